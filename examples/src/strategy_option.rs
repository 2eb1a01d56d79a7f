//! The option that says how ranks divide the computation, the same in `attend`, `plan` and `train`.

use std::str::FromStr;

use clap::Args;
use ring_core::{AttentionSpec, Auto, PatternError, Strategy};

use crate::command_line::Failure;

/// How ranks divide the computation.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct StrategyOption {
    /// How ranks divide the computation: ring (rows that are visible travel), ring-query (in the backward queries instead, where
    /// they are fewer bytes), all-gather (every rank gets all keys and values), head-parallel (every rank gets all positions of its
    /// part of the heads), mesh:HEAD_RANKS (so many ranks divide the heads, the others form rings), one-rank, or auto (the one that
    /// costs least on a common server).
    #[arg(
        long,
        help_heading = "Ranks",
        value_name = "STRATEGY",
        default_value = "ring"
    )]
    pub strategy: Wanted,
}

/// A strategy, or the wish that one be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// By its cost.
    Auto,
    /// This one.
    This(Strategy),
}

impl Default for Wanted {
    fn default() -> Self {
        Self::This(Strategy::Ring)
    }
}

impl FromStr for Wanted {
    type Err = PatternError;

    fn from_str(name: &str) -> Result<Self, PatternError> {
        match name {
            "auto" => Ok(Self::Auto),
            name => name.parse().map(Self::This),
        }
    }
}

impl StrategyOption {
    /// The computation, divided so. All else must have been set before. A choice is explained on standard error.
    ///
    /// # Errors
    /// [`Failure::Input`] for a strategy that cannot serve.
    pub fn divide(self, spec: AttentionSpec) -> Result<AttentionSpec, Failure> {
        let strategy = match self.strategy {
            Wanted::This(strategy) => strategy,
            Wanted::Auto => {
                let choice = Auto::default().choose(&spec).map_err(Failure::input)?;
                eprintln!("strategy: {choice}");
                choice.strategy
            }
        };
        spec.with_strategy(strategy).map_err(Failure::input)
    }
}
