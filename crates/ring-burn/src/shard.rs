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
