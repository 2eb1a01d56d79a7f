//! Memory of messages that outlives them: [`BufferPool`].
//!
//! Whoever exchanges messages takes memory for them here and gives it back afterwards. If every receive brings as much memory
//! as its message takes (see [`Transport::irecv_into`](crate::Transport::irecv_into)), and all ranks ask for the same capacity,
//! a rank ends every call with what it began with, and only the first call of its kind allocates.
//!
//! A pool never holds more than was taken from it, or allocated for want of it, at one time; nor more than [`KEPT`] buffers of
//! a type. A buffer too small for what is asked for is released in its favour, and one more than twice as large as anything
//! asked for in [`CALLS_BETWEEN_INVENTORIES`] calls is released too: a large call does not pin its memory for ever.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::buffer::{Buffer, DType};

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
    pub fn begin(&self) {
        let mut store = self.lock();
        store.calls += 1;
        if store.calls > CALLS_BETWEEN_INVENTORIES {
            store.calls = 1;
            store.shelves.iter_mut().for_each(Shelf::take_inventory);
        }
    }

    /// A buffer with room for `capacity` elements, the smallest there is; its contents are arbitrary.
    pub fn take(&self, dtype: DType, capacity: usize) -> Option<B> {
        self.lock().shelf(dtype).take(capacity)
    }

    /// Keeps `buffer` for whoever takes it next.
    pub fn give(&self, buffer: B) {
        let dtype = buffer.dtype();
        self.lock().shelf(dtype).give(buffer);
    }

    /// Bytes that wait for their next message.
    pub fn bytes(&self) -> usize {
        let bytes = |buffer: &B| buffer.capacity() * buffer.dtype().size();
        let store = self.lock();
        let kept = store.shelves.iter().flat_map(|shelf| &shelf.buffers);
        kept.map(bytes).sum()
    }
}

impl<B> Store<B> {
    fn shelf(&mut self, dtype: DType) -> &mut Shelf<B> {
        &mut self.shelves[match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
        }]
    }
}

impl<B: Buffer> Shelf<B> {
    fn take(&mut self, capacity: usize) -> Option<B> {
        self.largest = self.largest.max(capacity);
        let fitting = |&index: &usize| self.buffers[index].capacity() >= capacity;
        let smallest = (0..self.buffers.len())
            .filter(fitting)
            .min_by_key(|&index| self.buffers[index].capacity());
        if smallest.is_none() {
            // What will be allocated instead comes back; then there is one buffer again, not two.
            self.buffers.pop();
        }
        smallest.map(|index| self.buffers.swap_remove(index))
    }

    fn give(&mut self, buffer: B) {
        if buffer.capacity() > 0 && self.buffers.len() < KEPT {
            self.buffers.push(buffer);
        }
    }

    fn take_inventory(&mut self) {
        let largest = self.largest;
        self.buffers
            .retain(|buffer| buffer.capacity() <= largest.saturating_mul(2));
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
}
