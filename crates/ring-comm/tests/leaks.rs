//! Groups leave nothing behind: no memory, no thread. Alone in its process, because it counts what the process holds.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicIsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use ring_comm::{
    CommError, Expected, Loopback, LoopbackEndpoint, Payload, Rank, Tag, Transport,
    buffer::{DType, HostBuffer},
};

/// The system's allocator, counting the bytes in use.
struct Counting;

static IN_USE: AtomicIsize = AtomicIsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract; counting touches only an
// atomic number. `realloc` and `alloc_zeroed` are the trait's own, made of these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise that `memory` came from here with `layout` is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

const DEADLINE: Duration = Duration::from_secs(60);

type Endpoint = LoopbackEndpoint<HostBuffer>;

fn tag(step: u32) -> Tag {
    Tag::new(0, step, Payload::KeyValue)
}

/// Takes so much that a single one left behind shows.
fn message() -> HostBuffer {
    HostBuffer::zeros(DType::F32, 1000)
}

fn shift(endpoint: &Endpoint, step: u32) -> Result<HostBuffer, CommError> {
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let previous: Rank = (rank + world_size - 1) % world_size;
    let expected = Expected {
        dtype: DType::F32,
        len: 1000,
    };
    let incoming = endpoint.irecv_into(previous, tag(step), expected, Some(message()))?;
    let outgoing = endpoint.isend((rank + 1) % world_size, tag(step), message())?;
    let received = incoming.wait()?;
    outgoing.wait()?;
    Ok(received)
}

/// Some groups end in peace, some by an abort, some with messages and requests on their way; some never begin.
fn make_and_drop(number: usize) {
    let world_size = 2 + number % 3;
    let results = Loopback::run(world_size, DEADLINE, |endpoint: Endpoint| {
        shift(&endpoint, 0)?;
        match (number % 5, endpoint.rank()) {
            (0, _) => endpoint.all_gather_bytes(0, vec![0; 1000]).map(drop),
            (1, 0) => {
                endpoint.abort("staged");
                Ok(())
            }
            (2, 0) => endpoint.isend(1, tag(7), message()).map(drop),
            (3, _) => Ok(()),
            _ => shift(&endpoint, 1).map(drop),
        }
    });
    assert!(results.iter().all(Result::is_ok), "no rank panics");
    drop(Loopback::group::<HostBuffer>(world_size, DEADLINE));
}

/// Of this process; `None` where the system does not tell.
fn threads() -> Option<usize> {
    std::fs::read_dir("/proc/self/task")
        .ok()
        .map(Iterator::count)
}

#[test]
fn a_thousand_groups_leave_nothing_behind() {
    let make_and_drop_all = |numbers| {
        Iterator::for_each::<fn(usize)>(numbers, make_and_drop);
    };
    // The first ones fill what the process keeps for good.
    make_and_drop_all(0..30);
    let (before, threads_before) = (IN_USE.load(Ordering::Relaxed), threads());
    make_and_drop_all(0..1000);
    // Threads that have done their work may still be on their way out.
    let until = Instant::now() + DEADLINE;
    loop {
        let (after, threads_after) = (IN_USE.load(Ordering::Relaxed), threads());
        if after <= before && threads_after <= threads_before {
            return;
        }
        assert!(
            Instant::now() < until,
            "{} bytes more in use, {threads_after:?} threads instead of {threads_before:?}",
            after - before
        );
        thread::yield_now();
    }
}
