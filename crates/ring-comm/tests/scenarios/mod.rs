//! Random programs of random groups, each with a random fault: drawn from a seed, played by every rank, and judged by what all of
//! them came to. Transports are tested with these in `random_faults.rs` (ranks are threads) and in `mpi` (processes).

mod player;
mod verdict;

use std::{ops::RangeInclusive, time::Duration};

pub(crate) use player::{Ending, Player};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use ring_comm::{Rank, buffer::DType};
pub(crate) use verdict::judge;

/// For faults that nobody has to wait for.
const PATIENT: Duration = Duration::from_secs(60);
/// For faults that only the deadline finds. Long, because nothing else in the run may take as long on a busy machine.
const IMPATIENT: Duration = Duration::from_secs(1);

/// What all ranks do together.
#[derive(Clone, Debug)]
pub(crate) enum Step {
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
pub(crate) enum Fault {
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

pub(crate) const FAULTS: [Fault; 14] = [
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
pub(crate) struct Scenario {
    pub(crate) world_size: usize,
    /// The last step is a barrier, so that no rank can miss a failure.
    pub(crate) program: Vec<Step>,
    pub(crate) fault: Fault,
    pub(crate) culprit: Rank,
    /// The second rank that fails, if two do.
    pub(crate) accomplice: Rank,
    /// Before which step.
    pub(crate) at: usize,
}

impl Scenario {
    /// The scenario of a seed, for a group of one of these sizes.
    pub(crate) fn of_seed(seed: u64, world_sizes: RangeInclusive<usize>) -> Self {
        draw(scenario(world_sizes), seed)
    }

    /// The longest time a wait may take.
    pub(crate) fn deadline(&self) -> Duration {
        if self.needs_the_deadline() {
            IMPATIENT
        } else {
            PATIENT
        }
    }

    /// Whether nothing else ends the waits.
    pub(crate) fn needs_the_deadline(&self) -> bool {
        matches!(self.fault, Fault::WrongTag | Fault::Slow)
    }

    pub(crate) fn is_last_step(&self) -> bool {
        self.at + 1 == self.program.len()
    }

    fn after(&self, rank: Rank) -> Rank {
        (rank + 1) % self.world_size
    }
}

/// What the strategy makes of a seed.
pub(crate) fn draw<S: Strategy>(strategy: S, seed: u64) -> S::Value {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let tree = strategy.new_tree(&mut runner);
    tree.expect("the strategy rejects nothing").current()
}

/// Scenarios for groups of these sizes.
pub(crate) fn scenario(world_sizes: RangeInclusive<usize>) -> impl Strategy<Value = Scenario> {
    // A few elements, or so many that a network does not take them all at once.
    let len = prop_oneof![4 => 0..9usize, 1 => 3_000..60_000usize];
    let dtype = prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]);
    let step = prop_oneof![
        4 => (1..6usize, len.clone(), dtype)
            .prop_map(|(distance, len, dtype)| Step::Shift { distance, len, dtype }),
        1 => Just(Step::Barrier),
        2 => len.prop_map(Step::Sum),
        1 => (0..4usize).prop_map(Step::SumOfF64),
        1 => Just(Step::Agree),
        1 => Just(Step::Split),
    ];
    let program = prop::collection::vec(step, 0..8);
    let fault = prop::sample::select(FAULTS.to_vec());
    (
        world_sizes,
        program,
        fault,
        any::<[prop::sample::Index; 3]>(),
    )
        .prop_map(
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
