//! The options that say which keys every query attends to, the same in `attend` and `plan`.

use std::str::FromStr;

use clap::Args;
use ring_core::{AttentionSpec, Documents, HeadOffsets, MAX_LENGTH, Mixing, Pattern, SpecError};

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

    /// Sliding window: a query at position n sees keys from n-L to n+R; -1 is no bound. It counts positions, not selected ones.
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    pub window: Option<Window>,

    /// Lengths of documents packed one after the other, each of which attends to itself alone: for all batch entries, or those of
    /// each, separated by semicolons, e.g. "7,33;40".
    #[arg(long, value_name = "N,N,..[;N,N,..]", value_parser = parse_documents, allow_hyphen_values = true)]
    pub document_lengths: Option<Documents>,

    /// Number of keys of every batch entry; keys at later positions are padding, which nothing sees.
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = parse_length, allow_hyphen_values = true)]
    pub key_lengths: Option<Vec<usize>>,
}

impl PatternOptions {
    /// The pattern they describe.
    ///
    /// # Errors
    /// [`Failure::Input`] for a pattern that cannot be.
    pub fn pattern(&self) -> Result<Pattern, Failure> {
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
        let Window { left, right } = self.window.unwrap_or_default();
        Ok(pattern
            .with_window(left, right)
            .with_offsets(self.offsets)
            .with_mixing(self.mixing))
    }

    /// The computation with documents and padding.
    ///
    /// # Errors
    /// [`SpecError`] for lengths that do not fit the batch.
    pub fn masked(&self, mut spec: AttentionSpec) -> Result<AttentionSpec, SpecError> {
        if let Some(documents) = &self.document_lengths {
            spec = spec.with_documents(documents.clone())?;
        }
        if let Some(lengths) = &self.key_lengths {
            spec = spec.with_key_lengths(lengths.clone())?;
        }
        Ok(spec)
    }
}

/// How far a window reaches, in positions; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Before the query.
    pub left: Option<u64>,
    /// After the query.
    pub right: Option<u64>,
}

impl Window {
    /// The bounds as numbers, -1 for none.
    pub fn bounds(self) -> (i64, i64) {
        let number = |bound: Option<u64>| bound.map_or(-1, |bound| bound as i64);
        (number(self.left), number(self.right))
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bound = |text: &str| match text.trim() {
            "-1" => Ok(None),
            text => parse_length(text)
                .ok()
                .filter(|&bound| bound <= MAX_LENGTH)
                .map(|bound| Some(bound as u64))
                .ok_or_else(|| {
                    format!("\"{text}\" is neither a number of positions nor -1, which is no bound")
                }),
        };
        let (left, right) = text
            .split_once(',')
            .ok_or("two numbers are needed, LEFT,RIGHT, e.g. 1023,0")?;
        Ok(Self {
            left: bound(left)?,
            right: bound(right)?,
        })
    }
}

fn parse_documents(text: &str) -> Result<Documents, String> {
    let list = |text: &str| text.split(',').map(parse_length).collect();
    let mut lists: Vec<Vec<usize>> = text.split(';').map(list).collect::<Result<_, String>>()?;
    Ok(match lists.len() {
        1 => Documents::new(lists.remove(0)),
        _ => Documents::per_entry(lists),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_two_bounds() {
        let window = |left, right| Ok(Window { left, right });
        assert_eq!("13,0".parse(), window(Some(13), Some(0)));
        assert_eq!("-1,4".parse(), window(None, Some(4)));
        assert_eq!("2K,-1".parse(), window(Some(2048), None));
        assert_eq!("-1,-1".parse::<Window>().unwrap().bounds(), (-1, -1));
        for text in [
            "", "4", "4,", ",4", "-2,4", "4,-2", "1,2,3", "a,b", "1e18,0",
        ] {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }

    #[test]
    fn documents_are_those_of_all_entries_or_of_each() {
        assert_eq!(parse_documents("7,33"), Ok(Documents::new(vec![7, 33])));
        let of_each = Documents::per_entry(vec![vec![7, 33], vec![40]]);
        assert_eq!(parse_documents("7,33;40"), Ok(of_each));
        for text in ["", "7,", "7;", "7,-1", "x"] {
            assert!(parse_documents(text).is_err(), "{text}");
        }
    }
}
