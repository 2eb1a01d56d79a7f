//! One function for every kind of attention: [`create_multihead_dilated_attention`].

use std::{fmt, str::FromStr};

use burn::tensor::Device;
use ring_burn::{Auto, PatternError, Ring, RingError, Strategy};
use serde::{Deserialize, Serialize};

use crate::multihead::{MultiheadDilatedAttention, MultiheadDilatedAttentionConfig};

/// How attention is computed. All kinds give the same numbers, to rounding; they differ in what travels between ranks, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// By the strategy that costs least ([`Auto`]), unless the ring says how.
    #[default]
    Auto,
    /// On one rank; a ring of several is an error.
    Standard,
    /// Selected keys and values travel ([`Strategy::Ring`]), unless the ring says otherwise.
    Ring,
    /// In the backward pass queries travel where that is fewer bytes ([`Strategy::RingQuery`]).
    RingQuery,
    /// Every rank gets all keys and values ([`Strategy::AllGather`]).
    AllGather,
    /// Every rank computes a part of the heads ([`Strategy::HeadParallel`]).
    HeadParallel,
    /// Groups of ranks divide the heads, rings of ranks the positions ([`Strategy::Mesh`]).
    Mesh {
        /// Ranks that divide the heads.
        head_ranks: usize,
    },
    /// As [`Ring`](Self::Ring), for tokens of a grid in the order of a Hilbert curve, whose sides
    /// [`grid`](MultiheadDilatedAttentionConfig::grid) tells: each rank's rows are those of its
    /// [`shard_cells`](ring_burn::shard_cells), and rotary positions are those of the cells.
    Hilbert,
    /// As [`Ring`](Self::Ring), and memory that is refused is tried for again with less, by all ranks together
    /// ([`Recovery`](ring_burn::Recovery)): by the ring's own policy, or the default one, which all layers on a ring share.
    /// [`Ring::recovering`] tells what happened.
    Production,
}

impl AttentionKind {
    /// The names, as they parse.
    pub const NAMES: &'static str = "auto, standard, ring, ring-query, all-gather, head-parallel, mesh:HEAD_RANKS, hilbert, production";

    /// The ring that this kind of attention runs on.
    pub(crate) fn on(self, ring: &Ring) -> Result<Ring, RingError> {
        let ring = ring.clone();
        let divided = |strategy| Ok(ring.clone().with_strategy(strategy));
        match self {
            Self::Standard if ring.world_size() > 1 => Err(RingError::Value(format!(
                "standard attention runs on one rank, the ring has {}; use \"ring\" or \"auto\"",
                ring.world_size()
            ))),
            Self::Auto if !ring.is_division_given() => Ok(ring.with_auto(Auto::default())),
            Self::Auto | Self::Standard | Self::Ring | Self::Hilbert => Ok(ring),
            Self::Production => Ok(ring.recovering()),
            Self::RingQuery => divided(Strategy::RingQuery),
            Self::AllGather => divided(Strategy::AllGather),
            Self::HeadParallel => divided(Strategy::HeadParallel),
            Self::Mesh { head_ranks } => divided(Strategy::Mesh { head_ranks }),
        }
    }
}

impl FromStr for AttentionKind {
    type Err = PatternError;

    fn from_str(name: &str) -> Result<Self, PatternError> {
        let unknown = || PatternError::UnknownName {
            what: "kind of attention",
            got: name.into(),
            valid: Self::NAMES,
        };
        Ok(match name {
            "auto" => Self::Auto,
            "standard" => Self::Standard,
            "ring" => Self::Ring,
            "ring-query" => Self::RingQuery,
            "all-gather" => Self::AllGather,
            "head-parallel" => Self::HeadParallel,
            "hilbert" => Self::Hilbert,
            "production" => Self::Production,
            _ => {
                let head_ranks = name.strip_prefix("mesh:").ok_or_else(unknown)?;
                let head_ranks = head_ranks.parse().map_err(|_| unknown())?;
                Self::Mesh { head_ranks }
            }
        })
    }
}

impl fmt::Display for AttentionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Standard => f.write_str("standard"),
            Self::Ring => f.write_str("ring"),
            Self::RingQuery => f.write_str("ring-query"),
            Self::AllGather => f.write_str("all-gather"),
            Self::HeadParallel => f.write_str("head-parallel"),
            Self::Mesh { head_ranks } => write!(f, "mesh:{head_ranks}"),
            Self::Hilbert => f.write_str("hilbert"),
            Self::Production => f.write_str("production"),
        }
    }
}

/// Multi-head dilated attention of the given kind.
///
/// # Errors
/// As [`MultiheadDilatedAttentionConfig::try_init`].
///
/// ```
/// use burn::tensor::Device;
/// use ring_multihead::{MultiheadDilatedAttentionConfig, create_multihead_dilated_attention};
///
/// let config = MultiheadDilatedAttentionConfig::new(64, 4, vec![32, 128], vec![1, 2]);
/// let attention = create_multihead_dilated_attention("ring".parse()?, &config, &Device::flex())?;
/// assert_eq!(attention.kind().to_string(), "ring");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn create_multihead_dilated_attention(
    kind: AttentionKind,
    config: &MultiheadDilatedAttentionConfig,
    device: &Device,
) -> Result<MultiheadDilatedAttention, RingError> {
    config.init_kind(kind, device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_an_unknown_one_lists_them() {
        for name in [
            "auto",
            "standard",
            "ring",
            "ring-query",
            "all-gather",
            "head-parallel",
            "mesh:2",
            "hilbert",
            "production",
        ] {
            assert_eq!(name.parse::<AttentionKind>().unwrap().to_string(), name);
        }
        let error = "improved".parse::<AttentionKind>().unwrap_err().to_string();
        assert!(
            error.contains("improved") && error.contains(AttentionKind::NAMES),
            "{error}"
        );
    }
}
