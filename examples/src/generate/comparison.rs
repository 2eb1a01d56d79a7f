//! A token decoded against one for which the whole sequence is computed again.

use std::time::Instant;

use burn::tensor::Tensor;
use ring_burn::{Ring, RingError, collective, shard_slice};
use ring_multihead::{LongNet, LongNetCache};

use crate::{
    command_line::{self, Failure},
    continuation::tokens,
};

/// Tokens whose decoding is timed, and whole sequences.
const DECODED: usize = 50;
const WHOLE: usize = 3;

/// Prints a line of medians for every length of the prompt.
pub(super) fn run(model: &LongNet, lengths: &[usize], ring: &Ring) -> Result<(), Failure> {
    let reports = ring.rank() == 0;
    if reports {
        command_line::print(format!(
            "{} ranks, {} kernel threads each; medians, milliseconds per token\n{:>10} {:>10} {:>10} {:>8} {:>22}\n",
            ring.world_size(),
            ring.kernels().threads(),
            "prompt",
            "decoded",
            "anew",
            "ratio",
            "largest difference"
        ))?;
    }
    for &length in lengths {
        let line = compare(model, length, ring).map_err(|error| Failure::Run(error.to_string()))?;
        if reports {
            command_line::print(line)?;
        }
    }
    Ok(())
}

fn compare(model: &LongNet, length: usize, ring: &Ring) -> Result<String, RingError> {
    let text: Vec<u8> = (0..length + DECODED)
        .map(|i| (i * i / 7 + i) as u8)
        .collect();
    let of_prompt = ring.clone().with_sequence_length(length);
    let mut cache = LongNetCache::new();
    let own = shard_slice(&text[..length], &of_prompt)?;
    model.try_prefill(tokens(model, &own), &of_prompt, &mut cache)?;
    let (mut decoded, mut scores) = (Vec::new(), None);
    for byte in &text[length..] {
        let started = Instant::now();
        scores = Some(model.try_decode(tokens(model, &[*byte]), ring, &mut cache)?);
        decoded.push(started.elapsed().as_secs_f64());
    }
    let whole = ring.clone().with_sequence_length(text.len());
    let own = shard_slice(&text, &whole)?;
    let (mut anew, mut expected) = (Vec::new(), None);
    for _ in 0..WHOLE {
        collective::barrier(ring.communicator())?;
        let started = Instant::now();
        expected = Some(model.try_forward(tokens(model, &own), &whole)?);
        collective::barrier(ring.communicator())?;
        anew.push(started.elapsed().as_secs_f64());
    }
    let off = difference(scores, expected, &whole)?;
    let (decoded, anew) = (median(decoded) * 1e3, median(anew) * 1e3);
    Ok(format!(
        "{length:>10} {decoded:>10.3} {anew:>10.3} {:>8.1} {off:>22.1e}\n",
        anew / decoded
    ))
}

/// The largest difference of the scores of the last position, on every rank; the rank that owns it knows.
fn difference(
    decoded: Option<Tensor<3>>,
    whole: Option<Tensor<3>>,
    ring: &Ring,
) -> Result<f64, RingError> {
    let last = ring.sequence_length() - 1;
    let row = ring
        .positions()
        .iter()
        .position(|&position| position == last);
    let off = match (decoded, whole, row) {
        (Some(decoded), Some(whole), Some(row)) => (decoded - whole.narrow(1, row, 1))
            .abs()
            .max()
            .into_scalar::<f64>(),
        _ => 0.0,
    };
    Ok(collective::all_reduce_sum_f64(ring.communicator(), &[off])?[0])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
