//! Tiles and the memory they are computed in.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ring_comm::buffer::{HostBuffer, HostView, PoolStatistics};

use super::format::Format;
use super::format::Vectors;
use crate::{KernelError, RowLayout, Tensor};

/// Query rows of a tile: whole vectors of every length.
pub(super) const QUERY_TILE: usize = 64;
/// Key rows of a tile. With head size 64, scores and values of a tile take 32 KiB each: they stay in the caches nearby.
pub(super) const KEY_TILE: usize = 128;
/// Rows of scratch matrices are as wide as a multiple of this: the widest panel.
const WIDTH: usize = 32;
/// Scratch matrices start on cache lines.
const LINE: usize = 16;

/// `head_dim`, rounded up to whole panels.
pub(super) const fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WIDTH)
}

/// Query rows of a band: those that are packed together and used with all keys. More of them pack keys less often; but they,
/// what is summed for them, and the tiles have to stay in the second-level cache. Measured: half as many lose 2 to 8%, twice as
/// many 3%.
pub(super) const fn band(head_dim: usize) -> usize {
    const LEAST: usize = QUERY_TILE;
    const MOST: usize = 4 * QUERY_TILE;
    const NUMBERS: usize = 128 * 256;
    let rows = NUMBERS / padded(head_dim) / QUERY_TILE * QUERY_TILE;
    if rows < LEAST {
        LEAST
    } else if rows > MOST {
        MOST
    } else {
        rows
    }
}

/// A [`Tensor`] of host memory; unlike that one it may stand in for a tensor of a shorter lifetime.
#[derive(Clone, Copy)]
pub(super) struct HostTensor<'a> {
    pub(super) data: HostView<'a>,
    pub(super) layout: &'a RowLayout,
}

impl<'a> From<Tensor<'a, HostBuffer>> for HostTensor<'a> {
    fn from(Tensor { data, layout }: Tensor<'a, HostBuffer>) -> Self {
        Self { data, layout }
    }
}

/// Row lengths of scratch matrices.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    /// Numbers of a row, padding included.
    pub(super) numbers: usize,
    /// Words of a row of numbers.
    pub(super) words: usize,
    /// Words of a row that are not padding: the depth of a product along the head size.
    pub(super) depth: usize,
}

impl Strides {
    pub(super) fn new<S: Vectors, F: Format<S>>(head_dim: usize) -> Self {
        Self {
            numbers: padded(head_dim),
            words: padded(head_dim) / F::DEPTH,
            depth: head_dim.div_ceil(F::DEPTH),
        }
    }
}

/// Scratch memory that outlives the calls: a thread borrows a piece for a call and gives it back.
#[derive(Debug)]
pub(super) struct Pool {
    store: Mutex<Store>,
    /// The most bytes to keep.
    limit: usize,
}

#[derive(Debug, Default)]
struct Store {
    pieces: Vec<Vec<f32>>,
    statistics: PoolStatistics,
}

impl Default for Pool {
    /// A pool that keeps all that comes back.
    fn default() -> Self {
        Self::with_limit(usize::MAX)
    }
}

impl Pool {
    /// A pool that keeps at most `limit` bytes of what is not lent.
    pub(super) fn with_limit(limit: usize) -> Self {
        Self {
            store: Mutex::default(),
            limit,
        }
    }

    /// Memory of at least `len` words, contents arbitrary.
    pub(super) fn borrow(&self, len: usize) -> Result<Scratch<'_>, KernelError> {
        let needed = len.saturating_add(LINE);
        // Not within the match, which would hold the lock.
        let kept = self.store().reuse(needed);
        let memory = match kept {
            Some(memory) => memory,
            None => self.allocate(needed)?,
        };
        Ok(Scratch { memory, pool: self })
    }

    /// Gives back to the system what is not lent.
    pub(super) fn release(&self) {
        let mut store = self.store();
        let kept = store.statistics.kept_bytes;
        store.statistics.release(kept);
        // The lists too: nothing is kept.
        store.pieces = Vec::new();
    }

    pub(super) fn statistics(&self) -> PoolStatistics {
        self.store().statistics
    }

    fn allocate(&self, words: usize) -> Result<Vec<f32>, KernelError> {
        let mut memory = Vec::new();
        memory
            .try_reserve_exact(words)
            .map_err(|_| KernelError::Allocation {
                bytes: words.saturating_mul(size_of::<f32>()),
            })?;
        memory.resize(words, 0.0);
        self.store().statistics.allocate(byte_len(&memory));
        Ok(memory)
    }

    /// The store is sound after a panic too, because no change to it is left half done; so lock poisoning is ignored.
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// A piece of at least `words` words. One that is too small is released in favour of the one that will be allocated.
    fn reuse(&mut self, words: usize) -> Option<Vec<f32>> {
        self.statistics.borrows += 1;
        let memory = self.pieces.pop()?;
        let bytes = byte_len(&memory);
        if memory.len() < words {
            self.statistics.release(bytes);
            return None;
        }
        self.statistics.reuse(bytes);
        Some(memory)
    }
}

fn byte_len(memory: &[f32]) -> usize {
    size_of_val(memory)
}

/// Bytes that [`Pool::borrow`] allocates for `len` words.
pub(super) const fn bytes(len: usize) -> usize {
    (len + LINE) * size_of::<f32>()
}

/// Borrowed memory; goes back to its pool.
pub(super) struct Scratch<'a> {
    memory: Vec<f32>,
    pool: &'a Pool,
}

impl Scratch<'_> {
    /// All of it, to be cut into matrices.
    pub(super) fn cut(&mut self) -> Cut<'_> {
        // `align_offset` may give up and return `usize::MAX`; memory that is not aligned is only slower.
        let start = self
            .memory
            .as_ptr()
            .align_offset(LINE * size_of::<f32>())
            .min(LINE);
        Cut(&mut self.memory[start..])
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let memory = mem::take(&mut self.memory);
        let mut store = self.pool.store();
        if store
            .statistics
            .take_back(byte_len(&memory), self.pool.limit)
        {
            store.pieces.push(memory);
        }
    }
}

/// Memory that is cut into matrices, from front to back.
pub(super) struct Cut<'a>(&'a mut [f32]);

impl<'a> Cut<'a> {
    /// The next `len` words; `len` is a multiple of 16, so that all matrices start on cache lines.
    pub(super) fn next(&mut self, len: usize) -> &'a mut [f32] {
        debug_assert_eq!(len % LINE, 0);
        let (piece, rest) = mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_aligned_and_makes_place_for_larger() {
        let pool = Pool::default();
        let mut scratch = pool.borrow(64).unwrap();
        let mut cut = scratch.cut();
        let (first, second) = (cut.next(32), cut.next(32));
        assert_eq!(first.as_ptr().align_offset(64), 0);
        assert_eq!(second.as_ptr().align_offset(64), 0);
        drop(scratch);
        let address = |len| pool.borrow(len).unwrap().memory.as_ptr().addr();
        let before = address(64);
        assert_eq!(address(16), before);
        assert_eq!(pool.store().pieces.len(), 1);
        assert!(pool.borrow(1 << 16).unwrap().cut().0.len() >= 1 << 16);
        assert_eq!(pool.store().pieces.len(), 1);
        assert_eq!(pool.statistics().released_bytes, bytes(64) as u64);
        for len in [1 << 60, usize::MAX] {
            assert!(matches!(
                pool.borrow(len),
                Err(KernelError::Allocation { .. })
            ));
        }
    }

    #[test]
    fn statistics_tell_what_was_lent_and_what_is_kept() {
        let pool = Pool::with_limit(bytes(100) + bytes(50));
        let lent = [100, 50, 20].map(|len| pool.borrow(len).unwrap());
        let most = bytes(100) + bytes(50) + bytes(20);
        assert_eq!(pool.statistics().lent_bytes, most);
        lent.into_iter().for_each(drop);
        drop(pool.borrow(10).unwrap());
        let expected = PoolStatistics {
            kept_bytes: bytes(100) + bytes(50),
            lent_bytes: 0,
            most_lent_bytes: most,
            borrows: 4,
            reuses: 1,
            allocations: 3,
            released_bytes: bytes(20) as u64,
        };
        assert_eq!(pool.statistics(), expected);
        pool.release();
        let expected = PoolStatistics {
            kept_bytes: 0,
            released_bytes: most as u64,
            ..expected
        };
        assert_eq!(pool.statistics(), expected);
        assert!(pool.store().pieces.is_empty());
    }

    #[test]
    fn bands_are_whole_tiles() {
        assert_eq!(
            [32, 64, 96, 128, 256, 1000].map(band),
            [256, 256, 256, 256, 128, 64]
        );
    }
}
