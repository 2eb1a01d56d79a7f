//! The program `attend`: attention of whole tensors, computed by ranks that each hold only their rows.
//!
//! Data flows one way: [`Options`] name an [`Input`], whose sizes complete the computation; [`compute`] runs it on loopback
//! ranks, each of which takes its rows from the input; the [`Outcome`] puts their results together, for a file or a line of
//! measurements.

mod input;
mod measurement;
mod options;
mod output_file;
mod ranks;

pub use input::Input;
pub use measurement::{Measurement, Sizes, Times};
pub use options::{Device, Options, RandomShape, TransportKind};
pub(crate) use options::{in_range, parse_dtype};
pub use ranks::{GatheredTensor, Outcome, Pass};

use crate::command_line::{Failure, print};
use output_file::OutputFile;

/// The whole program.
///
/// # Errors
/// [`Failure`]; there is no output file then.
pub fn run(options: &Options) -> Result<(), Failure> {
    options.check()?;
    let input = Input::open(options)?;
    // Made before the computation, so that a path that cannot be written is found out at once.
    let file = options
        .output
        .as_deref()
        .map(OutputFile::create)
        .transpose()?;
    let outcome = ranks::compute(options, &input)?;
    if let Some(file) = file {
        file.write(&outcome)?;
    }
    for name in input.unused() {
        eprintln!("note: tensor \"{name}\" of the input is not used");
    }
    if options.measures() {
        let line = serde_json::to_string(&Measurement::new(options, &input, &outcome))
            .map_err(|error| Failure::Run(error.to_string()))?;
        print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// The computation that `options` ask for, its results in memory.
///
/// # Errors
/// [`Failure`] for bad input and for ranks that fail.
pub fn compute(options: &Options) -> Result<Outcome, Failure> {
    options.check()?;
    ranks::compute(options, &Input::open(options)?)
}
