//! A model of bytes continues a text.

use std::time::{Duration, Instant};

use burn::tensor::{Int, Tensor, TensorData};
use ring_burn::{Ring, RingError, philox, shard_slice};
use ring_multihead::{LongNet, LongNetCache};

use crate::command_line::Failure;

/// How bytes are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// How many.
    pub bytes: usize,
    /// Of the model's scores, positive.
    pub temperature: f64,
    /// The same on all ranks.
    pub seed: u64,
}

/// How long it took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The prompt, all but its last byte.
    pub prompt: Duration,
    /// The last byte of the prompt and those drawn, except for the last.
    pub bytes: Duration,
}

/// Continues `prompt`, which has a byte at least; every byte is given to `take` as it is drawn, on every rank. The prompt is sharded
/// over the ranks as `ring` says, whatever its sequence length. Positions simply go on, also beyond those that the model was trained on.
///
/// # Errors
/// [`Failure::Run`] for what the model or the group cannot do, and what `take` returns.
pub fn continue_text(
    model: &LongNet,
    prompt: &[u8],
    sampling: Sampling,
    ring: &Ring,
    mut take: impl FnMut(u8) -> Result<(), Failure>,
) -> Result<Timing, Failure> {
    let run = |error: RingError| Failure::Run(error.to_string());
    let Some((&last, before)) = prompt.split_last() else {
        return Err(Failure::Input("the prompt needs a byte at least".into()));
    };
    let started = Instant::now();
    let mut cache = LongNetCache::new();
    let ring = ring.clone().with_sequence_length(before.len());
    if !before.is_empty() {
        let own = shard_slice(before, &ring).map_err(run)?;
        let tokens = tokens(model, &own);
        model.try_prefill(tokens, &ring, &mut cache).map_err(run)?;
    }
    let prompt = started.elapsed();
    let started = Instant::now();
    let mut byte = last;
    for index in 0..sampling.bytes {
        let tokens = tokens(model, &[byte]);
        let scores = model.try_decode(tokens, &ring, &mut cache).map_err(run)?;
        byte = of_first_rank(draw(scores, sampling, index), &ring)?;
        take(byte)?;
    }
    Ok(Timing {
        prompt,
        bytes: started.elapsed(),
    })
}

/// Bytes as one sequence of tokens.
pub(crate) fn tokens(model: &LongNet, bytes: &[u8]) -> Tensor<2, Int> {
    let values: Vec<i64> = bytes.iter().copied().map(i64::from).collect();
    let shape = [1, values.len()];
    Tensor::from_data(TensorData::new(values, shape), &model.device())
}

/// Draws the byte number `index` by its scores.
fn draw(scores: Tensor<3>, sampling: Sampling, index: usize) -> u8 {
    let scores: Vec<f64> = scores.into_data().iter::<f64>().collect();
    let weights = weights(&scores, sampling.temperature);
    let key = [sampling.seed as u32, (sampling.seed >> 32) as u32];
    let [random, ..] = philox([index as u32, (index >> 32) as u32, 0, 0], key);
    pick(&weights, f64::from(random) / 2.0_f64.powi(32))
}

/// The softmax of scores at a temperature, in f64: one that is tiny leaves the best alone.
fn weights(scores: &[f64], temperature: f64) -> Vec<f64> {
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let raised = scores
        .iter()
        .map(|score| ((score - best) / temperature).exp());
    let raised: Vec<f64> = raised.collect();
    let sum: f64 = raised.iter().sum();
    raised.iter().map(|weight| weight / sum).collect()
}

/// The byte at which the running sum of weights passes `draw`.
fn pick(weights: &[f64], draw: f64) -> u8 {
    let mut sum = 0.0;
    for (byte, weight) in weights.iter().enumerate() {
        sum += weight;
        if draw < sum {
            return byte as u8;
        }
    }
    (weights.len() - 1) as u8
}

/// What rank 0 has drawn: scores may differ by rounding on processors of another kind.
fn of_first_rank(byte: u8, ring: &Ring) -> Result<u8, Failure> {
    if ring.world_size() == 1 {
        return Ok(byte);
    }
    let drawn = ring.communicator().all_gather_bytes("drawn byte", &[byte]);
    let drawn = drawn.map_err(|error| Failure::Run(error.to_string()))?;
    let first = drawn.first().and_then(|bytes| bytes.first());
    Ok(first.copied().unwrap_or(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_temperature_leaves_the_best_byte_alone() {
        for temperature in [1e-3, 1e-40, f64::MIN_POSITIVE] {
            assert_eq!(weights(&[1.0, 3.0, 2.0], temperature), [0.0, 1.0, 0.0]);
        }
        let warm = weights(&[0.0, 3.0_f64.ln()], 1.0);
        assert!((warm[1] - 0.75).abs() < 1e-12, "{warm:?}");
    }

    #[test]
    fn bytes_are_drawn_by_their_weights() {
        let weights = [0.25, 0.0, 0.5, 0.25];
        for (draw, byte) in [
            (0.0, 0),
            (0.24, 0),
            (0.25, 2),
            (0.74, 2),
            (0.76, 3),
            (1.0, 3),
        ] {
            assert_eq!(pick(&weights, draw), byte);
        }
    }
}
