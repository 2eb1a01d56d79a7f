//! How far a recovery goes, and what it has gone through.

/// How far a [`Recovery`](super::Recovery) goes. All ranks must have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryPolicy {
    /// Most attempts at a pass beyond the first.
    pub retries: u32,
    /// After so many passes without a refusal, the next one tries to compute with more memory and speed again, by a level. Needs
    /// retries.
    pub passes_per_level: u64,
}

impl Default for RecoveryPolicy {
    /// 4 retries; up a level after 256 passes.
    fn default() -> Self {
        Self {
            retries: 4,
            passes_per_level: 256,
        }
    }
}

/// What one rank has gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecoveryStatistics {
    /// Passes begun, forward and backward.
    pub passes: u64,
    /// Allocations refused to this rank, those in the middle of a pass among them.
    pub refusals: u64,
    /// Attempts beyond the first of each pass, whichever rank was refused memory; the same number on all ranks.
    pub retries: u64,
    /// Passes that could run after a retry; the same number on all ranks.
    pub recovered: u64,
    /// Passes that ended with [`Error::Memory`](crate::Error::Memory); the same number on all ranks.
    pub given_up: u64,
    /// Passes that ended because another rank failed, left, or did not answer in time.
    pub lost_peers: u64,
    /// The level of [`Kernels::with_less_memory`](ring_kernels::Kernels::with_less_memory) that served last, the same on all ranks. A
    /// rank that has no such level computes at its last.
    pub level: u32,
}
