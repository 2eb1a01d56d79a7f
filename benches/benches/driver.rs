//! The drivers over loopback, one kernel thread a rank: what sharding costs or gains.
//!
//! Throughput counts `4 D` a pair of all ranks together, in both passes; see the kernels' benchmark.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput};
use ring_benches::workload::{Rank, on_all_ranks};
use ring_core::{AttentionSpec, Pattern, Plan, Shape, Sharding};

const SHAPE: Shape = Shape {
    batch: 1,
    query_heads: 4,
    kv_heads: 4,
    head_dim: 64,
};
const LENGTH: usize = 4096;

/// The slowest rank's time for `repetitions` of a pass; threads, tensors and plans are made beforehand.
fn time(spec: &AttentionSpec, repetitions: u64, backward: bool) -> Duration {
    let times = on_all_ranks(spec.world_size, |endpoint| {
        let rank = Rank::new(spec, endpoint, 1);
        // The first pass compares plans; and from its end the ranks set off together.
        let result = rank.forward().expect("the forward pass succeeds");
        let start = Instant::now();
        for _ in 0..repetitions {
            if backward {
                black_box(rank.backward(&result).expect("the backward pass succeeds"));
            } else {
                black_box(rank.forward().expect("the forward pass succeeds"));
            }
        }
        start.elapsed()
    });
    times.into_iter().max().expect("a group has ranks")
}

fn pairs(spec: &AttentionSpec) -> u64 {
    (0..spec.world_size)
        .map(|rank| {
            Plan::new(spec, rank)
                .expect("a sound specification")
                .pairs() as u64
        })
        .sum()
}

fn driver(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("driver");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(3));
    let longnet = Pattern::dilated(&[1024, 2048, 4096], &[1, 2, 4]).expect("a sound pattern");
    let patterns = [
        ("full-causal", Pattern::full().causal(), Sharding::Zigzag),
        ("longnet", longnet, Sharding::Contiguous),
    ];
    for (name, pattern, sharding) in patterns {
        for ranks in [1, 2] {
            let spec = AttentionSpec::new(pattern.clone(), SHAPE, LENGTH)
                .and_then(|spec| spec.sharded(sharding, ranks))
                .expect("a sound specification");
            group.throughput(Throughput::Elements(
                pairs(&spec) * 4 * SHAPE.head_dim as u64,
            ));
            for (pass, backward) in [("forward", false), ("backward", true)] {
                let id = BenchmarkId::new(pass, format!("{name}/{ranks}-ranks"));
                group.bench_function(id, |bencher| {
                    bencher.iter_custom(|repetitions| time(&spec, repetitions, backward));
                });
            }
        }
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    driver(&mut criterion);
    criterion.final_summary();
}
