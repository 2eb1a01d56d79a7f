//! One function for every kind of attention: [`create_multihead_dilated_attention`].

use std::{fmt, str::FromStr};

use burn::tensor::Device;
use ring_burn::{PatternError, Ring, RingError};
use serde::{Deserialize, Serialize};

use crate::multihead::{MultiheadDilatedAttention, MultiheadDilatedAttentionConfig};

/// How attention is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// Whatever serves: on one rank as [`Standard`](Self::Standard), on several as [`Ring`](Self::Ring).
    #[default]
    Auto,
    /// On one rank; a ring of several is an error.
    Standard,
    /// Sharded over the ranks, selected keys and values travel.
    Ring,
}

impl AttentionKind {
    /// The names, as they parse.
    pub const NAMES: &'static str = "auto, standard, ring";

    /// Whether this kind can run on such a ring.
    pub(crate) fn check(self, ring: &Ring) -> Result<(), RingError> {
        if self == Self::Standard && ring.world_size() > 1 {
            return Err(RingError::Value(format!(
                "standard attention runs on one rank, the ring has {}; use \"ring\" or \"auto\"",
                ring.world_size()
            )));
        }
        Ok(())
    }
}

impl FromStr for AttentionKind {
    type Err = PatternError;

    fn from_str(name: &str) -> Result<Self, PatternError> {
        match name {
            "auto" => Ok(Self::Auto),
            "standard" => Ok(Self::Standard),
            "ring" => Ok(Self::Ring),
            _ => Err(PatternError::UnknownName {
                what: "kind of attention",
                got: name.into(),
                valid: Self::NAMES,
            }),
        }
    }
}

impl fmt::Display for AttentionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Standard => "standard",
            Self::Ring => "ring",
        })
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
        for kind in [
            AttentionKind::Auto,
            AttentionKind::Standard,
            AttentionKind::Ring,
        ] {
            assert_eq!(kind.to_string().parse::<AttentionKind>().unwrap(), kind);
        }
        let error = "improved".parse::<AttentionKind>().unwrap_err().to_string();
        assert!(
            error.contains("improved") && error.contains(AttentionKind::NAMES),
            "{error}"
        );
    }
}
