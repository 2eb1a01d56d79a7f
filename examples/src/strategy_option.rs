//! The option that says how ranks divide the computation, the same in `attend` and `plan`.

use clap::Args;
use ring_core::{AttentionSpec, Strategy};

use crate::command_line::Failure;

/// How ranks divide the computation.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct StrategyOption {
    /// How ranks divide the computation: ring (rows that are visible travel), ring-query (in the backward queries instead, where
    /// they are fewer bytes), all-gather (every rank gets all keys and values), head-parallel (every rank gets all positions of its
    /// part of the heads), mesh:HEAD_RANKS (so many ranks divide the heads, the others form rings) or one-rank.
    #[arg(
        long,
        help_heading = "Ranks",
        value_name = "STRATEGY",
        default_value = "ring"
    )]
    pub strategy: Strategy,
}

impl StrategyOption {
    /// The computation, divided so. All else must have been set before.
    ///
    /// # Errors
    /// [`Failure::Input`] for a strategy that cannot serve.
    pub fn divide(self, spec: AttentionSpec) -> Result<AttentionSpec, Failure> {
        spec.with_strategy(self.strategy).map_err(Failure::input)
    }
}
