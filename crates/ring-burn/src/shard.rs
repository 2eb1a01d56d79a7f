//! From whole sequences to a rank's part: tensors, plain data, positions, shifted labels.

use burn::tensor::{Device, Int, Tensor};

use crate::{error::RingError, ring::Ring};

/// The rows of `tensor` along `dim` that this rank owns.
///
/// For tensors small enough to exist whole, or in tests; data for training is better sharded before it becomes a tensor
/// ([`shard_slice`], [`next_token_shard`]).
///
/// # Errors
/// [`RingError::Shape`] if that dimension is not the length of the sequence.
pub fn shard_tensor<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    ring: &Ring,
) -> Result<Tensor<D>, RingError> {
    let dims = tensor.dims();
    if dim >= D || dims[dim] != ring.sequence_length() {
        return Err(RingError::Shape {
            what: "the tensor to shard",
            got: dims.to_vec(),
            expected: format!("{} rows in dimension {dim}", ring.sequence_length()),
        });
    }
    let parts: Vec<Tensor<D>> = ring
        .spans()
        .iter()
        .map(|span| tensor.clone().narrow(dim, span.start, span.len()))
        .collect();
    Ok(if parts.is_empty() {
        let mut shape = dims;
        shape[dim] = 0;
        Tensor::empty(shape, &tensor.device())
    } else {
        Tensor::cat(parts, dim)
    })
}

/// The elements of a whole sequence that this rank owns.
///
/// # Errors
/// [`RingError::Shape`] if `whole` is not as long as the sequence.
pub fn shard_slice<T: Clone>(whole: &[T], ring: &Ring) -> Result<Vec<T>, RingError> {
    check_len("the sequence to shard", whole.len(), ring.sequence_length())?;
    Ok(ring
        .spans()
        .iter()
        .flat_map(|span| whole[span.start..span.end].iter().cloned())
        .collect())
}

/// This rank's inputs and labels for predicting the next token: of `N + 1` tokens, position `i` reads token `i` and predicts
/// token `i + 1`, also where `i + 1` is another rank's.
///
/// # Errors
/// [`RingError::Shape`] unless `tokens` has one element more than the sequence.
pub fn next_token_shard<T: Clone>(
    tokens: &[T],
    ring: &Ring,
) -> Result<(Vec<T>, Vec<T>), RingError> {
    let length = ring.sequence_length();
    check_len("the tokens", tokens.len(), length + 1)?;
    let inputs = shard_slice(&tokens[..length], ring)?;
    let labels = shard_slice(&tokens[1..], ring)?;
    Ok((inputs, labels))
}

/// Global position of every row this rank owns, `[own positions]`.
pub fn positions_tensor(ring: &Ring, device: &Device) -> Tensor<1, Int> {
    let positions: Vec<i64> = ring
        .positions()
        .into_iter()
        .map(|position| position as i64)
        .collect();
    Tensor::from_ints(positions.as_slice(), device)
}

fn check_len(what: &'static str, got: usize, expected: usize) -> Result<(), RingError> {
    if got == expected {
        return Ok(());
    }
    Err(RingError::Shape {
        what,
        got: vec![got],
        expected: format!("{expected} elements"),
    })
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use burn::tensor::TensorData;
    use ring_comm::{Communicator, Loopback, buffer::HostBuffer};
    use ring_core::Sharding;

    use super::*;

    /// Runs on every rank of three, zigzag over 8 positions: rank 0 owns 0 and 7, as one example.
    fn on_ranks<R: Send>(body: impl Fn(&Ring) -> R + Sync) -> Vec<R> {
        let deadline = Duration::from_secs(10);
        Loopback::run::<HostBuffer, _>(3, deadline, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            body(&Ring::new(communicator, Sharding::Zigzag, 8).unwrap())
        })
        .into_iter()
        .map(Result::unwrap)
        .collect()
    }

    #[test]
    fn labels_are_the_next_tokens_across_shard_borders() {
        let tokens: Vec<u32> = (100..109).collect();
        let mut seen = Vec::new();
        for (inputs, labels) in on_ranks(|ring| next_token_shard(&tokens, ring).unwrap()) {
            assert!(
                inputs
                    .iter()
                    .zip(&labels)
                    .all(|(input, label)| input + 1 == *label)
            );
            seen.extend(inputs);
        }
        seen.sort_unstable();
        assert_eq!(seen, tokens[..8]);
    }

    #[test]
    fn tensors_and_positions_are_sharded_alike() {
        let device = Device::flex();
        let whole: Vec<f32> = (0..16).map(|i| (i % 8) as f32).collect();
        for (part, positions) in on_ranks(|ring| {
            let tensor = Tensor::<3>::from_data(TensorData::new(whole.clone(), [2, 8, 1]), &device);
            let part = shard_tensor(tensor, 1, ring).unwrap().into_data();
            let positions = positions_tensor(ring, &device).into_data();
            (
                part.iter::<i64>().collect::<Vec<_>>(),
                positions.iter::<i64>().collect::<Vec<_>>(),
            )
        }) {
            assert_eq!(part, [positions.clone(), positions].concat());
        }
    }

    #[test]
    fn what_is_not_as_long_as_the_sequence_is_refused() {
        let ring = Ring::single(8).unwrap();
        assert!(shard_slice(&[0; 7], &ring).is_err());
        assert!(next_token_shard(&[0; 8], &ring).is_err());
        let tensor = Tensor::<2>::zeros([3, 7], &Device::flex());
        assert!(shard_tensor(tensor.clone(), 1, &ring).is_err());
        assert!(shard_tensor(tensor, 2, &ring).is_err());
    }
}
