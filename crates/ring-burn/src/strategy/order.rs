//! What the rank that leads tells those that are other processes, which read their own data.

use burn::train::LearnerModel;
use ring_comm::{CommError, Communicator, buffer::HostBuffer};

use super::{
    SequenceItem,
    worker::{Order, Split},
};

/// An order without its item: that is told by its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Announced {
    Begin(Split),
    Train { identity: u64, update: bool },
    Validate { identity: u64 },
    End,
}

impl Announced {
    /// Nothing for an order that other processes have no part in.
    pub(super) fn of<M: LearnerModel>(order: &Order<M>) -> Option<Self>
    where
        <M as burn::train::TrainStep>::Input: SequenceItem,
        <M as burn::train::InferenceStep>::Input: SequenceItem,
    {
        match order {
            Order::Begin(split) => Some(Announced::Begin(*split)),
            Order::Train { item, update } => Some(Announced::Train {
                identity: item.identity(),
                update: *update,
            }),
            Order::Validate(item) => Some(Announced::Validate {
                identity: item.identity(),
            }),
            Order::Snapshot | Order::Abandon => None,
        }
    }

    /// Tells everyone; of rank 0.
    pub(super) fn send(self, everyone: &Communicator<HostBuffer>) -> Result<(), CommError> {
        everyone.all_gather_bytes(PURPOSE, &self.encode()).map(drop)
    }

    /// Hears what rank 0 tells; of all others. `None` for something that no rank of this version says.
    pub(super) fn receive(everyone: &Communicator<HostBuffer>) -> Result<Option<Self>, CommError> {
        let said = everyone.all_gather_bytes(PURPOSE, &[])?;
        Ok(Self::decode(&said[0]))
    }

    fn encode(self) -> [u8; 9] {
        let (code, identity) = match self {
            Announced::Begin(Split::Train) => (0, 0),
            Announced::Begin(Split::Valid) => (1, 0),
            Announced::Train {
                identity,
                update: false,
            } => (2, identity),
            Announced::Train {
                identity,
                update: true,
            } => (3, identity),
            Announced::Validate { identity } => (4, identity),
            Announced::End => (5, 0),
        };
        let mut bytes = [code; 9];
        bytes[1..].copy_from_slice(&identity.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&code, identity) = bytes.split_first()?;
        let identity = u64::from_le_bytes(identity.try_into().ok()?);
        match code {
            0 => Some(Announced::Begin(Split::Train)),
            1 => Some(Announced::Begin(Split::Valid)),
            2 | 3 => Some(Announced::Train {
                identity,
                update: code == 3,
            }),
            4 => Some(Announced::Validate { identity }),
            5 => Some(Announced::End),
            _ => None,
        }
    }
}

/// What the ranks compare before they believe one another.
const PURPOSE: &str = "orders of a training";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_back() {
        let identity = 0x0123_4567_89ab_cdef;
        for order in [
            Announced::Begin(Split::Train),
            Announced::Begin(Split::Valid),
            Announced::Train {
                identity,
                update: false,
            },
            Announced::Train {
                identity,
                update: true,
            },
            Announced::Validate { identity },
            Announced::End,
        ] {
            assert_eq!(Announced::decode(&order.encode()), Some(order));
        }
        for other in [&[][..], &[0; 8], &[9; 9], &[0; 10]] {
            assert_eq!(Announced::decode(other), None);
        }
    }
}
