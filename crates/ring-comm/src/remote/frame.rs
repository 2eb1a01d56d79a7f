//! What ranks tell one another beside their data.
//!
//! A frame is a [`Header`] and a [`Frame`], both in the `postcard` format. The header can be read in every version of the format,
//! so that ranks with different versions of this crate find that out.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::process::ProcessIdentity;
use crate::{
    buffer::DType,
    error::CommError,
    transport::{GroupId, Rank, Tag},
};

/// Begins every frame.
const MAGIC: [u8; 4] = *b"ring";
/// Changes with every change of what a frame may hold.
const VERSION: u8 = 1;

/// What stands before every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Number of the group among those that the process has been in, one after the other.
    pub(super) epoch: u64,
    /// Number of the frame among those to its destination.
    pub(super) number: u64,
}

/// What one rank tells another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Frame {
    /// The sender has joined the group.
    Hello {
        world_size: usize,
        process: Option<ProcessIdentity>,
    },
    /// A message is coming.
    Offer {
        tag: Tag,
        dtype: DType,
        len: usize,
        sequence: u64,
    },
    /// A posted receive has taken the message.
    Taken { sequence: u64 },
    /// The sender's part in an all-gather.
    Gather {
        group: GroupId,
        operation: u64,
        bytes: Vec<u8>,
    },
    /// The sender has failed and asks the destination which failure shall be the group's.
    Propose(Failure),
    /// The group has failed.
    Poison(Failure),
    /// The sender has left the group.
    Depart,
    /// The sender leaves the network; between groups.
    Finish { in_peace: bool },
}

/// How a group failed, and what the rank where it failed knows of the all-gathers under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// Where it failed.
    pub(super) origin: Rank,
    /// Why.
    pub(super) cause: CommError,
    /// All-gathers that have succeeded there lately. They must succeed everywhere.
    pub(super) completed: Vec<Completed>,
    /// All-gathers that have failed there. They must not succeed where they have not yet.
    pub(super) failed: Vec<(GroupId, u64)>,
}

/// A complete all-gather.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Completed {
    pub(super) group: GroupId,
    pub(super) operation: u64,
    /// Of each member.
    pub(super) parts: Vec<(Rank, Vec<u8>)>,
}

/// Bytes that are no frame of this version.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum FrameError {
    /// Something else than a rank of this library is on the line.
    #[error("not a frame of ring-comm")]
    Foreign,
    /// Another version.
    #[error("a frame of version {0}, this is version {VERSION}")]
    Version(u8),
    /// Damaged.
    #[error("a damaged frame: {0}")]
    Damaged(#[from] postcard::Error),
}

impl Frame {
    pub(super) fn encode(&self, header: Header) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(VERSION);
        let bytes = postcard::to_extend(&header, bytes);
        let bytes = bytes.and_then(|bytes| postcard::to_extend(self, bytes));
        bytes.expect("a frame has no values that the format cannot express, and memory grows")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<(Header, Frame), FrameError> {
        let bytes = bytes.strip_prefix(&MAGIC).ok_or(FrameError::Foreign)?;
        let (&version, bytes) = bytes.split_first().ok_or(FrameError::Foreign)?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let (header, bytes) = postcard::take_from_bytes(bytes)?;
        Ok((header, postcard::from_bytes(bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::{error::CommErrorKind, transport::Payload};

    const HEADER: Header = Header {
        epoch: 3,
        number: 70_000,
    };

    fn poison() -> Frame {
        let tag = Tag::new(u64::MAX, 1, Payload::Custom(7));
        let kind = CommErrorKind::Deadline {
            deadline: Duration::MAX,
            pending: vec![tag, tag],
        };
        let deadline = CommError::new(1, Some(2), Some(tag), kind);
        let kind = CommErrorKind::Poisoned(Box::new(deadline));
        Frame::Poison(Failure {
            origin: 1,
            cause: CommError::new(0, None, None, kind),
            completed: vec![Completed {
                group: GroupId::WHOLE,
                operation: 5,
                parts: vec![(0, vec![1, 2]), (1, vec![])],
            }],
            failed: vec![(GroupId::WHOLE, 6)],
        })
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        let offer = Frame::Offer {
            tag: Tag::new(1, 2, Payload::KeyValue),
            dtype: DType::BF16,
            len: usize::MAX,
            sequence: 9,
        };
        for frame in [poison(), offer, Frame::Depart] {
            let bytes = frame.encode(HEADER);
            assert_eq!(Frame::decode(&bytes), Ok((HEADER, frame)));
        }
    }

    #[test]
    fn another_version_is_told_apart_from_noise() {
        let mut bytes = Frame::Depart.encode(HEADER);
        bytes[MAGIC.len()] = 77;
        assert_eq!(Frame::decode(&bytes), Err(FrameError::Version(77)));
        assert_eq!(Frame::decode(b"noise"), Err(FrameError::Foreign));
    }

    proptest! {
        /// A frame with bytes changed, missing or added is an error or another frame, but never a panic.
        #[test]
        fn damage_is_no_panic(cut in 0..200usize, at in 0..200usize, to: u8, tail: Vec<u8>) {
            let mut bytes = poison().encode(HEADER);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            bytes.truncate(cut);
            bytes.extend(tail);
            let _ = Frame::decode(&bytes);
        }
    }
}
