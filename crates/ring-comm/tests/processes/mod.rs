//! What tests of backends have in common whose ranks are processes.
//!
//! Without a task this program runs its tests, which start it again as the ranks of a group: once per world size for the
//! conformance suite and once per scenario of a failure. A rank finds its task in the environment. Words on the command line
//! choose among the tests.

pub(crate) mod faults;
pub(crate) mod launch;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use launch::TASK;
use ring_comm::{
    RankPanic, Transport,
    buffer::HostBuffer,
    conformance::{self, Backend, RankBody, Staging},
};

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENT: Duration = Duration::from_secs(60);

/// One test: what it is called and what it launches.
pub(crate) struct Test {
    name: String,
    run: Box<dyn Fn()>,
}

impl Test {
    pub(crate) fn new(name: impl Into<String>, run: impl Fn() + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Performs the task that the environment names, or runs the tests if there is none.
pub(crate) fn main(perform: fn(&str), tests: fn() -> Vec<Test>) -> ExitCode {
    match env::var(TASK) {
        Ok(task) => {
            perform(&task);
            launch::report_end();
            ExitCode::SUCCESS
        }
        Err(_) => run_tests(tests()),
    }
}

fn run_tests(tests: Vec<Test>) -> ExitCode {
    let words: Vec<String> = env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let is_chosen =
        |test: &Test| words.is_empty() || words.iter().any(|word| test.name.contains(word));
    let mut failed = Vec::new();
    for test in tests.into_iter().filter(is_chosen) {
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

/// Runs the conformance suite as one rank of `world_size`; `group` makes its endpoint of a group with some deadline.
pub(crate) fn conform<T: Transport<HostBuffer> + 'static>(
    world_size: usize,
    group: &dyn Fn(Duration) -> T,
) {
    conformance::run_all(&Processes { world_size, group });
}

/// The processes of one launch; a case with another number of ranks is left to another one.
struct Processes<'a, T> {
    world_size: usize,
    group: &'a dyn Fn(Duration) -> T,
}

impl<T: Transport<HostBuffer> + 'static> Backend for Processes<'_, T> {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        if world_size != self.world_size {
            return Vec::new();
        }
        let endpoint = Arc::new((self.group)(deadline));
        let rank = endpoint.rank();
        match catch_unwind(AssertUnwindSafe(|| body(endpoint))) {
            Ok(()) => Vec::new(),
            Err(payload) => vec![RankPanic {
                rank,
                message: launch::panic_message(payload.as_ref()),
            }],
        }
    }

    fn max_world_size(&self) -> usize {
        self.world_size
    }

    fn staging(&self) -> Staging {
        Staging::Messages
    }
}
