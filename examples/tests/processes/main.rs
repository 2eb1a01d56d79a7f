//! The programs on ranks that are processes: the same numbers as on threads, and the same care with what can be wrong.
//!
//! Run without arguments of its own, this program starts `attend`, `train`, `generate` and itself as torchrun would, and, with the feature `mpi`,
//! under `mpirun`; as a rank it computes the golden cases. Words on the command line choose among the tests.

mod generation;
#[path = "../golden_cases/mod.rs"]
mod golden_cases;
mod launch;
mod training;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Duration,
};

use golden_cases::{Case, SHARDINGS, path};
use launch::{Launcher, TASK};
use ring_examples::placement::{Placement, Wishes};

/// Longer than anything takes on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);
/// Who starts the processes.
const LAUNCHERS: &[Launcher] = &[
    Launcher::Torchrun,
    #[cfg(feature = "mpi")]
    Launcher::Mpirun,
];

/// A test: its name, and what it does.
type Test = (&'static str, fn(Launcher));

const TESTS: [Test; 12] = [
    ("golden numbers", golden_numbers),
    (
        "attend writes files and measures",
        attend_writes_and_measures,
    ),
    ("requests that do not fit are refused", misfits_are_refused),
    (
        "losses are those of threads",
        training::losses_are_those_of_threads,
    ),
    (
        "losses of data groups are those of threads",
        training::data_groups,
    ),
    (
        "a text is continued as on threads",
        generation::texts_are_those_of_threads,
    ),
    ("a checkpoint of threads resumes", training::resume),
    (
        "another text on one rank is found out",
        training::another_text,
    ),
    (
        "a text that one rank cannot read is told to all",
        training::missing_text,
    ),
    (
        "another dropout on one rank is found out",
        training::another_dropout,
    ),
    (
        "another seed on one rank is found out",
        training::another_seed,
    ),
    (
        "a killed rank ends training everywhere",
        training::killed_rank,
    ),
];

fn main() -> ExitCode {
    if env::var(TASK).is_ok() {
        compute_golden_cases();
        return ExitCode::SUCCESS;
    }
    let words: Vec<String> = env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let is_chosen = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
    let mut has_failed = false;
    for launcher in LAUNCHERS {
        for (name, test) in TESTS {
            let name = format!("{launcher}: {name}");
            if is_chosen(&name) {
                let passed = catch_unwind(AssertUnwindSafe(|| test(*launcher))).is_ok();
                println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
                has_failed |= !passed;
            }
        }
    }
    ExitCode::from(u8::from(has_failed))
}

/// What a rank does.
fn compute_golden_cases() {
    let placement = Placement::join(&Wishes {
        transport: None,
        ranks: None,
        threads: 1,
        deadline: Some(PATIENT),
    })
    .unwrap();
    for case in Case::all() {
        for sharding in SHARDINGS {
            if let Some(got) = case.compute_on(&placement, &["--sharding", sharding]) {
                let how = format!("on {} processes, {sharding}", placement.world_size());
                case.check(&got, &how);
            }
        }
    }
}

fn golden_numbers(launcher: Launcher) {
    let own = env::current_exe().unwrap();
    for ranks in [2, 3, 4] {
        let outcome = launcher.run(ranks, own.to_str().unwrap());
        outcome.expect_success(ranks);
    }
}

fn attend_writes_and_measures(launcher: Launcher) {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    let cases = Case::all();
    let case = &cases[0];
    let file = case.file();
    let mut command = vec![env!("CARGO_BIN_EXE_attend"), "--input", path(&file)];
    command.extend(["--output", path(&output), "--repeat", "2"]);
    command.extend(case.options.iter().map(String::as_str));
    let outcome = launcher.run(3, &command.join(" "));
    outcome.expect_success(3);
    let results = golden_cases::read(&output);
    for (name, expected) in golden_cases::read(&file) {
        if let Some(got) = results.get(&name) {
            let distance = golden_cases::distance(got, &expected);
            assert!(
                distance <= golden_cases::TOLERANCE,
                "{name} off by {distance:e}"
            );
        }
    }
    // Rank 0 measures for all.
    let lines: Vec<&str> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with('{'))
        .collect();
    let [line] = lines.as_slice() else {
        panic!("{}", outcome.stdout)
    };
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["transport"], launcher.to_string());
    assert_eq!(line["ranks"], 3);
    assert_eq!(line["bytes_received"].as_array().unwrap().len(), 3);
    assert!(line["forward_s"]["median"].as_f64().unwrap() > 0.0);
}

fn misfits_are_refused(launcher: Launcher) {
    let attend = concat!(env!("CARGO_BIN_EXE_attend"), " --random 1,1,1,64,8");
    for (more, word) in [
        ("--ranks 3", "3 ranks are asked for"),
        ("--transport loopback", "one of 2 processes"),
        ("--transport pigeon", "loopback, tcp"),
    ] {
        let outcome = launcher.run(2, &format!("{attend} {more}"));
        assert_eq!(outcome.statuses(), ["2"; 2], "{}", outcome.stderr);
        assert!(outcome.stderr.contains(word), "{}", outcome.stderr);
    }
    // Each rank draws its own rows.
    let outcome = launcher.run(2, &format!("{attend} --seed $RANK"));
    assert_eq!(outcome.statuses(), ["1"; 2], "{}", outcome.stderr);
    let expected = "rank 1 has --seed = 1, rank 0 has 0";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}
