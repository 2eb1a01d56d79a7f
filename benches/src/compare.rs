//! Side-by-side runs: this workspace against PyTorch on the same work, and against itself where that is the question.
//!
//! A [`Case`] sets two [`Contender`]s against each other. They run in alternation, so that whatever else the machine does meets
//! both; what counts is the ratio of each pair of runs, and of these the median. Before anything is timed, [`agreement`] holds
//! both sides' results against each other: the same work is measured.
//!
//! - [`case`](Case), [`catalogue`]: what is compared, and what is asked of it;
//! - [`side`]: a contender, ready to run: [`ranks`], the Burn module, [`fma`], PyTorch's [`worker`] processes, [`footprint`];
//! - [`pairs`]: alternation and its statistics;
//! - [`report`], [`plot`]: the results, to read and to look at;
//! - [`venv`]: the virtual environment with PyTorch.

pub mod agreement;
mod case;
pub mod catalogue;
mod error;
pub mod fma;
pub mod footprint;
pub mod pairs;
pub mod plot;
pub mod protocol;
pub mod ranks;
pub mod report;
pub mod side;
pub mod stage;
pub mod venv;
pub mod worker;

pub use case::{Case, Contender, Section, Unit};
pub use error::CompareError;
