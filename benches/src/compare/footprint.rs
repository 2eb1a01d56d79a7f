//! Memory that a run needs beyond its inputs, as the system counts it, in a process of its own.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::{
    compare::{CompareError, protocol::Answer, ranks::LoopbackRanks},
    machine,
    work::Work,
};

/// What to run in the fresh process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What the ranks compute together.
    pub work: Work,
    /// How many.
    pub ranks: usize,
    /// Kernel threads of each.
    pub threads: usize,
}

/// Bytes of this process's first run: what was in memory at most, less what was there when the inputs were.
///
/// # Errors
/// [`CompareError::NoMemoryAccount`], or that of the run.
pub fn of_this_process(probe: &Probe) -> Result<u64, CompareError> {
    let ranks = LoopbackRanks::new(&probe.work, probe.ranks, probe.threads)?;
    let before = machine::resident_bytes().ok_or(CompareError::NoMemoryAccount)?;
    ranks.run()?;
    let peak = machine::peak_bytes().ok_or(CompareError::NoMemoryAccount)?;
    Ok(peak.saturating_sub(before))
}

/// [`of_this_process`] in a fresh process of `program`, which answers `--probe`.
///
/// # Errors
/// [`CompareError`] if there is no answer.
pub fn of_program(program: &Path, probe: &Probe) -> Result<f64, CompareError> {
    const PROCESS: &str = "probe";
    let output = Command::new(program)
        .arg("--probe")
        .arg(serde_json::to_string(probe).expect("a probe is plain data"))
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| CompareError::Program {
            program: program.to_path_buf(),
            source,
        })?;
    match Answer::parse(PROCESS, &String::from_utf8_lossy(&output.stdout))? {
        Answer::Bytes(bytes) => Ok(bytes as f64),
        other => Err(other.unexpected(PROCESS, "bytes")),
    }
}
