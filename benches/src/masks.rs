//! Windows, packed documents and scores: what they save and cost, in time, bytes and balance of work.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ring_comm::{Communicator, collective::barrier};
use ring_core::{AttentionSpec, CommunicationEstimate, Documents, Pattern, Plan, Shape, Sharding};

use crate::{
    machine,
    workload::{Rank, on_all_ranks},
};

/// Heads of all measurements: 2 of 64, f32.
pub const SHAPE: Shape = Shape {
    batch: 1,
    query_heads: 2,
    kv_heads: 2,
    head_dim: 64,
};

/// What is measured, by name.
pub struct Case {
    /// What it is.
    pub name: String,
    /// The computation.
    pub spec: AttentionSpec,
}

impl Case {
    /// A pattern over `length` positions.
    ///
    /// # Panics
    /// If it is not possible.
    pub fn new(
        name: &str,
        pattern: Pattern,
        length: usize,
        sharding: Sharding,
        ranks: usize,
    ) -> Self {
        let spec = AttentionSpec::new(pattern, SHAPE, length)
            .and_then(|spec| spec.sharded(sharding, ranks))
            .expect("a sound computation");
        Self {
            name: name.to_string(),
            spec,
        }
    }

    /// The same with documents packed into the sequence.
    ///
    /// # Panics
    /// If their lengths do not add up.
    #[must_use]
    pub fn with_documents(self, lengths: Vec<usize>) -> Self {
        let documents = Documents::new(lengths);
        Self {
            spec: self
                .spec
                .with_documents(documents)
                .expect("documents fill the sequence"),
            ..self
        }
    }

    /// Work of the slowest rank over the mean, from the plans.
    pub fn planned_imbalance(&self) -> f64 {
        imbalance(
            &self
                .plans()
                .iter()
                .map(|plan| plan.pairs() as f64)
                .collect::<Vec<_>>(),
        )
    }

    /// Admitted pairs of all ranks.
    pub fn pairs(&self) -> u128 {
        self.plans().iter().map(Plan::pairs).sum()
    }

    /// What the rank that receives most receives.
    pub fn received(&self) -> Received {
        let estimates = self
            .plans()
            .iter()
            .map(CommunicationEstimate::new)
            .collect::<Vec<_>>();
        let most =
            |of: fn(&CommunicationEstimate) -> u64| estimates.iter().map(of).max().unwrap_or(0);
        Received {
            forward: most(|estimate| estimate.forward_received),
            backward: most(|estimate| estimate.backward_received),
            hops: most(|estimate| estimate.hops as u64),
        }
    }

    fn plans(&self) -> Vec<Plan> {
        (0..self.spec.world_size)
            .map(|rank| Plan::new(&self.spec, rank).expect("a sound computation"))
            .collect()
    }
}

/// Most that any rank receives in a pass.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes of a forward pass.
    pub forward: u64,
    /// Bytes of a backward pass.
    pub backward: u64,
    /// Hops of either.
    pub hops: u64,
}

/// Times of a repetition.
#[derive(Clone, Debug)]
pub struct Times {
    /// Seconds until the last rank was done.
    pub forward: f64,
    /// Seconds until the last rank was done.
    pub backward: f64,
    /// Processor seconds of each rank, of both passes.
    pub of_ranks: Vec<f64>,
}

/// The slowest over the mean.
pub fn imbalance(times: &[f64]) -> f64 {
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    times.iter().copied().fold(0.0, f64::max) / mean
}

/// Runs every case `repetitions` times, the cases in turns, after one run of each that is not counted. Every rank has one thread.
///
/// # Panics
/// If a rank fails.
pub fn measure(cases: &[Case], repetitions: usize) -> Vec<Vec<Times>> {
    let mut all = vec![Vec::new(); cases.len()];
    for repetition in 0..=repetitions {
        for (case, times) in cases.iter().zip(&mut all) {
            let measured = run(&case.spec);
            if repetition > 0 {
                times.push(measured);
            }
        }
    }
    all
}

/// One forward and one backward pass.
fn run(spec: &AttentionSpec) -> Times {
    let of_ranks = on_all_ranks(spec.world_size, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = Rank::of(spec, communicator.clone(), 1);
        let timed = |work: &mut dyn FnMut()| {
            barrier(&communicator).expect("all ranks are there");
            let (start, on_processor) = (Instant::now(), thread_time());
            work();
            let on_processor = thread_time() - on_processor;
            barrier(&communicator).expect("all ranks are there");
            Pass {
                elapsed: start.elapsed(),
                on_processor,
            }
        };
        let mut output = None;
        let forward =
            timed(&mut || output = Some(rank.forward().expect("the forward pass succeeds")));
        let output = output.expect("it was computed");
        let backward =
            timed(&mut || drop(rank.backward(&output).expect("the backward pass succeeds")));
        [forward, backward]
    });
    let longest = |pass: usize| {
        let times = of_ranks.iter().map(|passes| passes[pass].elapsed);
        times.max().unwrap_or_default().as_secs_f64()
    };
    let on_processor = |passes: &[Pass; 2]| passes.iter().map(|pass| pass.on_processor).sum();
    Times {
        forward: longest(0),
        backward: longest(1),
        of_ranks: of_ranks
            .iter()
            .map(on_processor)
            .map(|time: Duration| time.as_secs_f64())
            .collect(),
    }
}

/// What a pass took on a rank.
struct Pass {
    /// Until all ranks were done.
    elapsed: Duration,
    /// For which its thread was on a processor.
    on_processor: Duration,
}

fn thread_time() -> Duration {
    machine::thread_time().expect("the system tells how long a thread was on a processor")
}
