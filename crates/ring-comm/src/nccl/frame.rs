//! What the [wires](super::wire) of the ranks tell one another, on the line that also carries the frames of the group.

use serde::{Deserialize, Serialize};

use super::{library::UniqueId, meeting::Introduction};

/// The last byte of every frame on the line tells whose it is.
const OF_GROUP: u8 = 0;
const OF_WIRE: u8 = 1;

/// What one wire tells another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum WireFrame {
    /// Who the sender is; comes before everything else.
    Introduce(Introduction),
    /// The sender has begun with group `epoch`, and has the communicator that was made in the group of that number; 0 at the start.
    Begin {
        epoch: u64,
        communicator: Option<u64>,
    },
    /// From rank 0: the communicator to make in group `epoch`.
    Connect { epoch: u64, id: UniqueId },
    /// The sender can receive this message of the destination, and proposes a time for it.
    Propose { sequence: u64, time: u64 },
    /// The sender has settled on a time for this message of its own.
    Settle { sequence: u64, time: u64 },
}

/// What comes over the line.
#[derive(Debug, PartialEq)]
pub(super) enum Incoming {
    OfGroup(Vec<u8>),
    OfWire(WireFrame),
}

/// A frame of the group, as it goes over the line.
pub(super) fn of_group(mut frame: Vec<u8>) -> Vec<u8> {
    frame.push(OF_GROUP);
    frame
}

impl WireFrame {
    /// As it goes over the line.
    pub(super) fn encode(&self) -> Vec<u8> {
        let bytes = postcard::to_extend(self, Vec::new());
        let mut bytes =
            bytes.expect("a frame has no values that the format cannot express, and memory grows");
        bytes.push(OF_WIRE);
        bytes
    }
}

impl Incoming {
    /// `None` if it is neither.
    pub(super) fn decode(mut bytes: Vec<u8>) -> Option<Self> {
        match bytes.pop()? {
            OF_GROUP => Some(Self::OfGroup(bytes)),
            OF_WIRE => postcard::from_bytes(&bytes).ok().map(Self::OfWire),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in() {
        let frames = [
            WireFrame::Begin {
                epoch: 3,
                communicator: Some(0),
            },
            WireFrame::Connect {
                epoch: u64::MAX,
                id: UniqueId::from_bytes([7; 128]),
            },
            WireFrame::Propose {
                sequence: 1,
                time: 2,
            },
            WireFrame::Settle {
                sequence: 1,
                time: 2,
            },
        ];
        for frame in frames {
            let incoming = Incoming::decode(frame.encode());
            assert_eq!(incoming, Some(Incoming::OfWire(frame)));
        }
        let of_group = Incoming::decode(of_group(b"frame".to_vec()));
        assert_eq!(of_group, Some(Incoming::OfGroup(b"frame".to_vec())));
    }

    proptest! {
        #[test]
        fn noise_is_no_panic(bytes: Vec<u8>) {
            let _ = Incoming::decode(bytes);
        }
    }
}
