//! The Burn operation: forward on the backend's tensors, hand-written backward on the autodiff backend.
//!
//! Saved for the backward: query, key, value, output and log-sum-exp; nothing of size N, no score.

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
mod flex;
#[cfg(feature = "cube")]
mod fusion;
mod memory;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::{Backend, backend_extension, tensor::FloatTensor};
use ring_core::{DropoutSeed, Plan};

#[cfg(feature = "cube")]
pub(crate) use self::memory::Site;
use crate::ring::Ring;

/// One attention of one rank, and what it leaves behind: an operation returns tensors, not results.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) ring: Ring,
    pub(crate) plan: Arc<Plan>,
    /// The same for the backward: it must drop what the forward dropped.
    pub(crate) dropout: DropoutSeed,
    outcome: Arc<Mutex<Outcome>>,
}

/// What a forward leaves behind, beside its tensors.
#[derive(Clone, Debug, Default)]
struct Outcome {
    failure: Option<ring_core::Error>,
    /// Number of the operation in its group, for the backward.
    operation: u64,
}

impl Job {
    pub(crate) fn new(ring: Ring, plan: Arc<Plan>, dropout: DropoutSeed) -> Self {
        Self {
            ring,
            plan,
            dropout,
            outcome: Arc::default(),
        }
    }

    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: ring_core::Error) {
        self.outcome().failure = Some(error);
    }

    pub(crate) fn failure(&self) -> Option<ring_core::Error> {
        self.outcome().failure.clone()
    }
}

/// What the backward needs beside the inputs.
#[derive(Clone, Debug)]
pub(crate) struct BackwardTensors<B: Backend> {
    output: FloatTensor<B>,
    log_sum_exp: FloatTensor<B>,
    grad_output: FloatTensor<B>,
    grad_log_sum_exp: Option<FloatTensor<B>>,
}

/// Ring attention on a Burn backend. Reached through the modules of this crate.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub(crate) trait RingAttentionOps: Backend {
    /// Output and log-sum-exp of this rank's queries; blocks until the group has exchanged what it needs.
    fn ring_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        job: Job,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// The backward of [`RingAttentionOps`], for backends that are differentiated, not for `Autodiff` itself.
pub(crate) trait RingAttentionGradient: RingAttentionOps {
    /// Gradients of query, key and value.
    ///
    /// # Panics
    /// If the exchange fails: a backward cannot return an error. The group is poisoned then, so that every rank ends.
    fn ring_attention_gradient(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [FloatTensor<Self>; 3];
}
