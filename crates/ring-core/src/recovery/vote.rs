//! What ranks tell each other before a pass: [`Vote`].

use ring_comm::{CommError, Communicator, buffer::Buffer};

use crate::error::Refusal;

/// Whether a rank could reserve what its pass will need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vote {
    /// Bytes of the allocation that was refused.
    pub(super) refused: Option<u64>,
    /// Whether it could do with less memory than it tried to have now.
    pub(super) has_less: bool,
}

impl Vote {
    /// The votes of all ranks; `purpose` says what they vote on.
    pub(super) fn cast<B: Buffer>(
        self,
        communicator: &Communicator<B>,
        purpose: &str,
    ) -> Result<Vec<Self>, CommError> {
        let votes = communicator.all_gather_bytes(purpose, &self.encode())?;
        Ok(votes.iter().map(|bytes| Self::decode(bytes)).collect())
    }

    /// The ranks that were refused memory.
    pub(super) fn refusals(votes: &[Self]) -> Vec<Refusal> {
        let refusal = |(rank, vote): (usize, &Self)| {
            let bytes = vote.refused?;
            Some(Refusal { rank, bytes })
        };
        votes.iter().enumerate().filter_map(refusal).collect()
    }

    fn encode(self) -> [u8; 9] {
        let mut bytes = [0; 9];
        bytes[0] = u8::from(self.refused.is_some()) | u8::from(self.has_less) << 1;
        bytes[1..].copy_from_slice(&self.refused.unwrap_or(0).to_le_bytes());
        bytes
    }

    /// Other bytes cannot come: ranks compare what they vote on.
    fn decode(bytes: &[u8]) -> Self {
        let (flags, refused) = bytes.split_first().unwrap_or((&0, &[]));
        let refused = refused.try_into().map_or(0, u64::from_le_bytes);
        Self {
            refused: (flags & 1 == 1).then_some(refused),
            has_less: flags & 2 == 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_are_read_as_they_were_written() {
        for refused in [None, Some(0), Some(u64::MAX)] {
            for has_less in [false, true] {
                let vote = Vote { refused, has_less };
                assert_eq!(Vote::decode(&vote.encode()), vote);
            }
        }
    }
}
