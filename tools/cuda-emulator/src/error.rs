//! What can go wrong.

use std::path::PathBuf;

/// Why a kernel does not compile, load or run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EmulatorError {
    /// The C++ compiler does not start.
    #[error(
        "the C++ compiler `{command}` cannot be started ({source}): install g++, or name a compiler in the variable CXX"
    )]
    NoCompiler {
        command: String,
        source: std::io::Error,
    },
    /// The C++ compiler refuses the source.
    #[error("the C++ compiler refuses {path}{hint}:\n{messages}")]
    Refused {
        path: PathBuf,
        hint: &'static str,
        messages: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    /// What was compiled cannot be loaded.
    #[error("{path} cannot be loaded: {source}")]
    Load {
        path: PathBuf,
        source: libloading::Error,
    },
    /// The source is not what CubeCL's CUDA compiler writes.
    #[error("line {line} of the CUDA source cannot be translated: {what}")]
    Translate { line: usize, what: String },
    /// A variable has a value that it cannot have.
    #[error("{variable} is `{value}`: {expected}")]
    Variable {
        variable: &'static str,
        value: String,
        expected: &'static str,
    },
    /// The launch asks for what the device does not have.
    #[error("{0}")]
    Launch(String),
    /// A thread did what it must not.
    #[error("kernel `{kernel}`: {message}")]
    Kernel { kernel: String, message: String },
}
