//! Runs this workspace and PyTorch side by side, prints a table, and writes it with a plot to `benches/results`.
//!
//!     cargo run --release -p ring-benches --bin compare
//!
//! The first time, it makes a virtual environment with PyTorch. Let the machine do nothing else meanwhile.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use ring_benches::compare::{
    Case, CompareError, agreement,
    catalogue::{self, Size},
    footprint::{self, Probe},
    pairs::{self, FEWEST_PAIRS},
    plot,
    protocol::Answer,
    report::Report,
    stage::Stage,
    venv,
};

/// This workspace and PyTorch, side by side.
#[derive(Debug, Parser)]
struct Options {
    /// Only cases whose name contains one of these; `--list` shows names.
    #[arg(long, num_args = 1.., value_name = "NAME")]
    only: Vec<String>,
    /// Prints the names of the cases.
    #[arg(long)]
    list: bool,
    /// Runs of each side; slow cases are content with 5, the Burn module is given three times as many.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Tiny sizes, two pairs: whether it works at all. The numbers say nothing.
    #[arg(long)]
    quick: bool,
    /// Only cases without PyTorch.
    #[arg(long)]
    no_torch: bool,
    /// Where to write `cpu.md` and `cpu.svg`, whatever was run; absent: to `benches/results`, if all was run, at least 5 pairs.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A virtual environment with PyTorch, made if it is not there; absent: in the build folder.
    #[arg(long, value_name = "DIR")]
    venv: Option<PathBuf>,
    /// Measures memory of this process instead, for the comparison in another.
    #[arg(long, hide = true, value_name = "JSON")]
    probe: Option<String>,
}

impl Options {
    fn cases(&self) -> Vec<Case> {
        let size = if self.quick { Size::Tiny } else { Size::Full };
        let mut cases = catalogue::cases(size);
        cases.retain(|case| self.wants(case));
        cases
    }

    fn wants(&self, case: &Case) -> bool {
        let name = case.name();
        let named = self.only.is_empty() || self.only.iter().any(|part| name.contains(part));
        named && !(self.no_torch && case.needs_torch())
    }

    fn pairs(&self) -> usize {
        if self.quick { 2 } else { self.pairs as usize }
    }

    /// Where to write; a run that is not complete must not take the place of one that is.
    fn folder(&self) -> Option<PathBuf> {
        let complete = self.only.is_empty() && !self.no_torch && !self.quick;
        let complete = complete && self.pairs() >= FEWEST_PAIRS;
        let results = || Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
        self.out.clone().or_else(|| complete.then(results))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.probe {
        Some(probe) => answer_probe(probe),
        None if options.list => {
            list(&options.cases());
            Ok(())
        }
        None => compare(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list(cases: &[Case]) {
    for case in cases {
        println!("{:40} {case}, bar {:.2}", case.name(), case.bar);
    }
}

fn compare(options: &Options) -> Result<(), CompareError> {
    let cases = options.cases();
    let mut stage = stage(options, &cases)?;
    let start = Instant::now();
    let mut report = Report::default();
    if cases.iter().any(Case::needs_torch) {
        eprintln!("holding the results of both sides against each other");
        report.agreements = agreement::check(&mut stage)?;
    }
    for (index, case) in cases.iter().enumerate() {
        eprint!("[{}/{}] {}:", index + 1, cases.len(), case.name());
        let outcome = pairs::run(case, options.pairs(), &mut stage, |ratio| {
            eprint!(" {ratio:.2}")
        })?;
        let verdict = if outcome.is_met() { "met" } else { "missed" };
        eprintln!(
            " -> {:.2}, bar {:.2} {verdict}",
            outcome.ratio().median,
            case.bar
        );
        report.outcomes.push(outcome);
    }
    report.torch = stage.torch_version();
    report.minutes = start.elapsed().as_secs_f64() / 60.0;
    publish(options, &report)
}

fn stage(options: &Options, cases: &[Case]) -> Result<Stage, CompareError> {
    let python = if cases.iter().any(Case::needs_torch) {
        let folder = options.venv.clone().unwrap_or_else(venv::default_folder);
        Some(venv::interpreter(&folder)?)
    } else {
        None
    };
    let probe = env::current_exe().map_err(|source| CompareError::Program {
        program: "compare".into(),
        source,
    })?;
    Ok(Stage::new(python, probe))
}

fn publish(options: &Options, report: &Report) -> Result<(), CompareError> {
    const PICTURE: &str = "cpu.svg";
    let folder = options.folder();
    let page = report.markdown(folder.as_ref().map(|_| PICTURE));
    print!("{page}");
    let Some(folder) = folder else {
        eprintln!("nothing was written: not a complete run, and no --out");
        return Ok(());
    };
    let write = |file: &Path, result: io::Result<()>| {
        result.map_err(|source| CompareError::Write {
            file: file.to_path_buf(),
            source,
        })
    };
    write(&folder, fs::create_dir_all(&folder))?;
    let file = folder.join("cpu.md");
    write(&file, fs::write(&file, page))?;
    plot::draw(&folder.join(PICTURE), report)
}

fn answer_probe(probe: &str) -> Result<(), CompareError> {
    let probe: Probe = serde_json::from_str(probe).map_err(|error| CompareError::Failed {
        process: "probe",
        message: error.to_string(),
    })?;
    let bytes = footprint::of_this_process(&probe)?;
    let answer = serde_json::to_string(&Answer::Bytes(bytes)).expect("an answer is plain data");
    println!("{answer}");
    Ok(())
}
