//! Messages of a store and their frames.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::mpsc::Receiver,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::error::{Failure, StoreError};
use crate::transport::Rank;

/// Most bytes of a key, or of the name of a gather.
pub const MAX_KEY_BYTES: usize = 256;
/// Most bytes of a value, and of all contributions to a gather together.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most bytes of the reason of an abort.
pub const MAX_REASON_BYTES: usize = 4096;
/// Most bytes of a job id.
pub const MAX_JOB_ID_BYTES: usize = 256;

/// Most bytes of a frame of the handshake: a job id, and the rest.
pub(super) const MAX_HANDSHAKE_FRAME: usize = 512;
/// Most bytes of any other frame: a value, a key, and a length for each part of the value.
pub(super) const MAX_FRAME: usize = MAX_VALUE_BYTES + (64 << 10);

/// What a rank wants of rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Question {
    Set { key: String, value: Vec<u8> },
    Get { key: String },
    Gather { name: String, value: Vec<u8> },
}

impl Question {
    /// What is asked for, of which key.
    pub(super) fn about(&self) -> (&'static str, &str) {
        match self {
            Question::Set { key, .. } => ("set", key),
            Question::Get { key } => ("get", key),
            Question::Gather { name, .. } => ("gather", name),
        }
    }
}

/// From a rank to rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    Ask { number: u64, question: Question },
    Forget { number: u64 },
    Abort { reason: String },
    Goodbye,
}

/// From rank 0 to a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    Done { number: u64 },
    Value { number: u64, value: Vec<u8> },
    Gathered { number: u64, values: Vec<Vec<u8>> },
    Forgotten { number: u64, missing: Vec<Rank> },
    Refused { number: u64, refusal: Refusal },
    Failed(Failure),
    Farewell,
}

impl Answer {
    /// The request that it answers.
    pub(super) fn number(&self) -> Option<u64> {
        match self {
            Answer::Done { number }
            | Answer::Value { number, .. }
            | Answer::Gathered { number, .. }
            | Answer::Forgotten { number, .. }
            | Answer::Refused { number, .. } => Some(*number),
            Answer::Failed(_) | Answer::Farewell => None,
        }
    }
}

/// Why rank 0 does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refusal {
    TooLong,
    Full,
    GatheringAlready,
}

/// Why no message came.
#[derive(Debug, Error)]
pub(crate) enum FrameError {
    #[error("the connection was closed")]
    Closed,
    #[error("{0}")]
    Connection(#[from] io::Error),
    #[error("a message of {len} bytes: at most {limit} are allowed")]
    TooLong { len: usize, limit: usize },
    #[error("a message that cannot be decoded")]
    Malformed,
}

/// Reads one frame with at most `limit` bytes of body.
pub(super) fn read_frame<T: DeserializeOwned>(
    reader: &mut impl Read,
    limit: usize,
) -> Result<T, FrameError> {
    let mut len = [0; 4];
    if let Err(error) = reader.read_exact(&mut len) {
        return Err(match error.kind() {
            io::ErrorKind::UnexpectedEof => FrameError::Closed,
            _ => FrameError::Connection(error),
        });
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > limit {
        return Err(FrameError::TooLong { len, limit });
    }
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    decode(&body)
}

/// The message of a body, which must contain nothing else.
fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameError::Malformed),
    }
}

/// Writes one frame.
pub(crate) fn write_frame(writer: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = postcard::to_allocvec(message).map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).map_err(io::Error::other)?;
    writer.write_all(&[&len.to_le_bytes(), body.as_slice()].concat())
}

/// Writes what comes out of `queue` until it ends, then ends this direction of the connection.
pub(super) fn write_queue<T: Serialize>(mut stream: &TcpStream, queue: Receiver<T>) {
    let written = queue
        .iter()
        .try_for_each(|message| write_frame(&mut stream, &message));
    // A connection that cannot be written to is of no use; its reader notices that it has ended.
    let half = match written {
        Ok(()) => Shutdown::Write,
        Err(_) => Shutdown::Both,
    };
    // Fails only if the connection has ended already.
    let _ = stream.shutdown(half);
}

pub(super) fn check_key(key: &str) -> Result<(), StoreError> {
    check_len("key", key.len(), MAX_KEY_BYTES)
}

pub(super) fn check_value(len: usize, limit: usize) -> Result<(), StoreError> {
    check_len("value", len, limit)
}

fn check_len(what: &'static str, len: usize, limit: usize) -> Result<(), StoreError> {
    if len > limit {
        return Err(StoreError::TooLong { what, len, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::launch::store::handshake::{Join, Verdict};

    fn frame(message: &impl Serialize) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, message).unwrap();
        bytes
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Answer>(&bytes);
            let _ = decode::<Join>(&bytes);
            let _ = decode::<Verdict>(&bytes);
            let _ = read_frame::<Request>(&mut bytes.as_slice(), MAX_FRAME);
        }

        #[test]
        fn damaged_frames_never_panic(
            value in proptest::collection::vec(any::<u8>(), 0..64),
            place in any::<prop::sample::Index>(),
            damage in 1u8..,
        ) {
            let question = Question::Gather { name: "ring".into(), value };
            let mut bytes = frame(&Request::Ask { number: 300, question });
            let place = place.index(bytes.len());
            bytes[place] ^= damage;
            let _ = read_frame::<Request>(&mut bytes.as_slice(), MAX_FRAME);
        }

        #[test]
        fn frames_come_back(number in any::<u64>(), key in ".{0,20}", value: Vec<u8>) {
            let request = Request::Ask { number, question: Question::Set { key, value } };
            let read: Request = read_frame(&mut frame(&request).as_slice(), MAX_FRAME).unwrap();
            prop_assert_eq!(read, request);
        }
    }

    #[test]
    fn largest_messages_fit() {
        let key = "k".repeat(MAX_KEY_BYTES);
        let value = vec![7; MAX_VALUE_BYTES];
        let request = Request::Ask {
            number: u64::MAX,
            question: Question::Set { key, value },
        };
        read_frame::<Request>(&mut frame(&request).as_slice(), MAX_FRAME).unwrap();
        let ranks = super::super::MAX_WORLD_SIZE;
        let answer = Answer::Gathered {
            number: u64::MAX,
            values: vec![vec![7; MAX_VALUE_BYTES / ranks]; ranks],
        };
        read_frame::<Answer>(&mut frame(&answer).as_slice(), MAX_FRAME).unwrap();
        let join = Join {
            rank: u64::MAX,
            world_size: u64::MAX,
            job_id: "j".repeat(MAX_JOB_ID_BYTES),
            proof: [7; 32],
        };
        read_frame::<Join>(&mut frame(&join).as_slice(), MAX_HANDSHAKE_FRAME).unwrap();
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_is_read() {
        let len = u32::MAX.to_le_bytes();
        let error = read_frame::<Request>(&mut len.as_slice(), MAX_FRAME).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut body = postcard::to_allocvec(&Request::Goodbye).unwrap();
        body.push(0);
        assert!(matches!(
            decode::<Request>(&body),
            Err(FrameError::Malformed)
        ));
    }
}
