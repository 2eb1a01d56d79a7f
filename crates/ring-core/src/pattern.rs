//! What attends to what: [`Pattern`].

use std::{fmt, str::FromStr};

use ring_kernels::Mask;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One branch of a pattern: the sequence cut into segments, every `dilation_rate`-th position of a segment selected.
///
/// A head with offset `s` selects, in segment `i`, the positions `i*w + s, i*w + s + r, ...` below `(i+1)*w`; the pair
/// (query, key) belongs to the branch if both are selected in the same segment (LongNet, arXiv 2307.02486, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Branch {
    /// Positions per segment (`w`); `None` is one segment that holds every position.
    pub segment_length: Option<usize>,
    /// Distance of selected positions (`r`).
    pub dilation_rate: usize,
}

/// How the heads of a branch with dilation rate `r` are shifted against each other, so that together they see every key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadOffsets {
    /// `kv_head % r`, as in the LongNet paper.
    #[default]
    Cyclic,
    /// `kv_head / ceil(kv_heads / r)`: contiguous blocks of heads, as in torchscale.
    Blocked,
}

/// How the branches are mixed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mixing {
    /// Every head has every branch; the branches are weighed by their softmax denominators, which is one softmax over the
    /// keys of all of them, a key that several branches hold counting several times (LongNet, eq. 10).
    #[default]
    LongNet,
    /// The key/value heads are split over the branches, extra heads to the first groups; group `i` has branch `i` alone, with
    /// offset `i % r`, and the output is divided by the number of branches (dilated-attention-pytorch).
    HeadGroups,
}

/// A pattern that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PatternError {
    /// No branch.
    #[error("a dilated pattern needs at least one segment length")]
    NoBranch,
    /// Lists of different length.
    #[error(
        "{segment_lengths} segment lengths but {dilation_rates} dilation rates; give one rate for each length"
    )]
    ListLengths {
        /// Number of segment lengths.
        segment_lengths: usize,
        /// Number of dilation rates.
        dilation_rates: usize,
    },
    /// A segment of no position.
    #[error("segment length {index} is 0; every segment length must be at least 1")]
    ZeroSegmentLength {
        /// Index in the list.
        index: usize,
    },
    /// A rate of zero.
    #[error("dilation rate {index} is 0; every dilation rate must be at least 1")]
    ZeroDilationRate {
        /// Index in the list.
        index: usize,
    },
    /// A number that positions cannot reach.
    #[error("{value} is more than the largest length, {max}")]
    TooLarge {
        /// The number.
        value: usize,
        /// The largest allowed.
        max: usize,
    },
    /// Head groups with fewer heads than branches.
    #[error(
        "head groups need at least one key/value head for each of the {branches} branches, there are {kv_heads}"
    )]
    TooFewHeads {
        /// Key/value heads.
        kv_heads: usize,
        /// Branches.
        branches: usize,
    },
    /// A window that reaches into a future that is hidden.
    #[error(
        "the pattern is causal, but its window reaches {right} positions after the query; give 0 or -1 (no bound)"
    )]
    Contradiction {
        /// The window's right side.
        right: u64,
    },
    /// A name that stands for nothing.
    #[error("unknown {what} \"{got}\"; valid: {valid}")]
    UnknownName {
        /// What was asked for.
        what: &'static str,
        /// The name given.
        got: String,
        /// The names that exist.
        valid: &'static str,
    },
}

/// Largest segment length, dilation rate or sequence length: 2^40 positions.
pub const MAX_LENGTH: usize = 1 << 40;

/// Which keys every query attends to: a list of branches, and what causality and a sliding window leave of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct Pattern {
    branches: Vec<Branch>,
    causal: bool,
    window: Mask,
    offsets: HeadOffsets,
    mixing: Mixing,
}

impl Pattern {
    /// Ordinary attention: every query attends to every key.
    pub fn full() -> Self {
        Self {
            branches: vec![Branch {
                segment_length: None,
                dilation_rate: 1,
            }],
            causal: false,
            window: Mask::NONE,
            offsets: HeadOffsets::Cyclic,
            mixing: Mixing::LongNet,
        }
    }

    /// LongNet's dilated attention: branch `i` has segments of `segment_lengths[i]` positions, of which every
    /// `dilation_rates[i]`-th is selected.
    ///
    /// # Errors
    /// [`PatternError`] for empty lists, lists of different length, zeros.
    ///
    /// ```
    /// use ring_core::Pattern;
    /// let pattern = Pattern::dilated(&[2048, 4096, 8192], &[1, 2, 4])?.causal();
    /// assert_eq!(pattern.branches().len(), 3);
    /// # Ok::<(), ring_core::PatternError>(())
    /// ```
    pub fn dilated(
        segment_lengths: &[usize],
        dilation_rates: &[usize],
    ) -> Result<Self, PatternError> {
        if segment_lengths.len() != dilation_rates.len() {
            return Err(PatternError::ListLengths {
                segment_lengths: segment_lengths.len(),
                dilation_rates: dilation_rates.len(),
            });
        }
        let branches = segment_lengths
            .iter()
            .zip(dilation_rates)
            .map(|(&length, &rate)| Branch {
                segment_length: Some(length),
                dilation_rate: rate,
            })
            .collect();
        Self {
            branches,
            ..Self::full()
        }
        .checked()
    }

    fn checked(self) -> Result<Self, PatternError> {
        if self.branches.is_empty() {
            return Err(PatternError::NoBranch);
        }
        for (index, branch) in self.branches.iter().enumerate() {
            if branch.segment_length == Some(0) {
                return Err(PatternError::ZeroSegmentLength { index });
            }
            if branch.dilation_rate == 0 {
                return Err(PatternError::ZeroDilationRate { index });
            }
            let value = branch.segment_length.unwrap_or(0).max(branch.dilation_rate);
            if value > MAX_LENGTH {
                return Err(PatternError::TooLarge {
                    value,
                    max: MAX_LENGTH,
                });
            }
        }
        match self.window.right {
            Some(right) if self.causal && right > 0 => Err(PatternError::Contradiction { right }),
            _ => Ok(self),
        }
    }

    /// Refuses what contradicts itself.
    pub(crate) fn check(&self) -> Result<(), PatternError> {
        self.clone().checked().map(drop)
    }

    /// The same pattern, keys after the query's position hidden.
    ///
    /// A [window](Self::with_window) that reaches after the query contradicts it: computations with both are refused.
    #[must_use]
    pub fn causal(self) -> Self {
        Self {
            causal: true,
            ..self
        }
    }

    /// The same pattern under a sliding window: of its keys, a query at `n` sees those from `n - left` to `n + right`. `None` is
    /// no bound. The window counts positions, not selected ones: a dilated branch of rate `r` has `1/r` of them.
    #[must_use]
    pub fn with_window(self, left: Option<u64>, right: Option<u64>) -> Self {
        Self {
            window: Mask { left, right },
            ..self
        }
    }

    /// The same pattern with other head offsets.
    #[must_use]
    pub fn with_offsets(self, offsets: HeadOffsets) -> Self {
        Self { offsets, ..self }
    }

    /// The same pattern with another mixing of branches.
    #[must_use]
    pub fn with_mixing(self, mixing: Mixing) -> Self {
        Self { mixing, ..self }
    }

    /// The branches.
    pub fn branches(&self) -> &[Branch] {
        &self.branches
    }

    /// What causality and the window leave.
    pub fn mask(&self) -> Mask {
        Mask {
            right: if self.causal {
                Some(0)
            } else {
                self.window.right
            },
            ..self.window
        }
    }

    /// The sliding window.
    pub fn window(&self) -> Mask {
        self.window
    }

    /// Whether keys after the query are hidden, by causality or by the window.
    pub fn is_causal(&self) -> bool {
        self.mask().right == Some(0)
    }

    /// The head offsets.
    pub fn offsets(&self) -> HeadOffsets {
        self.offsets
    }

    /// The mixing of branches.
    pub fn mixing(&self) -> Mixing {
        self.mixing
    }

    /// Factor on the output: one over the number of branches for head groups, else 1.
    pub fn output_scale(&self) -> f32 {
        match self.mixing {
            Mixing::LongNet => 1.0,
            Mixing::HeadGroups => 1.0 / self.branches.len() as f32,
        }
    }

    /// Whether the pattern can be used with so many key/value heads.
    ///
    /// # Errors
    /// [`PatternError::TooFewHeads`] for head groups with fewer heads than branches.
    pub fn check_heads(&self, kv_heads: usize) -> Result<(), PatternError> {
        if self.mixing == Mixing::HeadGroups && kv_heads < self.branches.len() {
            return Err(PatternError::TooFewHeads {
                kv_heads,
                branches: self.branches.len(),
            });
        }
        Ok(())
    }

    /// Offset `s` of a key/value head in a branch, or `None` if the head does not have that branch.
    ///
    /// The offset belongs to the key/value head, so that the query heads of one group share their key rows.
    pub fn offset(&self, branch: usize, kv_head: usize, kv_heads: usize) -> Option<usize> {
        let rate = self.branches[branch].dilation_rate;
        match self.mixing {
            Mixing::LongNet => Some(match self.offsets {
                HeadOffsets::Cyclic => kv_head % rate,
                HeadOffsets::Blocked => kv_head / kv_heads.div_ceil(rate),
            }),
            Mixing::HeadGroups => (head_group(kv_head, kv_heads, self.branches.len()) == branch)
                .then_some(branch % rate),
        }
    }
}

/// The group of a head when `heads` are split over `groups`, the first `heads % groups` groups having one more.
fn head_group(head: usize, heads: usize, groups: usize) -> usize {
    let (small, extra) = (heads / groups, heads % groups);
    let in_large_groups = extra * (small + 1);
    if head < in_large_groups {
        head / (small + 1)
    } else {
        extra + (head - in_large_groups) / small
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename = "Pattern")]
struct Unchecked {
    branches: Vec<Branch>,
    causal: bool,
    window: Mask,
    offsets: HeadOffsets,
    mixing: Mixing,
}

impl From<Pattern> for Unchecked {
    fn from(pattern: Pattern) -> Self {
        Self {
            branches: pattern.branches,
            causal: pattern.causal,
            window: pattern.window,
            offsets: pattern.offsets,
            mixing: pattern.mixing,
        }
    }
}

impl TryFrom<Unchecked> for Pattern {
    type Error = PatternError;

    fn try_from(raw: Unchecked) -> Result<Self, PatternError> {
        Self {
            branches: raw.branches,
            causal: raw.causal,
            window: raw.window,
            offsets: raw.offsets,
            mixing: raw.mixing,
        }
        .checked()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |field: fn(&Branch) -> String| {
            let items: Vec<String> = self.branches.iter().map(field).collect();
            items.join(",")
        };
        let whole = |branch: &Branch| branch.segment_length.is_none();
        if self.branches.iter().all(whole) && self.branches.len() == 1 {
            f.write_str("full")?;
        } else {
            write!(
                f,
                "dilated [{}] / [{}]",
                list(|branch| branch
                    .segment_length
                    .map_or("all".into(), |length| length.to_string())),
                list(|branch| branch.dilation_rate.to_string()),
            )?;
        }
        if self.causal {
            f.write_str(", causal")?;
        }
        if self.window != Mask::NONE {
            let bound = |bound: Option<u64>| bound.map_or("all".to_string(), |n| n.to_string());
            let Mask { left, right } = self.window;
            write!(f, ", window {},{}", bound(left), bound(right))?;
        }
        if self.offsets == HeadOffsets::Blocked {
            f.write_str(", blocked offsets")?;
        }
        if self.mixing == Mixing::HeadGroups {
            f.write_str(", head groups")?;
        }
        Ok(())
    }
}

impl FromStr for HeadOffsets {
    type Err = PatternError;

    fn from_str(name: &str) -> Result<Self, PatternError> {
        match name {
            "cyclic" => Ok(Self::Cyclic),
            "blocked" => Ok(Self::Blocked),
            _ => Err(PatternError::UnknownName {
                what: "head offsets",
                got: name.into(),
                valid: "cyclic, blocked",
            }),
        }
    }
}

impl FromStr for Mixing {
    type Err = PatternError;

    fn from_str(name: &str) -> Result<Self, PatternError> {
        match name {
            "longnet" => Ok(Self::LongNet),
            "head-groups" => Ok(Self::HeadGroups),
            _ => Err(PatternError::UnknownName {
                what: "mixing",
                got: name.into(),
                valid: "longnet, head-groups",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lists_are_refused_with_the_reason() {
        assert_eq!(Pattern::dilated(&[], &[]), Err(PatternError::NoBranch));
        assert_eq!(
            Pattern::dilated(&[4, 8], &[1]),
            Err(PatternError::ListLengths {
                segment_lengths: 2,
                dilation_rates: 1
            })
        );
        assert_eq!(
            Pattern::dilated(&[4, 0], &[1, 1]),
            Err(PatternError::ZeroSegmentLength { index: 1 })
        );
        assert_eq!(
            Pattern::dilated(&[4], &[0]),
            Err(PatternError::ZeroDilationRate { index: 0 })
        );
        assert!(Pattern::dilated(&[usize::MAX], &[1]).is_err());
    }

    #[test]
    fn a_pattern_read_from_text_is_checked_too() {
        let good = Pattern::dilated(&[4, 8], &[1, 2]).unwrap().causal();
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<Pattern>(&text).unwrap(), good);
        let bad = text.replace("\"dilation_rate\":2", "\"dilation_rate\":0");
        assert!(serde_json::from_str::<Pattern>(&bad).is_err());
    }

    #[test]
    fn head_groups_lose_no_head() {
        let groups: Vec<usize> = (0..8).map(|head| head_group(head, 8, 3)).collect();
        assert_eq!(groups, [0, 0, 0, 1, 1, 1, 2, 2]);
    }

    #[test]
    fn offsets_follow_their_definition() {
        let pattern = Pattern::dilated(&[16, 64], &[1, 4]).unwrap();
        let cyclic: Vec<_> = (0..5).map(|h| pattern.offset(1, h, 5).unwrap()).collect();
        assert_eq!(cyclic, [0, 1, 2, 3, 0]);
        let blocked = pattern.with_offsets(HeadOffsets::Blocked);
        let blocked: Vec<_> = (0..5).map(|h| blocked.offset(1, h, 5).unwrap()).collect();
        assert_eq!(blocked, [0, 0, 1, 1, 2]);
    }

    #[test]
    fn head_groups_need_a_head_each() {
        let pattern = Pattern::dilated(&[4, 8], &[1, 2])
            .unwrap()
            .with_mixing(Mixing::HeadGroups);
        assert!(pattern.check_heads(1).is_err());
        assert!(pattern.check_heads(2).is_ok());
    }
}
