//! Stores leave nothing behind. A test binary of its own: it counts what the whole process has open.

#![cfg(target_os = "linux")]

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use ring_comm::launch::store::{Membership, Store};

const DEADLINE: Duration = Duration::from_secs(30);

/// Open files and threads of this process.
fn held() -> (usize, usize) {
    let count = |folder| fs::read_dir(folder).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// A job of two ranks that meet and part.
fn meet() {
    let zero = Store::open("127.0.0.1:0", Membership::new(0, 2), DEADLINE).unwrap();
    let address = zero.address().to_string();
    let one = Store::open(&address, Membership::new(1, 2), DEADLINE).unwrap();
    one.set("key", "value").unwrap();
    assert_eq!(zero.get("key", DEADLINE).unwrap(), b"value");
}

#[test]
fn a_thousand_stores_leak_nothing() {
    meet();
    let before = held();
    for _ in 0..1000 {
        meet();
    }
    // The system may take a moment to let go of a thread that has been joined.
    let until = Instant::now() + DEADLINE;
    while held() != before && Instant::now() < until {
        thread::yield_now();
    }
    assert_eq!(held(), before, "(open files, threads)");
}
