//! What happens to processes, and what the others see of it: which error, whose fault, how soon.
//!
//! In every scenario three ranks meet; then something happens to one of them, the victim, which notes the time. The others note
//! the error they get, who is to blame by it, and how long after the fault they had it.

use std::{
    fs, mem,
    path::{Path, PathBuf},
    process::{self, Command},
    thread,
    time::{Duration, Instant, SystemTime},
};

use ring_comm::{
    CommError, CommErrorKind, Expected, Payload, Rank, Tag, Transport,
    buffer::{DType, HostBuffer},
};

use super::{
    PATIENT, Test,
    launch::{Launch, Outcome, folder, report},
};

const RANKS: usize = 3;
/// Of the scenarios in which it passes; the others have one that they must not need.
const DEADLINE: Duration = Duration::from_secs(2);
/// How soon the death of a process must be known: far less than the deadline, and room for a busy machine.
const SOON: Duration = Duration::from_secs(1);
/// How far behind the deadline an error may be.
const LATE: Duration = Duration::from_secs(1);

/// What happens to the victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Killed before it sends anything.
    KilledBefore,
    /// Killed while large messages are on their way.
    KilledDuring,
    /// Killed after an exchange that succeeded.
    KilledAfter,
    /// Ends without a word, as if all were well.
    Exits,
    Panics,
    /// Stopped, so that it neither acts nor ends.
    Stopped,
    /// Sends a little before the deadline.
    SlowButInTime,
    /// Sends a little after the deadline.
    TooSlow,
}

impl Fault {
    const ALL: [Fault; 8] = [
        Fault::KilledBefore,
        Fault::KilledDuring,
        Fault::KilledAfter,
        Fault::Exits,
        Fault::Panics,
        Fault::Stopped,
        Fault::SlowButInTime,
        Fault::TooSlow,
    ];

    fn deadline(self) -> Duration {
        match self {
            Fault::Stopped | Fault::SlowButInTime | Fault::TooSlow => DEADLINE,
            _ => PATIENT,
        }
    }

    /// The kind of error that the others must get, and within which time after the fault.
    fn expected(self) -> (&'static str, Duration, Duration) {
        match self {
            Fault::KilledBefore | Fault::KilledDuring | Fault::KilledAfter | Fault::Exits => {
                ("lost", Duration::ZERO, SOON)
            }
            Fault::Panics => ("panicked", Duration::ZERO, SOON),
            Fault::Stopped | Fault::TooSlow => {
                // The survivors may have begun to wait a little before the fault.
                ("deadline", DEADLINE - DEADLINE / 4, DEADLINE + LATE)
            }
            Fault::SlowButInTime => ("none", Duration::ZERO, DEADLINE),
        }
    }
}

/// One test for every fault of the first and of the last rank.
pub(crate) fn tests(launch: Launch) -> Vec<Test> {
    let cases = Fault::ALL
        .into_iter()
        .flat_map(|fault| [0, RANKS - 1].map(|victim| (fault, victim)));
    let test = |(fault, victim)| {
        let name = format!("fault {fault:?} of rank {victim}");
        Test::new(name, move || {
            let outcome = launch(&format!("{fault:?}-{victim}"), RANKS);
            expect(fault, victim, &outcome);
        })
    };
    cases.map(test).collect()
}

fn expect(fault: Fault, victim: Rank, outcome: &Outcome) {
    let (kind, earliest, latest) = fault.expected();
    for rank in others(victim) {
        let finding = outcome.finding(rank);
        println!("    {fault:?} of rank {victim}, rank {rank} found: {finding}");
        let words: Vec<&str> = finding.split_whitespace().collect();
        let [found, culprit, milliseconds, ..] = words[..] else {
            panic!("rank {rank} found: {finding}");
        };
        let after = Duration::from_millis(milliseconds.parse().unwrap());
        assert_eq!((found, culprit), (kind, &*victim.to_string()), "{finding}");
        assert!(
            earliest <= after && after <= latest,
            "rank {rank}: {finding}"
        );
    }
    // All have been waited for; nobody may linger, not even for a deadline that is much later.
    let latest = latest + Duration::from_secs(15);
    assert!(outcome.took <= latest, "it all took {:?}", outcome.took);
}

/// What one rank does, with an endpoint that has the deadline for which `group` is asked.
pub(crate) fn perform<T: Transport<HostBuffer>>(scenario: &str, group: impl FnOnce(Duration) -> T) {
    let named = |fault: &Fault, victim: Rank| format!("{fault:?}-{victim}") == scenario;
    let cases = Fault::ALL
        .into_iter()
        .flat_map(|fault| (0..RANKS).map(move |victim| (fault, victim)));
    let mut cases = cases.filter(|(fault, victim)| named(fault, *victim));
    let (fault, victim) = cases.next().expect("a task that exists");

    let endpoint = group(fault.deadline());
    endpoint.all_gather_bytes(0, Vec::new()).unwrap();
    // What a rank has said just before it dies may die with it.
    let have_met = |rank: Rank| folder().join(format!("met-{rank}"));
    fs::write(have_met(endpoint.rank()), "").unwrap();
    if endpoint.rank() == victim {
        wait_until(|| (0..RANKS).all(|rank| have_met(rank).exists()));
        suffer(fault, endpoint);
    } else {
        observe(fault, victim, endpoint);
    }
}

fn suffer(fault: Fault, endpoint: impl Transport<HostBuffer>) {
    match fault {
        Fault::KilledBefore => signal_self("KILL"),
        Fault::KilledDuring => exchange(&endpoint, |round| {
            if round == 5 {
                signal_self("KILL");
            }
        })
        .unwrap(),
        Fault::KilledAfter => {
            endpoint.all_gather_bytes(1, Vec::new()).unwrap();
            wait_until(|| others(endpoint.rank()).all(|rank| has_exchanged(rank).exists()));
            signal_self("KILL");
        }
        Fault::Exits => {
            note_fault();
            mem::forget(endpoint);
            process::exit(0);
        }
        Fault::Panics => {
            // The endpoint is dropped while unwinding.
            note_fault();
            panic!("staged");
        }
        Fault::Stopped => {
            fs::write(folder().join("victim"), process::id().to_string()).unwrap();
            signal_self("STOP");
            // Going on, it learns what the others think of it.
            let error = endpoint.all_gather_bytes(1, Vec::new()).unwrap_err();
            assert_eq!(error.culprit(), endpoint.rank(), "{error}");
        }
        Fault::SlowButInTime | Fault::TooSlow => {
            note_fault();
            let part = DEADLINE / 2;
            thread::sleep(if fault == Fault::TooSlow {
                DEADLINE + part
            } else {
                part
            });
            let result = endpoint.all_gather_bytes(1, Vec::new());
            assert_eq!(result.is_ok(), fault == Fault::SlowButInTime, "{result:?}");
        }
    }
}

fn observe(fault: Fault, victim: Rank, endpoint: impl Transport<HostBuffer>) {
    let result = match fault {
        Fault::KilledDuring => exchange(&endpoint, |_| ()),
        Fault::KilledAfter => {
            endpoint.all_gather_bytes(1, Vec::new()).unwrap();
            fs::write(has_exchanged(endpoint.rank()), "").unwrap();
            endpoint.all_gather_bytes(2, Vec::new()).map(drop)
        }
        // One waits for the victim, the other for one that waits.
        Fault::KilledBefore | Fault::Exits | Fault::Panics => {
            let next = (1..RANKS).map(|distance| (victim + distance) % RANKS);
            let order: Vec<Rank> = [victim].into_iter().chain(next).collect();
            let own = order.iter().position(|&rank| rank == endpoint.rank());
            receive(&endpoint, order[own.unwrap() - 1])
        }
        _ => endpoint.all_gather_bytes(1, Vec::new()).map(drop),
    };
    let after = since_fault();
    let found = match &result {
        Ok(()) => format!("none {victim} {}", after.as_millis()),
        Err(error) => {
            let kind = match &error.root().kind {
                CommErrorKind::PeerLost { .. } => "lost",
                CommErrorKind::Panicked { .. } => "panicked",
                CommErrorKind::Deadline { .. } => "deadline",
                _ => "other",
            };
            format!("{kind} {} {} {error}", error.culprit(), after.as_millis())
        }
    };
    report(endpoint.rank(), &found);
    if fault == Fault::Stopped && endpoint.rank() == (victim + 1) % RANKS {
        wake(victim);
    }
}

/// Large messages from everybody to everybody, round after round.
fn exchange(
    endpoint: &dyn Transport<HostBuffer>,
    mut meanwhile: impl FnMut(u32),
) -> Result<(), CommError> {
    const LEN: usize = 4 << 20;
    let peers = || others(endpoint.rank());
    let expected = Expected {
        dtype: DType::F32,
        len: LEN,
    };
    for round in 0.. {
        let tag = Tag::new(0, round, Payload::KeyValue);
        let receives: Result<Vec<_>, _> = peers()
            .map(|peer| endpoint.irecv(peer, tag, expected))
            .collect();
        let buffer = || HostBuffer::zeros(DType::F32, LEN);
        let sends: Result<Vec<_>, _> = peers()
            .map(|peer| endpoint.isend(peer, tag, buffer()))
            .collect();
        meanwhile(round);
        for receive in receives? {
            receive.wait()?;
        }
        for send in sends? {
            send.wait()?;
        }
    }
    Ok(())
}

fn receive(endpoint: &dyn Transport<HostBuffer>, peer: Rank) -> Result<(), CommError> {
    let expected = Expected {
        dtype: DType::F32,
        len: 1,
    };
    let tag = Tag::new(0, 0, Payload::KeyValue);
    endpoint.irecv(peer, tag, expected)?.wait().map(drop)
}

pub(crate) fn signal_self(signal: &str) {
    note_fault();
    send_signal(signal, &process::id().to_string());
}

/// Lets the victim go on when all others have found something.
fn wake(victim: Rank) {
    let has_found = |rank: Rank| folder().join(format!("rank-{rank}")).exists();
    wait_until(|| others(victim).all(has_found));
    let process = fs::read_to_string(folder().join("victim")).unwrap();
    send_signal("CONT", &process);
}

fn others(rank: Rank) -> impl Iterator<Item = Rank> {
    (0..RANKS).filter(move |&other| other != rank)
}

/// The file with which a rank says that it has got through an exchange.
fn has_exchanged(rank: Rank) -> PathBuf {
    folder().join(format!("exchanged-{rank}"))
}

pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENT, "another rank does not come");
        thread::yield_now();
    }
}

pub(crate) fn send_signal(signal: &str, process: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), process])
        .status();
    assert!(status.unwrap().success());
}

pub(crate) fn note_fault() {
    note_fault_in(&folder());
}

/// Notes in the findings of a launch that the fault happens now.
pub(crate) fn note_fault_in(folder: &Path) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanoseconds = now.unwrap().as_nanos().to_string();
    fs::write(folder.join("fault"), nanoseconds).unwrap();
}

pub(crate) fn since_fault() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let noted = fs::read_to_string(folder().join("fault")).unwrap();
    let noted: u64 = noted.parse().unwrap();
    now.unwrap().saturating_sub(Duration::from_nanos(noted))
}
