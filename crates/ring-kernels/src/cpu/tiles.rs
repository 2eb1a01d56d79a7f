//! How much is held in scratch memory at one time: [`Tiles`].
//!
//! What may be smaller without another bit in any result follows from what is a chain of additions:
//!
//! - Forward: the maximum of a row is known anew after every tile of keys, so tiles of keys are as they are. Bands of queries share
//!   nothing but the keys that are packed for them, so they may be of any number of whole query tiles.
//! - Backward: gradients of keys are summed over a band of queries before they are added to those of other bands, so bands are as
//!   they are. But the chain within a band goes from query to query, and that of a query gradient from key to key, wherever tiles
//!   end; so tiles of keys may be smaller, and queries of a band may be packed in groups, again for each tile of keys.

use super::scratch::{KEY_TILE, QUERY_TILE, band};

/// Sizes of what is held at one time, each at most what is best for speed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    /// Query rows of a band of the forward pass, whole tiles.
    forward_band: usize,
    /// Query rows of a band that the backward pass holds packed, whole tiles.
    packed_queries: usize,
    /// Key rows of a tile of the backward pass, even.
    backward_keys: usize,
}

impl Tiles {
    /// From what is best for speed down to what takes least memory.
    const LEVELS: [Self; 3] = [
        Self::FASTEST,
        Self {
            forward_band: 2 * QUERY_TILE,
            packed_queries: QUERY_TILE,
            backward_keys: 64,
        },
        Self {
            forward_band: QUERY_TILE,
            packed_queries: QUERY_TILE,
            backward_keys: 32,
        },
    ];

    pub(super) const FASTEST: Self = Self {
        forward_band: usize::MAX,
        packed_queries: usize::MAX,
        backward_keys: KEY_TILE,
    };

    /// The last level whose tiles are smaller than those before.
    pub(super) const LAST_LEVEL: u32 = Self::LEVELS.len() as u32 - 1;

    /// The tiles of a level; from [`LAST_LEVEL`](Self::LAST_LEVEL) on they stay the same.
    pub(super) fn at_level(level: u32) -> Self {
        Self::LEVELS[level.min(Self::LAST_LEVEL) as usize]
    }

    /// Query rows of a band of the forward pass.
    pub(super) const fn forward_band(self, head_dim: usize) -> usize {
        least(band(head_dim), self.forward_band)
    }

    /// Query rows of a band that the backward pass holds packed.
    pub(super) const fn packed_queries(self, head_dim: usize) -> usize {
        least(band(head_dim), self.packed_queries)
    }

    /// Key rows of a tile of the backward pass.
    pub(super) const fn backward_keys(self) -> usize {
        self.backward_keys
    }
}

const fn least(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}
