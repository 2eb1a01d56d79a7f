//! The language model under burn-train: its item, its steps, its output.

use std::{hash::Hasher, sync::Arc};

use burn::{
    tensor::{Device, ExecutionError, Int, Tensor, TensorData},
    train::{
        InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{Adaptor, LossInput},
    },
};
use ring_burn::{
    Communicator, DataGroup, Fnv1a, HostBuffer, Ring, SequenceItem, collective, shard_slice,
};

use crate::language_model::{LongNet, next_token_loss};

/// A batch of windows of a text, named by where they start; every rank builds tensors of its own positions alone.
#[derive(Clone, Debug)]
pub struct TokenWindows {
    text: Arc<[u8]>,
    starts: Arc<[usize]>,
    length: usize,
    seed: u64,
    /// Windows of the whole batch, and the first of these among them.
    batch: usize,
    first: usize,
    ring: Option<Ring>,
    /// All ranks that share the batch, if they are more than those of the ring.
    everyone: Option<Communicator<HostBuffer>>,
}

impl TokenWindows {
    /// Windows of `length` positions from `starts`; each reads `length + 1` tokens, inputs and labels shifted by one. `seed`
    /// is the step's, for dropout.
    ///
    /// # Panics
    /// If a window reaches beyond the text.
    pub fn new(text: Arc<[u8]>, starts: Vec<usize>, length: usize, seed: u64) -> Self {
        for &start in &starts {
            assert!(
                start + length < text.len(),
                "a window of {length} tokens and one label from {start} reaches beyond {} tokens",
                text.len()
            );
        }
        Self {
            text,
            batch: starts.len(),
            first: 0,
            starts: starts.into(),
            length,
            seed,
            ring: None,
            everyone: None,
        }
    }

    /// Labels of all windows of the batch, on all ranks of all groups.
    pub fn labels(&self) -> usize {
        self.batch * self.length
    }

    /// The ring of the rank this item is for; one rank alone if nobody said.
    fn ring(&self) -> Ring {
        let ring = match &self.ring {
            Some(ring) => ring.clone(),
            None => Ring::single(self.length).unwrap_or_else(|error| panic!("{error}")),
        };
        ring.with_sequence_length(self.length)
            .with_seed(self.seed)
            .with_first_batch_entry(self.first)
    }

    /// Own rows of all windows, `shift` tokens on: `[batch, own positions]`.
    fn tokens(&self, shift: usize, ring: &Ring, device: &Device) -> Tensor<2, Int> {
        let own: Vec<i64> = self
            .starts
            .iter()
            .flat_map(|&start| {
                let window = &self.text[start + shift..][..self.length];
                shard_slice(window, ring).expect("the window is as long as the sequence")
            })
            .map(i64::from)
            .collect();
        let shape = [self.starts.len(), ring.shard_len()];
        Tensor::from_data(TensorData::new(own, shape), device)
    }
}

impl SequenceItem for TokenWindows {
    fn on_rank(self, ring: &Ring) -> Self {
        Self {
            ring: Some(ring.clone()),
            ..self
        }
    }

    /// # Panics
    /// If there are fewer windows than groups.
    fn in_group(self, group: &DataGroup) -> Self {
        let share = group.share(self.starts.len());
        assert!(
            !share.is_empty(),
            "{} windows cannot be divided among {} groups",
            self.starts.len(),
            group.count()
        );
        Self {
            first: self.first + share.start,
            starts: self.starts[share].into(),
            everyone: Some(group.everyone().clone()),
            ..self
        }
    }

    fn identity(&self) -> u64 {
        let mut hasher = Fnv1a::default();
        for number in [self.length, self.batch, self.first, self.starts.len()] {
            hasher.write(&number.to_le_bytes());
        }
        hasher.write(&self.seed.to_le_bytes());
        for &start in self.starts.iter() {
            hasher.write(&start.to_le_bytes());
            hasher.write(&self.text[start..=start + self.length]);
        }
        hasher.finish()
    }
}

/// Mean loss of a batch over all ranks, in nats per token.
#[derive(Clone, Debug)]
pub struct SequenceLoss {
    /// `[1]`
    pub loss: Tensor<1>,
}

impl Adaptor<LossInput> for SequenceLoss {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl ItemLazy for SequenceLoss {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

impl LongNet {
    /// This rank's part of the loss of a batch.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn loss(&self, windows: &TokenWindows) -> Tensor<1> {
        let (ring, device) = (windows.ring(), self.device());
        let logits = self.forward(windows.tokens(0, &ring, &device), &ring);
        next_token_loss(logits, windows.tokens(1, &ring, &device), windows.labels())
    }

    /// The loss of all ranks together, for the metrics.
    fn total(&self, part: Tensor<1>, windows: &TokenWindows) -> SequenceLoss {
        let ring = windows.ring();
        let part: f32 = part.into_scalar();
        let everyone = windows.everyone.as_ref().unwrap_or(ring.communicator());
        let total = collective::all_reduce_sum_f64(everyone, &[f64::from(part)])
            .unwrap_or_else(|error| panic!("summing the loss failed: {error}"));
        SequenceLoss {
            loss: Tensor::from_floats([total[0] as f32], &self.device().inner()),
        }
    }
}

impl TrainStep for LongNet {
    type Input = TokenWindows;
    type Output = SequenceLoss;

    fn step(&self, windows: TokenWindows) -> TrainOutput<SequenceLoss> {
        let part = self.loss(&windows);
        let total = self.total(part.clone().inner(), &windows);
        TrainOutput::new(self, part.backward(), total)
    }
}

impl InferenceStep for LongNet {
    type Input = TokenWindows;
    type Output = SequenceLoss;

    fn step(&self, windows: TokenWindows) -> SequenceLoss {
        self.total(self.loss(&windows), &windows)
    }
}
