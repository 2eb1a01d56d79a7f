//! The program `attend`: attention of whole tensors, computed by ranks that each hold only their rows.
//!
//! Data flows one way: [`Options`] name an [`Input`], whose sizes complete the computation; the ranks, threads or
//! processes, each take their rows of it and compute; the [`Outcome`] puts their results together, for a file or a line of
//! measurements.

mod computer;
mod gather;
mod input;
mod measurement;
mod options;
mod outcome;
mod output_file;
mod ranks;
mod scores;

pub use input::Input;
pub use measurement::{Measurement, Sizes, Times};
pub use options::{Options, RandomShape};
pub(crate) use options::{in_range, parse_dtype};
pub use outcome::{GatheredTensor, Outcome, Pass};
pub use scores::ScoreOptions;

use crate::{
    command_line::{Failure, print},
    placement::{DEFAULT_DEADLINE, Placement},
};
use output_file::OutputFile;

/// The whole program.
///
/// # Errors
/// [`Failure`]; there is no output file then.
pub fn run(options: &Options) -> Result<(), Failure> {
    options.check()?;
    // Before anything that may be wrong in one process alone: the others would wait for it until the deadline.
    let placement = options.placement()?;
    let tell = |failure: &Failure| placement.abort(failure);
    let input = Input::open(options).inspect_err(tell)?;
    // Made before the computation, so that a path that cannot be written is found out at once.
    let file = options
        .output
        .as_deref()
        .filter(|_| placement.has_first_rank())
        .map(OutputFile::create)
        .transpose()
        .inspect_err(tell)?;
    let outcome = ranks::compute(options, &input, &placement).inspect_err(tell)?;
    let peak_rss_mb = measurement::peak_rss_mb(&placement)?;
    // The processes part here: none need wait until a large file is written.
    drop(placement);
    // Another process has it all.
    let Some(outcome) = outcome else {
        return Ok(());
    };
    if let Some(file) = file {
        file.write(&outcome)?;
    }
    for name in input.unused() {
        eprintln!("note: tensor \"{name}\" of the input is not used");
    }
    if options.measures() {
        let line = serde_json::to_string(&Measurement::new(options, &input, &outcome, peak_rss_mb))
            .map_err(|error| Failure::Run(error.to_string()))?;
        print(format!("{line}\n"))?;
    }
    Ok(())
}

/// The computation that `options` ask for, on ranks that are threads of this process, its results in memory.
///
/// # Errors
/// [`Failure`] for bad input and for ranks that fail.
pub fn compute(options: &Options) -> Result<Outcome, Failure> {
    let deadline = options.deadline.unwrap_or(DEFAULT_DEADLINE);
    let placement = Placement::threads(options.ranks.unwrap_or(1), deadline);
    let outcome = compute_on(options, &placement)?;
    Ok(outcome.expect("rank 0 is a thread of this process"))
}

/// As [`compute`], on ranks that may be processes, all of which must call it: the results are where rank 0 is.
///
/// # Errors
/// As [`compute`].
pub fn compute_on(options: &Options, placement: &Placement) -> Result<Option<Outcome>, Failure> {
    options.check()?;
    ranks::compute(options, &Input::open(options)?, placement)
}
