//! The options that say what scores and weights go through.

use clap::Args;
use ring_burn::alibi_slopes;
use ring_core::{AttentionSpec, DropoutSeed};

use super::Input;
use crate::command_line::Failure;

/// What scores and weights go through, beside scale and softmax.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Scores")]
pub struct ScoreOptions {
    /// Bound on the scores: S becomes c tanh(S/c).
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    pub softcap: Option<f32>,

    /// ALiBi with the usual slopes for the number of query heads: S becomes S - slope |n-m|, after the softcap. A tensor alibi_slopes
    /// of the input gives other slopes.
    #[arg(long)]
    pub alibi: bool,

    /// Probability that an attention weight is dropped; those that are kept count 1/(1-P) times.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub dropout: Option<f32>,

    /// Chooses which weights are dropped; the same ones for any number of ranks [default: 0]
    #[arg(long, value_name = "S", requires = "dropout")]
    pub dropout_seed: Option<u64>,
}

impl ScoreOptions {
    /// The computation with these scores, and the slopes that are in `input`.
    ///
    /// # Errors
    /// [`Failure::Input`] for numbers out of range, another number of slopes than of query heads, slopes given twice.
    pub fn of(&self, mut spec: AttentionSpec, input: &Input) -> Result<AttentionSpec, Failure> {
        if let Some(softcap) = self.softcap {
            spec = spec.with_softcap(softcap).map_err(Failure::input)?;
        }
        let slopes = match input.alibi_slopes() {
            Some(_) if self.alibi => {
                return Err(Failure::Input(
                    "--alibi asks for the usual slopes, but the input has a tensor \"alibi_slopes\""
                        .to_string(),
                ));
            }
            Some(slopes) => Some(slopes.to_vec()),
            None => self.alibi.then(|| {
                let slopes = alibi_slopes(spec.shape.query_heads);
                slopes.into_iter().map(|slope| slope as f32).collect()
            }),
        };
        if let Some(slopes) = slopes {
            spec = spec.with_alibi_slopes(slopes).map_err(Failure::input)?;
        }
        match self.dropout {
            Some(probability) => spec.with_dropout(probability).map_err(Failure::input),
            None => Ok(spec),
        }
    }

    /// What chooses the weights that are dropped.
    pub fn seed(&self) -> DropoutSeed {
        DropoutSeed {
            seed: self.dropout_seed.unwrap_or(0),
            first_entry: 0,
        }
    }
}
