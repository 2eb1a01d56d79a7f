//! One attention computation as all ranks must agree on it: [`AttentionSpec`].

use std::sync::Arc;

use ring_comm::buffer::DType;
use ring_kernels::{Problem, Scores};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    documents::Documents,
    pattern::{MAX_LENGTH, Pattern, PatternError},
    sharding::Sharding,
    strategy::Strategy,
};

/// What cannot be computed.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum SpecError {
    /// The pattern is at fault.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// Query heads that key/value heads do not divide.
    #[error("{query_heads} query heads cannot share {kv_heads} key/value heads: not a multiple")]
    Heads {
        /// Query heads.
        query_heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A size that must not be zero.
    #[error("{what} must be at least 1")]
    Zero {
        /// Which size.
        what: &'static str,
    },
    /// A length that positions cannot reach.
    #[error("{what} is {value}, the largest is {MAX_LENGTH}")]
    TooLong {
        /// Which length.
        what: &'static str,
        /// Its value.
        value: usize,
    },
    /// A scale that is no number.
    #[error("the scale must be a finite number, it is {0}")]
    Scale(f32),
    /// Documents that do not fill the sequence.
    #[error(
        "the documents of batch entry {entry} have {total} positions together, but there are {key_length} keys"
    )]
    DocumentLengths {
        /// The batch entry.
        entry: usize,
        /// The sum of their lengths.
        total: usize,
        /// The number of keys.
        key_length: usize,
    },
    /// Numbers of batch entries that differ.
    #[error("{what} are given for {got} batch entries, there are {batch}")]
    Entries {
        /// What is given.
        what: &'static str,
        /// For how many.
        got: usize,
        /// Batch entries.
        batch: usize,
    },
    /// More keys than there are.
    #[error(
        "key length {length} of batch entry {entry} is more than the number of keys, {key_length}"
    )]
    KeyLength {
        /// The batch entry.
        entry: usize,
        /// Its key length.
        length: usize,
        /// The number of keys.
        key_length: usize,
    },
    /// A bound that bounds nothing.
    #[error("the softcap must be a positive finite number, it is {0}")]
    Softcap(f32),
    /// Slopes for other heads than there are.
    #[error("{got} ALiBi slopes for {query_heads} query heads; give one slope for each")]
    Slopes {
        /// Number of slopes.
        got: usize,
        /// Query heads.
        query_heads: usize,
    },
    /// A slope that is no number, or that distances would make one of.
    #[error("ALiBi slope {index} must be a number from -2^20 to 2^20, it is {slope}")]
    Slope {
        /// Index of the head.
        index: usize,
        /// The slope.
        slope: f32,
    },
    /// A probability that leaves nothing.
    #[error("the dropout must be in [0, 1), it is {0}")]
    Dropout(f32),
    /// More than the counter of dropout holds.
    #[error("with dropout, {what} must be at most {limit}, it is {got}")]
    DropoutCounter {
        /// Which number.
        what: &'static str,
        /// Its value.
        got: usize,
        /// The limit.
        limit: u64,
    },
    /// A strategy that cannot serve.
    #[error("{strategy} cannot serve here: {reason}")]
    Strategy {
        /// The strategy.
        strategy: Strategy,
        /// Why not.
        reason: String,
    },
    /// A machine that no computation could run on.
    #[error("{what} of the machine must be a positive number, it is {value}")]
    Machine {
        /// Which of its figures.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A rank outside the group.
    #[error("rank {rank} does not exist among {world_size}")]
    Rank {
        /// The rank.
        rank: usize,
        /// The group's size.
        world_size: usize,
    },
}

/// Largest ALiBi slope: times any distance it is a number.
const MAX_SLOPE: f32 = 1_048_576.0;

/// Sizes of heads and batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Batch size.
    pub batch: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; divides `query_heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

/// One attention computation over a group: pattern, lengths, shardings, shape, element type.
///
/// Everything follows from it: the plan of every rank, the bytes that travel, the memory each rank needs. All ranks compare
/// it before their first exchange, and before every one if it has documents or key lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Which keys every query attends to.
    pub pattern: Pattern,
    /// Number of ranks.
    pub world_size: usize,
    /// Who owns which queries.
    pub query_sharding: Sharding,
    /// Who owns which keys and values.
    pub key_sharding: Sharding,
    /// Number of queries, over all ranks.
    pub query_length: usize,
    /// Number of keys, over all ranks.
    pub key_length: usize,
    /// Global position of query 0.
    pub query_offset: i64,
    /// Heads and batch.
    pub shape: Shape,
    /// Factor on the scores.
    pub scale: f32,
    /// Element type of queries, keys, values and outputs.
    pub dtype: DType,
    /// Documents packed into the sequence; a query sees its own alone.
    pub documents: Option<Documents>,
    /// How many keys every batch entry has; those at later positions are padding that nothing sees.
    pub key_lengths: Option<Arc<[usize]>>,
    /// Bound `c` on the scores: `S` becomes `c tanh(S / c)`.
    pub softcap: Option<f32>,
    /// ALiBi's slope of every query head: `S` becomes `S - slope |n - m|`, after the softcap. Constants, without gradient.
    pub alibi_slopes: Option<Arc<[f32]>>,
    /// Probability that a weight is dropped, in `[0, 1)`. Which ones are follows from the seed that is given with the inputs.
    pub dropout: f32,
    /// How ranks divide the computation among them.
    pub strategy: Strategy,
}

impl AttentionSpec {
    /// Self-attention over `length` positions on one rank, f32, `scale = 1/sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`SpecError`] for sizes that are zero or do not fit together.
    pub fn new(pattern: Pattern, shape: Shape, length: usize) -> Result<Self, SpecError> {
        Self {
            pattern,
            world_size: 1,
            query_sharding: Sharding::Contiguous,
            key_sharding: Sharding::Contiguous,
            query_length: length,
            key_length: length,
            query_offset: 0,
            shape,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
            dtype: DType::F32,
            documents: None,
            key_lengths: None,
            softcap: None,
            alibi_slopes: None,
            dropout: 0.0,
            strategy: Strategy::Ring,
        }
        .checked()
    }

    /// Queries of another number than keys. Query `i` stands at position `i + query_offset`: with a causal pattern the last
    /// query stands at the last key, otherwise query 0 at key 0.
    ///
    /// # Errors
    /// [`SpecError::TooLong`].
    pub fn with_lengths(self, query_length: usize, key_length: usize) -> Result<Self, SpecError> {
        let query_offset = if self.pattern.is_causal() {
            key_length as i64 - query_length as i64
        } else {
            0
        };
        Self {
            query_length,
            key_length,
            query_offset,
            ..self
        }
        .checked()
    }

    /// Another position of query 0.
    #[must_use]
    pub fn with_query_offset(self, query_offset: i64) -> Self {
        Self {
            query_offset,
            ..self
        }
    }

    /// The same computation over `world_size` ranks, queries and keys sharded alike.
    ///
    /// # Errors
    /// [`SpecError::Zero`] for a group of no rank.
    pub fn sharded(self, sharding: Sharding, world_size: usize) -> Result<Self, SpecError> {
        Self {
            query_sharding: sharding,
            key_sharding: sharding,
            world_size,
            ..self
        }
        .checked()
    }

    /// Another sharding of keys and values than of queries.
    #[must_use]
    pub fn with_key_sharding(self, key_sharding: Sharding) -> Self {
        Self {
            key_sharding,
            ..self
        }
    }

    /// Another factor on the scores.
    ///
    /// # Errors
    /// [`SpecError::Scale`] unless finite.
    pub fn with_scale(self, scale: f32) -> Result<Self, SpecError> {
        Self { scale, ..self }.checked()
    }

    /// Another element type.
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// Documents packed into the sequence. Their lengths must add up to the number of keys.
    ///
    /// # Errors
    /// [`SpecError::DocumentLengths`], [`SpecError::Entries`].
    pub fn with_documents(self, documents: Documents) -> Result<Self, SpecError> {
        Self {
            documents: Some(documents),
            ..self
        }
        .checked()
    }

    /// How many keys every batch entry has; the keys at later positions are padding.
    ///
    /// # Errors
    /// [`SpecError::Entries`], [`SpecError::KeyLength`].
    pub fn with_key_lengths(self, lengths: Vec<usize>) -> Result<Self, SpecError> {
        Self {
            key_lengths: Some(lengths.into()),
            ..self
        }
        .checked()
    }

    /// A bound on the scores.
    ///
    /// # Errors
    /// [`SpecError::Softcap`] unless positive and finite.
    pub fn with_softcap(self, softcap: f32) -> Result<Self, SpecError> {
        Self {
            softcap: Some(softcap),
            ..self
        }
        .checked()
    }

    /// ALiBi's slopes, one for each query head.
    ///
    /// # Errors
    /// [`SpecError::Slopes`], [`SpecError::Slope`].
    pub fn with_alibi_slopes(self, slopes: Vec<f32>) -> Result<Self, SpecError> {
        Self {
            alibi_slopes: Some(slopes.into()),
            ..self
        }
        .checked()
    }

    /// Dropout of weights.
    ///
    /// # Errors
    /// [`SpecError::Dropout`] for a probability outside `[0, 1)`, [`SpecError::DropoutCounter`].
    pub fn with_dropout(self, probability: f32) -> Result<Self, SpecError> {
        Self {
            dropout: probability,
            ..self
        }
        .checked()
    }

    /// Another way to divide the computation among ranks. Set it last: what is changed later is checked against it.
    ///
    /// # Errors
    /// [`SpecError::Strategy`] if it cannot serve.
    pub fn with_strategy(self, strategy: Strategy) -> Result<Self, SpecError> {
        Self { strategy, ..self }.checked()
    }

    /// Factor on the output: that of the pattern, and what makes up for dropped weights.
    pub fn output_scale(&self) -> f32 {
        self.pattern.output_scale() / (1.0 - self.dropout)
    }

    pub(crate) fn checked(self) -> Result<Self, SpecError> {
        let Shape {
            query_heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        for (what, value) in [
            ("the number of query heads", query_heads),
            ("the number of key/value heads", kv_heads),
            ("the head size", head_dim),
            ("the number of ranks", self.world_size),
        ] {
            if value == 0 {
                return Err(SpecError::Zero { what });
            }
        }
        for (what, value) in [
            ("the number of queries", self.query_length),
            ("the number of keys", self.key_length),
            (
                "the distance of query 0 from key 0",
                self.query_offset.unsigned_abs() as usize,
            ),
        ] {
            if value > MAX_LENGTH {
                return Err(SpecError::TooLong { what, value });
            }
        }
        if query_heads % kv_heads != 0 {
            return Err(SpecError::Heads {
                query_heads,
                kv_heads,
            });
        }
        if !self.scale.is_finite() {
            return Err(SpecError::Scale(self.scale));
        }
        self.pattern.check()?;
        self.pattern.check_heads(kv_heads)?;
        self.check_entries()?;
        self.check_scores()?;
        self.strategy.check(&self)?;
        Ok(self)
    }

    /// Checks what differs from batch entry to batch entry.
    fn check_entries(&self) -> Result<(), SpecError> {
        let (batch, key_length) = (self.shape.batch, self.key_length);
        if let Some(documents) = &self.documents {
            let got = documents.lists();
            if got != 1 && got != batch {
                let what = "document lengths";
                return Err(SpecError::Entries { what, got, batch });
            }
            for entry in 0..got {
                let lengths = documents.lengths(entry).iter();
                let total = lengths.fold(0, |sum: usize, &length| sum.saturating_add(length));
                if total != key_length {
                    return Err(SpecError::DocumentLengths {
                        entry,
                        total,
                        key_length,
                    });
                }
            }
        }
        let Some(lengths) = &self.key_lengths else {
            return Ok(());
        };
        if lengths.len() != batch {
            return Err(SpecError::Entries {
                what: "key lengths",
                got: lengths.len(),
                batch,
            });
        }
        match lengths.iter().position(|&length| length > key_length) {
            Some(entry) => Err(SpecError::KeyLength {
                entry,
                length: lengths[entry],
                key_length,
            }),
            None => Ok(()),
        }
    }

    /// Checks what scores and weights go through.
    fn check_scores(&self) -> Result<(), SpecError> {
        let query_heads = self.shape.query_heads;
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(SpecError::Softcap(cap));
        }
        if let Some(slopes) = &self.alibi_slopes {
            if slopes.len() != query_heads {
                return Err(SpecError::Slopes {
                    got: slopes.len(),
                    query_heads,
                });
            }
            let sound = |slope: &f32| slope.abs() <= MAX_SLOPE;
            if let Some(index) = slopes.iter().position(|slope| !sound(slope)) {
                let slope = slopes[index];
                return Err(SpecError::Slope { index, slope });
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(SpecError::Dropout(self.dropout));
        }
        let counted = [
            (
                "the number of branches",
                self.pattern.branches().len(),
                1 << 16,
            ),
            (
                "batch entries times query heads",
                self.shape.batch.saturating_mul(query_heads),
                1 << 32,
            ),
        ];
        match counted.iter().find(|(_, got, limit)| *got as u64 > *limit) {
            Some(&(what, got, limit)) if self.dropout > 0.0 => {
                Err(SpecError::DropoutCounter { what, got, limit })
            }
            _ => Ok(()),
        }
    }

    /// The sizes of one rank's own tensors; dropout is not in it, since its seed comes with the inputs.
    pub fn problem(&self, rank: usize) -> Problem {
        Problem {
            batch: self.shape.batch,
            query_heads: self.shape.query_heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            queries: self
                .query_sharding
                .shard_len(self.query_length, self.world_size, rank),
            keys: self
                .key_sharding
                .shard_len(self.key_length, self.world_size, rank),
            scale: self.scale,
            mask: self.pattern.mask(),
            scores: Scores {
                softcap: self.softcap,
                alibi_slopes: self.alibi_slopes.clone(),
                dropout: None,
            },
        }
    }

    /// Whether dropout can tell apart the entries of a batch that is part of a larger one, where its first entry counts as
    /// `first_entry`.
    ///
    /// # Errors
    /// [`SpecError::DropoutCounter`].
    pub fn check_first_entry(&self, first_entry: usize) -> Result<(), SpecError> {
        let limit = 1 << 32;
        let entries = first_entry.saturating_add(self.shape.batch);
        let got = entries.saturating_mul(self.shape.query_heads);
        if self.dropout > 0.0 && got as u64 > limit {
            return Err(SpecError::DropoutCounter {
                what: "the number of the last batch entry times query heads",
                got,
                limit,
            });
        }
        Ok(())
    }

    /// Whether it holds for one batch alone, because of its documents or padding. Ranks compare such computations in every forward
    /// pass: one whose batch is another than its peers' would come with what was right before.
    pub(crate) fn is_of_one_batch(&self) -> bool {
        self.documents.is_some() || self.key_lengths.is_some()
    }

    /// Bytes of one key row and one value row of one head: what one selected row costs on the wire.
    pub fn row_bytes(&self) -> u64 {
        (2 * self.shape.head_dim * self.dtype.size()) as u64
    }

    /// Everything the ranks must agree on, by name, for the comparison before the first exchange.
    pub fn fields(&self) -> Vec<(String, String)> {
        let Shape {
            batch,
            query_heads,
            kv_heads,
            head_dim,
        } = self.shape;
        [
            ("version", env!("CARGO_PKG_VERSION").to_string()),
            ("pattern", self.pattern.to_string()),
            ("ranks", self.world_size.to_string()),
            ("query sharding", self.query_sharding.to_string()),
            ("key sharding", self.key_sharding.to_string()),
            ("query length", self.query_length.to_string()),
            ("key length", self.key_length.to_string()),
            ("query offset", self.query_offset.to_string()),
            ("batch", batch.to_string()),
            ("query heads", query_heads.to_string()),
            ("key/value heads", kv_heads.to_string()),
            ("head size", head_dim.to_string()),
            ("scale", exact(self.scale)),
            ("dtype", self.dtype.to_string()),
            (
                "documents",
                optional(self.documents.as_ref().map(Documents::to_string)),
            ),
            (
                "key lengths",
                optional(
                    self.key_lengths
                        .as_ref()
                        .map(|lengths| format!("{lengths:?}")),
                ),
            ),
            ("softcap", optional(self.softcap.map(exact))),
            (
                "ALiBi slopes",
                optional(self.alibi_slopes.as_ref().map(|slopes| {
                    let slopes: Vec<String> = slopes.iter().copied().map(exact).collect();
                    slopes.join(", ")
                })),
            ),
            ("dropout", exact(self.dropout)),
            ("strategy", self.strategy.to_string()),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .to_vec()
    }
}

/// A number, to the bit.
fn exact(number: f32) -> String {
    format!("{number} (bits {:08x})", number.to_bits())
}

fn optional(text: Option<String>) -> String {
    text.unwrap_or_else(|| "none".to_string())
}
