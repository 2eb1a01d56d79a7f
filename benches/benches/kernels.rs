//! Block attention on one thread: forward and backward of one head group, by type, head size and length.
//!
//! Throughput counts the multiplications of the forward pass's two products and their additions, `4 D` a pair, in both passes:
//! "Gelem/s" reads as GFLOP/s forward; of the backward pass multiply by 2.5 (five products instead of two).

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput};
use ring_benches::workload::Rank;
use ring_comm::{Loopback, buffer::DType};
use ring_core::{AttentionSpec, Pattern, Shape};

const HEADS: usize = 2;

fn rank(dtype: DType, head_dim: usize, length: usize, causal: bool) -> Rank {
    let shape = Shape {
        batch: 1,
        query_heads: HEADS,
        kv_heads: HEADS,
        head_dim,
    };
    let pattern = Pattern::full();
    let pattern = if causal { pattern.causal() } else { pattern };
    let spec = AttentionSpec::new(pattern, shape, length)
        .expect("a sound specification")
        .with_dtype(dtype);
    let alone = Loopback::group(1, Duration::ZERO).remove(0);
    Rank::new(&spec, alone, 1)
}

fn kernels(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kernels");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    for dtype in [DType::F32, DType::BF16] {
        for head_dim in [64, 128] {
            for (causal, length) in [(false, 1024), (true, 1024), (true, 4096)] {
                let rank = rank(dtype, head_dim, length, causal);
                let mask = if causal { "causal" } else { "full" };
                let case = format!("{dtype}/D{head_dim}/{mask}/N{length}");
                let flops = rank.plan.pairs() * 4 * head_dim as u128;
                group.throughput(Throughput::Elements(flops as u64));
                group.bench_function(BenchmarkId::new("forward", &case), |bencher| {
                    bencher.iter(|| black_box(rank.forward().expect("the forward pass succeeds")));
                });
                let result = rank.forward().expect("the forward pass succeeds");
                group.bench_function(BenchmarkId::new("backward", &case), |bencher| {
                    bencher.iter(|| {
                        black_box(rank.backward(&result).expect("the backward pass succeeds"))
                    });
                });
            }
        }
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    kernels(&mut criterion);
    criterion.final_summary();
}
