//! What the ranks end with, put together.

use std::{borrow::Cow, time::Duration};

use ring_comm::{
    TransportKind,
    buffer::{DType, HostBuffer},
};
use ring_core::{AttentionSpec, Sharding};
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};

/// One pass of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// When the rank left the barrier before it, from the beginning of the run; zero on ranks that are processes, which have no
    /// common clock.
    pub started: Duration,
    /// When the rank was done.
    pub ended: Duration,
    /// Bytes that reached the rank meanwhile.
    pub bytes_received: u64,
}

/// What one rank ends with.
pub(super) struct RankOutcome {
    /// Forward and backward passes, without the warm-up.
    pub(super) forward: Vec<Pass>,
    pub(super) backward: Vec<Pass>,
    /// Results of the last repetition, if anybody wants them.
    pub(super) results: Option<Results>,
}

/// A rank's rows of the results.
pub(super) struct Results {
    pub(super) output: HostBuffer,
    pub(super) log_sum_exp: HostBuffer,
    /// Of queries, keys and values.
    pub(super) gradients: Option<[HostBuffer; 3]>,
}

impl Results {
    fn gradient(&self, index: usize) -> Option<&HostBuffer> {
        self.gradients.as_ref().map(|gradients| &gradients[index])
    }
}

/// Results of all ranks.
pub struct Outcome {
    pub(super) spec: AttentionSpec,
    pub(super) ranks: Vec<RankOutcome>,
    pub(super) transport: TransportKind,
}

/// A result of all ranks together; its rows are put in order only when they are asked for.
pub struct GatheredTensor<'a> {
    parts: Vec<&'a HostBuffer>,
    shape: Vec<usize>,
    length: usize,
    sharding: Sharding,
}

impl Outcome {
    /// The computation.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// How the ranks exchanged rows.
    pub fn transport(&self) -> TransportKind {
        self.transport
    }

    /// Every rank's forward passes.
    pub fn forward_passes(&self) -> impl Iterator<Item = &[Pass]> {
        self.ranks.iter().map(|rank| rank.forward.as_slice())
    }

    /// Every rank's backward passes; empty without gradients.
    pub fn backward_passes(&self) -> impl Iterator<Item = &[Pass]> {
        self.ranks.iter().map(|rank| rank.backward.as_slice())
    }

    /// The results, by the names they have in files; none if they were not kept.
    pub fn tensors(&self) -> Vec<(&'static str, GatheredTensor<'_>)> {
        let spec = &self.spec;
        let shape = spec.shape;
        let (batch, dim) = (shape.batch, shape.head_dim);
        let query = vec![batch, shape.query_heads, spec.query_length, dim];
        let key = vec![batch, shape.kv_heads, spec.key_length, dim];
        let rows = query[..3].to_vec();
        [
            self.gather("out", query.clone(), |results| Some(&results.output)),
            self.gather("lse", rows, |results| Some(&results.log_sum_exp)),
            self.gather("grad_q", query, |results| results.gradient(0)),
            self.gather("grad_k", key.clone(), |results| results.gradient(1)),
            self.gather("grad_v", key, |results| results.gradient(2)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn gather<'a>(
        &'a self,
        name: &'static str,
        shape: Vec<usize>,
        pick: impl Fn(&'a Results) -> Option<&'a HostBuffer>,
    ) -> Option<(&'static str, GatheredTensor<'a>)> {
        let parts = self
            .ranks
            .iter()
            .map(|rank| rank.results.as_ref().and_then(&pick))
            .collect::<Option<Vec<_>>>()?;
        let of_keys = matches!(name, "grad_k" | "grad_v");
        let tensor = GatheredTensor {
            parts,
            length: shape[2],
            shape,
            sharding: if of_keys {
                self.spec.key_sharding
            } else {
                self.spec.query_sharding
            },
        };
        Some((name, tensor))
    }
}

impl GatheredTensor<'_> {
    /// The elements in the order of the whole tensor.
    pub fn values(&self) -> Vec<f32> {
        let mut whole = vec![0.0; self.shape.iter().product()];
        let heads = self.shape[0] * self.shape[1];
        let row = self.shape.get(3).copied().unwrap_or(1);
        for (rank, part) in self.parts.iter().enumerate() {
            let spans = self.sharding.spans(self.length, self.parts.len(), rank);
            let mut from = 0;
            for head in 0..heads {
                for span in &spans {
                    let to = (head * self.length + span.start) * row;
                    let len = span.len() * row;
                    copy_f32(part, from, &mut whole[to..to + len]);
                    from += len;
                }
            }
        }
        whole
    }
}

/// Elements of `part` from `first` on, widened.
fn copy_f32(part: &HostBuffer, first: usize, target: &mut [f32]) {
    let range = first..first + target.len();
    match part {
        HostBuffer::F32(values) => target.copy_from_slice(&values[range]),
        HostBuffer::F16(values) => {
            for (target, value) in target.iter_mut().zip(&values[range]) {
                *target = value.to_f32();
            }
        }
        HostBuffer::BF16(values) => {
            for (target, value) in target.iter_mut().zip(&values[range]) {
                *target = value.to_f32();
            }
        }
    }
}

impl View for GatheredTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes: Vec<u8> = self
            .values()
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * DType::F32.size()
    }
}
