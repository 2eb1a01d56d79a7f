//! Random schedules of three and four ranks over loopback: rings, sums and gathers, with a fault or without.
//!
//! Shuttle takes the place of the lock and the condition and decides at random who goes on; a rank that nobody wakes is a
//! deadlock to it, and it prints the schedule of a failure for `shuttle::replay`. It runs by `.ci/models`.
#![cfg(shuttle)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use ring_comm::{
    CommError, CommErrorKind, Communicator, Expected, Loopback, LoopbackEndpoint, Payload, Rank,
    Tag,
    buffer::{DType, HostBuffer},
    collective::{all_reduce_sum, barrier},
};
use shuttle::{
    rand::{Rng, thread_rng},
    thread,
};

const STEPS: usize = 3;

type Endpoint = Arc<LoopbackEndpoint<HostBuffer>>;

/// What goes wrong, at the beginning of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Abort,
    Departure,
    DroppedRequest,
    /// At any time: the clock is a thread of its own.
    Deadline,
}

/// One ring shift, one sum, one barrier.
fn step(communicator: &Communicator<HostBuffer>) -> Result<(), CommError> {
    let (rank, world_size) = (communicator.rank(), communicator.world_size());
    let tag = Tag::new(communicator.next_operation(), 0, Payload::KeyValue);
    let expected = Expected {
        dtype: DType::F32,
        len: 1,
    };
    let next = (rank + 1) % world_size;
    let previous = (rank + world_size - 1) % world_size;
    let incoming = communicator.transport().irecv(previous, tag, expected)?;
    let own = HostBuffer::F32(vec![rank as f32]);
    let outgoing = communicator.transport().isend(next, tag, own)?;
    assert_eq!(incoming.wait()?, HostBuffer::F32(vec![previous as f32]));
    outgoing.wait()?;

    let sum = all_reduce_sum(communicator, vec![rank as f32; world_size])?;
    let expected = (world_size * (world_size - 1) / 2) as f32;
    assert_eq!(sum, vec![expected; world_size]);
    barrier(communicator)
}

/// What a rank does; `fault` is its own. `None` if it has left.
fn run(endpoint: Endpoint, fault: Option<(Fault, usize)>) -> Option<Result<(), CommError>> {
    let communicator = Communicator::new(endpoint);
    for number in 0..STEPS {
        match fault {
            Some((Fault::Abort, at)) if at == number => communicator.abort("staged"),
            Some((Fault::Departure, at)) if at == number => return None,
            Some((Fault::DroppedRequest, at)) if at == number => {
                let peer = (communicator.rank() + 1) % communicator.world_size();
                let tag = Tag::new(99, 0, Payload::KeyValue);
                let own = HostBuffer::F32(vec![0.0]);
                drop(communicator.transport().isend(peer, tag, own));
            }
            _ => {}
        }
        if let Err(error) = step(&communicator) {
            return Some(Err(error));
        }
    }
    Some(Ok(()))
}

fn run_all(world_size: usize, fault: Fault) {
    let culprit = thread_rng().gen_range(0..world_size);
    let at = thread_rng().gen_range(0..STEPS);
    let endpoints: Vec<Endpoint> = Loopback::group(world_size, Duration::MAX)
        .into_iter()
        .map(Arc::new)
        .collect();
    // The others stay until all have ended, so that their departure wakes nobody.
    let leaves = |rank: Rank| fault == Fault::Departure && rank == culprit;
    let stay: Vec<Endpoint> = (0..world_size)
        .filter(|&rank| !leaves(rank))
        .map(|rank| Arc::clone(&endpoints[rank]))
        .collect();
    let clock = (fault == Fault::Deadline).then(|| {
        let endpoint = Arc::clone(&endpoints[culprit]);
        thread::spawn(move || endpoint.pass_deadline())
    });
    let threads: Vec<_> = (0..world_size)
        .zip(endpoints)
        .map(|(rank, endpoint)| {
            let fault = (rank == culprit).then_some((fault, at));
            thread::spawn(move || run(endpoint, fault))
        })
        .collect();
    let outcomes: Vec<_> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    if let Some(clock) = clock {
        clock.join().unwrap();
    }
    drop(stay);
    judge(fault, culprit, &outcomes);
}

fn judge(fault: Fault, culprit: Rank, outcomes: &[Option<Result<(), CommError>>]) {
    let causes: Vec<&CommError> = outcomes
        .iter()
        .flatten()
        .filter_map(|outcome| outcome.as_ref().err().map(CommError::root))
        .collect();
    let culprits: BTreeSet<Rank> = causes.iter().map(|cause| cause.culprit()).collect();
    assert!(
        causes.iter().all(|cause| *cause == causes[0]),
        "{causes:#?}"
    );
    match fault {
        Fault::None => assert!(causes.is_empty(), "{causes:#?}"),
        // Whatever waits when the deadline passes fails, if anything does.
        Fault::Deadline => assert!(
            causes
                .iter()
                .all(|cause| matches!(cause.kind, CommErrorKind::Deadline { .. })),
            "{causes:#?}"
        ),
        _ => {
            let departed = usize::from(fault == Fault::Departure);
            assert_eq!(
                causes.len() + departed,
                outcomes.len(),
                "somebody did not hear of it"
            );
            assert_eq!(culprits, BTreeSet::from([culprit]), "{causes:#?}");
        }
    }
}

/// At random, and with a few changes of who has priority, which finds other things.
fn check(fault: Fault) {
    const SCHEDULES: usize = 300;
    for world_size in [3, 4] {
        shuttle::check_random(move || run_all(world_size, fault), SCHEDULES);
        shuttle::check_pct(move || run_all(world_size, fault), SCHEDULES, 3);
    }
}

#[test]
fn without_a_fault_all_ranks_succeed() {
    check(Fault::None);
}

#[test]
fn an_abort_reaches_all() {
    check(Fault::Abort);
}

#[test]
fn a_departure_reaches_all() {
    check(Fault::Departure);
}

#[test]
fn a_dropped_request_reaches_all() {
    check(Fault::DroppedRequest);
}

#[test]
fn a_deadline_that_passes_reaches_all() {
    check(Fault::Deadline);
}
