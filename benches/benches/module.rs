//! The Burn module against the drivers called directly: what Burn's tensors and autodiff add.
//!
//! Throughput counts floating-point operations: "Gelem/s" reads as GFLOP/s.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use ring_benches::{compare::ranks::LoopbackRanks, module::Module, work::Work};

const THREADS: usize = 1;

fn module(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("module");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(3));
    for causal in [false, true] {
        for backward in [false, true] {
            let work = Work::full(8, 2048, 64)
                .with_causal(causal)
                .with_backward(backward);
            group.throughput(Throughput::Elements(work.flops() as u64));
            let module = Module::new(&work, THREADS);
            group.bench_function(BenchmarkId::new("module", &work), |bencher| {
                bencher.iter(|| module.run());
            });
            let driver = LoopbackRanks::new(&work, 1, THREADS).expect("the work is possible");
            group.bench_function(BenchmarkId::new("driver", &work), |bencher| {
                bencher.iter(|| driver.run().expect("the passes succeed"));
            });
        }
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    module(&mut criterion);
    criterion.final_summary();
}
