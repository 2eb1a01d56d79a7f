//! What can go wrong when ranks meet: which error each of them gets, and how soon.

use std::{
    env, fs,
    net::TcpListener,
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use ring_comm::{
    Tcp, TcpError, Transport,
    launch::{from_env, store::StoreError},
};

use crate::{
    PATIENT, Port,
    processes::{
        Test,
        faults::wait_until,
        launch::{Outcome, folder, report, run},
    },
};

const RANKS: usize = 3;
/// Of the scenarios in which it passes.
const DEADLINE: Duration = Duration::from_secs(2);
/// How soon everything else must be known, and how far behind the deadline an error may be, on a busy machine.
const SOON: Duration = Duration::from_secs(1);

/// A task: the ranks try to meet.
pub(crate) const MEET: &str = "meet";
/// The same; the last one comes when another has reported.
pub(crate) const MEET_LATE: &str = "meet-late";
/// The variable with the number of a process, if ranks have several.
const PROCESS: &str = "RING_TEST_PROCESS";

/// What a process does.
pub(crate) fn perform(task: &str) {
    let launch = from_env().unwrap();
    let process = env::var(PROCESS).map_or(launch.rank.value, |number| number.parse().unwrap());
    if task == MEET_LATE && launch.rank.value == RANKS - 1 {
        let has_reported = |process: usize| folder().join(format!("rank-{process}")).exists();
        wait_until(|| (0..=RANKS).any(has_reported));
    }
    let start = Instant::now();
    let met = Tcp::init(&launch);
    let after = start.elapsed().as_millis();
    let found = match &met {
        Ok(_) => "met".to_owned(),
        Err(error) => kind(error),
    };
    let text = met.as_ref().err().map(TcpError::to_string);
    report(
        process,
        &format!("{found} {after} {}", text.unwrap_or_default()),
    );
    if let Ok(tcp) = met {
        assert_eq!(listening(), 0, "all ranks are here");
        let endpoint = tcp.group(PATIENT).unwrap();
        endpoint.all_gather_bytes(0, Vec::new()).unwrap();
    }
}

/// How many of this process's sockets listen; none where the system does not tell.
fn listening() -> usize {
    const LISTENS: &str = "0A";
    let Ok(own) = fs::read_dir("/proc/self/fd") else {
        return 0;
    };
    let targets = own.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let own: Vec<String> = targets.map(|target| target.display().to_string()).collect();
    let tables = ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/self/net/{table}")));
    let tables = tables.map(Result::unwrap_or_default).concat();
    let is_own_listener = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, LISTENS, _, _, _, _, _, inode, ..] = fields[..] else {
            return false;
        };
        own.contains(&format!("socket:[{inode}]"))
    };
    tables.lines().filter(is_own_listener).count()
}

/// What went wrong, and whose fault it is, in one word.
fn kind(error: &TcpError) -> String {
    let ranks = |ranks: &[usize]| ranks.iter().map(usize::to_string).collect::<String>();
    match error {
        TcpError::Absent { missing, .. } => format!("absent-{}", ranks(missing)),
        TcpError::Store(StoreError::Unreachable { .. }) => "unreachable-0".to_owned(),
        TcpError::Store(StoreError::WrongToken { rank, .. }) => format!("token-{rank}"),
        TcpError::Store(StoreError::WrongWorldSize { rank, .. }) => format!("size-{rank}"),
        TcpError::Store(StoreError::DuplicateRank { rank, .. }) => format!("duplicate-{rank}"),
        TcpError::Store(StoreError::AddressInUse { .. }) => "in-use".to_owned(),
        TcpError::Store(StoreError::Failed(failure)) => format!("failed-{}", failure.rank),
        _ => "other".to_owned(),
    }
}

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("rank 0 may listen everywhere", everywhere),
        Test::new("ranks meet at an address of version 6", version_six),
        Test::new("an absent rank is named at the deadline", absent_rank),
        Test::new("an absent rank 0 is named at the deadline", absent_zero),
        Test::new("a wrong token is refused at once", wrong_token),
        Test::new(
            "a rank 0 with another token lets nobody in",
            wrong_token_of_zero,
        ),
        Test::new("another world size is refused at once", wrong_world_size),
        Test::new("a port in use is an error at once", port_in_use),
        Test::new(
            "of two processes with one rank one is refused",
            duplicate_rank,
        ),
    ]
}

/// Starts the processes, with deadlines that pass if they must.
fn meet(mut processes: Vec<Command>) -> Outcome {
    for process in &mut processes {
        process.env("RING_DEADLINE_SECONDS", DEADLINE.as_secs().to_string());
    }
    run(processes, MEET, RANKS)
}

/// All ranks.
fn everybody(port: &Port) -> Vec<Command> {
    (0..RANKS).map(|rank| port.rank(rank, RANKS)).collect()
}

/// A rank has found one of `kinds`, from `earliest` to `latest` after it began.
fn expect(outcome: &Outcome, rank: usize, kinds: &[&str], earliest: Duration, latest: Duration) {
    let finding = outcome.finding(rank);
    println!("    rank {rank} found: {finding}");
    let mut words = finding.split_whitespace();
    let found = words.next().unwrap();
    assert!(kinds.contains(&found), "rank {rank}: {finding}");
    let after = Duration::from_millis(words.next().unwrap().parse().unwrap());
    assert!(
        earliest <= after && after <= latest,
        "rank {rank}: {finding}"
    );
}

fn expect_at_once(outcome: &Outcome, rank: usize, kind: &str) {
    expect(outcome, rank, &[kind], Duration::ZERO, SOON);
}

/// Ranks are not started at quite the same moment, and one whose deadline passes tells the others.
fn expect_at_deadline(outcome: &Outcome, rank: usize, kinds: &[&str]) {
    let earliest = DEADLINE - DEADLINE / 4;
    expect(outcome, rank, kinds, earliest, DEADLINE + SOON);
}

fn expect_met(outcome: &Outcome) {
    for rank in 0..RANKS {
        expect_at_once(outcome, rank, "met");
    }
    outcome.expect_success();
}

fn everywhere() {
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    ranks[0].env("MASTER_ADDR", "0.0.0.0");
    expect_met(&meet(ranks));
}

fn version_six() {
    if let Err(error) = TcpListener::bind("[::1]:0") {
        return println!("    not run: this host has no such address: {error}");
    }
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    for rank in &mut ranks {
        rank.env("MASTER_ADDR", "::1");
    }
    expect_met(&meet(ranks));
}

fn absent_rank() {
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    ranks.pop();
    let outcome = meet(ranks);
    let culprit = format!("absent-{}", RANKS - 1);
    let named = format!("rank {}", RANKS - 1);
    for rank in 0..RANKS - 1 {
        // Its own deadline, or that of the other a moment before.
        expect_at_deadline(&outcome, rank, &[&culprit, "failed-0", "failed-1"]);
        assert!(outcome.finding(rank).contains(&named));
    }
    let own = |rank: &usize| outcome.finding(*rank).starts_with(&culprit);
    assert!((0..RANKS - 1).any(|rank| own(&rank)));
}

fn absent_zero() {
    let port = Port::reserve();
    let outcome = meet(everybody(&port).split_off(1));
    for rank in 1..RANKS {
        expect_at_deadline(&outcome, rank, &["unreachable-0"]);
    }
}

fn wrong_token() {
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    ranks[1].env("RING_JOB_TOKEN", "guess");
    let outcome = meet(ranks);
    expect_at_once(&outcome, 1, "token-1");
    for rank in [0, 2] {
        expect_at_deadline(&outcome, rank, &["absent-1", "failed-0", "failed-2"]);
        assert!(outcome.finding(rank).contains("rank 1"));
    }
}

fn wrong_token_of_zero() {
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    ranks[0].env("RING_JOB_TOKEN", "guess");
    let outcome = meet(ranks);
    expect_at_deadline(&outcome, 0, &["absent-12"]);
    expect_at_once(&outcome, 1, "token-1");
    expect_at_once(&outcome, 2, "token-2");
}

fn wrong_world_size() {
    let port = Port::reserve();
    let mut ranks = everybody(&port);
    ranks[2] = port.rank(2, RANKS + 1);
    let outcome = meet(ranks);
    expect_at_once(&outcome, 2, "size-2");
    for rank in [0, 1] {
        expect_at_deadline(&outcome, rank, &["absent-2", "failed-0", "failed-1"]);
    }
}

fn port_in_use() {
    let port = Port::reserve();
    port.listen();
    let mut ranks = everybody(&port);
    ranks.truncate(1);
    let outcome = meet(ranks);
    expect_at_once(&outcome, 0, "in-use");
}

fn duplicate_rank() {
    let port = Port::reserve();
    let mut processes = everybody(&port);
    processes.push(port.rank(1, RANKS));
    for (number, process) in processes.iter_mut().enumerate() {
        process.env(PROCESS, number.to_string());
    }
    let outcome = run(processes, MEET_LATE, RANKS + 1);
    let is_refused = |process: &usize| outcome.finding(*process).starts_with("duplicate-1");
    assert_eq!(
        [1, RANKS]
            .iter()
            .filter(|&process| is_refused(process))
            .count(),
        1
    );
    let has_met = |process: &usize| outcome.finding(*process).starts_with("met");
    assert_eq!((0..=RANKS).filter(has_met).count(), RANKS);
    // Two of them end as the same rank, so not all ranks come to their end.
    assert!(outcome.statuses.iter().all(ExitStatus::success));
}
