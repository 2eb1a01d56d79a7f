//! The MPI backend keeps the promises of a transport, and survives what happens to processes.
//!
//! Without arguments of its own this program launches itself under `mpirun`, once per world size for the conformance suite and once
//! per scenario of a failure; a rank finds its task in the environment. Words on the command line choose among the tests.

mod faults;
mod hosts;
mod launch;
mod lives;
mod random;
#[path = "../scenarios/mod.rs"]
mod scenarios;
mod transfers;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use launch::{TASK, launch};
use ring_comm::{
    Mpi, RankPanic,
    conformance::{self, Backend, RankBody, Staging},
};

/// Longer than anything takes on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);

/// One test: what it is called and what it launches.
struct Test {
    name: String,
    run: Box<dyn Fn()>,
}

impl Test {
    fn new(name: impl Into<String>, run: impl Fn() + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

fn main() -> ExitCode {
    match env::var(TASK) {
        Ok(task) => perform(&task),
        Err(_) => run_tests(),
    }
}

/// What one rank does.
fn perform(task: &str) -> ExitCode {
    match task {
        "conformance" => {
            let mpi = Mpi::init(PATIENT).unwrap();
            conformance::run_all(&Processes(&mpi));
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
            None => faults::perform(other),
        },
    }
    launch::report_end();
    ExitCode::SUCCESS
}

fn tests() -> Vec<Test> {
    let conformance = (1..=4).map(|world_size| {
        let run = move || launch("conformance", world_size).expect_success();
        Test::new(format!("mpi conforms with {world_size} ranks"), run)
    });
    let alone = Test::new("a process without mpirun is a world of its own", || {
        launch::launch_alone("conformance").expect_success();
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
    tests.extend(faults::tests());
    tests.extend(random::tests());
    tests.extend(hosts::tests());
    tests
}

fn run_tests() -> ExitCode {
    let words: Vec<String> = env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let is_chosen =
        |test: &Test| words.is_empty() || words.iter().any(|word| test.name.contains(word));
    let mut failed = Vec::new();
    for test in tests().into_iter().filter(is_chosen) {
        let start = Instant::now();
        let has_passed = catch_unwind(AssertUnwindSafe(|| (test.run)())).is_ok();
        let verdict = if has_passed { "ok" } else { "FAILED" };
        let seconds = start.elapsed().as_secs_f32();
        println!("test {} ... {verdict} ({seconds:.1} s)", test.name);
        if !has_passed {
            failed.push(test.name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("{} tests failed: {failed:#?}", failed.len());
    ExitCode::FAILURE
}

/// The processes of one `mpirun`; a case with another number of ranks is left to another one.
struct Processes<'a>(&'a Mpi);

impl Backend for Processes<'_> {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        if world_size != self.0.world_size() {
            return Vec::new();
        }
        let endpoint = self.0.group_within(PATIENT, deadline).unwrap();
        let rank = self.0.rank();
        match catch_unwind(AssertUnwindSafe(|| body(Arc::new(endpoint)))) {
            Ok(()) => Vec::new(),
            Err(payload) => vec![RankPanic {
                rank,
                message: launch::panic_message(payload.as_ref()),
            }],
        }
    }

    fn max_world_size(&self) -> usize {
        self.0.world_size()
    }

    fn staging(&self) -> Staging {
        Staging::Messages
    }
}
