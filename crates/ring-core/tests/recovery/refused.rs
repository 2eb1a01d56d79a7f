//! Memory that is refused.

use std::sync::Arc;

use proptest::prelude::*;
use ring_comm::{
    CommErrorKind, Communicator, Loopback,
    buffer::{DType, HostBuffer},
};
use ring_core::{
    AttentionSpec, Error, Plan, Recovery, RecoveryPolicy, RecoveryStatistics, Refusal, Strategy,
};
use ring_kernels::{
    CpuKernels, KernelError,
    failing::{FailingAllocations, REFUSED_BYTES},
};

use crate::{
    cases,
    ranks::{DEADLINE, Results, plain, recovered, spec, specs},
};

type Ended = (Result<Results, Error>, RecoveryStatistics);

/// What every rank computes when nothing is refused.
fn expected(spec: &AttentionSpec) -> Vec<Results> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let plan = Plan::new(spec, communicator.rank()).unwrap();
        plain(&CpuKernels::new(1).unwrap(), &communicator, &plan).unwrap()
    });
    results.into_iter().map(Result::unwrap).collect()
}

/// Both passes, with those calls of a rank's kernels refused, from the first number on so many.
fn run(
    spec: &AttentionSpec,
    policy: RecoveryPolicy,
    refused: impl Fn(usize) -> (usize, usize) + Sync,
) -> Vec<Ended> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(spec, rank).unwrap();
        let (first, times) = refused(rank);
        let kernels = FailingAllocations::new(CpuKernels::new(1).unwrap(), first, times);
        let recovery = Recovery::new(policy);
        let result = recovered(&recovery, &kernels, &communicator, &plan);
        (result, recovery.statistics())
    });
    results.into_iter().map(Result::unwrap).collect()
}

/// Whose calls are refused.
fn last_rank(spec: &AttentionSpec) -> usize {
    spec.world_size - 1
}

fn retries(retries: u32) -> RecoveryPolicy {
    RecoveryPolicy {
        retries,
        ..RecoveryPolicy::default()
    }
}

/// Whether refusing that call ends the pass before it begins: on all ranks or none. `None` if there is no such call.
fn is_reserved(spec: &AttentionSpec, call: usize) -> Option<bool> {
    let last = last_rank(spec);
    let ended = run(spec, retries(0), |rank| (call, usize::from(rank == last)));
    let error = ended[last].0.as_ref().err()?;
    let is_memory = |error: &Error| matches!(error, Error::Memory { .. });
    for (result, statistics) in &ended {
        let on_this = result.as_ref().err().is_some_and(is_memory);
        assert_eq!(on_this, is_memory(error), "{result:?}");
        assert_eq!(statistics.given_up, u64::from(on_this));
    }
    Some(is_memory(error))
}

#[test]
fn whatever_was_refused_while_it_was_reserved_is_had_later_and_changes_nothing() {
    for spec in specs() {
        let (expected, last) = (expected(&spec), last_rank(&spec));
        let calls: Vec<bool> = (0..).map_while(|call| is_reserved(&spec, call)).collect();
        let reserved = (0..calls.len()).filter(|&call| calls[call]);
        let mut tried = 0;
        for call in reserved {
            for times in [1, 2, 3] {
                let ended = run(&spec, retries(4), |rank| {
                    (call, if rank == last { times } else { 0 })
                });
                for (rank, (result, statistics)) in ended.into_iter().enumerate() {
                    assert_eq!(
                        result.as_ref(),
                        Ok(&expected[rank]),
                        "call {call}, {spec:?}"
                    );
                    let refusals = if rank == last { times as u64 } else { 0 };
                    let expected = RecoveryStatistics {
                        passes: 2,
                        refusals,
                        retries: times as u64,
                        recovered: 1,
                        given_up: 0,
                        lost_peers: 0,
                        level: times as u32 - 1,
                    };
                    assert_eq!(statistics, expected, "call {call}");
                }
            }
            tried += 1;
        }
        assert!(tried >= 7, "{tried} of {calls:?}");
    }
}

#[test]
fn a_refusal_in_the_middle_of_a_pass_is_an_error_of_all_who_wait() {
    for spec in specs() {
        let last = last_rank(&spec);
        let calls: Vec<bool> = (0..).map_while(|call| is_reserved(&spec, call)).collect();
        let call = calls.iter().position(|is_reserved| !is_reserved).unwrap();
        let ended = run(&spec, retries(4), |rank| (call, usize::from(rank == last)));
        for (rank, (result, statistics)) in ended.iter().enumerate() {
            let refused = u64::from(rank == last);
            assert_eq!(statistics.refusals, refused);
            match result {
                Err(Error::Kernel { source, .. }) if rank == last => {
                    let bytes = REFUSED_BYTES;
                    assert_eq!(*source, KernelError::Allocation { bytes });
                }
                Err(Error::Comm { source, .. }) => {
                    assert_eq!(source.culprit(), last);
                    assert_eq!(statistics.lost_peers, 1);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn what_is_refused_for_ever_is_told_to_all_and_a_smaller_computation_goes_on() {
    for (spec, backward) in specs()
        .into_iter()
        .flat_map(|spec| [(spec.clone(), false), (spec, true)])
    {
        let (expected, last) = (expected(&spec), last_rank(&spec));
        let calls: Vec<bool> = (0..).map_while(|call| is_reserved(&spec, call)).collect();
        // The first call of a pass, the first of all or the next one that is reserved.
        let later = calls.windows(2).position(|calls| calls == [false, true]);
        let first = if backward { later.unwrap() + 1 } else { 0 };
        let pass = if backward { "backward" } else { "forward" };
        let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let rank = communicator.rank();
            let plan = Plan::new(&spec, rank).unwrap();
            let healthy = CpuKernels::new(1).unwrap();
            let times = if rank == last { usize::MAX } else { 0 };
            let failing = FailingAllocations::new(healthy.clone(), first, times);
            let recovery = Recovery::new(retries(9));
            let refused = recovered(&recovery, &failing, &communicator, &plan);
            let after = recovered(&recovery, &healthy, &communicator, &plan);
            (refused, after, recovery.statistics())
        });
        for (rank, result) in results.into_iter().enumerate() {
            let (refused, after, statistics) = result.unwrap();
            let error = refused.unwrap_err();
            let bytes = REFUSED_BYTES as u64;
            let memory = Error::Memory {
                pass,
                // As they were, without what was kept, levels 1 and 2.
                attempts: 4,
                refusals: vec![Refusal { rank: last, bytes }],
            };
            assert_eq!(error, memory);
            let text = format!("rank {last} was refused {bytes} bytes");
            assert!(error.to_string().contains(&text), "{error}");
            assert_eq!(after.as_ref(), Ok(&expected[rank]));
            assert_eq!((statistics.given_up, statistics.retries), (1, 3));
            assert_eq!((statistics.recovered, statistics.level), (0, 0));
        }
    }
}

#[test]
fn after_some_passes_without_a_refusal_there_is_more_memory_again() {
    let spec = spec(3, DType::F32, Strategy::Ring);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let times = if rank == 1 { 3 } else { 0 };
        let kernels = FailingAllocations::new(CpuKernels::new(1).unwrap(), 0, times);
        let recovery = Recovery::new(RecoveryPolicy {
            passes_per_level: 3,
            ..RecoveryPolicy::default()
        });
        let levels = (0..5).map(|_| {
            recovered(&recovery, &kernels, &communicator, &plan).unwrap();
            recovery.statistics().level
        });
        levels.collect::<Vec<_>>()
    });
    for levels in results {
        assert_eq!(levels.unwrap(), [2, 2, 1, 1, 0]);
    }
}

#[test]
fn ranks_with_other_policies_are_told() {
    let spec = spec(3, DType::F32, Strategy::Ring);
    let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let recovery = Recovery::new(retries(if rank == 2 { 1 } else { 4 }));
        let kernels = CpuKernels::new(1).unwrap();
        recovered(&recovery, &kernels, &communicator, &plan).unwrap_err()
    });
    for error in results {
        let Ok(Error::Comm { source, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.culprit(), 2);
        assert!(matches!(source.root().kind, CommErrorKind::Disagreement(_)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn refusals_anywhere_change_nothing_or_are_errors(
        spec in cases::any_divided_spec(60),
        is_short: bool,
        refused in prop::collection::vec((0_usize..16, 0_usize..4), 8),
    ) {
        let spec = spec.with_dtype(if is_short { DType::BF16 } else { DType::F32 });
        let expected = expected(&spec);
        let ended = run(&spec, RecoveryPolicy::default(), |rank| refused[rank]);
        let is = |kind: fn(&Error) -> bool| {
            ended.iter().filter(|(result, _)| result.as_ref().is_err_and(kind)).count()
        };
        let of_memory = is(|error| matches!(error, Error::Memory { .. }));
        let in_the_middle = is(|error| matches!(error, Error::Kernel { .. }));
        let heard = is(|error| matches!(error, Error::Comm { .. }));
        prop_assert!(of_memory == 0 || of_memory == spec.world_size);
        prop_assert!(heard == 0 || in_the_middle > 0);
        prop_assert_eq!(is(|_| true), of_memory + in_the_middle + heard);
        for (rank, (result, statistics)) in ended.iter().enumerate() {
            let first = ended[0].1;
            if in_the_middle == 0 {
                prop_assert_eq!(statistics.level, first.level);
                prop_assert_eq!(statistics.retries, first.retries);
                prop_assert_eq!(statistics.recovered, first.recovered);
            }
            if let Ok(results) = result {
                prop_assert_eq!(results, &expected[rank]);
            }
        }
    }
}
