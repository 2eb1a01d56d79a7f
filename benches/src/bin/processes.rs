//! Measures ranks that are processes: what a shift costs under a computation, and a ring of two processes against one process
//! with two threads. Writes `processes.md`, a trace and its picture.
//!
//! `cargo run --release --features mpi -p ring-benches --bin processes`; without the feature, over TCP alone.

use std::{
    error::Error,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, builder::RangedU64ValueParser};
use ring_benches::{
    machine,
    overlap::{SHIFT_BYTES, Times},
    processes::{self, RING_LENGTH, Starter},
    timeline,
};

/// Computations under which a shift goes on, in milliseconds.
const COMPUTATIONS: [u64; 3] = [200, 500, 1000];
/// What a shift may add to a computation, as a factor.
const OVERLAP_BAR: f64 = 1.05;
/// The rate of two processes as a share of that of one with two threads.
const RING_BAR: f64 = 0.92;

/// Measure ranks that are processes.
#[derive(Parser, Debug)]
#[command(name = "processes", version)]
struct Options {
    /// Directory for the table, the trace and its picture
    #[arg(long, default_value = "benches/results")]
    out: PathBuf,

    /// Repetitions of a shift, each with the computation alone before it
    #[arg(long, default_value_t = 15, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    shifts: usize,

    /// Pairs of runs of the ring
    #[arg(long, default_value_t = 9, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pairs: usize,
}

fn main() -> ExitCode {
    let result = match processes::perform_as_rank() {
        Some(result) => result.map_err(Into::into),
        None => measure(&Options::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Box<dyn Error>> {
    let mut processes = vec![Starter::Tcp];
    if cfg!(feature = "mpi") {
        processes.insert(0, Starter::Mpi);
    }
    let mut report = heading();
    let mut is_met = true;
    for &starter in [Starter::Loopback].iter().chain(&processes) {
        for computation in COMPUTATIONS {
            let times = starter.overlap(computation, options.shifts)?;
            is_met &= overlap_row(&mut report, starter, &times);
        }
    }
    report += RING_HEADING;
    for &starter in &processes {
        is_met &= ring_row(&mut report, starter, options.pairs)?;
    }
    report += TRACE_TEXT;
    fs::create_dir_all(&options.out)?;
    trace(processes[0], &options.out)?;
    fs::write(options.out.join("processes.md"), &report)?;
    println!("{report}");
    if !is_met {
        return Err("a bar was missed".into());
    }
    Ok(())
}

fn heading() -> String {
    format!(
        "# Ranks that are processes\n\n\
         {}, {} cores, {}; {}.\n\n\
         ## A shift of {} MiB under a computation\n\n\
         Two ranks of one thread, each of which sends a buffer to the other and receives one while it computes (attention that fits in the \
         cache, always the same number of operations). Medians of repetitions in which the computation alone, the shift alone, and both \
         take turns; the ratio is that of both to the computation alone, median and range of the pairs; the bar of loopback and MPI is {OVERLAP_BAR}. No core is \
         idle here, so that what a copy takes is missing elsewhere. For comparison: full attention on {} MiB of keys and values (8 heads of 64, f32) is 3 s of computation.\n\n\
         | transport | computation, ms | shift alone, ms | both, ms | ratio | range | |\n\
         |---|---|---|---|---|---|---|\n",
        machine::processor(),
        machine::cores(),
        machine::operating_system(),
        machine::date(),
        SHIFT_BYTES >> 20,
        SHIFT_BYTES >> 20,
    )
}

const RING_HEADING: &str = "\n## A ring of two processes\n\n\
    Full causal attention, N = 8192, 8 heads of 64, f32, zigzag, forward and backward: two processes with one thread each against one \
    process with two threads, in alternating runs. The ratio is that of their rates, median and range of the pairs; the bar is 0.92.\n\n\
    | transport | one process, ms | two processes, ms | ratio | range | |\n\
    |---|---|---|---|---|---|\n";

const TRACE_TEXT: &str = "\n## Trace\n\n\
    One forward and backward of that ring, as each rank recorded it (`RING_TRACE`): [processes-trace.json](processes-trace.json), to open \
    in <https://ui.perfetto.dev>, and as a picture:\n\n\
    ![timeline](processes-trace.svg)\n\n\
    Made by `cargo run --release --features mpi -p ring-benches --bin processes`.\n";

fn overlap_row(report: &mut String, starter: Starter, times: &[Times]) -> bool {
    let of = |pick: fn(&Times) -> f64| Spread::of(times.iter().map(pick).collect());
    let ratio = of(|times| times.both / times.computation);
    let is_met = ratio.median <= OVERLAP_BAR;
    // TCP copies through the kernel twice; it has no bar.
    let has_bar = starter != Starter::Tcp;
    let _ = writeln!(
        report,
        "| {starter} | {:.1} | {:.1} | {:.1} | {:.3} | {:.3} to {:.3} | {} |",
        1e3 * of(|times| times.computation).median,
        1e3 * of(|times| times.shift).median,
        1e3 * of(|times| times.both).median,
        ratio.median,
        ratio.least,
        ratio.most,
        if has_bar { verdict(is_met) } else { "" },
    );
    eprintln!("{}", report.lines().last().unwrap_or_default());
    is_met || !has_bar
}

fn ring_row(report: &mut String, starter: Starter, pairs: usize) -> Result<bool, Box<dyn Error>> {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        one.push(Spread::of(starter.ring(1, 2, 3, None)?).median);
        two.push(Spread::of(starter.ring(2, 1, 3, None)?).median);
    }
    let ratio = Spread::of(one.iter().zip(&two).map(|(one, two)| one / two).collect());
    let is_met = ratio.median >= RING_BAR;
    let _ = writeln!(
        report,
        "| {starter} | {:.0} | {:.0} | {:.2} | {:.2} to {:.2} | {} |",
        1e3 * Spread::of(one).median,
        1e3 * Spread::of(two).median,
        ratio.median,
        ratio.least,
        ratio.most,
        verdict(is_met),
    );
    eprintln!("{}", report.lines().last().unwrap_or_default());
    Ok(is_met)
}

/// Traces one pass of the ring, after one to warm up.
fn trace(starter: Starter, out: &Path) -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    starter.ring(2, 1, 1, Some(&directory.path().join("trace-%p.json")))?;
    let mut files: Vec<PathBuf> = fs::read_dir(directory.path())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let events = timeline::merged(&files)?;
    timeline::write(&out.join("processes-trace.json"), &events)?;
    let title = format!(
        "Causal attention, N = {RING_LENGTH}, forward and backward, two {starter} processes of one thread"
    );
    timeline::draw(&out.join("processes-trace.svg"), &title, &events)?;
    Ok(())
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "**missed**" }
}

struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    /// # Panics
    /// Without numbers.
    fn of(mut numbers: Vec<f64>) -> Self {
        numbers.sort_by(f64::total_cmp);
        Self {
            least: numbers[0],
            median: numbers[numbers.len() / 2],
            most: numbers[numbers.len() - 1],
        }
    }
}
