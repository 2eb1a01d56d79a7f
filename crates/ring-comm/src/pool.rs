//! Memory of messages that outlives them: [`BufferPool`].
//!
//! Whoever exchanges messages takes memory for them here and gives it back afterwards. If every receive brings as much memory
//! as its message takes (see [`Transport::irecv_into`](crate::Transport::irecv_into)), and all ranks ask for the same capacity,
//! a rank ends every call with what it began with, and only the first call of its kind allocates.
//!
//! A pool never holds more than was taken from it, or allocated for want of it, at one time; nor more than [`KEPT`] buffers of
//! a type. A buffer too small for what is asked for is released in its favour, and one more than twice as large as anything
//! asked for in [`CALLS_BETWEEN_INVENTORIES`] calls is released too: a large call does not pin its memory for ever. Less is
//! kept with a [limit](BufferPool::set_limit), and nothing once the pool was told to [release](BufferPool::release) it.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::buffer::{Buffer, DType, PoolStatistics};

/// Most buffers of one element type that a pool keeps: in the backward of f32 tensors, the rows computed on, leaving and
/// arriving, and the gradients of a slot, leaving and arriving, each of keys and of queries if both travel; and gradients of
/// queries before they are packed.
pub const KEPT: usize = 13;

/// Calls of [`BufferPool::begin`] after which buffers that have become too large are released.
pub const CALLS_BETWEEN_INVENTORIES: usize = 256;

/// Buffers that wait for their next message.
pub struct BufferPool<B> {
    store: Mutex<Store<B>>,
}

struct Store<B> {
    /// One for each of [`DTYPES`].
    shelves: [Shelf<B>; 3],
    calls: usize,
    /// The most bytes to keep.
    limit: usize,
    statistics: PoolStatistics,
}

struct Shelf<B> {
    buffers: Vec<B>,
    /// The largest capacity asked for since the last inventory.
    largest: usize,
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

impl<B> fmt::Debug for BufferPool<B> {
    /// Without the buffers: that would print every element.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = self.lock();
        let kept = store.shelves.each_ref().map(|shelf| shelf.buffers.len());
        f.debug_struct("BufferPool").field("kept", &kept).finish()
    }
}

impl<B> Default for BufferPool<B> {
    fn default() -> Self {
        let store = Store {
            shelves: DTYPES.map(|_| Shelf {
                buffers: Vec::with_capacity(KEPT),
                largest: 0,
            }),
            calls: 0,
            limit: usize::MAX,
            statistics: PoolStatistics::default(),
        };
        Self {
            store: Mutex::new(store),
        }
    }
}

impl<B> BufferPool<B> {
    /// The store is sound after a panic too, because no change to it is left half done; so lock poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, Store<B>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Buffer> BufferPool<B> {
    /// Announces a call that will take buffers. From time to time this is when what has become too large is released.
    ///
    /// What was lent before counts as lent no more: a call that failed may have dropped what it took.
    pub fn begin(&self) {
        let mut store = self.lock();
        let Store {
            shelves,
            calls,
            statistics,
            ..
        } = &mut *store;
        statistics.lent_bytes = 0;
        *calls += 1;
        if *calls > CALLS_BETWEEN_INVENTORIES {
            *calls = 1;
            for shelf in shelves {
                shelf.take_inventory(statistics);
            }
        }
    }

    /// A buffer with room for `capacity` elements, the smallest there is; its contents are arbitrary. Whoever gets `None`
    /// allocates, which is counted here.
    pub fn take(&self, dtype: DType, capacity: usize) -> Option<B> {
        let mut store = self.lock();
        let (shelf, statistics) = store.shelf(dtype);
        statistics.borrows += 1;
        let taken = shelf.take(capacity, statistics);
        match &taken {
            Some(buffer) => statistics.reuse(bytes(buffer)),
            None => statistics.allocate(capacity.saturating_mul(dtype.size())),
        }
        taken
    }

    /// Keeps `buffer` for whoever takes it next, within the limit.
    pub fn give(&self, buffer: B) {
        drop(self.offer(buffer));
    }

    /// As [`give`](Self::give), but returns the buffer if it is not kept.
    pub fn offer(&self, buffer: B) -> Option<B> {
        let mut store = self.lock();
        let limit = store.limit;
        let (shelf, statistics) = store.shelf(buffer.dtype());
        let limit = if shelf.buffers.len() < KEPT { limit } else { 0 };
        if statistics.take_back(bytes(&buffer), limit) && buffer.capacity() > 0 {
            shelf.buffers.push(buffer);
            return None;
        }
        Some(buffer)
    }

    /// Keeps at most `bytes` from now on, and gives back what is more than that. With less than the messages of a call take,
    /// every call allocates.
    pub fn set_limit(&self, bytes: usize) {
        let mut store = self.lock();
        store.limit = bytes;
        store.release_down_to(bytes);
    }

    /// Gives back to the system, or the device, what is not lent.
    pub fn release(&self) {
        self.lock().release_down_to(0);
    }

    /// What the pool has lent and kept since it was made. Messages that change hands without a copy count as given back by
    /// who receives them.
    pub fn statistics(&self) -> PoolStatistics {
        self.lock().statistics
    }

    /// Bytes that wait for their next message.
    pub fn bytes(&self) -> usize {
        self.statistics().kept_bytes
    }
}

/// Bytes that a buffer holds.
fn bytes(buffer: &impl Buffer) -> usize {
    buffer.capacity() * buffer.dtype().size()
}

impl<B> Store<B> {
    fn shelf(&mut self, dtype: DType) -> (&mut Shelf<B>, &mut PoolStatistics) {
        let shelf = &mut self.shelves[match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
        }];
        (shelf, &mut self.statistics)
    }
}

impl<B: Buffer> Store<B> {
    fn release_down_to(&mut self, limit: usize) {
        for shelf in &mut self.shelves {
            while self.statistics.kept_bytes > limit && shelf.release(&mut self.statistics) {}
        }
    }
}

impl<B: Buffer> Shelf<B> {
    fn take(&mut self, capacity: usize, statistics: &mut PoolStatistics) -> Option<B> {
        self.largest = self.largest.max(capacity);
        let fitting = |&index: &usize| self.buffers[index].capacity() >= capacity;
        let smallest = (0..self.buffers.len())
            .filter(fitting)
            .min_by_key(|&index| self.buffers[index].capacity());
        if smallest.is_none() {
            // What will be allocated instead comes back; then there is one buffer again, not two.
            self.release(statistics);
        }
        smallest.map(|index| self.buffers.swap_remove(index))
    }

    /// Releases one buffer; whether there was one.
    fn release(&mut self, statistics: &mut PoolStatistics) -> bool {
        let released = self.buffers.pop();
        statistics.release(released.as_ref().map_or(0, bytes));
        released.is_some()
    }

    fn take_inventory(&mut self, statistics: &mut PoolStatistics) {
        let largest = self.largest;
        self.buffers.retain(|buffer| {
            let keep = buffer.capacity() <= largest.saturating_mul(2);
            if !keep {
                statistics.release(bytes(buffer));
            }
            keep
        });
        self.largest = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::HostBuffer;

    fn pool(lens: &[usize]) -> BufferPool<HostBuffer> {
        let pool = BufferPool::default();
        for &len in lens {
            pool.give(HostBuffer::zeros(DType::F32, len));
        }
        pool
    }

    fn taken(pool: &BufferPool<HostBuffer>, capacity: usize) -> Option<usize> {
        pool.take(DType::F32, capacity)
            .map(|buffer| buffer.capacity())
    }

    #[test]
    fn the_smallest_buffer_that_fits_is_taken() {
        let pool = pool(&[30, 10, 20]);
        assert_eq!(taken(&pool, 15), Some(20));
        assert_eq!(taken(&pool, 15), Some(30));
        assert_eq!(pool.take(DType::BF16, 1), None, "another type");
        assert_eq!(taken(&pool, 5), Some(10));
        assert_eq!(pool.bytes(), 0);
    }

    #[test]
    fn what_is_too_small_makes_place() {
        let pool = pool(&[10, 10]);
        assert_eq!(taken(&pool, 11), None);
        assert_eq!(pool.bytes(), 40, "one of the two is released");
    }

    #[test]
    fn surplus_is_released() {
        assert_eq!(pool(&[1; 2 * KEPT]).bytes(), 4 * KEPT);
    }

    #[test]
    fn what_nobody_needs_any_more_is_released() {
        let pool = pool(&[100, 20, 10]);
        for _ in 0..=CALLS_BETWEEN_INVENTORIES {
            pool.begin();
            let buffer = pool.take(DType::F32, 10).unwrap();
            assert_eq!(buffer.capacity(), 10);
            pool.give(buffer);
        }
        assert_eq!(pool.bytes(), 4 * (10 + 20));
    }

    #[test]
    fn no_more_is_kept_than_the_limit_allows() {
        let pool = pool(&[10, 20]);
        pool.set_limit(4 * 25);
        assert_eq!(pool.bytes(), 40, "the latest is released");
        pool.give(HostBuffer::zeros(DType::BF16, 30));
        let surplus = HostBuffer::zeros(DType::F32, 1);
        assert_eq!(pool.offer(surplus.clone()), Some(surplus));
        assert_eq!(pool.bytes(), 100, "within the limit, of all types together");
        assert_eq!(taken(&pool, 1), Some(10));
        pool.set_limit(usize::MAX);
        pool.give(HostBuffer::zeros(DType::F32, 25));
        assert_eq!(pool.bytes(), 160);
    }

    #[test]
    fn statistics_tell_what_was_lent_and_what_is_kept() {
        let pool = BufferPool::default();
        pool.begin();
        assert_eq!(taken(&pool, 10), None);
        assert_eq!(taken(&pool, 20), None);
        pool.give(HostBuffer::zeros(DType::F32, 10));
        pool.give(HostBuffer::zeros(DType::F32, 20));
        let again = pool.take(DType::F32, 5).unwrap();
        let expected = PoolStatistics {
            kept_bytes: 80,
            lent_bytes: 40,
            most_lent_bytes: 120,
            borrows: 3,
            reuses: 1,
            allocations: 2,
            released_bytes: 0,
        };
        assert_eq!(pool.statistics(), expected);
        drop(again);
        pool.begin();
        pool.release();
        let expected = PoolStatistics {
            kept_bytes: 0,
            lent_bytes: 0,
            released_bytes: 80,
            ..expected
        };
        assert_eq!(pool.statistics(), expected);
        assert_eq!(taken(&pool, 5), None);
    }
}
