//! How ranks begin, for which no GPU is needed: they find the library, meet, and say clearly what is missing.

use std::{process::Command, time::Duration};

use ring_comm::{
    Nccl, NcclError, TcpError,
    launch::{LaunchError, from_env, store::StoreError},
    nccl::{self, CudaDevice, LIBRARY_VARIABLE, NcclLibrary, Version},
};

use crate::{
    processes::{
        Test,
        launch::{Outcome, report, run},
    },
    ranks,
};

/// A task: the ranks start NCCL.
pub(crate) const INIT: &str = "init";
/// A task: the ranks meet, and do no more.
pub(crate) const RENDEZVOUS: &str = "rendezvous";
/// How soon all must be over that does not wait for a deadline, on a busy machine.
const SOON: Duration = Duration::from_secs(20);
/// A library that is not there.
const NOWHERE: &str = "/nowhere/libnccl.so.2";

/// What one rank does: it tells what came of it.
pub(crate) fn perform(task: &str) {
    let launch = from_env().unwrap();
    let found = match task {
        RENDEZVOUS => nccl::rendezvous(&launch).map(|id| serde_json::to_string(&id).unwrap()),
        _ => Nccl::init(&launch, Some(0)).map(|nccl| format!("NCCL {}", nccl.version())),
    };
    let finding = found.unwrap_or_else(|error| format!("{} {error}", kind(&error)));
    report(launch.rank.value, &finding);
}

/// What went wrong, and where, in one word.
fn kind(error: &NcclError) -> String {
    match error {
        NcclError::LibraryMissing { .. } => "library-missing".to_owned(),
        NcclError::SymbolMissing { .. } => "symbol-missing".to_owned(),
        NcclError::DriverMissing => "driver-missing".to_owned(),
        NcclError::NoDevice => "no-device".to_owned(),
        NcclError::Elsewhere { rank, .. } => format!("elsewhere-{rank}"),
        NcclError::Launch(LaunchError::Store(StoreError::WrongToken { rank, .. })) => {
            format!("token-{rank}")
        }
        NcclError::Tcp(TcpError::Absent { .. }) => "absent".to_owned(),
        NcclError::Tcp(_) => "tcp".to_owned(),
        error => format!("other-{error:?}"),
    }
}

pub(crate) fn tests_without_library() -> Vec<Test> {
    vec![
        Test::new("a missing library is a clear error", missing_library),
        Test::new("another library is a clear error", another_library),
    ]
}

pub(crate) fn tests_with_library() -> Vec<Test> {
    let mut tests = vec![
        Test::new("the library has a version and makes ids", library_works),
        Test::new("two processes meet and have the same id", same_id),
        Test::new("a wrong token is refused", wrong_token),
        Test::new(
            "a rank without NCCL is named by the others",
            missing_elsewhere,
        ),
    ];
    match CudaDevice::count() {
        Ok(count) => println!("not run: what happens without a GPU, because there are {count}"),
        Err(error) => {
            println!("not run: everything on GPUs, because: {error}");
            for world_size in [1, 2] {
                let name = format!("{world_size} ranks without a GPU get a clear error");
                tests.push(Test::new(name, move || no_gpu(world_size)));
            }
        }
    }
    tests
}

fn missing_library() {
    let outcome = alone_with(NOWHERE);
    expect(&outcome, 0, "library-missing");
    let finding = outcome.finding(0);
    assert!(
        finding.contains(NOWHERE) && finding.contains(LIBRARY_VARIABLE),
        "{finding}"
    );
}

fn another_library() {
    let outcome = alone_with("libc.so.6");
    expect(&outcome, 0, "symbol-missing");
    assert!(outcome.finding(0).contains("libc.so.6"));
}

/// A world of one rank whose library is `library`.
fn alone_with(library: &str) -> Outcome {
    let mut ranks = ranks(1);
    ranks[0].env(LIBRARY_VARIABLE, library);
    run_soon(ranks, INIT)
}

fn library_works() {
    let library = NcclLibrary::load().unwrap();
    assert!(library.version() >= Version::OLDEST);
    let ids = [(); 2].map(|()| library.unique_id().unwrap());
    assert_ne!(ids[0], ids[1]);
}

fn same_id() {
    let outcome = run_soon(ranks(2), RENDEZVOUS);
    let id = outcome.finding(0);
    let bytes: Vec<u8> = serde_json::from_str(id).unwrap_or_else(|_| panic!("no id: {id}"));
    assert_eq!(bytes.len(), 128);
    assert_eq!(id, outcome.finding(1));
}

/// The one is refused at once; the other waits for it in vain.
fn wrong_token() {
    let mut ranks = ranks(2);
    ranks[1].env("RING_JOB_TOKEN", "simsim");
    for rank in &mut ranks {
        rank.env("RING_DEADLINE_SECONDS", "2");
    }
    let outcome = run_soon(ranks, RENDEZVOUS);
    expect(&outcome, 1, "token-1");
    expect(&outcome, 0, "absent");
}

fn missing_elsewhere() {
    for task in [RENDEZVOUS, INIT] {
        let mut ranks = ranks(2);
        ranks[1].env(LIBRARY_VARIABLE, NOWHERE);
        let outcome = run_soon(ranks, task);
        expect(&outcome, 1, "library-missing");
        match (task, CudaDevice::count()) {
            // It has trouble of its own.
            (INIT, Err(_)) => expect_no_gpu(&outcome, 0),
            _ => expect(&outcome, 0, "elsewhere-1"),
        }
    }
}

fn no_gpu(world_size: usize) {
    let outcome = run_soon(ranks(world_size), INIT);
    (0..world_size).for_each(|rank| expect_no_gpu(&outcome, rank));
}

fn expect_no_gpu(outcome: &Outcome, rank: usize) {
    let finding = outcome.finding(rank);
    println!("    rank {rank} found: {finding}");
    let is_clear = |kind| finding.starts_with(kind);
    assert!(
        is_clear("driver-missing ") || is_clear("no-device "),
        "{finding}"
    );
}

fn run_soon(ranks: Vec<Command>, task: &str) -> Outcome {
    let world_size = ranks.len();
    let outcome = run(ranks, task, world_size);
    outcome.expect_success();
    assert!(outcome.took < SOON, "{:?}", outcome.took);
    outcome
}

fn expect(outcome: &Outcome, rank: usize, kind: &str) {
    let finding = outcome.finding(rank);
    println!("    rank {rank} found: {finding}");
    assert_eq!(finding.split_whitespace().next(), Some(kind), "{finding}");
}
