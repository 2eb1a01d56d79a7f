//! Peers that are lost, and what is logged of them and of refused memory.

use std::{
    sync::{Arc, Barrier},
    time::Duration,
};

use ring_comm::{CommErrorKind, Communicator, Loopback, buffer::DType};
use ring_core::{Error, Plan, Recovery, RecoveryPolicy, Strategy};
use ring_kernels::{CpuKernels, failing::FailingAllocations};
use tracing::Level;

use crate::{
    events::Events,
    ranks::{DEADLINE, recovered, spec, specs},
};

/// The rank that is lost.
const LOST: usize = 1;

fn new_recovery() -> Recovery {
    Recovery::new(RecoveryPolicy::default())
}

#[test]
fn a_rank_that_panics_anywhere_is_an_error_of_all_who_wait() {
    for spec in specs().into_iter().filter(|spec| spec.world_size > 1) {
        for call in 0.. {
            let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
                let communicator = Communicator::new(Arc::new(endpoint));
                let rank = communicator.rank();
                let plan = Plan::new(&spec, rank).unwrap();
                let call = if rank == LOST { call } else { usize::MAX };
                let kernels = FailingAllocations::panicking(CpuKernels::new(1).unwrap(), call);
                let recovery = new_recovery();
                let result = recovered(&recovery, &kernels, &communicator, &plan);
                (result, recovery.statistics().lost_peers)
            });
            if results[LOST].is_ok() {
                break;
            }
            for (rank, result) in results.into_iter().enumerate() {
                match result {
                    Ok((Err(Error::Comm { source, .. }), 1)) => assert_eq!(source.culprit(), LOST),
                    // Nothing was left to receive from it.
                    Ok((Ok(_), 0)) => {}
                    Err(_) if rank == LOST => {}
                    other => panic!("rank {rank}, call {call}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_is_found_out_by_the_vote_and_logged() {
    let spec = spec(3, DType::F32, Strategy::Ring);
    let all_have_passed = Barrier::new(3);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let (kernels, recovery) = (CpuKernels::new(1).unwrap(), new_recovery());
        let first = recovered(&recovery, &kernels, &communicator, &plan);
        all_have_passed.wait();
        first.unwrap();
        let again = || recovered(&recovery, &kernels, &communicator, &plan);
        (rank != LOST).then(|| (Events::of(again), recovery.statistics()))
    });
    for result in results.into_iter().filter_map(Result::unwrap) {
        let ((error, events), statistics) = result;
        let Err(Error::Comm { step, source }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(&*step, "the vote on memory of the forward pass");
        assert_eq!(source.culprit(), LOST);
        assert_eq!((statistics.passes, statistics.lost_peers), (3, 1));
        let [(Level::ERROR, text)] = &events[..] else {
            panic!("{events:?}");
        };
        assert!(text.contains(&format!(" culprit={LOST} kind=")), "{text}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_when_the_deadline_passes() {
    let spec = spec(3, DType::F32, Strategy::Ring);
    let others_are_done = Barrier::new(3);
    let results = Loopback::run(3, Duration::from_millis(200), |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let (kernels, recovery) = (CpuKernels::new(1).unwrap(), new_recovery());
        let result = (rank != LOST).then(|| recovered(&recovery, &kernels, &communicator, &plan));
        others_are_done.wait();
        (result, recovery.statistics().lost_peers)
    });
    for result in results {
        match result.unwrap() {
            (Some(Err(Error::Comm { source, .. })), 1) => {
                assert_eq!(source.culprit(), LOST);
                assert!(matches!(source.root().kind, CommErrorKind::Deadline { .. }));
            }
            (None, 0) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// The events of both passes on all ranks, when rank 2 is refused its first calls, so many of them.
fn events(refusals: usize) -> Vec<Vec<(Level, String)>> {
    let spec = spec(3, DType::F32, Strategy::Ring);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let times = if rank == 2 { refusals } else { 0 };
        let kernels = FailingAllocations::new(CpuKernels::new(1).unwrap(), 0, times);
        let recovery = new_recovery();
        let passes = || drop(recovered(&recovery, &kernels, &communicator, &plan));
        Events::of(passes).1
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn refusals_retries_and_what_became_of_them_are_logged() {
    let levels = |events: &[(Level, String)]| -> Vec<Level> {
        events.iter().map(|&(level, _)| level).collect()
    };
    assert!(events(0).iter().all(Vec::is_empty));
    let (warn, info, error) = (Level::WARN, Level::INFO, Level::ERROR);
    for (rank, events) in events(2).iter().enumerate() {
        let expected = match rank {
            2 => vec![warn, warn, warn, warn, info],
            _ => vec![warn, warn, info],
        };
        assert_eq!(levels(events), expected);
        let own = format!(" rank={rank} level=");
        assert!(events.iter().all(|(_, text)| text.contains(&own)));
        let [.., (_, retry), (_, recovered)] = &events[..] else {
            panic!("{events:?}");
        };
        assert!(retry.contains(" level=1 bytes=64017 attempt=2"), "{retry}");
        assert!(retry.contains(" of=2"), "{retry}");
        assert!(recovered.contains(" level=1 attempt=2"), "{recovered}");
    }
    for (rank, events) in events(usize::MAX).iter().enumerate() {
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last.0, error);
        assert!(last.1.contains("rank 2 was refused 64017 bytes"));
        assert_eq!(before.len(), if rank == 2 { 7 } else { 3 });
    }
}
