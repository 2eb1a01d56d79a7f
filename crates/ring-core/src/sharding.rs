//! Who owns which positions: [`Sharding`].

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::pattern::PatternError;

/// A range of positions `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// First position.
    pub start: usize,
    /// One past the last position.
    pub end: usize,
}

impl Span {
    /// Number of positions.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether the span holds no position.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// Stripes per rank when no size is given.
const STRIPES_PER_RANK: usize = 8;

/// How the positions of a sequence are dealt out to ranks.
///
/// The sequence of `N` positions is cut into chunks, chunk `c` of `C` being `floor(c N / C) .. floor((c+1) N / C)`. Shards may
/// be uneven, and empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharding {
    /// Rank `p` of `P` owns chunk `p` of `P`.
    #[default]
    Contiguous,
    /// Rank `p` of `P` owns chunks `p` and `2P-1-p` of `2P`, which balances causal work.
    Zigzag,
    /// Rank `p` of `P` owns chunks `p, p+P, p+2P, ...` of about `chunk_size` positions each; by default 8 chunks a rank.
    /// Plans grow with the square of the number of chunks a rank owns: choose chunks as large as balance allows.
    Striped {
        /// Positions of one chunk.
        chunk_size: Option<usize>,
    },
}

impl Sharding {
    /// The spans that `rank` owns, ascending, none empty, neighbours merged. Row `i` of the rank's tensors is the `i`-th
    /// position of these spans.
    pub fn spans(&self, length: usize, world_size: usize, rank: usize) -> Vec<Span> {
        let (chunks, own): (usize, Vec<usize>) = match *self {
            Sharding::Contiguous => (world_size, vec![rank]),
            Sharding::Zigzag => (2 * world_size, vec![rank, 2 * world_size - 1 - rank]),
            Sharding::Striped { chunk_size } => {
                let size = chunk_size
                    .unwrap_or(length.div_ceil(STRIPES_PER_RANK * world_size))
                    .max(1);
                let chunks = length.div_ceil(size);
                (chunks, (rank..chunks).step_by(world_size).collect())
            }
        };
        let boundary = |chunk: usize| (chunk as u128 * length as u128 / chunks as u128) as usize;
        let mut spans: Vec<Span> = Vec::with_capacity(own.len());
        for chunk in own {
            let span = Span {
                start: boundary(chunk),
                end: boundary(chunk + 1),
            };
            match spans.last_mut() {
                _ if span.is_empty() => {}
                Some(last) if last.end == span.start => last.end = span.end,
                _ => spans.push(span),
            }
        }
        spans
    }

    /// Number of positions that `rank` owns.
    pub fn shard_len(&self, length: usize, world_size: usize, rank: usize) -> usize {
        self.spans(length, world_size, rank)
            .iter()
            .map(Span::len)
            .sum()
    }
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sharding::Contiguous => f.write_str("contiguous"),
            Sharding::Zigzag => f.write_str("zigzag"),
            Sharding::Striped { chunk_size: None } => f.write_str("striped"),
            Sharding::Striped {
                chunk_size: Some(size),
            } => write!(f, "striped:{size}"),
        }
    }
}

impl FromStr for Sharding {
    type Err = PatternError;

    /// Parses `contiguous`, `zigzag`, `striped` or `striped:SIZE`.
    fn from_str(name: &str) -> Result<Self, PatternError> {
        let unknown = || PatternError::UnknownName {
            what: "sharding",
            got: name.into(),
            valid: "contiguous, zigzag, striped, striped:CHUNK_SIZE",
        };
        match name {
            "contiguous" => Ok(Self::Contiguous),
            "zigzag" => Ok(Self::Zigzag),
            "striped" => Ok(Self::Striped { chunk_size: None }),
            _ => {
                let size = name.strip_prefix("striped:").ok_or_else(unknown)?;
                let size: usize = size.parse().map_err(|_| unknown())?;
                if size == 0 {
                    return Err(unknown());
                }
                Ok(Self::Striped {
                    chunk_size: Some(size),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_sharding() -> impl Strategy<Value = Sharding> {
        prop_oneof![
            Just(Sharding::Contiguous),
            Just(Sharding::Zigzag),
            Just(Sharding::Striped { chunk_size: None }),
            (1_usize..20).prop_map(|size| Sharding::Striped {
                chunk_size: Some(size)
            }),
        ]
    }

    proptest! {
        #[test]
        fn every_position_has_exactly_one_owner(
            sharding in any_sharding(), length in 0_usize..200, world_size in 1_usize..12,
        ) {
            let mut owners = vec![0; length];
            for rank in 0..world_size {
                let spans = sharding.spans(length, world_size, rank);
                for pair in spans.windows(2) {
                    prop_assert!(pair[0].end < pair[1].start, "ascending and merged");
                }
                for span in spans {
                    prop_assert!(!span.is_empty());
                    for count in &mut owners[span.start..span.end] {
                        *count += 1;
                    }
                }
            }
            prop_assert!(owners.iter().all(|&count| count == 1));
        }

        #[test]
        fn names_parse_back(sharding in any_sharding()) {
            prop_assert_eq!(sharding.to_string().parse::<Sharding>().unwrap(), sharding);
        }
    }

    #[test]
    fn zigzag_pairs_the_first_chunk_with_the_last() {
        let spans = Sharding::Zigzag.spans(16, 2, 0);
        assert_eq!(
            spans,
            [Span { start: 0, end: 4 }, Span { start: 12, end: 16 }]
        );
        assert_eq!(
            Sharding::Zigzag.spans(16, 2, 1),
            [Span { start: 4, end: 12 }]
        );
    }

    #[test]
    fn unknown_names_list_the_valid_ones() {
        for name in ["ring", "striped:", "striped:0", "striped:x"] {
            let error = name.parse::<Sharding>().unwrap_err().to_string();
            assert!(error.contains("zigzag"), "{error}");
        }
    }
}
