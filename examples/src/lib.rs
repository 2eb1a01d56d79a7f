//! What the programs `attend` and `plan` are made of; the programs themselves only read the command line.
//!
//! - [`attend`]: attention of tensors on disk, or of drawn ones, over ranks that are threads or processes;
//! - [`plan`]: who would hold, send and compute what, for any length and number of ranks, and a picture of it;
//! - [`placement`]: where the ranks run;
//! - [`device`]: what computes;
//! - [`pattern_options`] and [`strategy_option`]: the options that both have in common;
//! - [`command_line`]: from arguments to an exit status.

pub mod attend;
pub mod command_line;
pub mod device;
pub mod length;
pub mod pattern_options;
pub mod placement;
pub mod plan;
pub mod strategy_option;
