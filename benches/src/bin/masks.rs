//! Measures windows, packed documents and scores, and writes `benches/results/masks.md`. Fails if a bar is missed.
//!
//!     cargo run --release -p ring-benches --bin masks

use std::{error::Error, fmt::Write as _, fs, path::Path};

use ring_benches::{
    compare::pairs::Spread,
    machine,
    masks::{Case, Times, imbalance, measure},
};
use ring_core::{AttentionSpec, Pattern, Sharding};

/// Repetitions; every table takes its cases in turns.
const REPETITIONS: usize = 5;
/// Keys of a window: the query's own and those before it.
const WINDOW: u64 = 1024;
/// What a position may cost at the longest length, as a factor of the shortest.
const LINEAR_BAR: f64 = 1.15;
/// Work of the slowest rank over the mean, from plans: for full attention and LongNet, and for windows.
const BALANCE_BARS: [f64; 2] = [1.01, 1.05];

fn main() -> Result<(), Box<dyn Error>> {
    let mut missed = Vec::new();
    let report = [
        head(),
        lengths(&mut missed),
        workloads(),
        balance(&mut missed),
        scores(),
    ]
    .concat();
    print!("{report}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("masks.md"), report)?;
    match missed.as_slice() {
        [] => Ok(()),
        missed => Err(missed.join("; ").into()),
    }
}

fn head() -> String {
    format!(
        "# Windows, documents, scores\n\n\
         {}, {} cores, {}; {}.\n\n\
         Batch 1, 2 heads of 64, f32, one thread a rank, ranks as threads of one process (loopback). Medians of {REPETITIONS} \
         repetitions after one that does not count, the cases of a table in turns. Made by `cargo run --release -p ring-benches \
         --bin masks`.\n",
        machine::processor(),
        machine::cores(),
        machine::operating_system(),
        machine::date(),
    )
}

fn causal() -> Pattern {
    Pattern::full().causal()
}

fn window() -> Pattern {
    causal().with_window(Some(WINDOW - 1), None)
}

/// Medians of forward and backward, in seconds.
fn medians(times: &[Times]) -> (f64, f64) {
    let of =
        |pick: fn(&Times) -> f64| Spread::of(&times.iter().map(pick).collect::<Vec<_>>()).median;
    (of(|times| times.forward), of(|times| times.backward))
}

fn lengths(missed: &mut Vec<String>) -> String {
    let mut report = format!(
        "\n## A window costs O(N W)\n\n\
         One rank. A causal window of {WINDOW} keys, and all keys up to the query's beside it.\n\n\
         | N | keys | forward, ms | backward, ms | ns a position, both | ratio to N = 8192 | multiply-adds a second, G |\n\
         |---|---|---|---|---|---|---|\n"
    );
    let on_one =
        |name: &str, pattern, length| Case::new(name, pattern, length, Sharding::Contiguous, 1);
    let cases = [
        on_one("window", window(), 8192),
        on_one("window", window(), 32_768),
        on_one("window", window(), 131_072),
        on_one("all", causal(), 8192),
        on_one("all", causal(), 32_768),
    ];
    let all_times = measure(&cases, REPETITIONS);
    let mut first = 0.0;
    for (case, times) in cases.iter().zip(&all_times) {
        let length = case.spec.query_length;
        let (forward, backward) = medians(times);
        let position = (forward + backward) * 1e9 / length as f64;
        if length == 8192 {
            first = position;
        }
        let ratio = position / first;
        if case.name == "window" && ratio > LINEAR_BAR {
            missed.push(format!(
                "a position of a window costs {ratio:.2} times as much at N = {length}"
            ));
        }
        // Two products forward, five backward.
        let rate = 7.0 * 64.0 * case.pairs() as f64 / (forward + backward) / 1e9;
        let _ = writeln!(
            report,
            "| {length} | {} | {:.1} | {:.1} | {position:.0} | {ratio:.2} | {rate:.0} |",
            case.name,
            1e3 * forward,
            1e3 * backward,
        );
    }
    report
}

/// Lengths of documents that fill `length` positions, from 64 to 4096 (the last one may be shorter), skewed to the short.
fn documents(length: usize) -> Vec<usize> {
    let (mut lengths, mut left, mut state) = (Vec::new(), length, 7_u64);
    while left > 0 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let share = (state >> 40) as f64 / (1 << 24) as f64;
        let next = ((64.0 * 64_f64.powf(share)) as usize).min(left);
        lengths.push(next);
        left -= next;
    }
    lengths
}

fn workloads() -> String {
    const LENGTH: usize = 16_384;
    let lengths = documents(LENGTH);
    let count = lengths.len();
    let longnet = || {
        Pattern::dilated(&[2048, 4096, 16_384], &[1, 2, 8])
            .expect("a sound pattern")
            .causal()
    };
    let on_four = |name: &str, pattern, sharding| Case::new(name, pattern, LENGTH, sharding, 4);
    let (contiguous, zigzag) = (Sharding::Contiguous, Sharding::Zigzag);
    let cases = [
        on_four("causal", causal(), zigzag),
        on_four("causal, window", window(), zigzag),
        on_four("causal, window", window(), contiguous),
        on_four("causal, documents", causal(), zigzag).with_documents(lengths.clone()),
        on_four("causal, documents", causal(), contiguous).with_documents(lengths.clone()),
        on_four("causal, window, documents", window(), contiguous).with_documents(lengths.clone()),
        on_four("LongNet, causal", longnet(), contiguous),
        on_four("LongNet, causal, documents", longnet(), contiguous).with_documents(lengths),
    ];
    let all_times = measure(&cases, REPETITIONS);
    let mut report = format!(
        "\n## Beside full attention\n\n\
         N = {LENGTH} on 4 ranks, on {} cores: times are those of all ranks together. The window has {WINDOW} keys; {count} packed \
         documents of 64 to 4096 positions; LongNet's segments are 2048, 4096, 16384 with rates 1, 2, 8. Bytes are what the rank \
         that receives most receives (counted on the wire in tests), from the plan, as pairs are.\n\n\
         | attention | sharding | pairs, M | of all | slowest rank | hops | received forward, KiB | backward, KiB | forward, ms | backward, ms | time of all |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
        machine::cores(),
    );
    let (whole_pairs, whole) = (cases[0].pairs() as f64, medians(&all_times[0]));
    for (case, times) in cases.iter().zip(&all_times) {
        let (pairs, received) = (case.pairs() as f64, case.received());
        let (forward, backward) = medians(times);
        let _ = writeln!(
            report,
            "| {} | {} | {:.1} | {:.3} | {:.3} | {} | {} | {} | {:.1} | {:.1} | {:.3} |",
            case.name,
            case.spec.query_sharding,
            pairs / 1e6,
            pairs / whole_pairs,
            case.planned_imbalance(),
            received.hops,
            received.forward >> 10,
            received.backward >> 10,
            1e3 * forward,
            1e3 * backward,
            (forward + backward) / (whole.0 + whole.1),
        );
    }
    report
}

fn balance(missed: &mut Vec<String>) -> String {
    const LENGTH: usize = 8192;
    let longnet = Pattern::dilated(&[1024, 2048, 8192], &[1, 2, 8])
        .expect("a sound pattern")
        .causal();
    let patterns = [
        ("causal", causal(), BALANCE_BARS[0]),
        (
            "LongNet 1024, 2048, 8192 / 1, 2, 8, causal",
            longnet,
            BALANCE_BARS[0],
        ),
        (
            "causal, window N/16",
            causal().with_window(Some(LENGTH as u64 / 16 - 1), None),
            BALANCE_BARS[1],
        ),
    ];
    let mut cases = Vec::new();
    let mut bars = Vec::new();
    for (name, pattern, bar) in patterns {
        for ranks in [4, 8] {
            cases.push(Case::new(
                name,
                pattern.clone(),
                LENGTH,
                Sharding::Zigzag,
                ranks,
            ));
            bars.push(bar);
        }
    }
    cases.push(Case::new(
        "causal",
        causal(),
        LENGTH,
        Sharding::Contiguous,
        4,
    ));
    bars.push(f64::INFINITY);
    let all_times = measure(&cases, REPETITIONS);
    let mut report = format!(
        "\n## Balance\n\n\
         Slowest rank over the mean, N = {LENGTH}: pairs by the plan, and processor time of the ranks' threads in forward and backward \
         together (each rank's median), which counts packing and adding rows and what ranks do to each other's caches too.\n\n\
         | attention | sharding | ranks | planned | measured | bar of the plan |\n\
         |---|---|---|---|---|---|\n"
    );
    for ((case, times), bar) in cases.iter().zip(&all_times).zip(bars) {
        let planned = case.planned_imbalance();
        if planned > bar {
            missed.push(format!("{}: planned imbalance {planned:.3}", case.name));
        }
        let of_rank = |rank| {
            Spread::of(
                &times
                    .iter()
                    .map(|of: &Times| of.of_ranks[rank])
                    .collect::<Vec<_>>(),
            )
            .median
        };
        let measured: Vec<f64> = (0..case.spec.world_size).map(of_rank).collect();
        let bar = if bar.is_finite() {
            bar.to_string()
        } else {
            "none".to_string()
        };
        let _ = writeln!(
            report,
            "| {} | {} | {} | {planned:.4} | {:.3} | {bar} |",
            case.name,
            case.spec.query_sharding,
            case.spec.world_size,
            imbalance(&measured),
        );
    }
    report
}

fn scores() -> String {
    const LENGTH: usize = 4096;
    let case = |name: &str, change: fn(AttentionSpec) -> AttentionSpec| {
        let case = Case::new(name, causal(), LENGTH, Sharding::Contiguous, 1);
        Case {
            spec: change(case.spec),
            ..case
        }
    };
    let cases = [
        case("none", |spec| spec),
        case("softcap", |spec| AttentionSpec {
            softcap: Some(30.0),
            ..spec
        }),
        case("ALiBi", |spec| AttentionSpec {
            alibi_slopes: Some([0.1, 0.01].into()),
            ..spec
        }),
        case("dropout 0.1", |spec| AttentionSpec {
            dropout: 0.1,
            ..spec
        }),
        case("all three", |spec| AttentionSpec {
            softcap: Some(30.0),
            alibi_slopes: Some([0.1, 0.01].into()),
            dropout: 0.1,
            ..spec
        }),
    ];
    let all_times = measure(&cases, REPETITIONS);
    let mut report = format!(
        "\n## What options cost that are used\n\n\
         Causal, N = {LENGTH}, one rank.\n\n\
         | option | forward, ms | backward, ms | forward, ratio | backward, ratio |\n\
         |---|---|---|---|---|\n"
    );
    let none = medians(&all_times[0]);
    for (case, times) in cases.iter().zip(&all_times) {
        let (forward, backward) = medians(times);
        let _ = writeln!(
            report,
            "| {} | {:.1} | {:.1} | {:.2} | {:.2} |",
            case.name,
            1e3 * forward,
            1e3 * backward,
            forward / none.0,
            backward / none.1,
        );
    }
    report
}
