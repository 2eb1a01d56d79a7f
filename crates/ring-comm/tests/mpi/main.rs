//! The MPI backend keeps the promises of a transport, and survives what happens to processes.
//!
//! The ranks are started by `mpirun`; `RING_MPIRUN_OPTIONS` adds options to it.

#[path = "../processes/mod.rs"]
mod processes;
mod transfers;

use std::{
    env,
    process::{Command, ExitCode},
};

use processes::{
    PATIENT, Test, conform, faults,
    launch::{Outcome, run, this_program},
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
        scenario => {
            let mpi = Mpi::init(PATIENT).unwrap();
            let group = |deadline| mpi.group_within(PATIENT, deadline).unwrap();
            faults::perform(scenario, group);
        }
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
    tests.extend(faults::tests(launch));
    tests
}

/// Has `world_size` ranks perform `task`, under `mpirun`.
fn launch(task: &str, world_size: usize) -> Outcome {
    let mut mpirun = Command::new("mpirun");
    mpirun.args([
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
    ]);
    // One rank that dies must not take the others with it.
    mpirun.args(["--enable-recovery", "-n", &world_size.to_string()]);
    if let Ok(options) = env::var("RING_MPIRUN_OPTIONS") {
        mpirun.args(options.split_whitespace());
    }
    mpirun.arg(this_program().get_program());
    run(vec![mpirun], task, world_size)
}
