//! The lives of groups and of processes in them: a rank that never comes, and a thousand groups one after the other.

use std::{
    fs,
    time::{Duration, Instant},
};

use ring_comm::{
    CommError, CommErrorKind, Expected, Mpi, MpiError, Payload, Rank, RemoteEndpoint, Tag,
    Transport,
    buffer::{DType, HostBuffer},
};

use crate::{
    launch,
    processes::{
        PATIENT, Test,
        faults::wait_until,
        launch::{folder, launched_rank, report},
    },
};

const RANKS: usize = 3;
/// How long the others wait for a rank that does not come.
const DEADLINE: Duration = Duration::from_secs(1);
/// How far behind the deadline an error may be.
const LATE: Duration = Duration::from_secs(1);
const GROUPS: usize = 1000;
/// What a process may hold more after all groups than after the first ones: less than 4 kB each, which is the smallest message.
const MEMORY: usize = 3 << 20;

pub(crate) fn tests() -> Vec<Test> {
    let absent = [0, RANKS - 1].map(|absent| {
        let name = format!("rank {absent} does not join the group");
        Test::new(name, move || {
            let outcome = launch(&format!("absent-{absent}"), RANKS);
            (0..RANKS).for_each(|rank| assert_eq!(outcome.finding(rank), "ok"));
            outcome.expect_success();
        })
    });
    let unstarted = Test::new("rank 1 does not start MPI", || {
        let outcome = launch("unstarted", RANKS);
        assert_eq!([0, 2].map(|rank| outcome.finding(rank)), ["ok"; 2]);
    });
    let leaks = Test::new("a thousand groups leave nothing behind", || {
        launch("leaks", RANKS).expect_success();
    });
    absent.into_iter().chain([unstarted, leaks]).collect()
}

/// Rank `absent` joins when the others have given up, and learns that it was waited for.
pub(crate) fn absent(absent: Rank) {
    let mpi = Mpi::init(PATIENT).unwrap();
    if mpi.rank() == absent {
        wait_until(|| (0..RANKS).all(|rank| rank == absent || has_found(rank)));
        let endpoint = mpi.group(PATIENT).unwrap();
        let error = endpoint.all_gather_bytes(0, Vec::new()).unwrap_err();
        assert_eq!(error.culprit(), absent, "{error}");
        return report(absent, "ok");
    }
    let start = Instant::now();
    let joined = mpi.group_within(DEADLINE, PATIENT);
    // If another rank was the first to give up, the first call says so.
    let met = joined.and_then(|endpoint| endpoint.all_gather_bytes(0, Vec::new()));
    let (error, took) = (met.unwrap_err(), start.elapsed());
    let root = error.root();
    assert!(
        matches!(root.kind, CommErrorKind::Deadline { deadline, .. } if deadline == DEADLINE),
        "{error}"
    );
    assert_eq!(error.culprit(), absent, "{error}");
    // The other may have begun to wait a little earlier, and be the first to give up.
    assert!(DEADLINE / 2 <= took && took < DEADLINE + LATE, "{took:?}");
    report(mpi.rank(), "ok");
}

/// Rank 1 is there as a process, but does not start MPI before the others have given up.
pub(crate) fn unstarted() {
    let rank = launched_rank();
    if rank != 1 {
        let start = Instant::now();
        let error = Mpi::init(DEADLINE).unwrap_err();
        let took = start.elapsed();
        assert_eq!(error, MpiError::Deadline(DEADLINE));
        assert!(DEADLINE <= took && took < DEADLINE + LATE, "{took:?}");
        report(rank, "ok");
    }
    // The launcher may end all when the first one ends.
    wait_until(|| has_found(0) && has_found(2));
}

fn has_found(rank: Rank) -> bool {
    folder().join(format!("rank-{rank}")).exists()
}

/// What a process holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    threads: usize,
    descriptors: usize,
}

impl Held {
    fn now() -> Self {
        let count = |folder| fs::read_dir(folder).unwrap().count();
        Self {
            threads: count("/proc/self/task"),
            descriptors: count("/proc/self/fd"),
        }
    }
}

/// Bytes of memory that are this process's own.
fn memory() -> usize {
    const ANONYMOUS: &str = "RssAnon:";
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(ANONYMOUS));
    let kilobytes = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse::<usize>();
    kilobytes.unwrap() << 10
}

/// Makes groups that end in all sorts of ways, and looks at what stays.
pub(crate) fn leaks() {
    let mpi = Mpi::init(PATIENT).unwrap();
    let make_and_drop = |number| live(&mpi.group(PATIENT).unwrap(), number);
    // The first ones fill what the process keeps for good.
    (0..GROUPS / 5).for_each(make_and_drop);
    let (before, memory_before) = (Held::now(), memory());
    let start = Instant::now();
    (0..GROUPS).for_each(make_and_drop);
    let (after, memory_after) = (Held::now(), memory());
    println!(
        "{GROUPS} groups in {:?}, {memory_before} then {memory_after} bytes",
        start.elapsed()
    );
    assert_eq!(after, before);
    let more = memory_after.saturating_sub(memory_before);
    assert!(more < MEMORY, "{more} bytes more");
}

/// In peace, by an abort, with messages on their way that nobody takes.
fn live(endpoint: &RemoteEndpoint, number: usize) {
    // A few kilobytes, or more than MPI takes without a receive.
    let len = if number.is_multiple_of(2) {
        1000
    } else {
        100_000
    };
    let aborts = |rank: Rank| endpoint.rank() == rank && endpoint.poisoned().is_none();
    match number % 5 {
        0 => drop(endpoint.all_gather_bytes(0, vec![0; 1000]).unwrap()),
        1 => {
            if aborts(0) {
                endpoint.abort("staged");
            }
        }
        2 => {
            if endpoint.rank() == 0 {
                drop(endpoint.isend(1, tag(7), HostBuffer::F32(vec![1.0; len])));
            }
        }
        3 => {
            let _ = shift(endpoint, len, len - endpoint.rank() / 2);
        }
        _ => shift(endpoint, len, len).unwrap(),
    }
}

fn tag(step: u32) -> Tag {
    Tag::new(0, step, Payload::KeyValue)
}

fn shift(endpoint: &RemoteEndpoint, len: usize, sent: usize) -> Result<(), CommError> {
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let expected = Expected {
        dtype: DType::F32,
        len,
    };
    let incoming = endpoint.irecv((rank + world_size - 1) % world_size, tag(0), expected)?;
    let message = HostBuffer::F32(vec![1.0; sent]);
    let outgoing = endpoint.isend((rank + 1) % world_size, tag(0), message)?;
    incoming.wait()?;
    outgoing.wait()?;
    Ok(())
}
