//! How ranks divide one computation among them: [`Strategy`].

use std::{fmt, ops::Range, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    pattern::PatternError,
    spec::{AttentionSpec, SpecError},
};

/// How ranks divide one computation among them. All strategies compute the same, from the same shards and to the same shards;
/// they differ in what travels, when, and in who computes what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Every rank computes for its own queries. Of keys and values those rows travel, straight from their owner, that the
    /// receiver's queries see, hop by hop while others are computed with; their gradients travel home. Memory O(N/P).
    #[default]
    Ring,
    /// As [`Ring`](Self::Ring), but in the backward pass queries travel to the keys, with the gradients of their outputs, and
    /// the gradients of queries travel home, between all pairs of ranks where that is fewer bytes.
    RingQuery,
    /// Every rank gets all keys and values, visible or not, all at once, and sends all their gradients home: what a collective
    /// all-gather does, whose memory is O(N). The baseline of earlier systems.
    AllGather,
    /// Every rank gets all positions of its part of the heads and computes alone (DeepSpeed Ulysses, arXiv 2309.14509). Needs as
    /// many key/value heads as ranks, or a multiple. Memory O(N/P).
    HeadParallel,
    /// Groups of `head_ranks` neighbouring ranks divide the heads as [`HeadParallel`](Self::HeadParallel) does, and each holds the
    /// positions of its whole group; ranks with the same heads form a ring. Memory O(N/P).
    Mesh {
        /// Ranks that divide the heads: a divisor of the number of ranks and of the number of key/value heads.
        head_ranks: usize,
    },
    /// Rank 0 gets everything and computes alone: for sequences so short that nothing else pays.
    OneRank,
}

impl Strategy {
    /// The names, as they parse.
    pub const NAMES: &'static str =
        "ring, ring-query, all-gather, head-parallel, mesh:HEAD_RANKS, one-rank";

    /// All strategies that a computation could be divided by; of meshes those that are none of the others.
    pub fn candidates(spec: &AttentionSpec) -> Vec<Self> {
        let meshes = (2..spec.world_size).map(|head_ranks| Self::Mesh { head_ranks });
        let mut candidates = vec![Self::Ring, Self::RingQuery, Self::AllGather];
        candidates.extend(meshes);
        candidates.extend([Self::HeadParallel, Self::OneRank]);
        candidates.retain(|strategy| strategy.check(spec).is_ok());
        candidates
    }

    /// Whether this strategy can serve.
    ///
    /// # Errors
    /// [`SpecError::Strategy`], which says why not.
    pub fn check(self, spec: &AttentionSpec) -> Result<(), SpecError> {
        let (ranks, heads) = (spec.world_size, spec.shape.kv_heads);
        let refused = |reason: String| {
            Err(SpecError::Strategy {
                strategy: self,
                reason,
            })
        };
        match self {
            Self::HeadParallel if !heads.is_multiple_of(ranks) => refused(format!(
                "{heads} key/value heads cannot be divided among {ranks} ranks; use ring, or a mesh of fewer ranks"
            )),
            Self::Mesh { head_ranks: 0 } => refused("at least 1 rank must hold the heads".into()),
            Self::Mesh { head_ranks } if !ranks.is_multiple_of(head_ranks) => refused(format!(
                "{ranks} ranks cannot be divided into groups of {head_ranks}"
            )),
            Self::Mesh { head_ranks } if !heads.is_multiple_of(head_ranks) => refused(format!(
                "{heads} key/value heads cannot be divided among {head_ranks} ranks"
            )),
            _ => Ok(()),
        }
    }

    /// Ranks that hold the same positions, and divide the heads.
    pub(crate) fn head_ranks(self, ranks: usize) -> usize {
        match self {
            Self::Ring | Self::RingQuery | Self::AllGather => 1,
            Self::HeadParallel | Self::OneRank => ranks,
            Self::Mesh { head_ranks } => head_ranks,
        }
    }

    /// The key/value heads that rank `index` of those that divide them computes with.
    pub(crate) fn heads_of(self, heads: usize, ranks: usize, index: usize) -> Range<usize> {
        match (self, index) {
            (Self::OneRank, 0) => 0..heads,
            (Self::OneRank, _) => heads..heads,
            _ => {
                let part = heads / self.head_ranks(ranks);
                index * part..(index + 1) * part
            }
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring => f.write_str("ring"),
            Self::RingQuery => f.write_str("ring-query"),
            Self::AllGather => f.write_str("all-gather"),
            Self::HeadParallel => f.write_str("head-parallel"),
            Self::Mesh { head_ranks } => write!(f, "mesh:{head_ranks}"),
            Self::OneRank => f.write_str("one-rank"),
        }
    }
}

impl FromStr for Strategy {
    type Err = PatternError;

    /// Parses what [`Display`](fmt::Display) writes.
    fn from_str(name: &str) -> Result<Self, PatternError> {
        let unknown = || PatternError::UnknownName {
            what: "strategy",
            got: name.into(),
            valid: Self::NAMES,
        };
        Ok(match name {
            "ring" => Self::Ring,
            "ring-query" => Self::RingQuery,
            "all-gather" => Self::AllGather,
            "head-parallel" => Self::HeadParallel,
            "one-rank" => Self::OneRank,
            _ => {
                let head_ranks = name.strip_prefix("mesh:").ok_or_else(unknown)?;
                let head_ranks = head_ranks.parse().map_err(|_| unknown())?;
                Self::Mesh { head_ranks }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pattern, Shape, Sharding};

    fn spec(kv_heads: usize, ranks: usize) -> AttentionSpec {
        let shape = Shape {
            batch: 1,
            query_heads: kv_heads,
            kv_heads,
            head_dim: 8,
        };
        AttentionSpec::new(Pattern::full(), shape, 64)
            .and_then(|spec| spec.sharded(Sharding::Contiguous, ranks))
            .unwrap()
    }

    fn names(spec: &AttentionSpec) -> Vec<String> {
        Strategy::candidates(spec)
            .iter()
            .map(Strategy::to_string)
            .collect()
    }

    #[test]
    fn candidates_are_those_that_can_serve() {
        assert_eq!(
            names(&spec(4, 4)),
            [
                "ring",
                "ring-query",
                "all-gather",
                "mesh:2",
                "head-parallel",
                "one-rank"
            ]
        );
        assert_eq!(
            names(&spec(4, 3)),
            ["ring", "ring-query", "all-gather", "one-rank"]
        );
        assert_eq!(
            names(&spec(2, 6)),
            ["ring", "ring-query", "all-gather", "mesh:2", "one-rank"]
        );
    }

    #[test]
    fn what_cannot_serve_says_why() {
        for (strategy, told) in [
            ("head-parallel", "3 key/value heads"),
            ("mesh:3", "groups of 3"),
            ("mesh:2", "3 key/value heads"),
            ("mesh:0", "at least 1"),
        ] {
            let strategy: Strategy = strategy.parse().unwrap();
            let error = spec(3, 4).with_strategy(strategy).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
            assert!(error.contains(&strategy.to_string()), "{error}");
        }
    }

    #[test]
    fn names_parse_back_and_an_unknown_one_lists_them() {
        for strategy in Strategy::candidates(&spec(6, 6)) {
            assert_eq!(strategy.to_string().parse::<Strategy>().unwrap(), strategy);
        }
        for name in ["ulysses", "mesh", "mesh:", "mesh:x"] {
            let error = name.parse::<Strategy>().unwrap_err().to_string();
            assert!(error.contains("mesh:HEAD_RANKS"), "{error}");
        }
    }
}
