//! Random programs of random groups over loopback, each with a random fault: no rank hangs, all see the same cause, and it
//! names the culprit.
//!
//! Every run follows from its seed, which a failure tells.

mod scenarios;

use std::{
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use ring_comm::{Loopback, LoopbackEndpoint, RankPanic, buffer::HostBuffer};
use scenarios::{Ending, FAULTS, Player, Scenario, judge};

const RUNS: u64 = 200;
const WORLD_SIZES: RangeInclusive<usize> = 2..=6;
/// Runs at the same time: most of those with a deadline only wait for it.
const CONCURRENT: usize = 12;
/// How long after the deadline a rank may end on a busy machine.
const MARGIN: Duration = Duration::from_secs(20);
/// When a run hangs.
const WATCHDOG: Duration = Duration::from_secs(100);

fn play(scenario: &Scenario) -> Vec<Ending> {
    let results = Loopback::run(
        scenario.world_size,
        scenario.deadline(),
        |endpoint: LoopbackEndpoint<HostBuffer>| Player::new(scenario, endpoint).play(),
    );
    let ending = |RankPanic { message, .. }| Ending::Panicked(message);
    let endings = results.into_iter();
    endings
        .map(|result| result.unwrap_or_else(ending))
        .collect()
}

/// Plays the scenario of a seed on a thread of its own, and gives up on it after a while.
fn run(seed: u64) {
    let scenario = Scenario::of_seed(seed, WORLD_SIZES);
    let (report, ended) = mpsc::channel();
    let deadline = scenario.deadline();
    let needs_the_deadline = scenario.needs_the_deadline();
    thread::spawn(move || {
        let started = Instant::now();
        let endings = play(&scenario);
        let elapsed = started.elapsed();
        let verdict = catch_unwind(AssertUnwindSafe(|| judge(&scenario, &endings)));
        // Nobody listens any more if the watchdog was faster.
        let _ = report.send((
            elapsed,
            verdict.is_ok(),
            format!("{scenario:#?}\n{endings:#?}"),
        ));
    });
    let Ok((elapsed, is_right, story)) = ended.recv_timeout(WATCHDOG) else {
        let scenario = Scenario::of_seed(seed, WORLD_SIZES);
        panic!("seed {seed} hangs: {scenario:#?}");
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
    let of_seed = |seed| Scenario::of_seed(seed, WORLD_SIZES);
    let scenarios: Vec<_> = (0..RUNS).map(of_seed).collect();
    for fault in FAULTS {
        let runs = scenarios.iter().filter(|scenario| scenario.fault == fault);
        assert!(runs.count() >= 5, "{fault:?}");
    }
    for world_size in WORLD_SIZES {
        let has_size = |scenario: &Scenario| scenario.world_size == world_size;
        assert!(scenarios.iter().any(has_size));
    }
    let last = |scenario: &&Scenario| scenario.needs_the_deadline() && scenario.is_last_step();
    assert!(scenarios.iter().filter(last).count() >= 3);
}
