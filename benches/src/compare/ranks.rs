//! The drivers over loopback ranks that wait, each on a thread of its own, for the next run.

use std::{
    hint::black_box,
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use ring_comm::{Loopback, LoopbackEndpoint, buffer::HostBuffer};
use ring_core::AttentionSpec;

use crate::{compare::CompareError, work::Work, workload::Rank};

/// Longest wait of a rank for another.
const DEADLINE: Duration = Duration::from_secs(600);

/// Ranks with random tensors; their threads, tensors and plans are made before the first run.
pub struct LoopbackRanks(Vec<WaitingRank>);

struct WaitingRank {
    /// Dropped to end the thread.
    start: Option<Sender<()>>,
    done: Receiver<Result<(), ring_core::Error>>,
    thread: Option<JoinHandle<()>>,
}

impl LoopbackRanks {
    /// `ranks` of them, each with `threads` kernel threads.
    ///
    /// # Errors
    /// [`CompareError::Spec`] for a work that is not possible.
    pub fn new(work: &Work, ranks: usize, threads: usize) -> Result<Self, CompareError> {
        let spec = work.spec(ranks)?;
        let waiting: Vec<WaitingRank> = Loopback::group(ranks, DEADLINE)
            .into_iter()
            .map(|endpoint| WaitingRank::new(spec.clone(), endpoint, threads, work.backward))
            .collect();
        let group = Self(waiting);
        group.wait()?;
        Ok(group)
    }

    /// One run of all ranks, in seconds, from the word to start until the last is done.
    ///
    /// # Errors
    /// [`CompareError::Attention`] or [`CompareError::RankEnded`].
    pub fn run(&self) -> Result<f64, CompareError> {
        let start = Instant::now();
        for (rank, waiting) in self.0.iter().enumerate() {
            let start = waiting.start.as_ref();
            start
                .and_then(|start| start.send(()).ok())
                .ok_or(CompareError::RankEnded(rank))?;
        }
        self.wait()?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn wait(&self) -> Result<(), CompareError> {
        for (rank, waiting) in self.0.iter().enumerate() {
            let done = waiting.done.recv();
            done.map_err(|_| CompareError::RankEnded(rank))??;
        }
        Ok(())
    }
}

impl WaitingRank {
    /// Reports once when it is ready, and then after each run.
    fn new(
        spec: AttentionSpec,
        endpoint: LoopbackEndpoint<HostBuffer>,
        threads: usize,
        backward: bool,
    ) -> Self {
        let (start, started) = channel();
        let (report, done) = channel();
        let thread = thread::spawn(move || {
            let rank = Rank::new(&spec, endpoint, threads);
            let mut sent = report.send(Ok(()));
            while sent.is_ok() && started.recv().is_ok() {
                sent = report.send(pass(&rank, backward));
            }
        });
        Self {
            start: Some(start),
            done,
            thread: Some(thread),
        }
    }
}

impl Drop for WaitingRank {
    fn drop(&mut self) {
        self.start = None;
        if let Some(thread) = self.thread.take() {
            // A rank that panicked has said so, and the run has failed.
            let _ = thread.join();
        }
    }
}

fn pass(rank: &Rank, backward: bool) -> Result<(), ring_core::Error> {
    let result = rank.forward()?;
    if backward {
        black_box(rank.backward(&result)?);
    }
    black_box(result);
    Ok(())
}
