//! The way out: records in the order in which they leave.
//!
//! Frames go before data, and data in pieces, so that a frame waits for one piece at most. Data leaves when the peer has asked for
//! it, which it does when it has memory for it, the data asked for first first. Headers and bodies are written together from where
//! they lie.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, IoSlice, Write},
};

use super::record::{HEADER_BYTES, MAX_PIECE_BYTES, Record};
use crate::buffer::{Buffer, HostBuffer};

/// Data that has left whole.
#[derive(Debug, PartialEq)]
pub(super) struct Departure {
    pub(super) sequence: u64,
    pub(super) buffer: HostBuffer,
}

/// Data that has not left whole.
struct Send {
    sequence: u64,
    buffer: HostBuffer,
    /// Bytes that have.
    sent: usize,
}

/// What is written after a header.
enum Body {
    Frame(Vec<u8>),
    /// The next piece of a message. If it is abandoned, this piece is the last, and nobody is told.
    Piece {
        send: Send,
        is_abandoned: bool,
    },
}

/// A record that is being written.
struct Writing {
    header: [u8; HEADER_BYTES],
    body: Body,
    /// Bytes of the body.
    len: usize,
    /// Bytes of header and body that have been written.
    written: usize,
}

/// One direction of a connection: what is being written, and what will be.
pub(super) struct Outgoing {
    writing: Option<Writing>,
    control: VecDeque<(Record, Vec<u8>)>,
    asked: VecDeque<Send>,
    unasked: Vec<Send>,
    largest_piece: usize,
}

impl Outgoing {
    /// With data cut into pieces of at most `largest_piece` bytes.
    pub(super) fn new(largest_piece: usize) -> Self {
        Self {
            writing: None,
            control: VecDeque::new(),
            asked: VecDeque::new(),
            unasked: Vec::new(),
            largest_piece: largest_piece.clamp(1, MAX_PIECE_BYTES),
        }
    }

    pub(super) fn frame(&mut self, bytes: Vec<u8>) {
        let record = Record::Frame { len: bytes.len() };
        self.control.push_back((record, bytes));
    }

    /// Asks the peer for data.
    pub(super) fn ask(&mut self, sequence: u64) {
        let record = Record::Ask { sequence };
        self.control.push_back((record, Vec::new()));
    }

    /// Takes data that waits until the peer asks for it.
    pub(super) fn data(&mut self, sequence: u64, buffer: HostBuffer) {
        self.unasked.push(Send {
            sequence,
            buffer,
            sent: 0,
        });
    }

    /// The peer asks for data; one that asks for something abandoned gets nothing.
    pub(super) fn asked_for(&mut self, sequence: u64) {
        let mut unasked = self.unasked.iter();
        if let Some(index) = unasked.position(|send| send.sequence == sequence) {
            self.asked.push_back(self.unasked.remove(index));
        }
    }

    /// Whether data is still here.
    pub(super) fn has_data(&self) -> bool {
        let is_piece = |writing: &Writing| matches!(writing.body, Body::Piece { .. });
        !self.unasked.is_empty()
            || !self.asked.is_empty()
            || self.writing.as_ref().is_some_and(is_piece)
    }

    /// Whether nothing is left that can leave.
    pub(super) fn is_flushed(&self) -> bool {
        self.writing.is_none() && self.control.is_empty() && self.asked.is_empty()
    }

    /// Frees all data but that of a piece that is being written.
    pub(super) fn abandon(&mut self) {
        self.unasked.clear();
        self.asked.clear();
        if let Some(Writing {
            body: Body::Piece { is_abandoned, .. },
            ..
        }) = &mut self.writing
        {
            *is_abandoned = true;
        }
    }

    /// Writes until all is written, nothing can be for now, or `budget` bytes or a little more have been.
    pub(super) fn write(
        &mut self,
        sink: &mut impl Write,
        budget: usize,
        departures: &mut Vec<Departure>,
    ) -> io::Result<()> {
        let mut left = budget;
        while left > 0 {
            let Some(mut writing) = self.writing.take().or_else(|| self.next()) else {
                return Ok(());
            };
            let written = write_part(sink, &mut writing);
            if writing.is_complete() {
                self.end(writing, departures);
            } else {
                self.writing = Some(writing);
            }
            match written {
                Ok(len) => left = left.saturating_sub(len),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is to be written next.
    fn next(&mut self) -> Option<Writing> {
        if let Some((record, bytes)) = self.control.pop_front() {
            return Some(Writing::new(record, bytes.len(), Body::Frame(bytes)));
        }
        let send = self.asked.pop_front()?;
        let len = send.missing().min(self.largest_piece);
        let sequence = send.sequence;
        let body = Body::Piece {
            send,
            is_abandoned: false,
        };
        Some(Writing::new(Record::Data { sequence, len }, len, body))
    }

    fn end(&mut self, writing: Writing, departures: &mut Vec<Departure>) {
        let Body::Piece {
            mut send,
            is_abandoned: false,
        } = writing.body
        else {
            return;
        };
        send.sent += writing.len;
        match send.missing() {
            0 => departures.push(Departure {
                sequence: send.sequence,
                buffer: send.buffer,
            }),
            _ => self.asked.push_front(send),
        }
    }
}

/// Writes once.
fn write_part(sink: &mut impl Write, writing: &mut Writing) -> io::Result<usize> {
    let header = &writing.header[writing.written.min(HEADER_BYTES)..];
    let body = &writing.body()[writing.written.saturating_sub(HEADER_BYTES)..];
    let slices = [IoSlice::new(header), IoSlice::new(body)];
    let written = match slices.as_slice() {
        [_, body] if header.is_empty() => sink.write(body)?,
        slices => sink.write_vectored(slices)?,
    };
    if written == 0 {
        return Err(ErrorKind::WriteZero.into());
    }
    writing.written += written;
    Ok(written)
}

impl Send {
    fn missing(&self) -> usize {
        self.buffer.byte_len() - self.sent
    }
}

impl Writing {
    fn new(record: Record, len: usize, body: Body) -> Self {
        Self {
            header: record.header(),
            body,
            len,
            written: 0,
        }
    }

    fn body(&self) -> &[u8] {
        match &self.body {
            Body::Frame(bytes) => bytes,
            Body::Piece { send, .. } => &send.buffer.as_bytes()[send.sent..send.sent + self.len],
        }
    }

    fn is_complete(&self) -> bool {
        self.written == HEADER_BYTES + self.len
    }
}
