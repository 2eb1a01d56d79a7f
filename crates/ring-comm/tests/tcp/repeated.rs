//! Groups and jobs leave nothing behind, however many there are.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use ring_comm::{
    Expected, Payload, Tag, Tcp, Transport,
    buffer::{DType, HostBuffer},
    launch::from_env,
};

use crate::{PATIENT, Test, launch};

/// A task: many groups of one job.
pub(crate) const GROUPS: &str = "groups";
/// A task: many jobs of one process.
pub(crate) const JOBS: &str = "jobs";

pub(crate) fn tests() -> Vec<Test> {
    let leave_nothing = |task: &'static str| move || launch(task, 3).expect_success();
    vec![
        Test::new("fifty groups leave nothing behind", leave_nothing(GROUPS)),
        Test::new("twenty jobs leave nothing behind", leave_nothing(JOBS)),
    ]
}

pub(crate) fn many_groups(tcp: &Tcp) {
    exchange(tcp);
    let before = held();
    for _ in 0..50 {
        exchange(tcp);
    }
    expect_held(before);
}

pub(crate) fn many_jobs() {
    let launch = from_env().unwrap();
    let before = held();
    for _ in 0..20 {
        exchange(&Tcp::init(&launch).unwrap());
    }
    expect_held(before);
}

/// A group in which every rank sends to the next.
fn exchange(tcp: &Tcp) {
    const LEN: usize = 100_000;
    let endpoint = tcp.group(PATIENT).unwrap();
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let (next, before) = (
        (rank + 1) % world_size,
        (rank + world_size - 1) % world_size,
    );
    let tag = Tag::new(0, 0, Payload::KeyValue);
    let expected = Expected {
        dtype: DType::F32,
        len: LEN,
    };
    let receive = endpoint.irecv(before, tag, expected).unwrap();
    let own = HostBuffer::F32(vec![rank as f32; LEN]);
    let send = endpoint.isend(next, tag, own).unwrap();
    let received = receive.wait().unwrap();
    assert_eq!(received, HostBuffer::F32(vec![before as f32; LEN]));
    send.wait().unwrap();
}

/// Open files and threads of this process; nothing where the system does not tell.
fn held() -> [usize; 2] {
    ["/proc/self/fd", "/proc/self/task"]
        .map(|folder| fs::read_dir(folder).map_or(0, Iterator::count))
}

/// The system may take a moment to let go of a thread that has ended.
fn expect_held(expected: [usize; 2]) {
    let until = Instant::now() + Duration::from_secs(20);
    while held() != expected && Instant::now() < until {
        thread::yield_now();
    }
    assert_eq!(held(), expected, "open files, threads");
}
