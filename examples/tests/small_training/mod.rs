//! A small model on a small text, trained by the program as a user runs it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A text with something to learn, in a directory of its own.
pub(crate) fn workplace() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    let line = "the quick brown fox jumps over the lazy dog; ";
    fs::write(&file, line.repeat(150)).unwrap();
    (directory, file)
}

/// Runs the program.
pub(crate) fn train(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_train"))
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap()
}

/// Options of the small model.
pub(crate) const SMALL: [&str; 20] = [
    "--data",
    "text.txt",
    "--seq-length",
    "256",
    "--segment-lengths",
    "32,64,256",
    "--dilation-rates",
    "1,2,4",
    "--embed-dim",
    "32",
    "--layers",
    "2",
    "--checkpoint-every",
    "25",
    "--sample-bytes",
    "0",
    "--seed",
    "7",
    "--learning-rate",
    "0.003",
];

/// Trains the small model and reads its losses.
pub(crate) fn losses(directory: &Path, artifacts: &str, extra: &[&str]) -> Vec<f64> {
    let mut arguments = SMALL.to_vec();
    arguments.extend(["--artifacts", artifacts]);
    arguments.extend(extra);
    let output = train(directory, &arguments);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let csv = fs::read_to_string(directory.join(artifacts).join("losses.csv")).unwrap();
    csv.lines()
        .skip(1)
        .map(|line| line.split(',').nth(1).unwrap().parse().unwrap())
        .collect()
}

/// The same losses but for rounding.
pub(crate) fn assert_agree(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got / expected - 1.0).abs() < 1e-3,
            "step {step}: {got} and {expected}"
        );
    }
}
