//! What a cache cannot be used for: [`CacheError`].

use thiserror::Error;

use crate::spec::AttentionSpec;

/// A key/value cache that does not fit what it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CacheError {
    /// The pattern lets a query see what comes after it.
    #[error(
        "tokens can only be decoded one after the other if no query sees what follows it: the pattern must be causal"
    )]
    NotCausal,
    /// An option that later tokens could not go on with.
    #[error("a key/value cache cannot go on from {0}")]
    Unsupported(&'static str),
    /// The cache belongs to another rank, or to another number of ranks.
    #[error(
        "the cache is of rank {cache_rank} of {cache_ranks}, the communicator is rank {rank} of {ranks}"
    )]
    Place {
        /// Rank of the cache.
        cache_rank: usize,
        /// Ranks of the cache.
        cache_ranks: usize,
        /// Rank of the communicator.
        rank: usize,
        /// Ranks of the communicator.
        ranks: usize,
    },
    /// A tensor does not reach as far as its shape says.
    #[error("{what} has {got} elements, its shape and strides reach to element {expected}")]
    Size {
        /// Which tensor.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it must have.
        expected: usize,
    },
    /// A decoding failed before, so that nobody knows which tokens the ranks hold.
    #[error("an earlier decoding with this cache failed: start again with a new one")]
    Failed,
}

/// Refuses what later tokens could not go on with.
pub(super) fn check(spec: &AttentionSpec) -> Result<(), CacheError> {
    let unsupported = [
        (spec.documents.is_some(), "documents"),
        (spec.key_lengths.is_some(), "key lengths (padding)"),
        (
            spec.query_length != spec.key_length
                || spec.query_sharding != spec.key_sharding
                || spec.query_offset != 0,
            "cross-attention",
        ),
    ];
    if !spec.pattern.is_causal() {
        return Err(CacheError::NotCausal);
    }
    match unsupported.iter().find(|(given, _)| *given) {
        Some(&(_, what)) => Err(CacheError::Unsupported(what)),
        None => Ok(()),
    }
}
