//! The options that say which keys every query attends to, the same in every program.

use clap::Args;
use ring_core::{HeadOffsets, Mixing, Pattern};

use crate::{command_line::Failure, length::parse_length};

/// Which keys every query attends to.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Pattern")]
pub struct PatternOptions {
    /// Segment lengths of the branches, e.g. 2048,4096,8192; absent: full attention.
    #[arg(long, value_name = "W,W,..", value_delimiter = ',', value_parser = parse_length)]
    pub segment_lengths: Vec<usize>,

    /// Dilation rates of the branches, one for each segment length, e.g. 1,2,4.
    #[arg(long, value_name = "R,R,..", value_delimiter = ',', value_parser = parse_length)]
    pub dilation_rates: Vec<usize>,

    /// Hide keys after the query's position.
    #[arg(long)]
    pub causal: bool,

    /// Which positions a head selects in a branch of rate r, by its key/value head h: `cyclic` those h % r after the
    /// segment's start (LongNet), `blocked` those h / ceil(heads / r) after it (torchscale).
    #[arg(long, value_name = "cyclic|blocked", default_value = "cyclic")]
    pub offsets: HeadOffsets,

    /// How branches are mixed: `longnet` weighs them by their softmax denominators, `head-groups` gives every branch its own
    /// heads.
    #[arg(long, value_name = "longnet|head-groups", default_value = "longnet")]
    pub mixing: Mixing,

    /// Attention window LEFT,RIGHT. Not supported yet.
    #[arg(long, value_name = "LEFT,RIGHT", allow_hyphen_values = true)]
    pub window: Option<String>,

    /// Lengths of packed documents. Not supported yet.
    #[arg(long, value_name = "N,N,..", allow_hyphen_values = true)]
    pub document_lengths: Option<String>,

    /// Bound on the scores, S becomes c tanh(S/c). Not supported yet.
    #[arg(long, value_name = "C", allow_hyphen_values = true)]
    pub softcap: Option<String>,
}

impl PatternOptions {
    /// The pattern they describe.
    ///
    /// # Errors
    /// [`Failure::Unsupported`] for features that do not exist, [`Failure::Input`] for a pattern that cannot be.
    pub fn pattern(&self) -> Result<Pattern, Failure> {
        self.refuse_unsupported()?;
        let full = self.segment_lengths.is_empty() && self.dilation_rates.is_empty();
        let pattern = if full {
            Pattern::full()
        } else {
            Pattern::dilated(&self.segment_lengths, &self.dilation_rates).map_err(Failure::input)?
        };
        let pattern = if self.causal {
            pattern.causal()
        } else {
            pattern
        };
        Ok(pattern.with_offsets(self.offsets).with_mixing(self.mixing))
    }

    fn refuse_unsupported(&self) -> Result<(), Failure> {
        for (feature, value) in [
            ("--window (attention windows)", &self.window),
            (
                "--document-lengths (packed documents)",
                &self.document_lengths,
            ),
            ("--softcap (bounded scores)", &self.softcap),
        ] {
            if value.is_some() {
                return Err(Failure::Unsupported(feature.to_string()));
            }
        }
        Ok(())
    }
}
