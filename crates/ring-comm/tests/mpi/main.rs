//! The MPI backend keeps the promises of a transport, and survives what happens to processes.
//!
//! The ranks are started by `mpirun`, or what `RING_MPIRUN` says; `RING_MPIRUN_OPTIONS` adds options to it.

mod hosts;
mod lives;
#[path = "../processes/mod.rs"]
mod processes;
mod random;
#[path = "../scenarios/mod.rs"]
mod scenarios;
mod transfers;

use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
};

use processes::{
    PATIENT, Test, conform, faults,
    launch::{Outcome, run, run_and, this_program},
};
use ring_comm::Mpi;

fn main() -> ExitCode {
    processes::main(perform, tests)
}

/// What one rank does.
fn perform(task: &str) {
    match task {
        "conformance" => {
            let mpi = Mpi::init(PATIENT).unwrap();
            let group = |deadline| mpi.group_within(PATIENT, deadline).unwrap();
            conform(mpi.world_size(), &group);
        }
        "chunks" => transfers::in_chunks(),
        "large" => transfers::large(),
        "absent-0" => lives::absent(0),
        "absent-2" => lives::absent(2),
        "unstarted" => lives::unstarted(),
        "leaks" => lives::leaks(),
        "cut-0" | "cut-1" | "cut-2" => hosts::cut(),
        "traffic" => hosts::traffic(),
        other => match random::Task::named(other) {
            Some(task) => task.perform(),
            None => {
                let mpi = Mpi::init(PATIENT).unwrap();
                let group = |deadline| mpi.group_within(PATIENT, deadline).unwrap();
                faults::perform(other, group);
            }
        },
    }
}

fn tests() -> Vec<Test> {
    let conformance = (1..=4).map(|world_size| {
        let run = move || launch("conformance", world_size).expect_success();
        Test::new(format!("mpi conforms with {world_size} ranks"), run)
    });
    let alone = Test::new("a process without mpirun is a world of its own", || {
        run(vec![this_program()], "conformance", 1).expect_success();
    });
    let chunks = Test::new("messages travel in chunks", || {
        launch("chunks", 2).expect_success();
    });
    let mut tests: Vec<_> = conformance.chain([alone, chunks]).collect();
    if env::var("RING_TEST_LARGE").is_ok() {
        tests.push(Test::new(
            "a message of more than 2^31 bytes arrives",
            || {
                launch("large", 2).expect_success();
            },
        ));
    }
    tests.extend(lives::tests());
    tests.extend(faults::tests(launch));
    tests.extend(random::tests());
    tests.extend(hosts::tests());
    tests
}

/// How Open MPI starts ranks. One that dies must not take the others with it.
const MPIRUN: &str = "mpirun --allow-run-as-root --oversubscribe --bind-to none --enable-recovery";

/// Has `world_size` ranks perform `task`.
fn launch(task: &str, world_size: usize) -> Outcome {
    launch_and(task, world_size, |_| ())
}

/// As [`launch`], and does something `meanwhile`, with the folder of the findings.
fn launch_and(task: &str, world_size: usize, meanwhile: impl FnOnce(&Path)) -> Outcome {
    let command = env::var("RING_MPIRUN").unwrap_or_else(|_| MPIRUN.to_owned());
    let mut words = command.split_whitespace();
    let mut mpirun = Command::new(words.next().expect("the name of a program"));
    mpirun.args(words).args(["-n", &world_size.to_string()]);
    if let Ok(options) = env::var("RING_MPIRUN_OPTIONS") {
        mpirun.args(options.split_whitespace());
    }
    mpirun.arg(this_program().get_program());
    run_and(vec![mpirun], task, world_size, meanwhile)
}
