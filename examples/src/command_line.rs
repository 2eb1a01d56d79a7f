//! From arguments to an exit status, the same way in every program.
//!
//! Status 0 is success, 1 a computation that failed, 2 a request that makes no sense or is not supported. Whatever goes wrong
//! is one line on standard error.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};

/// Why a program ends without its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The request makes no sense: arguments, files, shapes. Exit status 2.
    Input(String),
    /// The request makes sense, but nobody has written it yet. Exit status 2.
    Unsupported(String),
    /// The computation failed. Exit status 1.
    Run(String),
}

impl Failure {
    /// The exit status it ends with.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Input(_) | Failure::Unsupported(_) => 2,
            Failure::Run(_) => 1,
        }
    }

    /// Bad input, from any error that explains itself.
    pub fn input(error: impl fmt::Display) -> Self {
        Failure::Input(error.to_string())
    }
}

impl fmt::Display for Failure {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, text) = match self {
            Failure::Unsupported(text) => ("not supported", text),
            Failure::Input(text) | Failure::Run(text) => ("error", text),
        };
        write!(f, "{kind}: {}", one_line(text))
    }
}

/// Reads the command line, runs `program` on it, and reports as described above.
pub fn run<Options: Parser>(program: impl FnOnce(&Options) -> Result<(), Failure>) -> ExitCode {
    let result = match Options::try_parse() {
        Ok(options) => program(&options),
        Err(help)
            if matches!(
                help.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            // A reader that closed the pipe has seen enough.
            let _ = help.print();
            Ok(())
        }
        Err(error) => Err(Failure::Input(explanation(&error))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.status())
        }
    }
}

/// Writes to standard output; a reader that closed the pipe has seen enough.
///
/// # Errors
/// [`Failure::Run`] if standard output cannot be written.
pub fn print(text: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    let written = output
        .write_all(text.as_ref())
        .and_then(|()| output.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Run(format!(
            "cannot write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// What clap has to say, without the usage that `--help` shows.
fn explanation(error: &clap::Error) -> String {
    let text = error.to_string();
    let end = ["\n\nUsage:", "\n\nFor more information"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    text[..end].trim_start_matches("error: ").to_string()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
