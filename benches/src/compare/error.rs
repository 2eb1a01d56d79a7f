//! What can go wrong in a comparison.

use std::{io, path::PathBuf};

use ring_core::SpecError;
use thiserror::Error;

/// A comparison that could not be made.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A case that cannot be computed.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A pass of this workspace failed.
    #[error("a pass of this workspace failed: {0}")]
    Attention(#[from] ring_core::Error),
    /// A rank ended before its time.
    #[error("rank {0} has ended; what it said is above")]
    RankEnded(usize),
    /// A program could not be run.
    #[error("cannot run {program}: {source}")]
    Program {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {what}; its messages are above")]
    ProgramFailed {
        /// The program.
        program: PathBuf,
        /// What it was to do, and how it ended.
        what: String,
    },
    /// A process ended in the middle of a conversation.
    #[error("the {0} process ended instead of answering; its messages are above")]
    ProcessEnded(&'static str),
    /// A process answered with something else than was asked for.
    #[error("the {process} process answered {answer:?} where {expected} was expected")]
    Answer {
        /// Which process.
        process: &'static str,
        /// What it said.
        answer: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A process could not do what it was asked for.
    #[error("the {process} process failed: {message}")]
    Failed {
        /// Which process.
        process: &'static str,
        /// What it said.
        message: String,
    },
    /// PyTorch is needed, but was ruled out.
    #[error("this case needs PyTorch")]
    NoTorch,
    /// The two sides do not compute the same.
    #[error("{work}: {what} of the two sides differ by {difference}, allowed is {allowed}")]
    Disagreement {
        /// What was computed.
        work: String,
        /// Which result.
        what: &'static str,
        /// Largest difference.
        difference: f32,
        /// What rounding explains.
        allowed: f32,
    },
    /// The system does not tell how much memory a process uses.
    #[error("this system does not tell how much memory a process uses (/proc/self/status)")]
    NoMemoryAccount,
    /// A file could not be written.
    #[error("cannot write {file}: {source}")]
    Write {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The plot could not be drawn.
    #[error("cannot draw {file}: {message}")]
    Plot {
        /// The file.
        file: PathBuf,
        /// Why not.
        message: String,
    },
}
