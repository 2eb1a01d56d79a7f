//! Measures every strategy on every workload beside the others, and what `Auto` chooses, and writes
//! `benches/results/strategies.md`. Fails if a choice is more than 5% slower than the best.
//!
//!     cargo run --release -p ring-benches --bin strategies

use std::{error::Error, fmt::Write as _, fs, path::Path, sync::Arc};

use ring_benches::{
    compare::pairs::Spread,
    machine,
    masks::{Case, Times, measure},
    workload::on_all_ranks,
};
use ring_comm::Communicator;
use ring_core::{AttentionSpec, Auto, Documents, MachineModel, Pattern, Shape, Sharding, Strategy};
use ring_kernels::CpuKernels;

/// Ranks of all measurements, each with one thread.
const RANKS: usize = 4;
/// Heads of all measurements.
const HEADS: usize = 4;
/// How much slower than the best strategy the chosen one may be.
const BAR: f64 = 1.05;
/// Repetitions with which a choice that seems too slow is measured again, beside the best.
const AGAIN: usize = 7;

/// A computation, and how often each strategy computes it.
struct Workload {
    name: String,
    spec: AttentionSpec,
    repetitions: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let machine = measured_machine();
    let mut report = head(&machine);
    let mut missed = Vec::new();
    for workload in workloads() {
        eprintln!("{}", workload.name);
        table(&workload, machine, &mut report, &mut missed);
    }
    print!("{report}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("strategies.md"), report)?;
    match missed.as_slice() {
        [] => Ok(()),
        missed => Err(missed.join("; ").into()),
    }
}

fn measured_machine() -> MachineModel {
    let models = on_all_ranks(RANKS, |endpoint| {
        let kernels = CpuKernels::new(1).expect("a thread can be started");
        let communicator = Communicator::new(Arc::new(endpoint));
        MachineModel::measure(&kernels, &communicator).expect("the measurement succeeds")
    });
    models[0]
}

fn head(machine: &MachineModel) -> String {
    format!(
        "# Strategies\n\n\
         {}, {} cores, {}; {}.\n\n\
         {RANKS} ranks as threads of one process (loopback) that share the cores, one thread each; {HEADS} heads, batch 1, f32. A \
         forward and a backward pass; medians, the strategies in turns, after one run that does not count. Messages change hands \
         without a copy here, so times show what packing, waiting and uneven work cost, not a network. Bytes are what the rank that \
         receives most receives (counted on the wire in tests), hops the rounds of messages of a forward pass. Made by `cargo run \
         --release -p ring-benches --bin strategies`.\n\n\
         The machine as `MachineModel::measure` found it: a pair of query and key takes {:.1} ps for each element of the head \
         forward, {:.1} ps backward; {:.1} of {RANKS} ranks compute at the same time; a small message takes {:.0} us, rows are copied \
         at {:.1} GB/s.\n",
        machine::processor(),
        machine::cores(),
        machine::operating_system(),
        machine::date(),
        machine.forward_pair_seconds * 1e12,
        machine.backward_pair_seconds * 1e12,
        machine.parallel_ranks,
        machine.latency_seconds * 1e6,
        machine.copy_bytes_per_second / 1e9,
    )
}

fn workloads() -> Vec<Workload> {
    let causal = || Pattern::full().causal();
    let longnet = |lengths: &[usize], rates: &[usize]| {
        let pattern = Pattern::dilated(lengths, rates).expect("a sound pattern");
        pattern.causal()
    };
    let (contiguous, zigzag) = (Sharding::Contiguous, Sharding::Zigzag);
    let workload = |name: &str, pattern, length, head_dim, sharding, repetitions| {
        let shape = Shape {
            batch: 1,
            query_heads: HEADS,
            kv_heads: HEADS,
            head_dim,
        };
        let spec = AttentionSpec::new(pattern, shape, length)
            .and_then(|spec| spec.sharded(sharding, RANKS))
            .expect("a sound computation");
        Workload {
            name: format!("{name}, N = {length}, heads of {head_dim}, {sharding}"),
            spec,
            repetitions,
        }
    };
    let window = causal().with_window(Some(1023), None);
    let mut documents = workload(
        "causal, packed documents",
        causal(),
        16_384,
        64,
        contiguous,
        5,
    );
    let lengths = [700, 2048, 100, 4096, 1300, 900, 240, 3000, 2000, 2000];
    documents.spec = documents
        .spec
        .with_documents(Documents::new(lengths.to_vec()))
        .expect("documents fill the sequence");
    let branches: [&[usize]; 2] = [&[2048, 8192, 32_768], &[1, 4, 16]];
    let wide: [&[usize]; 2] = [&[2048, 32_768, 131_072], &[1, 16, 64]];
    let whole: [&[usize]; 2] = [&[2048, 32_768, 1 << 20], &[1, 16, 512]];
    vec![
        workload("full causal", causal(), 8192, 64, zigzag, 5),
        workload("full causal", causal(), 8192, 64, contiguous, 5),
        workload("full causal", causal(), 32_768, 64, zigzag, 2),
        workload(
            "LongNet",
            longnet(branches[0], branches[1]),
            32_768,
            64,
            contiguous,
            5,
        ),
        workload(
            "LongNet",
            longnet(wide[0], wide[1]),
            131_072,
            64,
            contiguous,
            3,
        ),
        workload(
            "LongNet",
            longnet(whole[0], whole[1]),
            1 << 20,
            16,
            contiguous,
            2,
        ),
        workload("causal window of 1024", window, 32_768, 64, contiguous, 5),
        documents,
    ]
}

/// Seconds of both passes.
fn median(times: &[Times]) -> f64 {
    let both: Vec<f64> = times
        .iter()
        .map(|times| times.forward + times.backward)
        .collect();
    Spread::of(&both).median
}

fn table(
    workload: &Workload,
    machine: MachineModel,
    report: &mut String,
    missed: &mut Vec<String>,
) {
    let auto = Auto {
        machine,
        ..Auto::default()
    };
    let choice = auto.choose(&workload.spec).expect("a sound computation");
    let case = |strategy: Strategy| Case {
        name: strategy.to_string(),
        spec: workload
            .spec
            .clone()
            .with_strategy(strategy)
            .expect("candidates can serve"),
    };
    let cases: Vec<Case> = choice
        .candidates
        .iter()
        .map(|(strategy, _)| case(*strategy))
        .collect();
    let all_times = measure(&cases, workload.repetitions);
    let medians: Vec<f64> = all_times.iter().map(|times| median(times)).collect();
    let best = (0..cases.len())
        .min_by(|&a, &b| medians[a].total_cmp(&medians[b]))
        .expect("there are candidates");
    let _ = write!(
        report,
        "\n## {}\n\n\
         | strategy | received forward, KiB | backward, KiB | hops | forward, ms | backward, ms | time over the best | estimated, ms |\n\
         |---|---|---|---|---|---|---|---|\n",
        workload.name
    );
    for (index, (case, times)) in cases.iter().zip(&all_times).enumerate() {
        let received = case.received();
        let of = |pick: fn(&Times) -> f64| {
            1e3 * Spread::of(&times.iter().map(pick).collect::<Vec<_>>()).median
        };
        let _ = writeln!(
            report,
            "| {} | {} | {} | {} | {:.1} | {:.1} | {:.3} | {:.1} |",
            case.name,
            received.forward >> 10,
            received.backward >> 10,
            received.hops,
            of(|times| times.forward),
            of(|times| times.backward),
            medians[index] / medians[best],
            1e3 * choice.candidates[index].1.seconds,
        );
    }
    let chosen = choice.candidates.iter();
    let chosen = chosen
        .map(|(strategy, _)| *strategy)
        .position(|strategy| strategy == choice.strategy)
        .expect("the choice is a candidate");
    let mut ratio = medians[chosen] / medians[best];
    let mut how = String::new();
    if ratio > BAR {
        // Is it so, or was the machine busy? Only the two, and more often.
        let two = [case(choice.strategy), case(choice.candidates[best].0)];
        let again = measure(&two, AGAIN);
        ratio = median(&again[0]) / median(&again[1]);
        how = format!(" (measured again beside it, {AGAIN} times in turns)");
    }
    let _ = writeln!(
        report,
        "\n`Auto` chooses {}: {ratio:.3} times the best{how}. It takes {}.",
        choice.strategy,
        choice.to_string().lines().next().unwrap_or_default()
    );
    if ratio > BAR {
        missed.push(format!(
            "{}: {} was chosen, {ratio:.3} times the best",
            workload.name, choice.strategy
        ));
    }
}
