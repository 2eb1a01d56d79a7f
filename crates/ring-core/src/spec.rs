//! One attention computation as all ranks must agree on it: [`AttentionSpec`].

use ring_comm::buffer::DType;
use ring_kernels::Problem;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    pattern::{MAX_LENGTH, Pattern, PatternError},
    sharding::Sharding,
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
    /// A rank outside the group.
    #[error("rank {rank} does not exist among {world_size}")]
    Rank {
        /// The rank.
        rank: usize,
        /// The group's size.
        world_size: usize,
    },
}

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
/// it before their first exchange.
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
        self.pattern.check_heads(kv_heads)?;
        Ok(self)
    }

    /// The sizes one rank's kernels see.
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
        }
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
            (
                "scale",
                format!("{} (bits {:08x})", self.scale, self.scale.to_bits()),
            ),
            ("dtype", self.dtype.to_string()),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .to_vec()
    }
}
