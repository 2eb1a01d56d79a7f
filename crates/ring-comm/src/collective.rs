//! Operations of all ranks together, with results that depend on the ranks' values only.
//!
//! Every sum adds the ranks' values one after the other in rank order, `((x_0 + x_1) + x_2) + ...`, so it is bitwise the
//! same on all ranks, in every run and over every transport. All ranks must call the same functions in the same order
//! (see [`communicator`](crate::Communicator)).

mod tree;

use std::ops::Range;

pub use self::tree::all_reduce_merged;
pub(crate) use self::tree::parent;

use crate::{
    buffer::{Buffer, DType, HostBuffer},
    communicator::Communicator,
    error::CommError,
    transport::{Expected, Payload, Rank, RecvRequest, SendRequest, Tag},
};

/// Returns when every rank has called it.
///
/// # Errors
/// As [`Communicator::all_gather_bytes`].
pub fn barrier<B: Buffer>(communicator: &Communicator<B>) -> Result<(), CommError> {
    communicator.all_gather_bytes("barrier", &[])?;
    Ok(())
}

/// The elementwise sum of all ranks' `values`, on every rank. For a few numbers, such as a loss: every rank sends all of
/// them to every other.
///
/// # Errors
/// A [`Disagreement`](crate::CommErrorKind::Disagreement) if the ranks' lengths differ; else as
/// [`Communicator::all_gather_bytes`].
pub fn all_reduce_sum_f64<B: Buffer>(
    communicator: &Communicator<B>,
    values: &[f64],
) -> Result<Vec<f64>, CommError> {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let parts = communicator.all_gather_bytes("sum of f64", &bytes)?;
    let lengths: Vec<String> = parts
        .iter()
        .map(|part| (part.len() / size_of::<f64>()).to_string())
        .collect();
    communicator.require_equal("number of values", &lengths)?;

    let mut parts = parts.iter().map(|part| decode_f64(part));
    let first = parts.next().unwrap_or_default();
    Ok(parts.fold(first, |mut sum, part| {
        sum.iter_mut()
            .zip(part)
            .for_each(|(sum, value)| *sum += value);
        sum
    }))
}

/// The elementwise sum of all ranks' `values`, on every rank. For tensors, such as gradients: every rank sends and
/// receives `2 (P - 1) / P` times their size, which is the least possible.
///
/// Rank `r` adds up the `r`-th of P chunks, received from its owners directly, and sends the sum to all. Takes up to
/// twice the size of `values` in further memory.
///
/// # Errors
/// [`CommError`] as from any message; a [`SizeMismatch`](crate::CommErrorKind::SizeMismatch) if the ranks' lengths differ.
pub fn all_reduce_sum(
    communicator: &Communicator<HostBuffer>,
    mut values: Vec<f32>,
) -> Result<Vec<f32>, CommError> {
    if communicator.world_size() == 1 {
        return Ok(values);
    }
    let exchange = Exchange {
        communicator,
        operation: communicator.next_operation(),
        len: values.len(),
    };
    let own = exchange.chunk(communicator.rank());
    let sum = exchange.reduce_scatter(&values)?;
    values[own].copy_from_slice(&sum);
    exchange.all_gather(&mut values)?;
    Ok(values)
}

const REDUCE_SCATTER: u32 = 0;
const ALL_GATHER: u32 = 1;

/// One all-reduce under way. Per step there is one message between any two ranks, even if its chunk is empty, so that
/// ranks with different lengths get an error at once.
struct Exchange<'a> {
    communicator: &'a Communicator<HostBuffer>,
    operation: u64,
    len: usize,
}

impl Exchange<'_> {
    /// Sends each chunk to its rank and sums the chunk of this rank.
    fn reduce_scatter(&self, values: &[f32]) -> Result<Vec<f32>, CommError> {
        let rank = self.communicator.rank();
        let own = &values[self.chunk(rank)];
        let receives = self.receive_from_peers(REDUCE_SCATTER, |_| own.len())?;
        let sends = self.send_to_peers(REDUCE_SCATTER, |peer| values[self.chunk(peer)].to_vec())?;

        let mut sum = Vec::new();
        for (source, receive) in receives.into_iter().enumerate() {
            match receive {
                None => add_next(&mut sum, own, source),
                Some(receive) => {
                    let buffer = receive.wait()?;
                    add_next(&mut sum, received_f32(&buffer), source);
                }
            }
        }
        wait_all(sends)?;
        Ok(sum)
    }

    /// Sends the chunk of this rank to all and fills in the others.
    fn all_gather(&self, values: &mut [f32]) -> Result<(), CommError> {
        let own = self.chunk(self.communicator.rank());
        let receives = self.receive_from_peers(ALL_GATHER, |peer| self.chunk(peer).len())?;
        let sends = self.send_to_peers(ALL_GATHER, |_| values[own.clone()].to_vec())?;
        for (peer, receive) in receives.into_iter().enumerate() {
            if let Some(receive) = receive {
                let buffer = receive.wait()?;
                values[self.chunk(peer)].copy_from_slice(received_f32(&buffer));
            }
        }
        wait_all(sends)
    }

    /// The elements that rank `owner` sums.
    fn chunk(&self, owner: Rank) -> Range<usize> {
        chunk(self.len, self.communicator.world_size(), owner)
    }

    /// By rank; none for this rank itself.
    fn receive_from_peers(
        &self,
        step: u32,
        len: impl Fn(Rank) -> usize,
    ) -> Result<Vec<Option<RecvRequest<HostBuffer>>>, CommError> {
        let receive = |peer| {
            let expected = Expected {
                dtype: DType::F32,
                len: len(peer),
            };
            self.communicator
                .transport()
                .irecv(peer, self.tag(step), expected)
        };
        (0..self.communicator.world_size())
            .map(|peer| {
                (peer != self.communicator.rank())
                    .then(|| receive(peer))
                    .transpose()
            })
            .collect()
    }

    /// Begins with the next rank, so that the ranks do not all send to the same one first.
    fn send_to_peers(
        &self,
        step: u32,
        chunk: impl Fn(Rank) -> Vec<f32>,
    ) -> Result<Vec<SendRequest<HostBuffer>>, CommError> {
        let (rank, world_size) = (self.communicator.rank(), self.communicator.world_size());
        (1..world_size)
            .map(|distance| (rank + distance) % world_size)
            .map(|peer| {
                let buffer = HostBuffer::F32(chunk(peer));
                self.communicator
                    .transport()
                    .isend(peer, self.tag(step), buffer)
            })
            .collect()
    }

    fn tag(&self, step: u32) -> Tag {
        Tag::new(self.operation, step, Payload::Collective)
    }
}

/// Chunk `index` of `count` nearly equal ones; empty for some if there are more chunks than elements.
fn chunk(len: usize, count: usize, index: usize) -> Range<usize> {
    index * len / count..(index + 1) * len / count
}

/// Starts from the first rank's values rather than from zero, which would turn -0 into +0.
fn add_next(sum: &mut Vec<f32>, values: &[f32], source: Rank) {
    if source == 0 {
        sum.extend_from_slice(values);
    } else {
        sum.iter_mut()
            .zip(values)
            .for_each(|(sum, value)| *sum += value);
    }
}

fn received_f32(buffer: &HostBuffer) -> &[f32] {
    buffer
        .as_f32()
        .expect("the transport delivers the type that was expected")
}

fn wait_all(sends: Vec<SendRequest<HostBuffer>>) -> Result<(), CommError> {
    sends.into_iter().try_for_each(|send| send.wait().map(drop))
}

fn decode_f64(bytes: &[u8]) -> Vec<f64> {
    let (values, _) = bytes.as_chunks();
    values
        .iter()
        .map(|&value| f64::from_le_bytes(value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_element_once() {
        for (len, count) in [(0, 3), (2, 3), (7, 3), (9, 1)] {
            let covered: Vec<usize> = (0..count)
                .flat_map(|index| chunk(len, count, index))
                .collect();
            assert_eq!(covered, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_single_rank_gets_its_own_values_back() {
        let communicator = Communicator::<HostBuffer>::single();
        let sum = all_reduce_sum(&communicator, vec![-0.0, 1.5]).unwrap();
        assert_eq!(sum[0].to_bits(), (-0.0f32).to_bits());
        assert_eq!(all_reduce_sum_f64(&communicator, &[2.5]).unwrap(), [2.5]);
        barrier(&communicator).unwrap();
    }
}
