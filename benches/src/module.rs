//! The Burn module around the drivers, on Burn's Flex backend.

use std::hint::black_box;

use burn::tensor::{Device, Distribution, Tensor};
use ring_burn::{Ring, RingAttention, RingAttentionConfig};

use crate::work::Work;

/// Full attention of random tensors through [`RingAttention`], on one rank.
pub struct Module {
    attention: RingAttention,
    ring: Ring,
    inputs: [Tensor<4>; 3],
    backward: bool,
}

impl Module {
    /// The module for full attention in f32, with `threads` kernel threads.
    ///
    /// # Panics
    /// If threads cannot be started.
    pub fn new(work: &Work, threads: usize) -> Self {
        let device = if work.backward {
            Device::flex().autodiff()
        } else {
            Device::flex()
        };
        let shape = [1, work.heads, work.length, work.head_dim];
        let draw = || Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &device);
        let mut inputs = [draw(), draw(), draw()];
        if work.backward {
            inputs = inputs.map(Tensor::require_grad);
        }
        let ring = Ring::single(work.length).and_then(|ring| ring.with_threads(threads));
        Self {
            attention: RingAttentionConfig::new().with_causal(work.causal).init(),
            ring: ring.expect("threads can be started"),
            inputs,
            backward: work.backward,
        }
    }

    /// One pass, or both, as a model would have them: through the graph, gradients of queries, keys and values at its end. The
    /// gradient that reaches the output is one everywhere, since making another would not be the module's doing.
    pub fn run(&self) {
        let [query, key, value] = self.inputs.clone();
        let output = self.attention.forward(query, key, value, &self.ring);
        if self.backward {
            let gradients = output.backward();
            black_box(self.inputs.each_ref().map(|input| input.grad(&gradients)));
        } else {
            black_box(output);
        }
    }
}
