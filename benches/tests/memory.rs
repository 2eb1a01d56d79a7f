//! Attention beyond its inputs takes O(N/P) memory on each of P ranks, forward and backward.
//!
//! Ranks are threads, each computes on its own thread, and a counting allocator keeps an account for each; messages are charged
//! to the rank that holds them ([`ring_benches::metered`]). What is counted depends on the plan alone, not on timing.

use std::thread;

use ring_benches::{
    heap::{CountingAllocator, measure},
    memory::{Pass, measure_ranks, scratch, worst},
};
use ring_comm::buffer::DType;
use ring_core::{AttentionSpec, Pattern, Shape, Sharding};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What is not a tensor: lists of blocks and of tasks, message layouts.
const SMALL_CHANGE: u64 = 32 << 10;

const SHARDINGS: [Sharding; 2] = [Sharding::Contiguous, Sharding::Zigzag];

fn spec(pattern: Pattern, sharding: Sharding, ranks: usize, length: usize) -> AttentionSpec {
    let shape = Shape {
        batch: 1,
        query_heads: 4,
        kv_heads: 4,
        head_dim: 16,
    };
    AttentionSpec::new(pattern, shape, length)
        .and_then(|spec| spec.sharded(sharding, ranks))
        .unwrap()
}

/// Full causal, and LongNet whose first branch stays within a shard, and whose last one takes the whole sequence.
fn patterns(shortest: usize, middle: usize, length: usize) -> [Pattern; 3] {
    let longnet = Pattern::dilated(&[shortest, middle, length], &[1, 2, 4]).unwrap();
    [Pattern::full().causal(), longnet.clone().causal(), longnet]
}

/// Peak bytes beyond the inputs of the rank that needs most, `[forward, backward]`.
fn peaks(spec: &AttentionSpec) -> [u64; 2] {
    worst(&measure_ranks(spec)).map(|pass| pass.usage.peak as u64)
}

#[test]
fn memory_per_rank_stays_when_length_and_ranks_grow_together() {
    const SHARD: usize = 512;
    for sharding in SHARDINGS {
        for index in 0..3 {
            let grown = [2, 4, 8, 16].map(|ranks| {
                let length = ranks * SHARD;
                let pattern = patterns(SHARD / 4, 2 * SHARD, length)[index].clone();
                peaks(&spec(pattern, sharding, ranks, length))
            });
            for pass in [0, 1] {
                let [two, four, eight, sixteen] = grown.map(|peaks| peaks[pass]);
                let case = format!(
                    "pattern {index}, {sharding}, pass {pass}: {two}, {four}, {eight}, {sixteen} bytes"
                );
                // With few ranks there are too few hops for all kinds of messages to exist at the same time.
                assert!(two.max(four) <= eight * 110 / 100 + SMALL_CHANGE, "{case}");
                assert!(
                    sixteen.abs_diff(eight) <= eight * 3 / 100 + SMALL_CHANGE,
                    "{case}"
                );
            }
        }
    }
}

#[test]
fn memory_per_rank_halves_when_ranks_double() {
    const LENGTH: usize = 8192;
    for sharding in SHARDINGS {
        for pattern in patterns(LENGTH / 64, LENGTH / 2, LENGTH) {
            let at = |ranks| spec(pattern.clone(), sharding, ranks, LENGTH);
            let [eight, sixteen] = [8, 16].map(|ranks| peaks(&at(ranks)));
            let fixed = scratch(&at(1)) + SMALL_CHANGE;
            for (eight, sixteen) in eight.into_iter().zip(sixteen) {
                let case =
                    format!("{pattern}, {sharding}: {eight} bytes on 8 ranks, {sixteen} on 16");
                assert!(sixteen <= eight * 53 / 100 + fixed, "{case}");
                assert!(sixteen + fixed >= eight * 47 / 100, "{case}");
            }
        }
    }
}

#[test]
fn memory_per_rank_is_linear_in_the_length() {
    for sharding in SHARDINGS {
        let at = |length: usize| {
            patterns(length / 16, length / 2, length)
                .map(|pattern| spec(pattern, sharding, 4, length))
        };
        for (short, long) in at(2048).iter().zip(&at(4096)) {
            let fixed = scratch(short) + SMALL_CHANGE;
            for (short, long) in peaks(short).into_iter().zip(peaks(long)) {
                assert!(
                    long.abs_diff(2 * short) <= fixed,
                    "{sharding}: {short} bytes, {long} for twice the length"
                );
            }
        }
    }
}

#[test]
fn nobody_ever_holds_a_tensor_of_the_whole_sequence() {
    const LENGTH: usize = 4096;
    for sharding in SHARDINGS {
        for pattern in patterns(LENGTH / 32, LENGTH / 2, LENGTH) {
            let spec = spec(pattern, sharding, 8, LENGTH);
            let Shape {
                kv_heads, head_dim, ..
            } = spec.shape;
            // The largest thing of all: a message with keys and values of one shard.
            let message = 2 * kv_heads * (LENGTH / 8) * head_dim * size_of::<f32>();
            for rank in measure_ranks(&spec) {
                for pass in [rank.forward, rank.backward] {
                    let largest = pass.usage.largest;
                    assert!(largest <= message.max(scratch(&spec) as usize), "{largest}");
                }
            }
        }
    }
}

#[test]
fn the_estimate_is_not_exceeded() {
    let striped = Sharding::Striped { chunk_size: None };
    let mut exceeded = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for sharding in [Sharding::Contiguous, Sharding::Zigzag, striped] {
            for (ranks, length) in [(1, 1024), (2, 2048), (5, 2000), (8, 4096)] {
                for pattern in patterns(length / 16, length / 2, length) {
                    let spec = spec(pattern, sharding, ranks, length).with_dtype(dtype);
                    for (rank, memory) in measure_ranks(&spec).iter().enumerate() {
                        exceeded.extend(excess(&spec, rank, "forward", &memory.forward));
                        exceeded.extend(excess(&spec, rank, "backward", &memory.backward));
                    }
                }
            }
        }
    }
    assert!(
        exceeded.is_empty(),
        "{} cases:\n{}",
        exceeded.len(),
        exceeded.join("\n")
    );
}

/// What to say of a pass that needed more than was estimated.
fn excess(spec: &AttentionSpec, rank: usize, name: &str, pass: &Pass) -> Option<String> {
    let (peak, ratio) = (pass.usage.peak, pass.ratio());
    (peak as u64 > pass.estimate + SMALL_CHANGE).then(|| {
        format!(
            "{}, {}, {}, N = {}, {name} of rank {rank} of {}: {peak} bytes, {} estimated ({ratio:.2})",
            spec.pattern,
            spec.query_sharding,
            spec.dtype,
            spec.query_length,
            spec.world_size,
            pass.estimate,
        )
    })
}

#[test]
fn the_account_of_a_thread_is_its_own() {
    let (kept, usage) = measure(|| {
        let first = vec![1_u8; 1000];
        drop(vec![2_u8; 3000]);
        let other = thread::spawn(|| drop(vec![3_u8; 1 << 20]));
        other.join().unwrap();
        first
    });
    assert_eq!(usage.largest, 3000);
    assert!((4000..8000).contains(&usage.peak), "{usage:?}");
    assert_eq!(kept.len(), 1000);
}
