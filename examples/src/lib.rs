//! What the programs `attend`, `generate` and `plan` are made of, and a part of `train`; the programs themselves only read the command line.
//!
//! - [`attend`]: attention of tensors on disk, or of drawn ones, over ranks that are threads or processes;
//! - [`plan`]: who would hold, send and compute what, for any length and number of ranks, and a picture of it;
//! - [`generate`]: a trained model continues a text; [`continuation`] is what it has in common with `train`'s sample;
//! - [`placement`]: where the ranks run;
//! - [`device`]: what computes;
//! - [`pattern_options`], [`model_options`]: the options that programs have in common;
//! - [`command_line`]: from arguments to an exit status.

pub mod attend;
pub mod command_line;
pub mod continuation;
pub mod device;
pub mod generate;
pub mod length;
pub mod model_options;
pub mod pattern_options;
pub mod placement;
pub mod plan;
