//! A short text from the trained model.

use burn::{module::Module, tensor::Device};
use ring_burn::Ring;
use ring_examples::continuation::{Sampling, continue_text};
use ring_multihead::LongNet;

use crate::{args::Args, feed::Text};

/// Bytes of held-out text the model starts from.
const PROMPT: usize = 100;

/// Continues the beginning of the held-out text, on one rank and on the processor, whatever it was trained on. Positions simply go on where the sample outgrows the sequence length of
/// the training.
pub(crate) fn generate(model: &LongNet, text: &Text, args: &Args) -> Result<String, String> {
    let model = model.clone().valid().fork(&Device::flex());
    let prompt = PROMPT.min(text.held_out_len());
    let prompt = &text.bytes[text.split..text.split + prompt];
    let ring = Ring::single(0).map_err(|error| error.to_string())?;
    let sampling = Sampling {
        bytes: args.sample_bytes,
        temperature: args.temperature,
        seed: args.seed,
    };
    let mut sampled = Vec::new();
    continue_text(&model, prompt, sampling, &ring, |byte| {
        sampled.push(byte);
        Ok(())
    })
    .map_err(|failure| failure.to_string())?;
    Ok(format!(
        "{}|{}",
        String::from_utf8_lossy(prompt),
        String::from_utf8_lossy(&sampled)
    ))
}
