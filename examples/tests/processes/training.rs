//! `train` on processes.

use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use crate::launch::Launcher;

const TRAIN: &str = env!("CARGO_BIN_EXE_train");

const SMALL: [&str; 18] = [
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
    "--deadline",
    "60",
    "--sharding",
    "zigzag",
];

/// A directory with a text that has something to learn.
pub(crate) fn workplace() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let line = "the quick brown fox jumps over the lazy dog; ";
    fs::write(directory.path().join("text.txt"), line.repeat(150)).unwrap();
    directory
}

/// The command that trains the small model on the text of `directory`.
pub(crate) fn command(directory: &Path, artifacts: &str, more: &[&str]) -> Vec<String> {
    let text = directory.join("text.txt");
    let artifacts = directory.join(artifacts);
    let fixed = [TRAIN, "--data", text.to_str().unwrap(), "--artifacts"];
    let words = fixed.into_iter().chain([artifacts.to_str().unwrap()]);
    let words = words.chain(SMALL).chain(more.iter().copied());
    words.map(str::to_owned).collect()
}

pub(crate) fn on_threads(command: &[String]) {
    let output = Command::new(&command[0])
        .args(&command[1..])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

fn losses(directory: &Path, artifacts: &str) -> Vec<f64> {
    let csv = fs::read_to_string(directory.join(artifacts).join("losses.csv")).unwrap();
    csv.lines()
        .skip(1)
        .map(|line| line.split(',').nth(1).unwrap().parse().unwrap())
        .collect()
}

fn assert_agree(got: &[f64], expected: &[f64], steps: usize) {
    assert_eq!((got.len(), expected.len()), (steps, steps));
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        let relative = (got / expected - 1.0).abs();
        assert!(relative < 1e-5, "step {step}: {got} and {expected}");
    }
}

pub(crate) fn losses_are_those_of_threads(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    on_threads(&command(
        directory,
        "threads",
        &["--steps", "50", "--ranks", "4"],
    ));
    let words = command(directory, "processes", &["--steps", "50"]);
    let outcome = launcher.run(4, &words.join(" "));
    outcome.expect_success(4);
    let expected = losses(directory, "threads");
    assert!(expected[49] < 0.8 * expected[0], "nothing was learned");
    assert_agree(&losses(directory, "processes"), &expected, 50);
    // One rank reports, for all.
    let figures = "bits per byte over all 337 bytes";
    assert_eq!(
        outcome.stdout.matches(figures).count(),
        1,
        "{}",
        outcome.stdout
    );
    assert!(
        outcome
            .stdout
            .contains(&format!("4 ranks ({launcher} processes)")),
        "{}",
        outcome.stdout
    );
    assert!(directory.join("processes/loss.svg").exists());
    assert!(directory.join("processes/checkpoint/model-2.bpk").exists());
}

/// With dropout, and a batch that the groups cannot divide evenly.
pub(crate) fn data_groups(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    let common = ["--steps", "25", "--batch", "3", "--dropout", "0.1"];
    let threads = [&common[..], &["--ranks", "1"]].concat();
    on_threads(&command(directory, "threads", &threads));
    let processes = [&common[..], &["--data-parallel", "2", "--ranks", "2"]].concat();
    let words = command(directory, "processes", &processes);
    launcher.run(4, &words.join(" ")).expect_success(4);
    let expected = losses(directory, "threads");
    assert_agree(&losses(directory, "processes"), &expected, 25);
}

pub(crate) fn resume(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    on_threads(&command(
        directory,
        "run",
        &["--steps", "50", "--ranks", "2"],
    ));
    let whole = losses(directory, "run");
    // As if the run had been stopped after its first checkpoint.
    fs::remove_file(directory.join("run/checkpoint/model-2.bpk")).unwrap();
    let resumed = command(directory, "run", &["--steps", "50", "--resume", "1"]);
    launcher.run(3, &resumed.join(" ")).expect_success(3);
    assert_agree(&losses(directory, "run"), &whole, 50);
}

pub(crate) fn another_text(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    let text = directory.join("text.txt");
    let words = fs::read_to_string(&text).unwrap();
    fs::write(directory.join("0"), &words).unwrap();
    fs::write(directory.join("1"), words.replace("fox", "cat")).unwrap();
    let line = command(directory, "odd", &["--steps", "50"]).join(" ");
    let own = format!("{}/$RANK", directory.display());
    let outcome = launcher.run(2, &line.replace(text.to_str().unwrap(), &own));
    assert_eq!(outcome.statuses(), ["1"; 2], "{}", outcome.stderr);
    let expected = "rank 1 has the text = ";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}

pub(crate) fn missing_text(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    let text = directory.join("text.txt");
    fs::copy(&text, directory.join("0")).unwrap();
    let line = command(directory, "odd", &["--steps", "50"]).join(" ");
    let own = format!("{}/$RANK", directory.display());
    let outcome = launcher.run(2, &line.replace(text.to_str().unwrap(), &own));
    assert_eq!(outcome.statuses(), ["1", "2"], "{}", outcome.stderr);
    let expected = "rank 1 aborted: error: cannot read";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}

/// No parameter, item or size tells what is dropped.
pub(crate) fn another_dropout(launcher: Launcher) {
    let directory = workplace();
    let line = command(directory.path(), "odd", &["--steps", "50", "--dropout"]).join(" ");
    let outcome = launcher.run(2, &(line + " 0.$RANK"));
    assert_eq!(outcome.statuses(), ["1"; 2], "{}", outcome.stderr);
    let expected = "rank 1 has --dropout = 0.1, rank 0 has 0";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}

pub(crate) fn another_seed(launcher: Launcher) {
    let directory = workplace();
    let line = command(directory.path(), "odd", &["--steps", "50", "--seed"]).join(" ");
    let outcome = launcher.run(2, &(line + " $RANK"));
    assert_eq!(outcome.statuses(), ["1"; 2], "{}", outcome.stderr);
    let expected = "ranks start from different parameters";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}

/// Whoever is left says whose fault it was, and ends.
pub(crate) fn killed_rank(launcher: Launcher) {
    let directory = workplace();
    let words = command(directory.path(), "killed", &["--steps", "1000000"]).join(" ");
    let script = format!("{words} & echo rank $RANK is $!; wait $!");
    let mut victim = None;
    let outcome = launcher.run_watched(3, &script, |line| {
        if let Some(process) = line.strip_prefix("rank 1 is ") {
            victim = Some(process.trim().to_owned());
        }
        // They are in the middle of it.
        if line.starts_with("checkpoint ")
            && let Some(process) = victim.take()
        {
            let killed = Command::new("kill").args(["-KILL", &process]).status();
            assert!(killed.unwrap().success());
        }
    });
    // 128 + the number of the signal.
    let said = &outcome.stderr;
    assert_eq!(outcome.statuses(), ["1", "1", "137"], "{said}");
    assert!(
        said.matches("peer 1: the peer is lost").count() >= 2,
        "{said}"
    );
}
