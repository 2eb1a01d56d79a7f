//! Random programs of random groups over loopback, each with a random fault: no rank hangs, all see the same cause, and it
//! names the culprit.
//!
//! Every run follows from its seed, which a failure tells.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use ring_comm::{
    CommError, CommErrorKind, Communicator, Expected, Loopback, LoopbackEndpoint, Payload, Rank,
    RankPanic, Tag,
    buffer::{DType, HostBuffer},
    collective::{all_reduce_sum, all_reduce_sum_f64, barrier},
};

const RUNS: u64 = 200;
/// Runs at the same time: most of those with a deadline only wait for it.
const CONCURRENT: usize = 12;
/// For faults that nobody has to wait for.
const PATIENT: Duration = Duration::from_secs(60);
/// For faults that only the deadline finds. Long, because nothing else in the run may take as long on a busy machine.
const IMPATIENT: Duration = Duration::from_secs(1);
/// How long after the deadline a rank may end on a busy machine.
const MARGIN: Duration = Duration::from_secs(20);
/// When a run hangs.
const WATCHDOG: Duration = Duration::from_secs(100);

/// What all ranks do together.
#[derive(Clone, Debug)]
enum Step {
    /// Everybody sends to the rank `distance` further; modulo the number of ranks, at least 1.
    Shift {
        distance: usize,
        len: usize,
        dtype: DType,
    },
    Barrier,
    Sum(usize),
    SumOfF64(usize),
    Agree,
    /// A barrier of each half.
    Split,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Panic,
    /// While a request is open.
    PanicWithRequest,
    Departure,
    Abort,
    DroppedSend,
    DroppedReceive,
    WrongSize,
    WrongDType,
    WrongTag,
    WrongTerms,
    /// Does nothing before somebody has failed.
    Slow,
    /// Another rank aborts at the same step.
    TwoAborts,
    /// Another rank panics at the same step.
    TwoPanics,
}

const FAULTS: [Fault; 14] = [
    Fault::None,
    Fault::Panic,
    Fault::PanicWithRequest,
    Fault::Departure,
    Fault::Abort,
    Fault::DroppedSend,
    Fault::DroppedReceive,
    Fault::WrongSize,
    Fault::WrongDType,
    Fault::WrongTag,
    Fault::WrongTerms,
    Fault::Slow,
    Fault::TwoAborts,
    Fault::TwoPanics,
];

#[derive(Clone, Debug)]
struct Scenario {
    world_size: usize,
    /// The last step is a barrier, so that no rank can miss a failure.
    program: Vec<Step>,
    fault: Fault,
    culprit: Rank,
    /// The second rank that fails, if two do.
    accomplice: Rank,
    /// Before which step.
    at: usize,
}

impl Scenario {
    fn of_seed(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let tree = scenario().new_tree(&mut runner);
        tree.expect("the strategy rejects nothing").current()
    }

    fn deadline(&self) -> Duration {
        if self.needs_the_deadline() {
            IMPATIENT
        } else {
            PATIENT
        }
    }

    fn needs_the_deadline(&self) -> bool {
        matches!(self.fault, Fault::WrongTag | Fault::Slow)
    }

    fn is_last_step(&self) -> bool {
        self.at + 1 == self.program.len()
    }

    fn after(&self, rank: Rank) -> Rank {
        (rank + 1) % self.world_size
    }
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let step = prop_oneof![
        4 => (1..6usize, 0..9usize, prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]))
            .prop_map(|(distance, len, dtype)| Step::Shift { distance, len, dtype }),
        1 => Just(Step::Barrier),
        2 => (0..20usize).prop_map(Step::Sum),
        1 => (0..4usize).prop_map(Step::SumOfF64),
        1 => Just(Step::Agree),
        1 => Just(Step::Split),
    ];
    let program = prop::collection::vec(step, 0..8);
    let fault = prop::sample::select(FAULTS.to_vec());
    (2..7usize, program, fault, any::<[prop::sample::Index; 3]>()).prop_map(
        |(world_size, mut program, fault, [culprit, accomplice, at])| {
            program.push(Step::Barrier);
            let culprit = culprit.index(world_size);
            Scenario {
                world_size,
                fault,
                culprit,
                accomplice: (culprit + 1 + accomplice.index(world_size - 1)) % world_size,
                at: at.index(program.len()),
                program,
            }
        },
    )
}

/// Tells a slow rank when somebody has failed.
#[derive(Default)]
struct Event {
    has_happened: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn happen(&self) {
        *self.has_happened.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let happened = self.has_happened.lock().unwrap();
        let waiting = |happened: &mut bool| !*happened;
        let waited = self.changed.wait_timeout_while(happened, MARGIN, waiting);
        assert!(!waited.unwrap().1.timed_out(), "nobody has failed");
    }
}

type Outcome = Result<(), CommError>;

/// One rank's part of a scenario.
struct Player<'a> {
    scenario: &'a Scenario,
    communicator: Communicator<HostBuffer>,
    somebody_failed: &'a Event,
}

impl Player<'_> {
    /// `None` if the rank has left on purpose.
    fn play(&self) -> Option<Outcome> {
        for (number, step) in self.scenario.program.iter().enumerate() {
            if number == self.scenario.at {
                match self.fail() {
                    Ok(true) => {}
                    Ok(false) => return None,
                    Err(error) => return Some(Err(error)),
                }
            }
            if let Err(error) = self.take(step) {
                return Some(Err(error));
            }
        }
        Some(Ok(()))
    }

    fn rank(&self) -> Rank {
        self.communicator.rank()
    }

    fn is_culprit(&self) -> bool {
        self.rank() == self.scenario.culprit
    }

    /// Does what goes wrong; whether the rank goes on.
    fn fail(&self) -> Result<bool, CommError> {
        let fails_too = self.rank() == self.scenario.accomplice;
        match self.scenario.fault {
            Fault::WrongSize | Fault::WrongDType | Fault::WrongTag => self.shift_wrongly()?,
            Fault::WrongTerms => self.agree(if self.is_culprit() { "wrong" } else { "right" })?,
            Fault::TwoAborts if fails_too => self.communicator.abort("staged"),
            // Without the message that a panic prints.
            Fault::TwoPanics if fails_too => resume_unwind(Box::new("staged")),
            fault if self.is_culprit() => return self.fail_alone(fault),
            _ => {}
        }
        Ok(true)
    }

    fn fail_alone(&self, fault: Fault) -> Result<bool, CommError> {
        let peer = self.scenario.after(self.rank());
        let tag = Tag::new(1 << 40, 0, Payload::Custom(7));
        let transport = self.communicator.transport();
        match fault {
            Fault::Panic | Fault::TwoPanics => resume_unwind(Box::new("staged")),
            Fault::PanicWithRequest => {
                let _open = transport.isend(peer, tag, HostBuffer::F32(vec![0.0]))?;
                resume_unwind(Box::new("staged"))
            }
            Fault::Departure => return Ok(false),
            Fault::Abort | Fault::TwoAborts => self.communicator.abort("staged"),
            Fault::DroppedSend => drop(transport.isend(peer, tag, HostBuffer::F32(vec![0.0]))?),
            Fault::DroppedReceive => drop(transport.irecv(peer, tag, expected(DType::F32, 1))?),
            Fault::Slow => self.somebody_failed.wait(),
            _ => {}
        }
        Ok(true)
    }

    /// A shift by one in which the culprit's message is not what its receiver expects.
    fn shift_wrongly(&self) -> Outcome {
        let (mut dtype, mut len, mut step) = (DType::F16, 3, 0);
        if self.is_culprit() {
            match self.scenario.fault {
                Fault::WrongSize => len = 4,
                Fault::WrongDType => dtype = DType::BF16,
                _ => step = 1,
            }
        }
        let operation = self.communicator.next_operation();
        let tag = |step| Tag::new(operation, step, Payload::KeyValue);
        self.exchange(
            1,
            HostBuffer::zeros(dtype, len),
            tag(step),
            expected(DType::F16, 3),
            tag(0),
        )
        .map(drop)
    }

    fn take(&self, step: &Step) -> Outcome {
        let world_size = self.scenario.world_size;
        match *step {
            Step::Shift {
                distance,
                len,
                dtype,
            } => self.shift(1 + distance % (world_size - 1).max(1), len, dtype),
            Step::Barrier => barrier(&self.communicator),
            Step::Sum(len) => {
                let sum = all_reduce_sum(&self.communicator, vec![self.rank() as f32; len])?;
                let expected = (world_size * (world_size - 1) / 2) as f32;
                assert_eq!(sum, vec![expected; len]);
                Ok(())
            }
            Step::SumOfF64(len) => {
                let sum = all_reduce_sum_f64(&self.communicator, &vec![1.0; len])?;
                assert_eq!(sum, vec![world_size as f64; len]);
                Ok(())
            }
            Step::Agree => self.agree("right"),
            Step::Split => {
                let half = self.communicator.split(Some(self.rank() as u64 % 2), 0)?;
                barrier(&half.expect("every rank has a color"))
            }
        }
    }

    fn agree(&self, value: &str) -> Outcome {
        self.communicator
            .agree("plan", &[("value".to_owned(), value.to_owned())])
    }

    fn shift(&self, distance: usize, len: usize, dtype: DType) -> Outcome {
        let tag = Tag::new(self.communicator.next_operation(), 0, Payload::KeyValue);
        let own = telling(self.rank(), dtype, len);
        let (previous, received) = self.exchange(distance, own, tag, expected(dtype, len), tag)?;
        assert_eq!(received, telling(previous, dtype, len));
        Ok(())
    }

    /// Yields who sent, and what.
    fn exchange(
        &self,
        distance: usize,
        own: HostBuffer,
        outgoing: Tag,
        expected: Expected,
        incoming: Tag,
    ) -> Result<(Rank, HostBuffer), CommError> {
        let (rank, world_size) = (self.rank(), self.scenario.world_size);
        let previous = (rank + world_size - distance) % world_size;
        let next = (rank + distance) % world_size;
        let transport = self.communicator.transport();
        let receive = transport.irecv(previous, incoming, expected)?;
        let send = transport.isend(next, outgoing, own)?;
        let received = receive.wait()?;
        send.wait()?;
        Ok((previous, received))
    }
}

fn expected(dtype: DType, len: usize) -> Expected {
    Expected { dtype, len }
}

/// A buffer that tells whose it is.
fn telling(rank: Rank, dtype: DType, len: usize) -> HostBuffer {
    let value = rank as f32;
    match dtype {
        DType::F32 => HostBuffer::F32(vec![value; len]),
        DType::F16 => HostBuffer::F16(vec![half::f16::from_f32(value); len]),
        DType::BF16 => HostBuffer::BF16(vec![half::bf16::from_f32(value); len]),
    }
}

type Outcomes = Vec<Result<Option<Outcome>, RankPanic>>;

fn play(scenario: &Scenario) -> Outcomes {
    let somebody_failed = Event::default();
    Loopback::run(
        scenario.world_size,
        scenario.deadline(),
        |endpoint: LoopbackEndpoint<HostBuffer>| {
            let player = Player {
                scenario,
                communicator: Communicator::new(Arc::new(endpoint)),
                somebody_failed: &somebody_failed,
            };
            let outcome = player.play();
            if let Some(Err(_)) = outcome {
                somebody_failed.happen();
            }
            outcome
        },
    )
}

fn judge(scenario: &Scenario, outcomes: &Outcomes) {
    let errors: Vec<(Rank, &CommError)> = outcomes
        .iter()
        .enumerate()
        .filter_map(|(rank, outcome)| match outcome {
            Ok(Some(Err(error))) => Some((rank, error)),
            _ => None,
        })
        .collect();
    let panicked: BTreeSet<Rank> = panicked(outcomes);
    let departed = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Ok(None)))
        .count();
    if scenario.fault == Fault::None {
        assert!(errors.is_empty() && panicked.is_empty() && departed == 0);
        return;
    }
    assert_eq!(
        errors.len() + panicked.len() + departed,
        scenario.world_size,
        "a rank has not heard of the failure"
    );
    let Some(&(_, first)) = errors.first() else {
        assert_eq!(
            panicked,
            BTreeSet::from([scenario.culprit, scenario.accomplice])
        );
        return;
    };
    let root = first.root();
    for (rank, error) in errors {
        if scenario.fault == Fault::WrongTerms {
            // Every rank finds out by itself.
            assert_eq!(error.root().kind, root.kind);
        } else {
            assert_eq!(error.root(), root, "the ranks do not agree on the cause");
        }
        assert_eq!(error.rank, rank);
        assert_eq!(error.history().map(|history| history.rank), Some(rank));
    }
    judge_cause(scenario, root);
    judge_panics(scenario, &panicked);
}

fn panicked(outcomes: &Outcomes) -> BTreeSet<Rank> {
    let panics = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    panics
        .map(|panic| {
            assert_eq!(panic.message, "staged", "rank {}", panic.rank);
            panic.rank
        })
        .collect()
}

fn judge_panics(scenario: &Scenario, panicked: &BTreeSet<Rank>) {
    let expected: &[Rank] = match scenario.fault {
        // The second may hear of the first before it comes to its own.
        Fault::TwoPanics => &[scenario.culprit, scenario.accomplice],
        Fault::Panic | Fault::PanicWithRequest => &[scenario.culprit],
        _ => &[],
    };
    assert!(
        panicked.iter().all(|rank| expected.contains(rank)),
        "{panicked:?}"
    );
    assert_eq!(panicked.is_empty(), expected.is_empty());
}

fn judge_cause(scenario: &Scenario, root: &CommError) {
    let culprit = scenario.culprit;
    let right_kind = match (&root.kind, scenario.fault) {
        (CommErrorKind::Panicked { .. }, fault) => {
            matches!(
                fault,
                Fault::Panic | Fault::PanicWithRequest | Fault::TwoPanics
            )
        }
        (CommErrorKind::Departed, fault) => fault == Fault::Departure,
        (CommErrorKind::Aborted { .. }, fault) => {
            matches!(fault, Fault::Abort | Fault::TwoAborts)
        }
        (CommErrorKind::RequestDropped { .. }, fault) => {
            matches!(fault, Fault::DroppedSend | Fault::DroppedReceive)
        }
        (CommErrorKind::SizeMismatch { .. }, fault) => {
            matches!(fault, Fault::WrongSize | Fault::WrongDType)
        }
        (CommErrorKind::Disagreement(_), fault) => fault == Fault::WrongTerms,
        (CommErrorKind::Deadline { .. }, _) => scenario.needs_the_deadline(),
        _ => false,
    };
    assert!(right_kind, "{root:#}");
    let suspects = match scenario.fault {
        Fault::TwoAborts | Fault::TwoPanics => vec![culprit, scenario.accomplice],
        // The ranks are compared with rank 0; if that is the culprit, the next one differs from it.
        Fault::WrongTerms => vec![culprit.max(1)],
        // Sender and receiver wait for each other, and either may be the first to give up.
        Fault::WrongTag if scenario.is_last_step() => vec![culprit, scenario.after(culprit)],
        Fault::Slow if scenario.is_last_step() => vec![culprit],
        // Others wait for ranks that wait, and may be the first to give up.
        Fault::WrongTag | Fault::Slow => (0..scenario.world_size).collect(),
        _ => vec![culprit],
    };
    assert!(
        suspects.contains(&root.culprit()),
        "{suspects:?} suspected: {root:#}"
    );
}

/// Plays the scenario of a seed on a thread of its own, and gives up on it after a while.
fn run(seed: u64) {
    let scenario = Scenario::of_seed(seed);
    let (report, ended) = mpsc::channel();
    let deadline = scenario.deadline();
    let needs_the_deadline = scenario.needs_the_deadline();
    thread::spawn(move || {
        let started = Instant::now();
        let outcomes = play(&scenario);
        let elapsed = started.elapsed();
        let verdict = catch_unwind(AssertUnwindSafe(|| judge(&scenario, &outcomes)));
        // Nobody listens any more if the watchdog was faster.
        let _ = report.send((
            elapsed,
            verdict.is_ok(),
            format!("{scenario:#?}\n{outcomes:#?}"),
        ));
    });
    let Ok((elapsed, is_right, story)) = ended.recv_timeout(WATCHDOG) else {
        panic!("seed {seed} hangs: {:#?}", Scenario::of_seed(seed));
    };
    assert!(is_right, "seed {seed}: {story}");
    let limit = if needs_the_deadline {
        deadline + MARGIN
    } else {
        deadline
    };
    assert!(elapsed < limit, "seed {seed} took {elapsed:?}: {story}");
}

#[test]
fn every_fault_reaches_every_rank_in_time() {
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..CONCURRENT {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= RUNS {
                        return;
                    }
                    run(seed);
                }
            });
        }
    });
}

/// Otherwise the test above would say less than it seems to.
#[test]
fn the_seeds_have_every_fault_and_every_size() {
    let scenarios: Vec<_> = (0..RUNS).map(Scenario::of_seed).collect();
    for fault in FAULTS {
        let runs = scenarios.iter().filter(|scenario| scenario.fault == fault);
        assert!(runs.count() >= 5, "{fault:?}");
    }
    for world_size in 2..=6 {
        assert!(
            scenarios
                .iter()
                .any(|scenario| scenario.world_size == world_size)
        );
    }
    let last = |scenario: &&Scenario| scenario.needs_the_deadline() && scenario.is_last_step();
    assert!(scenarios.iter().filter(last).count() >= 3);
}
