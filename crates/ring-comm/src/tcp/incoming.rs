//! The way in: takes records apart as their bytes come, in pieces of any size.
//!
//! Data goes straight into the memory that was given for it. Memory for a frame grows with what has come of it, so that a
//! length alone costs nothing. Data that nobody waits for any more is read and dropped.

use std::{
    io::{self, ErrorKind, Read},
    mem,
};

use thiserror::Error;

use super::record::{HEADER_BYTES, Record, RecordError};
use crate::buffer::{Buffer, HostBuffer};

/// Bytes by which the memory of a frame grows at least, and that are dropped at once.
const STEP: usize = 64 << 10;

/// What has come in whole.
#[derive(Debug, PartialEq)]
pub(super) enum Arrival {
    /// A frame.
    Frame(Vec<u8>),
    /// The peer has memory for the data of this number.
    Asked { sequence: u64 },
    /// All of the data, in the memory that was given for it.
    Data { sequence: u64, buffer: HostBuffer },
}

/// Why nothing can come any more.
#[derive(Debug, Error)]
pub(super) enum ReadError {
    #[error("it closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] RecordError),
}

/// How a call of [`Incoming::read`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nothing is left to read for now.
    Nothing,
    /// There may be more.
    Perhaps,
}

/// Memory that waits for its data.
struct Receive {
    sequence: u64,
    buffer: HostBuffer,
    filled: usize,
}

/// Where the next bytes go.
enum Place {
    Header {
        bytes: [u8; HEADER_BYTES],
        filled: usize,
    },
    Frame {
        bytes: Vec<u8>,
        filled: usize,
        len: usize,
    },
    Data {
        receive: Receive,
        missing: usize,
    },
    /// Of data that nobody waits for.
    Nowhere {
        bytes: Vec<u8>,
        missing: usize,
    },
}

/// One direction of a connection: what is being read, and the memory for what will be.
pub(super) struct Incoming {
    place: Place,
    receives: Vec<Receive>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            place: Place::header(),
            receives: Vec::new(),
        }
    }

    /// Gives memory for data, as long as that.
    pub(super) fn expect(&mut self, sequence: u64, buffer: HostBuffer) {
        self.receives.push(Receive {
            sequence,
            buffer,
            filled: 0,
        });
    }

    /// Whether memory waits for data.
    pub(super) fn is_expecting(&self) -> bool {
        !self.receives.is_empty() || matches!(self.place, Place::Data { .. })
    }

    /// Frees all memory that waits for data.
    pub(super) fn abandon(&mut self) {
        self.receives.clear();
        if let Place::Data { missing, .. } = self.place {
            self.place = Place::nowhere(missing);
        }
    }

    /// Reads until there is nothing left for now, or `budget` bytes or a little more have come.
    pub(super) fn read(
        &mut self,
        source: &mut impl Read,
        budget: usize,
        arrivals: &mut Vec<Arrival>,
    ) -> Result<Rest, ReadError> {
        let mut read = 0;
        while read < budget {
            match source.read(self.room()) {
                Ok(0) => return Err(ReadError::Closed),
                Ok(len) => {
                    read += len;
                    self.advance(len, arrivals)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Rest::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Rest::Perhaps)
    }

    #[cfg(test)]
    pub(super) fn room_len(&mut self) -> usize {
        self.room().len()
    }

    /// Where the next bytes go: never empty, because a record ends when nothing of it is missing.
    fn room(&mut self) -> &mut [u8] {
        match &mut self.place {
            Place::Header { bytes, filled } => &mut bytes[*filled..],
            Place::Frame { bytes, filled, len } => {
                if *filled == bytes.len() {
                    let more = STEP.max(*filled).min(*len - *filled);
                    bytes.resize(*filled + more, 0);
                }
                &mut bytes[*filled..]
            }
            Place::Data { receive, missing } => {
                let start = receive.filled;
                &mut receive.buffer.as_bytes_mut()[start..start + *missing]
            }
            Place::Nowhere { bytes, missing } => {
                let len = bytes.len().min(*missing);
                &mut bytes[..len]
            }
        }
    }

    /// Takes note of `len` bytes, written into the room.
    fn advance(&mut self, len: usize, arrivals: &mut Vec<Arrival>) -> Result<(), RecordError> {
        match &mut self.place {
            Place::Header { bytes, filled } => {
                *filled += len;
                if *filled == HEADER_BYTES {
                    let record = Record::parse(bytes)?;
                    self.begin(record, arrivals)?;
                }
            }
            Place::Frame { filled, .. } => *filled += len,
            Place::Data { receive, missing } => {
                receive.filled += len;
                *missing -= len;
            }
            Place::Nowhere { missing, .. } => *missing -= len,
        }
        if self.place.is_complete() {
            self.end(arrivals);
        }
        Ok(())
    }

    fn begin(&mut self, record: Record, arrivals: &mut Vec<Arrival>) -> Result<(), RecordError> {
        self.place = match record {
            Record::Ask { sequence } => {
                arrivals.push(Arrival::Asked { sequence });
                Place::header()
            }
            Record::Frame { len } => Place::Frame {
                bytes: Vec::new(),
                filled: 0,
                len,
            },
            Record::Data { sequence, len } => self.place_for(sequence, len)?,
        };
        Ok(())
    }

    fn place_for(&mut self, sequence: u64, len: usize) -> Result<Place, RecordError> {
        let mut receives = self.receives.iter();
        let Some(index) = receives.position(|receive| receive.sequence == sequence) else {
            return Ok(Place::nowhere(len));
        };
        let receive = self.receives.swap_remove(index);
        let missing = receive.missing();
        if len > missing {
            return Err(RecordError::TooMuch {
                sequence,
                len,
                missing,
            });
        }
        Ok(Place::Data {
            receive,
            missing: len,
        })
    }

    fn end(&mut self, arrivals: &mut Vec<Arrival>) {
        match mem::replace(&mut self.place, Place::header()) {
            Place::Frame { bytes, .. } => arrivals.push(Arrival::Frame(bytes)),
            Place::Data { receive, .. } if receive.missing() == 0 => arrivals.push(Arrival::Data {
                sequence: receive.sequence,
                buffer: receive.buffer,
            }),
            Place::Data { receive, .. } => self.receives.push(receive),
            Place::Header { .. } | Place::Nowhere { .. } => {}
        }
    }
}

impl Receive {
    fn missing(&self) -> usize {
        self.buffer.byte_len() - self.filled
    }
}

impl Place {
    fn header() -> Self {
        Place::Header {
            bytes: [0; HEADER_BYTES],
            filled: 0,
        }
    }

    fn nowhere(missing: usize) -> Self {
        Place::Nowhere {
            bytes: vec![0; missing.min(STEP)],
            missing,
        }
    }

    /// Whether all of a body has come.
    fn is_complete(&self) -> bool {
        match self {
            Place::Header { .. } => false,
            Place::Frame { filled, len, .. } => filled == len,
            Place::Data { missing, .. } | Place::Nowhere { missing, .. } => *missing == 0,
        }
    }
}
