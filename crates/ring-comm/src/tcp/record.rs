//! What travels on a connection: records, each a header of 16 bytes and a body.
//!
//! Numbers are little-endian: kind (u32), length of the body in bytes (u32), sequence number of the data (u64, 0 in a frame).

use thiserror::Error;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 16;
/// Most bytes of a frame.
pub(super) const MAX_FRAME_BYTES: usize = 1 << 30;
/// Most bytes of data in one record: a frame waits for no more than what is left of one.
pub(super) const MAX_PIECE_BYTES: usize = 1 << 20;

const FRAME: u32 = 0x52_49_4e_01;
const ASK: u32 = 0x52_49_4e_02;
const DATA: u32 = 0x52_49_4e_03;

/// One record, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// A frame of `len` bytes.
    Frame { len: usize },
    /// There is memory for the data `sequence`: it may come.
    Ask { sequence: u64 },
    /// The next `len` bytes of the data `sequence`.
    Data { sequence: u64, len: usize },
}

/// Bytes that no rank of this version sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum RecordError {
    /// No known kind.
    #[error("it sent a record of unknown kind {0:#x}")]
    Kind(u32),
    /// More than is allowed.
    #[error("it sent a record of {len} bytes, where at most {limit} are allowed")]
    TooLong { len: usize, limit: usize },
    /// More than there is memory for.
    #[error("it sent {len} bytes of message {sequence}, of which {missing} are missing")]
    TooMuch {
        sequence: u64,
        len: usize,
        missing: usize,
    },
}

impl Record {
    /// The header of this record, whose body must not be longer than its limit.
    pub(super) fn header(self) -> [u8; HEADER_BYTES] {
        let (kind, len, sequence) = match self {
            Record::Frame { len } => (FRAME, len, 0),
            Record::Ask { sequence } => (ASK, 0, sequence),
            Record::Data { sequence, len } => (DATA, len, sequence),
        };
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        // Both limits are far below.
        header[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        header[8..].copy_from_slice(&sequence.to_le_bytes());
        header
    }

    /// The record with this header.
    pub(super) fn parse(header: &[u8; HEADER_BYTES]) -> Result<Self, RecordError> {
        let [a, b, c, d, e, f, g, h, sequence @ ..] = *header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let len = u32::from_le_bytes([e, f, g, h]) as usize;
        let sequence = u64::from_le_bytes(sequence);
        let (record, limit) = match kind {
            FRAME => (Record::Frame { len }, MAX_FRAME_BYTES),
            ASK => (Record::Ask { sequence }, 0),
            DATA => (Record::Data { sequence, len }, MAX_PIECE_BYTES),
            _ => return Err(RecordError::Kind(kind)),
        };
        if len > limit {
            return Err(RecordError::TooLong { len, limit });
        }
        Ok(record)
    }
}
