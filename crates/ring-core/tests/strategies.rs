//! What holds for every strategy: the same bits every time and over every transport, and an error on all ranks when one fails.

mod cases;
mod ranks;

use std::{
    net::TcpListener,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use ranks::{
    DEADLINE, RankResult, Whole,
    faulty::{Fault, Faulty},
    run_rank, run_rank_on,
};
use ring_comm::{
    Communicator, Loopback, RankPanic, Tcp, Transport,
    buffer::{DType, HostBuffer},
    collective::barrier,
    launch::from_variables,
};
use ring_core::{
    AttentionSpec, Documents, Error, Mixing, Pattern, Plan, Shape, Sharding, Strategy,
};

const RANKS: usize = 4;

/// The bits of everything a rank ends with.
fn bits(result: &RankResult) -> Vec<Vec<u32>> {
    let [query, key, value] = &result.gradients;
    [&result.output, &result.log_sum_exp, query, key, value]
        .map(|values| values.iter().map(|x| x.to_bits()).collect())
        .into()
}

/// The bits that every rank ends with over loopback.
fn over_loopback(spec: &AttentionSpec, threads: usize) -> Vec<Vec<Vec<u32>>> {
    let whole = Whole::random(spec);
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        bits(&run_rank(spec, &whole, &communicator, threads).unwrap())
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn any_dtype() -> impl proptest::strategy::Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::BF16, DType::F16])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn results_are_the_same_bits_every_time(spec in cases::any_divided_spec(70), dtype in any_dtype()) {
        let spec = spec.with_dtype(dtype);
        let expected = over_loopback(&spec, 1);
        for threads in [1, 2, 2] {
            prop_assert!(over_loopback(&spec, threads) == expected, "{threads} threads");
        }
    }
}

/// Self-attention of 4 heads on 4 ranks, by every strategy, with patterns, shardings and types that differ.
fn computations() -> Vec<AttentionSpec> {
    let longnet = Pattern::dilated(&[16, 32, 80], &[1, 2, 3]).unwrap();
    let patterns = [
        (Pattern::full().causal(), Sharding::Zigzag, DType::F32),
        (longnet.clone(), Sharding::Contiguous, DType::BF16),
        (
            longnet.causal(),
            Sharding::Striped {
                chunk_size: Some(5),
            },
            DType::F32,
        ),
    ];
    let shape = |query_heads| Shape {
        batch: 2,
        query_heads,
        kv_heads: 4,
        head_dim: 8,
    };
    let mut all = Vec::new();
    for (pattern, sharding, dtype) in patterns {
        for query_heads in [4, 8] {
            let spec = AttentionSpec::new(pattern.clone(), shape(query_heads), 80)
                .and_then(|spec| spec.sharded(sharding, RANKS))
                .and_then(|spec| spec.with_documents(Documents::new(vec![50, 30])))
                .and_then(|spec| spec.with_dropout(0.1))
                .unwrap()
                .with_dtype(dtype);
            let strategies = Strategy::candidates(&spec);
            assert_eq!(strategies.len(), 6, "every kind of strategy");
            let divided = |strategy| spec.clone().with_strategy(strategy).unwrap();
            all.extend(strategies.into_iter().map(divided));
        }
    }
    all
}

/// Runs `rank` as every rank of a group that is connected by TCP.
fn over_tcp<T: Send>(rank: impl Fn(&Communicator<HostBuffer>) -> T + Sync) -> Vec<T> {
    // Free a moment ago, and in nobody's hands most likely.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    let process = |number: usize| {
        let variables = move |name: &str| {
            let value = match name {
                "RING_RANK" => number.to_string(),
                "RING_WORLD_SIZE" => RANKS.to_string(),
                "RING_RENDEZVOUS" => format!("127.0.0.1:{port}"),
                "RING_JOB_TOKEN" => "not very secret".to_string(),
                _ => return None,
            };
            Some(value.into())
        };
        let tcp = Tcp::init(&from_variables(variables).unwrap()).unwrap();
        rank(&Communicator::new(Arc::new(tcp.group(DEADLINE).unwrap())))
    };
    thread::scope(|scope| {
        let process = &process;
        let ranks: Vec<_> = (0..RANKS)
            .map(|number| scope.spawn(move || process(number)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn results_are_the_same_bits_over_tcp() {
    let computations = computations();
    let by_rank = over_tcp(|communicator| -> Vec<_> {
        let run = |spec| {
            let result = run_rank(spec, &Whole::random(spec), communicator, 1);
            bits(&result.unwrap())
        };
        computations.iter().map(run).collect()
    });
    for (index, spec) in computations.iter().enumerate() {
        let got: Vec<_> = by_rank
            .iter()
            .map(|results| results[index].clone())
            .collect();
        let (strategy, pattern) = (spec.strategy, &spec.pattern);
        assert!(got == over_loopback(spec, 1), "{strategy}, {pattern}");
    }
}

/// Full attention, by every strategy.
fn full_by_every_strategy() -> Vec<AttentionSpec> {
    let shape = Shape {
        batch: 1,
        query_heads: 4,
        kv_heads: 4,
        head_dim: 8,
    };
    let spec = AttentionSpec::new(Pattern::full(), shape, 64)
        .and_then(|spec| spec.sharded(Sharding::Zigzag, RANKS))
        .unwrap();
    let strategies = Strategy::candidates(&spec).into_iter();
    let divided = |strategy| spec.clone().with_strategy(strategy).unwrap();
    strategies.map(divided).collect()
}

/// How a rank ended, unless it panicked: its error, if any.
type End = Result<Option<Error>, RankPanic>;

/// Asserts that all ranks heard of `culprit`, which failed as `reason` says.
fn assert_all_hear(ends: Vec<End>, culprit: usize, reason: &str, how: &str) {
    for (rank, end) in ends.into_iter().enumerate() {
        match end {
            Err(panic) => {
                let expected = rank == culprit && panic.message.contains("out of order");
                assert!(expected, "{how}: {panic:?}");
            }
            Ok(Some(Error::Kernel { .. })) => assert_eq!(rank, culprit, "{how}"),
            Ok(Some(Error::Comm { source, .. })) => {
                assert_eq!(source.culprit(), culprit, "{how}: {source}");
                assert!(source.to_string().contains(reason), "{how}: {source}");
            }
            Ok(other) => panic!("{how}: rank {rank} ended with {other:?}"),
        }
    }
}

/// Has one kernel of `culprit` fail. Whether it was called at all.
fn fail(spec: &AttentionSpec, culprit: usize, faulty: &Faulty, how: &str) -> bool {
    let whole = Whole::random(spec);
    let ends = Loopback::run(RANKS, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let healthy = Faulty::never();
        let kernels = match communicator.rank() {
            rank if rank == culprit => faulty,
            _ => &healthy,
        };
        let end = run_rank_on(kernels, spec, &whole, &communicator);
        // A rank that was done before the fault hears of it now.
        let met = barrier(&communicator).map_err(|source| Error::Comm {
            step: "the end".into(),
            source,
        });
        end.and(met).err()
    });
    if faulty.has_failed() {
        let reason = match faulty.fault() {
            Some(Fault::Panic) => format!("rank {culprit} panicked"),
            _ => format!("attention kernel failed on rank {culprit}"),
        };
        assert_all_hear(ends, culprit, &reason, how);
    } else {
        assert!(ends.iter().all(|end| matches!(end, Ok(None))), "{how}");
    }
    faulty.has_failed()
}

#[test]
fn a_kernel_that_fails_anywhere_ends_all_within_the_deadline() {
    const KERNELS: [&str; 6] = [
        "pack",
        "place_rows",
        "forward",
        "finish",
        "backward",
        "add_rows",
    ];
    let started = Instant::now();
    for spec in full_by_every_strategy() {
        let mut failed = 0;
        for (kernel, culprit) in KERNELS
            .into_iter()
            .flat_map(|kernel| [(kernel, 0), (kernel, 2)])
        {
            for (number, fault) in [(0, Fault::Panic), (1, Fault::Error), (9, Fault::Panic)] {
                let how = format!("{}, {kernel} {number} of rank {culprit}", spec.strategy);
                let faulty = Faulty::at(kernel, number, fault);
                failed += usize::from(fail(&spec, culprit, &faulty, &how));
            }
        }
        assert!(failed >= 10, "only {failed} failed with {}", spec.strategy);
    }
    assert!(
        started.elapsed() < DEADLINE / 2,
        "some waited for the deadline"
    );
}

#[test]
fn a_rank_that_leaves_ends_all_within_the_deadline() {
    let started = Instant::now();
    for spec in full_by_every_strategy() {
        for culprit in [0, 3] {
            let whole = Whole::random(&spec);
            let all_are_done = Barrier::new(RANKS);
            let ends = Loopback::run(RANKS, DEADLINE, |endpoint| {
                let communicator = Communicator::new(Arc::new(endpoint));
                // Plans are compared once, so that the second time all begin with their exchange.
                run_rank(&spec, &whole, &communicator, 1).unwrap();
                all_are_done.wait();
                match communicator.rank() {
                    rank if rank == culprit => None,
                    _ => run_rank(&spec, &whole, &communicator, 1).err(),
                }
            });
            let is_divided = Plan::new(&spec, 0).unwrap().regroup().is_some();
            for (rank, end) in ends.into_iter().enumerate().filter(|end| end.0 != culprit) {
                let Ok(Some(Error::Comm { step, source })) = end else {
                    panic!("rank {rank} by {} ended with {end:?}", spec.strategy)
                };
                assert_eq!(source.culprit(), culprit, "{}: {source}", spec.strategy);
                let is_early = step.contains("division of heads") || step.contains("hop");
                assert!(is_early && (is_divided || step.contains("hop")), "{step}");
            }
        }
    }
    assert!(
        started.elapsed() < DEADLINE / 2,
        "some waited for the deadline"
    );
}

#[test]
fn another_strategy_on_one_rank_is_found_out() {
    let all = full_by_every_strategy();
    for other in &all[1..] {
        let whole = Whole::random(other);
        let ends = Loopback::run(RANKS, Duration::from_secs(30), |endpoint| {
            let mine = if endpoint.rank() == 1 { other } else { &all[0] };
            let communicator = Communicator::new(Arc::new(endpoint));
            run_rank(mine, &whole, &communicator, 1).err()
        });
        let name = other.strategy.to_string();
        assert_all_hear(ends, 1, &name, &name);
    }
}

#[test]
fn what_is_kept_for_messages_does_not_grow_where_few_heads_have_queries_that_travel() {
    let shape = Shape {
        batch: 1,
        query_heads: 8,
        kv_heads: 8,
        head_dim: 16,
    };
    let pattern = Pattern::dilated(&[1, 2, 4, 8, 8, 8, 16, 256], &[1; 8]);
    let pattern = pattern.unwrap().with_mixing(Mixing::HeadGroups).causal();
    let spec = AttentionSpec::new(pattern, shape, 256)
        .and_then(|spec| spec.sharded(Sharding::Contiguous, RANKS))
        .and_then(|spec| spec.with_strategy(Strategy::RingQuery))
        .unwrap();
    let whole = Whole::random(&spec);
    let kept = Loopback::run(RANKS, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        [1, 2, 3, 4].map(|_| {
            run_rank(&spec, &whole, &communicator, 1).unwrap();
            communicator.buffers().bytes()
        })
    });
    for kept in kept {
        let kept = kept.unwrap();
        assert!(kept.iter().all(|bytes| *bytes == kept[0]), "{kept:?}");
    }
}
