//! Random programs with random faults over MPI, as over loopback; and processes that end or stop at random moments.
//!
//! Faults that a process survives are played one after the other in one launch. Each of the others takes a launch of its own.
//! All follow from a seed: `RING_TEST_SEED` is the first of them, which `RING_TEST_RUNS` follow; a run is told by its seed.

use std::{
    env, fs,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process, thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use ring_comm::{CommErrorKind, Mpi, Rank, Transport};
use serde::{Deserialize, Serialize};

use crate::{
    launch,
    processes::{
        PATIENT, Test,
        faults::{note_fault, send_signal, signal_self, since_fault, wait_until},
        launch::{Outcome, folder, panic_message, report},
    },
    scenarios::{Ending, Player, Scenario, draw, judge, scenario},
};

/// Runs of faults that processes survive, for each number of ranks.
const GROUPS: u64 = 40;
/// Runs of faults that a process does not survive.
const PROCESSES: u64 = 18;
/// How long after the fault, or after the deadline, a rank may end on a busy machine.
const MARGIN: Duration = Duration::from_secs(10);
/// For processes that stop.
const DEADLINE: Duration = Duration::from_secs(1);
/// How soon the death of a process must be known.
const SOON: Duration = Duration::from_secs(1);

pub(crate) fn tests() -> Vec<Test> {
    let groups = (2..=4).map(|world_size| {
        let name = format!("random faults of {world_size} ranks");
        Test::new(name, move || play_groups(world_size, seeds(GROUPS)))
    });
    let processes = Test::new("random ends of processes", || {
        seeds(PROCESSES).for_each(end_process);
    });
    groups.chain([processes]).collect()
}

/// What a launch of these tests does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Task {
    Groups { first: u64, end: u64 },
    EndOfProcess { seed: u64 },
}

impl Task {
    /// As the name of a task of a rank.
    fn name(self) -> String {
        match self {
            Task::Groups { first, end } => format!("groups-{first}-{end}"),
            Task::EndOfProcess { seed } => format!("end-{seed}"),
        }
    }

    /// `None` if the task is of another kind.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let mut words = name.split('-');
        let kind = words.next()?;
        let numbers: Option<Vec<u64>> = words.map(|word| word.parse().ok()).collect();
        match (kind, &numbers?[..]) {
            ("groups", &[first, end]) => Some(Task::Groups { first, end }),
            ("end", &[seed]) => Some(Task::EndOfProcess { seed }),
            _ => None,
        }
    }

    pub(crate) fn perform(self) {
        match self {
            Task::Groups { first, end } => perform_groups(first..end),
            Task::EndOfProcess { seed } => perform_end(seed),
        }
    }
}

fn seeds(runs: u64) -> Range<u64> {
    let number = |name| Some(env::var(name).ok()?.parse().expect("a number"));
    let first = number("RING_TEST_SEED").unwrap_or(0);
    first..first + number("RING_TEST_RUNS").unwrap_or(runs)
}

/// What one rank came to in one run, and how long it took.
#[derive(Debug, Serialize, Deserialize)]
struct Played {
    ending: Ending,
    took: Duration,
}

fn play_groups(world_size: usize, seeds: Range<u64>) {
    println!("    seeds {seeds:?}");
    let outcome = launch(
        &Task::Groups {
            first: seeds.start,
            end: seeds.end,
        }
        .name(),
        world_size,
    );
    let of_rank = |rank| -> Vec<Played> {
        let lines = outcome.finding(rank).lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let mut ranks: Vec<_> = (0..world_size)
        .map(|rank| of_rank(rank).into_iter())
        .collect();
    for seed in seeds {
        let played: Option<Vec<Played>> = ranks.iter_mut().map(Iterator::next).collect();
        let played = played.unwrap_or_else(|| panic!("a rank did not come to seed {seed}"));
        let scenario = Scenario::of_seed(seed, world_size..=world_size);
        let story = format!("seed {seed}: {scenario:#?}\n{played:#?}");
        let longest = match scenario.needs_the_deadline() {
            true => scenario.deadline() + MARGIN,
            false => MARGIN,
        };
        assert!(played.iter().all(|rank| rank.took < longest), "{story}");
        let endings: Vec<Ending> = played.into_iter().map(|rank| rank.ending).collect();
        let verdict = catch_unwind(|| judge(&scenario, &endings));
        assert!(verdict.is_ok(), "{story}");
    }
    outcome.expect_success();
}

/// Plays the scenarios of all seeds, each in a group of its own.
fn perform_groups(seeds: Range<u64>) {
    let mpi = Mpi::init(PATIENT).unwrap();
    let world_size = mpi.world_size();
    let mut findings = String::new();
    for seed in seeds {
        let scenario = Scenario::of_seed(seed, world_size..=world_size);
        let endpoint = mpi.group_within(PATIENT, scenario.deadline()).unwrap();
        let start = Instant::now();
        let play = AssertUnwindSafe(|| Player::new(&scenario, endpoint).play());
        let ending = catch_unwind(play)
            .unwrap_or_else(|payload| Ending::Panicked(panic_message(payload.as_ref())));
        let took = start.elapsed();
        findings += &serde_json::to_string(&Played { ending, took }).unwrap();
        findings.push('\n');
        report(mpi.rank(), &findings);
    }
}

/// How a process ends, or stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Killed,
    Exits,
    Stopped,
}

/// Ranks perform a program over and over, until one of them ends.
#[derive(Debug)]
struct Finale {
    scenario: Scenario,
    end: End,
    victim: Rank,
    /// How long after the ranks have met.
    delay: Duration,
}

impl Finale {
    fn of_seed(seed: u64) -> Self {
        let end = prop::sample::select(vec![End::Killed, End::Exits, End::Stopped]);
        // A round takes less than a millisecond, or some; so this is in the first rounds and in all that they do.
        let delay = (0..20_000u64).prop_map(Duration::from_micros);
        let all = (scenario(2..=4), end, delay).prop_map(|(scenario, end, delay)| Self {
            victim: scenario.culprit,
            scenario,
            end,
            delay,
        });
        draw(all, seed)
    }

    fn deadline(&self) -> Duration {
        match self.end {
            End::Stopped => DEADLINE,
            End::Killed | End::Exits => PATIENT,
        }
    }

    fn survivors(&self) -> impl Iterator<Item = Rank> {
        let victim = self.victim;
        (0..self.scenario.world_size).filter(move |&rank| rank != victim)
    }
}

/// What a survivor found, and how long after the fault.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    ending: Ending,
    after: Duration,
}

fn end_process(seed: u64) {
    let finale = Finale::of_seed(seed);
    let (end, victim, world_size) = (finale.end, finale.victim, finale.scenario.world_size);
    print!("    seed {seed}: {end:?}, rank {victim} of {world_size}; ");
    let outcome = launch(&Task::EndOfProcess { seed }.name(), world_size);
    let verdict = catch_unwind(AssertUnwindSafe(|| judge_survivors(&finale, &outcome)));
    let story = || format!("seed {seed}: {finale:#?}\n{:#?}", outcome.findings);
    assert!(verdict.is_ok(), "{}", story());
}

fn judge_survivors(finale: &Finale, outcome: &Outcome) {
    let found: Vec<Found> = finale
        .survivors()
        .map(|rank| serde_json::from_str(outcome.finding(rank)).unwrap())
        .collect();
    let error = |found: &Found| match &found.ending {
        Ending::Failed(error) => error.clone(),
        other => panic!("a survivor has {other:?}"),
    };
    let errors: Vec<_> = found.iter().map(error).collect();
    let root = errors[0].root();
    assert!(errors.iter().all(|error| error.root() == root));
    // Some have waited for ranks that waited themselves; who is stopped does not complain.
    assert_eq!(root.culprit(), finale.victim, "{root}");
    let (is_right, longest) = match finale.end {
        End::Stopped => {
            let is_right = matches!(root.kind, CommErrorKind::Deadline { .. });
            (is_right, DEADLINE + MARGIN)
        }
        End::Killed | End::Exits => (matches!(root.kind, CommErrorKind::PeerLost { .. }), SOON),
    };
    assert!(is_right, "{root}");
    let latest = found.iter().map(|found| found.after).max().unwrap();
    println!("known after {latest:?}");
    assert!(latest < longest);
    assert!(outcome.took < longest + MARGIN, "{:?}", outcome.took);
}

/// One rank's part of a process' end.
fn perform_end(seed: u64) {
    let finale = Finale::of_seed(seed);
    let mpi = Mpi::init(PATIENT).unwrap();
    let endpoint = mpi.group_within(PATIENT, finale.deadline()).unwrap();
    endpoint.all_gather_bytes(0, Vec::new()).unwrap();
    fs::write(has_met(mpi.rank()), "").unwrap();
    wait_until(|| (0..mpi.world_size()).all(|rank| has_met(rank).exists()));

    let is_victim = mpi.rank() == finale.victim;
    if is_victim {
        let (end, delay) = (finale.end, finale.delay);
        thread::spawn(move || {
            thread::sleep(delay);
            suffer(end);
        });
    }
    let player = Player::new(&finale.scenario, endpoint);
    let mut rounds = finale.scenario.program.iter().cycle();
    let error = rounds.find_map(|step| player.take(step).err());
    let ending = Ending::Failed(error.expect("the rounds have no end"));
    let after = since_fault();
    report(
        mpi.rank(),
        &serde_json::to_string(&Found { ending, after }).unwrap(),
    );
    if finale.end == End::Stopped && finale.survivors().next() == Some(mpi.rank()) {
        wake_when_all_have_found(&finale);
    }
}

/// Lets the victim go on, so that it leaves too.
fn wake_when_all_have_found(finale: &Finale) {
    let has_found = |rank: Rank| folder().join(format!("rank-{rank}")).exists();
    wait_until(|| finale.survivors().all(has_found));
    let process = fs::read_to_string(folder().join("victim")).unwrap();
    send_signal("CONT", &process);
}

/// The file with which a rank says that it has met all others.
fn has_met(rank: Rank) -> PathBuf {
    folder().join(format!("met-{rank}"))
}

fn suffer(end: End) {
    match end {
        End::Killed => signal_self("KILL"),
        End::Stopped => {
            fs::write(folder().join("victim"), process::id().to_string()).unwrap();
            signal_self("STOP");
        }
        End::Exits => {
            note_fault();
            process::exit(0);
        }
    }
}
