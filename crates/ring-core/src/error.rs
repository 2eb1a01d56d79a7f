//! What can go wrong: [`enum@Error`].

use std::fmt;

use ring_comm::{CommError, buffer::DType};
use ring_kernels::KernelError;
use thiserror::Error;

use crate::{cache::CacheError, spec::SpecError};

/// A distributed attention that could not be computed.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Error {
    /// The computation is not possible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The key/value cache does not fit.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A kernel failed; all ranks of the group are told.
    #[error("attention kernel failed on rank {rank}: {source}")]
    Kernel {
        /// The rank whose kernel failed.
        rank: usize,
        /// What it said.
        source: KernelError,
    },
    /// Before a pass began under a [`Recovery`](crate::Recovery), its memory was refused for good. Every rank gets this error, and the group
    /// is as good as before: a smaller computation may go through.
    #[error("no memory for the {pass} pass in {attempts} attempts: {}", Refusals(.refusals))]
    Memory {
        /// `forward` or `backward`.
        pass: &'static str,
        /// How often all ranks tried.
        attempts: u32,
        /// The ranks that were refused memory in the last attempt.
        refusals: Vec<Refusal>,
    },
    /// The exchange failed.
    #[error("attention exchange failed in {step}: {source}")]
    Comm {
        /// What the rank was about.
        step: Box<str>,
        /// Who, with whom, what and why.
        source: CommError,
    },
    /// The plan was made for another rank or another number of ranks.
    #[error(
        "the plan is for rank {plan_rank} of {plan_ranks}, the communicator is rank {rank} of {ranks}"
    )]
    WrongPlan {
        /// Rank of the plan.
        plan_rank: usize,
        /// Ranks of the plan.
        plan_ranks: usize,
        /// Rank of the communicator.
        rank: usize,
        /// Ranks of the communicator.
        ranks: usize,
    },
    /// A tensor has another element type than the plan says.
    #[error("{what} is {got}, the plan is for {expected}")]
    DType {
        /// Which tensor.
        what: &'static str,
        /// Its type.
        got: DType,
        /// The plan's type.
        expected: DType,
    },
}

/// Memory that a rank was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The rank.
    pub rank: usize,
    /// Bytes of the allocation that was refused.
    pub bytes: u64,
}

/// As they are listed.
struct Refusals<'a>(&'a [Refusal]);

impl fmt::Display for Refusals<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Refusal { rank, bytes }) in self.0.iter().enumerate() {
            let separator = if index > 0 { ", " } else { "" };
            write!(f, "{separator}rank {rank} was refused {bytes} bytes")?;
        }
        Ok(())
    }
}
