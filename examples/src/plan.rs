//! The program `plan`: what every rank would hold, send, receive and compute, before anything runs.
//!
//! Data flows one way: [`Options`] describe the computation, a [`Survey`] plans every rank of it, and a table, JSON or a
//! picture show it.

mod comparison;
mod options;
mod picture;
mod pixels;
mod survey;
mod table;
mod units;

pub use comparison::{Comparison, ShardingCost};
pub use options::Options;
pub use survey::{Branch, Imbalance, Model, RankSurvey, Survey, Totals};

use std::fs;

use crate::command_line::{Failure, print};

/// The whole program.
///
/// # Errors
/// [`Failure::Input`] for a computation that cannot be, and for a picture that cannot be written.
pub fn run(options: &Options) -> Result<(), Failure> {
    let spec = options.spec()?;
    if let Some(path) = &options.svg {
        let rank = options.rank.unwrap_or(spec.world_size / 2);
        let picture = picture::draw(&spec, rank)?;
        fs::write(path, picture)
            .map_err(|error| Failure::Input(format!("cannot write {}: {error}", path.display())))?;
    }
    let survey = match options.rank {
        Some(rank) => Survey::of_rank(&spec, options.threads, rank),
        None => {
            Survey::of_all(&spec, options.threads).and_then(|survey| match options.compares() {
                true => survey.compared(&spec),
                false => Ok(survey),
            })
        }
    }
    .map_err(Failure::input)?;
    let mut text = if options.json {
        serde_json::to_string_pretty(&survey).map_err(|error| Failure::Run(error.to_string()))?
    } else {
        table::render(&spec, &survey, options.all)
    };
    text.push('\n');
    print(&text)
}
