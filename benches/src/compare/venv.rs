//! The virtual environment with PyTorch.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::compare::CompareError;

const PACKAGES: [&str; 2] = ["torch", "numpy"];

/// Where the environment goes if nothing else is said: beside the build, which is found by this program's own place in it.
pub fn default_folder() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    let target = program.ancestors().nth(2).unwrap_or(Path::new("target"));
    target.join("compare-venv")
}

/// The interpreter of the environment in `folder`, which is made if it is not there yet.
///
/// # Errors
/// [`CompareError::Program`] or [`CompareError::ProgramFailed`] if it cannot be made.
pub fn interpreter(folder: &Path) -> Result<PathBuf, CompareError> {
    let python = folder.join("bin/python");
    if has_packages(&python) {
        return Ok(python);
    }
    eprintln!(
        "making a virtual environment with {} in {}, once: this takes some minutes",
        PACKAGES.join(" and "),
        folder.display()
    );
    run(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
    let pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ];
    run(Command::new(&python).args(pip).args(PACKAGES))?;
    Ok(python)
}

fn has_packages(python: &Path) -> bool {
    let import = format!("import {}", PACKAGES.join(", "));
    let status = Command::new(python)
        .args(["-c", &import])
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Result<(), CompareError> {
    let program = PathBuf::from(command.get_program());
    let failed = |what: String| CompareError::ProgramFailed {
        program: program.clone(),
        what,
    };
    let status = command
        .status()
        .map_err(|source: io::Error| CompareError::Program {
            program: program.clone(),
            source,
        })?;
    if status.success() {
        return Ok(());
    }
    let arguments: Vec<_> = command
        .get_args()
        .map(|argument| argument.to_string_lossy())
        .collect();
    Err(failed(format!("{}: {status}", arguments.join(" "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interpreter_that_is_not_there_has_no_packages() {
        assert!(!has_packages(Path::new("no/such/python")));
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err();
        assert!(
            error.to_string().starts_with("sh failed: -c exit 3: "),
            "{error}"
        );
    }
}
