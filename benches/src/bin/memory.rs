//! Prints memory per rank for growing lengths and numbers of ranks, and writes the table to `benches/results/memory.md`.
//!
//!     cargo run --release -p ring-benches --bin memory

use std::{fs, io, path::Path};

use ring_benches::{
    heap::CountingAllocator,
    machine,
    memory::{estimates, measure_ranks, worst},
};
use ring_core::{AttentionSpec, Pattern, Plan, Shape, Sharding};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const SHAPE: Shape = Shape {
    batch: 1,
    query_heads: 4,
    kv_heads: 4,
    head_dim: 64,
};
const COMMAND: &str = "cargo run --release -p ring-benches --bin memory";

fn main() -> io::Result<()> {
    let report = report();
    print!("{report}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("memory.md"), report)
}

fn report() -> String {
    let full = || Pattern::full().causal();
    let longnet = || {
        Pattern::dilated(&[1024, 4096, 16384], &[1, 4, 16])
            .expect("a sound pattern")
            .causal()
    };
    let together = [(1, 2048), (2, 4096), (4, 8192), (8, 16384)];
    let longer = [(1, 4096), (2, 8192), (4, 16384), (8, 32768), (16, 65536)];
    let more_ranks = [1, 2, 4, 8, 16];
    [
        head(),
        "\n## N and P grow together: memory per rank stays\n".into(),
        table(Sharding::Zigzag, together.map(|size| (full(), size))),
        table(Sharding::Contiguous, longer.map(|size| (longnet(), size))),
        "\n## P grows: memory per rank shrinks in proportion\n".into(),
        table(
            Sharding::Zigzag,
            more_ranks.map(|ranks| (full(), (ranks, 8192))),
        ),
        table(
            Sharding::Contiguous,
            more_ranks.map(|ranks| (longnet(), (ranks, 32768))),
        ),
        "\n## N grows: memory per rank grows in proportion, not with the square\n".into(),
        table(
            Sharding::Zigzag,
            [4096, 8192, 16384].map(|length| (full(), (4, length))),
        ),
        table(
            Sharding::Contiguous,
            [16384, 32768, 65536].map(|length| (longnet(), (4, length))),
        ),
    ]
    .concat()
}

fn head() -> String {
    let Shape {
        batch,
        query_heads,
        kv_heads,
        head_dim,
    } = SHAPE;
    format!(
        "# Memory per rank\n\n\
         Bytes of heap that the rank which needs most held at one time, beyond its inputs (own rows of Q, K, V), results included;\n\
         in the backward also beyond output, log-sum-exp and incoming gradient, and beyond the memory for messages that the forward\n\
         pass has left to it (the estimate counts that too). Ranks are threads over loopback, one kernel thread\n\
         each; a message is charged to its sender until it is taken and to its receiver from the posted receive on.\n\
         \"Estimate\" is `MemoryEstimate` for the same; \"one device\" is what it says of a single rank with the whole sequence,\n\
         inputs included, in the backward; \"scores\" are the bytes of one head's N x N matrix in f32, which never exists here.\n\n\
         Batch {batch}, {query_heads} query heads, {kv_heads} key/value heads of {head_dim} elements, f32. MiB = 2^20 bytes.\n\n\
         - Machine: {}, {} cores in use\n- Date: {}\n- Command: `{COMMAND}`\n",
        machine::processor(),
        machine::cores(),
        machine::date(),
    )
}

fn table(sharding: Sharding, sizes: impl IntoIterator<Item = (Pattern, (usize, usize))>) -> String {
    let mut lines = String::new();
    for (pattern, (ranks, length)) in sizes {
        if lines.is_empty() {
            lines = format!(
                "\n{pattern}, {sharding}\n\n\
                 | P | N | N/P | inputs MiB | forward MiB | estimate | backward MiB | estimate | largest allocation | one device | scores |\n\
                 |---|---|---|---|---|---|---|---|---|---|---|\n"
            );
        }
        lines += &line(pattern, sharding, ranks, length);
    }
    lines
}

fn line(pattern: Pattern, sharding: Sharding, ranks: usize, length: usize) -> String {
    let spec = AttentionSpec::new(pattern, SHAPE, length)
        .and_then(|spec| spec.sharded(sharding, ranks))
        .expect("a sound specification");
    let plan = Plan::new(&spec, 0).expect("a sound specification");
    let [_, of_backward] = estimates(&plan);
    let measured = measure_ranks(&spec);
    let [forward, backward] = worst(&measured);
    let largest = forward.usage.largest.max(backward.usage.largest) as u64;
    format!(
        "| {ranks} | {length} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        length / ranks,
        mib(measured[0].inputs),
        mib(forward.usage.peak as u64),
        mib(forward.estimate),
        mib(backward.usage.peak as u64),
        mib(backward.estimate),
        mib(largest),
        mib(of_backward.single_device_total),
        mib(4 * (length as u64).pow(2)),
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 20))
}
