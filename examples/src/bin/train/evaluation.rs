//! Every byte of the held-out text, scored over the ranks.

use std::{ops::Range, sync::Arc};

use burn::{
    module::Module,
    tensor::{Int, Tensor, TensorData, activation::log_softmax},
};
use ring_burn::{Communicator, HostBuffer, Loopback, Ring, collective, shard_slice};
use ring_examples::placement::{Placement, Ranks};
use ring_multihead::LongNet;

use crate::{args::Args, feed::Text};

/// Mean bits per byte of the held-out text; its bytes are predicted in windows of the sequence length, the first from the
/// last byte of the training text. Threads score it over `ranks` of them, processes over all.
pub(crate) fn bits_per_byte(
    model: &LongNet,
    text: &Text,
    args: &Args,
    placement: &Placement,
    ranks: usize,
) -> Result<f64, String> {
    let score = |communicator: Communicator<HostBuffer>| {
        let ring = Ring::new(communicator, args.sharding, args.seq_length)
            .and_then(|ring| match args.threads {
                Some(threads) => ring.with_threads(threads),
                None => Ok(ring),
            })
            .map_err(|error| error.to_string())?;
        held_out_bits(&model.clone().valid(), text, &ring)
    };
    let bits = match &placement.ranks {
        Ranks::Processes(everyone) => score(everyone.clone())?,
        Ranks::Threads(_) => {
            let totals = Loopback::run(ranks, placement.deadline, |endpoint| {
                score(Communicator::new(Arc::new(endpoint)))
            });
            let mut bits = Err("there is no rank".to_string());
            for total in totals {
                bits = Ok(total.map_err(|panic| panic.to_string())??);
            }
            bits?
        }
    };
    Ok(bits / text.held_out_len() as f64)
}

/// Bits of all held-out bytes together, on every rank.
fn held_out_bits(model: &LongNet, text: &Text, ring: &Ring) -> Result<f64, String> {
    let mut bits = 0.0;
    for (start, counted) in windows(text, ring.sequence_length()) {
        bits += own_bits(model, text, ring, start, &counted).map_err(|error| error.to_string())?;
    }
    collective::all_reduce_sum_f64(ring.communicator(), &[bits])
        .map(|sum| sum[0])
        .map_err(|error| error.to_string())
}

/// Windows by their start, with the positions whose labels count: every held-out byte is the label of exactly one.
fn windows(text: &Text, length: usize) -> Vec<(usize, Range<usize>)> {
    let last_start = text.bytes.len() - 1 - length;
    let mut windows = Vec::new();
    let mut label = text.split;
    while label < text.bytes.len() {
        // The label of position i of a window is byte start + i + 1.
        let start = (label - 1).min(last_start);
        windows.push((start, label - 1 - start..length));
        label = start + length + 1;
    }
    windows
}

/// Bits of the counted labels at the positions this rank owns.
fn own_bits(
    model: &LongNet,
    text: &Text,
    ring: &Ring,
    start: usize,
    counted: &Range<usize>,
) -> Result<f64, ring_burn::RingError> {
    let device = model.device();
    let length = ring.sequence_length();
    let own = |from: usize| -> Result<Tensor<2, Int>, ring_burn::RingError> {
        let bytes = shard_slice(&text.bytes[from..from + length], ring)?;
        let tokens: Vec<i64> = bytes.into_iter().map(i64::from).collect();
        let shape = [1, tokens.len()];
        Ok(Tensor::from_data(TensorData::new(tokens, shape), &device))
    };
    let logits = model.try_forward(own(start)?, ring)?;
    let scores = log_softmax(logits, 2).gather(2, own(start + 1)?.unsqueeze_dim(2));
    let nats: f64 = scores
        .into_data()
        .iter::<f64>()
        .zip(ring.positions())
        .filter(|(_, position)| counted.contains(position))
        .map(|(score, _)| -score)
        .sum();
    Ok(nats / std::f64::consts::LN_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_held_out_byte_is_scored_once() {
        for (len, length) in [
            (1000, 32),
            (1000, 49),
            (1000, 50),
            (1000, 51),
            (1000, 900),
            (200, 150),
        ] {
            let text = Text {
                bytes: vec![0; len].into(),
                split: len - len / 20,
            };
            let mut scored = vec![0; len];
            for (start, counted) in windows(&text, length) {
                assert!(start + length < len);
                for position in counted {
                    scored[start + position + 1] += 1;
                }
            }
            assert!(scored[..text.split].iter().all(|&count| count == 0));
            assert!(scored[text.split..].iter().all(|&count| count == 1));
        }
    }
}
