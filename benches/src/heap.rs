//! Heap memory by thread: what one rank holds, when ranks are threads of one process.
//!
//! Every allocation is added to the account of the thread that makes it, every release taken from the account of the thread
//! that releases. That is right as long as memory does not change hands. Where it does - a message that moves from one rank to
//! another - whoever hands it over says so with [`charge`] on both sides ([`Metered`](crate::metered::Metered) does). What a
//! rank counts then depends on its own calls alone, never on the order in which threads happen to run.
//!
//! Counted are the bytes asked for, without the allocator's own overhead. Growing in place counts as a move: the old memory
//! and the new exist together, the worst that can happen.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

/// The system's allocator, counting. To be declared `#[global_allocator]` by the program that measures.
#[derive(Clone, Copy, Debug)]
pub struct CountingAllocator;

/// What a thread holds; relative to the begin of its last [`measure`].
#[derive(Clone, Copy)]
struct Account {
    held: i64,
    peak: i64,
    largest: usize,
}

thread_local! {
    static ACCOUNT: Cell<Account> = const { Cell::new(EMPTY) };
}

const EMPTY: Account = Account {
    held: 0,
    peak: 0,
    largest: 0,
};

/// What [`measure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The most bytes held at one time, beyond what was held at the begin.
    pub peak: usize,
    /// The largest single allocation.
    pub largest: usize,
    /// Bytes held at the end, beyond what was held at the begin: negative if more was released than allocated.
    pub held: i64,
}

/// Adds `bytes` to this thread's account, as memory received (positive) or handed over (negative).
pub fn charge(bytes: i64) {
    // A thread that ends may release memory after its account is gone; nobody asks for that account any more.
    let _ = ACCOUNT.try_with(|account| {
        let mut now = account.get();
        now.held += bytes;
        now.peak = now.peak.max(now.held);
        account.set(now);
    });
}

/// Runs `work` and tells what heap memory this thread needed for it. Not to be nested.
pub fn measure<R>(work: impl FnOnce() -> R) -> (R, Usage) {
    ACCOUNT.set(EMPTY);
    let result = work();
    let Account {
        held,
        peak,
        largest,
    } = ACCOUNT.get();
    let peak = usize::try_from(peak).expect("the peak is at least the 0 of the begin");
    let usage = Usage {
        peak,
        largest,
        held,
    };
    (result, usage)
}

fn allocated(layout: Layout) {
    charge(signed(layout));
    let _ = ACCOUNT.try_with(|account| {
        let now = account.get();
        account.set(Account {
            largest: now.largest.max(layout.size()),
            ..now
        });
    });
}

fn signed(layout: Layout) -> i64 {
    // A layout is never larger than isize::MAX.
    layout.size() as i64
}

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract; counting touches only a
// thread-local cell without destructor, and neither allocates nor unwinds. `realloc` is the trait's own, made of these.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        allocated(layout);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        allocated(layout);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        charge(-signed(layout));
        // SAFETY: the caller's promise that `memory` came from here with `layout` is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}
