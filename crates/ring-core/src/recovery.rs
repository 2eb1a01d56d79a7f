//! What becomes of a pass whose memory is refused, or whose peer is lost: [`Recovery`].
//!
//! A pass cannot be tried again in its middle: messages are under way, and the first error ends the group. So everything that may be
//! refused comes before: a rank reserves what its pass will allocate (`needs.rs`), all ranks tell each other whether they could,
//! and only if all could does the pass run, on what was reserved. Otherwise all give everything back and try again: first without what
//! was kept between calls, then with kernels that need less memory, level by level. Results are the same bits whatever happened.

mod messages;
mod needs;
mod policy;
mod reserved;
#[cfg(test)]
mod tests;
mod vote;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ring_comm::{
    Communicator,
    buffer::Buffer,
    trace::{Activity, Details},
};
use ring_kernels::{KernelError, Kernels};

pub use self::policy::{RecoveryPolicy, RecoveryStatistics};
use self::{needs::Needs, reserved::Reserved, vote::Vote};
use crate::{
    driver::{Gradients, Inputs, Output, Run, Saved},
    error::{Error, Refusal},
    plan::Plan,
};

/// Runs passes so that refused memory is tried for again, with less, and so that every failure is counted and logged.
///
/// Each rank has one, for all that it computes in its group; clones share what they learn. All ranks go through one, or none does.
/// The crate `tracing` gets an event for every refusal and retry (warnings, with `rank`, `level`, `bytes`, `attempt`), for
/// a pass that could run in spite of them (info), and for one that was given up or ended by a failure (errors).
///
/// A pass costs one small all-gather more than without, before its first message, and holds from its beginning what it would have
/// allocated on its way: with 16-bit inputs the room for rounded results, and messages if heads are divided. Measured on two busy cores,
/// two loopback ranks of one thread, 64 positions, 4 heads of 16 (tenth percentiles): a forward pass took 39 to 48 µs instead of 19 to 25,
/// a backward pass 75 to 79 instead of 64 to 72.
///
/// ```
/// use ring_comm::Communicator;
/// use ring_core::{AttentionSpec, DropoutSeed, Inputs, Pattern, Plan, Recovery, RecoveryPolicy, Shape};
/// use ring_comm::buffer::{Buffer, DType, HostBuffer};
/// use ring_kernels::{CpuKernels, RowLayout, Tensor};
///
/// let recovery = Recovery::new(RecoveryPolicy { retries: 4, ..RecoveryPolicy::default() });
/// let shape = Shape { batch: 1, query_heads: 2, kv_heads: 2, head_dim: 8 };
/// let plan = Plan::new(&AttentionSpec::new(Pattern::full().causal(), shape, 100)?, 0)?;
/// let (rows, layout) = (HostBuffer::zeros(DType::F32, 2 * 100 * 8), RowLayout::contiguous(2, 100, 8));
/// let tensor = || Tensor { data: rows.view(), layout: &layout };
/// let inputs = Inputs { query: tensor(), key: tensor(), value: tensor(), dropout: DropoutSeed::default() };
/// let output = recovery.forward(&CpuKernels::new(1)?, &Communicator::single(), &plan, inputs)?;
/// assert_eq!(recovery.statistics().passes, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Recovery {
    policy: RecoveryPolicy,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    statistics: RecoveryStatistics,
    /// Passes since the last refusal or change of level.
    undisturbed: u64,
}

/// One try at reserving what a pass needs.
#[derive(Clone, Copy)]
struct Attempt {
    number: u32,
    level: u32,
    /// Of a next attempt.
    next_level: u32,
}

impl Recovery {
    /// A recovery that nothing has happened to.
    pub fn new(policy: RecoveryPolicy) -> Self {
        Self {
            policy,
            state: Arc::default(),
        }
    }

    /// How far it goes.
    pub fn policy(&self) -> RecoveryPolicy {
        self.policy
    }

    /// What this rank has gone through so far.
    pub fn statistics(&self) -> RecoveryStatistics {
        self.state().statistics
    }

    /// As [`forward`](crate::forward), of which results are the same to the last bit.
    ///
    /// # Errors
    /// [`Error::Memory`] on all ranks if memory is refused for good; they can go on then. Otherwise as [`forward`](crate::forward).
    pub fn forward<B: Buffer, K: Kernels<B>>(
        &self,
        kernels: &K,
        communicator: &Communicator<B>,
        plan: &Plan,
        inputs: Inputs<'_, B>,
    ) -> Result<Output<B>, Error> {
        let kernels = Reserved::new(kernels);
        let run = Run::new(&kernels, communicator, plan, inputs.dropout, None);
        let result = run.and_then(|run| {
            run.traced(|run| {
                self.reserve(&kernels, run)?;
                run.forward(inputs)
            })
        });
        self.ended(communicator, result)
    }

    /// As [`backward`](crate::backward), of which results are the same to the last bit.
    ///
    /// # Errors
    /// [`Error::Memory`] on all ranks if memory is refused for good; they can go on then. Otherwise as
    /// [`backward`](crate::backward).
    pub fn backward<B: Buffer, K: Kernels<B>>(
        &self,
        kernels: &K,
        communicator: &Communicator<B>,
        plan: &Plan,
        inputs: Inputs<'_, B>,
        saved: Saved<'_, B>,
    ) -> Result<Gradients<B>, Error> {
        let kernels = Reserved::new(kernels);
        let operation = Some(saved.operation);
        let run = Run::new(&kernels, communicator, plan, inputs.dropout, operation);
        let result = run.and_then(|run| {
            run.traced(|run| {
                self.reserve(&kernels, run)?;
                run.backward(inputs, saved)
            })
        });
        self.ended(communicator, result)
    }

    /// Reserves what the pass needs, on all ranks or on none.
    fn reserve<B: Buffer, K: Kernels<B>>(
        &self,
        reserved: &Reserved<'_, B, K>,
        run: &Run<'_, B, Reserved<'_, B, K>>,
    ) -> Result<(), Error> {
        let (needs, given) = (Needs::of(run), reserved.given());
        let first_level = self.first_level();
        for number in 0.. {
            let attempt = self.attempt(number, first_level);
            let less = at_most_level(given, attempt.level);
            let outcome = needs.reserve(less.as_ref().unwrap_or(given), run);
            let has_less = number == 0 || given.with_less_memory(attempt.next_level).is_some();
            let (stash, refused) = match outcome {
                Ok(stash) => (Some(stash), None),
                Err(KernelError::Allocation { bytes }) => (None, Some(bytes as u64)),
                Err(source) => return Err(kernel_failed(run, source)),
            };
            self.tell_refusal(run, attempt, refused);
            let votes = self.vote(run, attempt, Vote { refused, has_less })?;
            let refusals = Vote::refusals(&votes);
            if let (true, Some(stash)) = (refusals.is_empty(), stash) {
                reserved.fill(less, stash);
                self.succeeded(run, attempt);
                return Ok(());
            }
            // What was reserved went with the stash.
            given
                .release_memory()
                .map_err(|source| kernel_failed(run, source))?;
            run.exchanger.communicator.buffers().release();
            let some_have_less = votes
                .iter()
                .any(|vote| vote.refused.is_some() && vote.has_less);
            if number >= self.policy.retries || !some_have_less {
                return Err(self.gave_up(run, attempt, refusals));
            }
            self.retried(run, attempt, &refusals);
        }
        unreachable!("retries are fewer than numbers")
    }

    /// The level that a pass begins with.
    fn first_level(&self) -> u32 {
        let mut state = self.state();
        state.statistics.passes += 1;
        let RecoveryPolicy {
            retries,
            passes_per_level,
        } = self.policy;
        let is_time = retries > 0 && state.undisturbed >= passes_per_level;
        let level = state.statistics.level;
        level.saturating_sub(u32::from(is_time))
    }

    /// The first retry is for what was kept between calls: at the level that served so far. Each further one is a level on.
    fn attempt(&self, number: u32, first_level: u32) -> Attempt {
        let known = self.state().statistics.level;
        let retried = |number: u32| known.saturating_add(number.saturating_sub(1));
        Attempt {
            number,
            level: if number == 0 {
                first_level
            } else {
                retried(number)
            },
            next_level: retried(number.saturating_add(1)),
        }
    }

    fn vote<B: Buffer, K>(
        &self,
        run: &Run<'_, B, K>,
        attempt: Attempt,
        own: Vote,
    ) -> Result<Vec<Vote>, Error> {
        let exchanger = &run.exchanger;
        let Attempt { number, level, .. } = attempt;
        let (pass, operation) = (exchanger.pass.name(), exchanger.operation);
        // Whatever could have ranks decide otherwise is compared.
        let purpose = format!(
            "memory of the {pass} pass of operation {operation}, attempt {number} at level {level}, {:?}",
            self.policy
        );
        let details = Details {
            operation,
            ..Details::default()
        };
        exchanger
            .communicator
            .timed(Activity::Wait, "vote on memory", details, || {
                own.cast(exchanger.communicator, &purpose)
            })
            .map_err(|source| Error::Comm {
                step: format!("the vote on memory of the {pass} pass").into(),
                source,
            })
    }

    fn tell_refusal<B: Buffer, K>(
        &self,
        run: &Run<'_, B, K>,
        attempt: Attempt,
        refused: Option<u64>,
    ) {
        let Some(bytes) = refused else { return };
        let Attempt { number, level, .. } = attempt;
        let (rank, pass) = (run.exchanger.communicator.rank(), run.exchanger.pass.name());
        self.state().statistics.refusals += 1;
        tracing::warn!(rank, level, bytes, attempt = number, pass, "memory refused");
    }

    fn succeeded<B: Buffer, K>(&self, run: &Run<'_, B, K>, attempt: Attempt) {
        let Attempt { number, level, .. } = attempt;
        let mut state = self.state();
        let is_as_before = number == 0 && level == state.statistics.level;
        state.undisturbed = if is_as_before {
            state.undisturbed.saturating_add(1)
        } else {
            0
        };
        state.statistics.level = level;
        state.statistics.recovered += u64::from(number > 0);
        drop(state);
        if number > 0 {
            let (rank, pass) = (run.exchanger.communicator.rank(), run.exchanger.pass.name());
            tracing::info!(
                rank,
                level,
                attempt = number,
                pass,
                "recovered from refused memory"
            );
        }
    }

    fn retried<B: Buffer, K>(&self, run: &Run<'_, B, K>, attempt: Attempt, refusals: &[Refusal]) {
        self.state().statistics.retries += 1;
        let (rank, pass) = (run.exchanger.communicator.rank(), run.exchanger.pass.name());
        let (level, number) = (attempt.next_level, attempt.number + 1);
        for &Refusal { rank: of, bytes } in refusals {
            tracing::warn!(
                rank,
                level,
                bytes,
                attempt = number,
                pass,
                of,
                "trying again"
            );
        }
    }

    fn gave_up<B: Buffer, K>(
        &self,
        run: &Run<'_, B, K>,
        attempt: Attempt,
        refusals: Vec<Refusal>,
    ) -> Error {
        let Attempt { number, level, .. } = attempt;
        let (rank, pass) = (run.exchanger.communicator.rank(), run.exchanger.pass.name());
        let attempts = number.saturating_add(1);
        let mut state = self.state();
        state.statistics.given_up += 1;
        state.undisturbed = 0;
        drop(state);
        let error = Error::Memory {
            pass,
            attempts,
            refusals,
        };
        tracing::error!(rank, level, attempt = number, pass, "given up: {error}");
        error
    }

    /// Counts and logs how a pass ended, if badly.
    fn ended<B: Buffer, T>(
        &self,
        communicator: &Communicator<B>,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        let rank = communicator.rank();
        match &result {
            Err(Error::Comm { step, source }) => {
                let (culprit, kind) = (source.culprit(), &source.root().kind);
                let own = communicator.transport().global_rank(rank);
                self.state().statistics.lost_peers += u64::from(culprit != own);
                tracing::error!(rank, culprit, %kind, "the exchange failed in {step}");
            }
            Err(Error::Kernel { source, .. }) => {
                let is_refusal = matches!(source, KernelError::Allocation { .. });
                self.state().statistics.refusals += u64::from(is_refusal);
                tracing::error!(rank, "a kernel failed: {source}");
            }
            _ => {}
        }
        result
    }

    /// Sound after a panic too: no change is left half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernels at that level, or at the last one before it; `None` for those that were given.
fn at_most_level<B: Buffer, K: Kernels<B>>(given: &K, level: u32) -> Option<K> {
    let levels = (1..=level).rev();
    levels
        .into_iter()
        .find_map(|level| given.with_less_memory(level))
}

/// Not for want of memory: the end for all.
fn kernel_failed<B: Buffer, K: Kernels<B>>(run: &Run<'_, B, K>, source: KernelError) -> Error {
    let rank = run.exchanger.communicator.rank();
    run.exchanger.failed(Error::Kernel { rank, source })
}
