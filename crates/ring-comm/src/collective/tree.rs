//! A reduction by any merge, over a binomial tree: [`all_reduce_merged`].

use crate::{
    buffer::{DType, HostBuffer},
    communicator::Communicator,
    error::{CommError, Disagreement},
    transport::{Expected, Payload, Rank, RecvRequest, SendRequest, Tag},
};

/// What `merge` makes of all ranks' `values`, on every rank. For a few thousand numbers that must arrive soon, such as the partial
/// results of one token: messages go to rank 0 and back over a binomial tree, `2 ceil(log2 P)` of them one after the other, and a
/// rank sends at most `1 + ceil(log2 P)`.
///
/// `merge(ours, theirs)` puts the two together in `ours`, which belongs to lower ranks. Who merges what, in which order, depends on
/// the number of ranks alone, and the result is computed once: the same bits on all ranks, in every run, over every transport.
///
/// `terms` are numbers that must be the same on all ranks, by name. They travel with the values and are compared wherever two
/// messages meet, which costs no message of their own.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use ring_comm::{Communicator, Loopback, buffer::HostBuffer, collective::all_reduce_merged};
///
/// let results = Loopback::run::<HostBuffer, _>(3, Duration::from_secs(10), |endpoint| {
///     let communicator = Communicator::new(Arc::new(endpoint));
///     let values = vec![communicator.rank() as f32, 5.0];
///     let largest = |ours: &mut [f32], theirs: &[f32]| {
///         ours.iter_mut().zip(theirs).for_each(|(ours, theirs)| *ours = ours.max(*theirs));
///     };
///     all_reduce_merged(&communicator, &[("step", 7)], values, largest)
/// });
/// assert!(results.into_iter().all(|result| result == Ok(Ok(vec![2.0, 5.0]))));
/// ```
///
/// # Errors
/// A [`Disagreement`](crate::CommErrorKind::Disagreement) if terms differ, a
/// [`SizeMismatch`](crate::CommErrorKind::SizeMismatch) if the ranks' lengths do; else [`CommError`] as from any message.
pub fn all_reduce_merged(
    communicator: &Communicator<HostBuffer>,
    terms: &[(&'static str, u64)],
    values: Vec<f32>,
    merge: impl FnMut(&mut [f32], &[f32]),
) -> Result<Vec<f32>, CommError> {
    if communicator.world_size() == 1 {
        return Ok(values);
    }
    let reduction = Reduction {
        communicator,
        operation: communicator.next_operation(),
        terms,
        len: values.len() + terms.len() * PIECES,
    };
    reduction.run(values, merge)
}

// Steps of their own, so that no other collective's message is mistaken for one of these.
const UP: u32 = 2;
const DOWN: u32 = 3;

/// Numbers that a term travels as: 16 bits each, which an f32 holds exactly.
const PIECES: usize = 4;

/// One reduction under way.
struct Reduction<'a> {
    communicator: &'a Communicator<HostBuffer>,
    operation: u64,
    terms: &'a [(&'static str, u64)],
    /// Of a message.
    len: usize,
}

impl Reduction<'_> {
    fn run(
        &self,
        mut values: Vec<f32>,
        merge: impl FnMut(&mut [f32], &[f32]),
    ) -> Result<Vec<f32>, CommError> {
        let own = values.len();
        let encoded = self.terms.iter().flat_map(|&(_, term)| encode(term));
        values.reserve_exact(self.len - own);
        values.extend(encoded);
        self.merge_children(&mut values, merge)?;
        if let Some(parent) = parent(self.communicator.rank()) {
            values = self.exchange_with(parent, values)?;
        }
        self.tell_children(&values)?;
        values.truncate(own);
        Ok(values)
    }

    /// Merges what the children send, nearest first. All receives are posted at once: no child waits for another.
    fn merge_children(
        &self,
        values: &mut [f32],
        mut merge: impl FnMut(&mut [f32], &[f32]),
    ) -> Result<(), CommError> {
        let receives: Vec<(Rank, RecvRequest<HostBuffer>)> = self
            .children()
            .map(|child| Ok((child, self.receive(child, UP)?)))
            .collect::<Result<_, CommError>>()?;
        for (child, receive) in receives {
            let buffer = receive.wait()?;
            let theirs = received(&buffer);
            let numbers = theirs.len() - self.terms.len() * PIECES;
            self.compare(child, &theirs[numbers..])?;
            merge(&mut values[..numbers], &theirs[..numbers]);
        }
        Ok(())
    }

    /// Sends what this rank and those behind it have, and receives the result.
    fn exchange_with(&self, parent: Rank, values: Vec<f32>) -> Result<Vec<f32>, CommError> {
        let receive = self.receive(parent, DOWN)?;
        let send = self.send(parent, UP, values)?;
        let result = receive.wait()?;
        send.wait()?;
        match result {
            HostBuffer::F32(values) => Ok(values),
            _ => unreachable!("the transport delivers the type that was expected"),
        }
    }

    /// Passes the result on, farthest first: behind that child are the most ranks.
    fn tell_children(&self, values: &[f32]) -> Result<(), CommError> {
        let children: Vec<Rank> = self.children().collect();
        let sends: Vec<SendRequest<HostBuffer>> = children
            .into_iter()
            .rev()
            .map(|child| self.send(child, DOWN, values.to_vec()))
            .collect::<Result<_, CommError>>()?;
        sends.into_iter().try_for_each(|send| send.wait().map(drop))
    }

    /// Fails unless a child's terms are this rank's.
    fn compare(&self, child: Rank, theirs: &[f32]) -> Result<(), CommError> {
        let (theirs, _) = theirs.as_chunks();
        for (&(name, ours), theirs) in self.terms.iter().zip(theirs) {
            let theirs = decode(*theirs);
            if theirs != ours {
                return Err(self.communicator.disagree(Disagreement {
                    culprit: child,
                    reference: self.communicator.rank(),
                    field: name.to_owned(),
                    theirs: theirs.to_string(),
                    ours: ours.to_string(),
                }));
            }
        }
        Ok(())
    }

    fn children(&self) -> impl Iterator<Item = Rank> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        (0..usize::BITS)
            .map(|level| 1_usize << level)
            .take_while(move |&distance| rank & distance == 0 && rank + distance < ranks)
            .map(move |distance| rank + distance)
    }

    fn receive(&self, peer: Rank, step: u32) -> Result<RecvRequest<HostBuffer>, CommError> {
        let expected = Expected {
            dtype: DType::F32,
            len: self.len,
        };
        let transport = self.communicator.transport();
        transport.irecv(peer, self.tag(step), expected)
    }

    fn send(
        &self,
        peer: Rank,
        step: u32,
        values: Vec<f32>,
    ) -> Result<SendRequest<HostBuffer>, CommError> {
        let transport = self.communicator.transport();
        transport.isend(peer, self.tag(step), HostBuffer::F32(values))
    }

    fn tag(&self, step: u32) -> Tag {
        Tag::new(self.operation, step, Payload::Collective)
    }
}

/// Whom a rank reports to: the rank without its lowest bit; rank 0 to nobody.
pub(crate) fn parent(rank: Rank) -> Option<Rank> {
    (rank != 0).then(|| rank & (rank - 1))
}

fn encode(term: u64) -> [f32; PIECES] {
    std::array::from_fn(|piece| f32::from((term >> (16 * piece)) as u16))
}

/// Numbers that are no pieces come from a rank that does something else; whatever they decode to, it is most likely something else too.
fn decode(pieces: [f32; PIECES]) -> u64 {
    let number = |(piece, value): (usize, &f32)| u64::from(*value as u16) << (16 * piece);
    pieces.iter().enumerate().map(number).sum()
}

fn received(buffer: &HostBuffer) -> &[f32] {
    buffer
        .as_f32()
        .expect("the transport delivers the type that was expected")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_survive_their_way_through_floats() {
        for term in [0, 1, 0xffff, 0x1_0000, 0x1234_5678_9abc_def0, u64::MAX] {
            assert_eq!(decode(encode(term)), term);
        }
    }

    #[test]
    fn a_single_rank_keeps_its_values() {
        let communicator = Communicator::single();
        let values = all_reduce_merged(&communicator, &[("a", 1)], vec![1.0, -0.0], |_, _| {
            unreachable!("there is nobody to merge with")
        });
        assert_eq!(values.unwrap(), [1.0, -0.0]);
    }
}
