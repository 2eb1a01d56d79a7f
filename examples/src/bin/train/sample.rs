//! A short text from the trained model.

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData, activation::softmax},
};
use ring_burn::Ring;
use ring_multihead::LongNet;

use crate::{
    args::Args,
    feed::{Text, scramble},
};

/// Bytes of held-out text the model starts from.
const PROMPT: usize = 100;

/// Continues the beginning of the held-out text; on one rank, the whole prefix anew for every byte.
pub(crate) fn generate(
    model: &LongNet,
    text: &Text,
    args: &Args,
    device: &Device,
) -> Result<String, String> {
    let model = model.clone().valid();
    let prompt = PROMPT.min(text.held_out_len());
    let mut bytes: Vec<u8> = text.bytes[text.split..text.split + prompt].to_vec();
    let ring = Ring::single(0).map_err(|error| error.to_string())?;
    for index in 0..args.sample_bytes {
        let context = &bytes[bytes.len().saturating_sub(args.seq_length)..];
        let tokens: Vec<i64> = context.iter().copied().map(i64::from).collect();
        let shape = [1, tokens.len()];
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), device);
        let ring = ring.clone().with_sequence_length(context.len());
        let logits = model
            .try_forward(tokens, &ring)
            .map_err(|error| error.to_string())?;
        let last = logits.narrow(1, context.len() - 1, 1).flatten::<1>(0, 2);
        let weights: Vec<f64> = softmax(last.div_scalar(args.temperature), 0)
            .into_data()
            .iter::<f64>()
            .collect();
        let draw = scramble(args.seed ^ 0x7e87, index as u64) as f64 / u64::MAX as f64;
        bytes.push(pick(&weights, draw));
    }
    let (prompt, sampled) = bytes.split_at(prompt);
    Ok(format!(
        "{}|{}",
        String::from_utf8_lossy(prompt),
        String::from_utf8_lossy(sampled)
    ))
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
