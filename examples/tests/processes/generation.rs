//! `generate` on processes.

use std::process::Command;

use crate::{
    launch::Launcher,
    training::{command, on_threads, workplace},
};

const GENERATE: &str = env!("CARGO_BIN_EXE_generate");

/// What describes the small model.
const MODEL: &str = "--segment-lengths 32,64,256 --dilation-rates 1,2,4 --embed-dim 32 --layers 2";

pub(crate) fn texts_are_those_of_threads(launcher: Launcher) {
    let directory = workplace();
    let directory = directory.path();
    on_threads(&command(
        directory,
        "run",
        &["--steps", "25", "--ranks", "1"],
    ));
    let artifacts = directory.join("run");
    let artifacts = artifacts.to_str().unwrap();
    let words = format!(
        "{GENERATE} {MODEL} --artifacts {artifacts} --bytes 60 --temperature 0.1 --prompt fox --deadline 60"
    );
    let words_alone: Vec<&str> = words.split(' ').collect();
    let alone = Command::new(words_alone[0])
        .args(&words_alone[1..])
        .output();
    let alone = alone.unwrap();
    assert!(alone.status.success());
    let outcome = launcher.run(3, &words);
    outcome.expect_success(3);
    let expected = String::from_utf8(alone.stdout).unwrap();
    assert!(outcome.stdout.contains(&expected), "{}", outcome.stdout);

    let outcome = launcher.run(2, &format!("{words} --seed $RANK"));
    assert_eq!(outcome.statuses(), ["1"; 2], "{}", outcome.stderr);
    let expected = "rank 1 has --seed = 1, rank 0 has 0";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}
