//! What every backend must do, as a suite of cases written once and run over each.
//!
//! A backend's tests implement [`Backend`] and call [`run_all`]. In a case, every rank runs the same body and asserts by
//! itself what it sees, so that ranks may as well be processes; the few cases that need ranks with common memory
//! ([`Staging::CommonMemory`]) are left out there. No case sleeps: what must happen in an order is ordered by messages or by
//! barriers, and only the cases about the deadline wait for it.

mod collectives;
mod exchange;
mod faults;
mod groups;
mod history;
mod hosted;
mod misuse;

pub use hosted::Hosted;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    buffer::{DType, HostBuffer},
    error::{CommError, CommErrorKind},
    loopback::{Loopback, LoopbackEndpoint, RankPanic},
    transport::{Expected, Payload, Rank, Tag, Transport},
};

/// What one rank does in a case.
pub type RankBody<'a> = dyn Fn(Arc<dyn Transport<HostBuffer>>) + Sync + 'a;

/// Makes groups of ranks for the suite.
pub trait Backend {
    /// Runs `body` on every rank of a new group and returns the panics of the ranks that ran in this process.
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic>;

    /// The largest group it can make; larger ones are not asked for.
    fn max_world_size(&self) -> usize;

    /// What the ranks of its groups have in common.
    fn staging(&self) -> Staging;
}

impl Backend for Loopback {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        let results = Loopback::run(
            world_size,
            deadline,
            |endpoint: LoopbackEndpoint<HostBuffer>| {
                body(Arc::new(endpoint));
            },
        );
        results.into_iter().filter_map(Result::err).collect()
    }

    fn max_world_size(&self) -> usize {
        usize::MAX
    }

    fn staging(&self) -> Staging {
        Staging::CommonMemory
    }
}

/// What the ranks have in common beside the transport: what a case needs, and what a backend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Staging {
    /// Nothing.
    Messages,
    /// The memory of one process: a rank can panic or leave alone, and ranks can meet outside the transport.
    CommonMemory,
}

/// One promise of a backend, tested for some sizes of group.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The promise.
    pub name: &'static str,
    /// Sizes of the groups it is tested with.
    pub world_sizes: &'static [usize],
    /// What its ranks must have in common.
    pub needs: Staging,
    body: fn(&Stage<'_>),
}

impl Case {
    /// Tests the promise with every size of group that the backend can make.
    ///
    /// # Panics
    /// If the promise is broken.
    pub fn run(&self, backend: &dyn Backend) {
        if self.needs > backend.staging() {
            return;
        }
        let possible = |&&world_size: &&usize| world_size <= backend.max_world_size();
        for &world_size in self.world_sizes.iter().filter(possible) {
            (self.body)(&Stage {
                backend,
                world_size,
            });
        }
    }

    const fn messages(
        name: &'static str,
        world_sizes: &'static [usize],
        body: fn(&Stage<'_>),
    ) -> Self {
        Self {
            name,
            world_sizes,
            needs: Staging::Messages,
            body,
        }
    }

    const fn common_memory(
        name: &'static str,
        world_sizes: &'static [usize],
        body: fn(&Stage<'_>),
    ) -> Self {
        Self {
            name,
            world_sizes,
            needs: Staging::CommonMemory,
            body,
        }
    }
}

/// Every case of the suite.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    [
        exchange::CASES,
        collectives::CASES,
        groups::CASES,
        misuse::CASES,
        faults::CASES,
        history::CASES,
    ]
    .into_iter()
    .flatten()
}

/// Runs every case, also after one has failed.
///
/// # Panics
/// If a case fails, with the names of all that did.
pub fn run_all(backend: &dyn Backend) {
    let fails = |case: &&Case| catch_unwind(AssertUnwindSafe(|| case.run(backend))).is_err();
    let failed: Vec<_> = cases().filter(fails).map(|case| case.name).collect();
    assert!(
        failed.is_empty(),
        "the backend breaks {} promises: {failed:#?}",
        failed.len()
    );
}

/// Longer than anything takes on a busy machine: for the cases in which no deadline may pass.
const PATIENT: Duration = Duration::from_secs(60);
/// For the cases in which the deadline passes.
const IMPATIENT: Duration = Duration::from_millis(50);
/// How long after the deadline a rank may end on a busy machine.
const MARGIN: Duration = Duration::from_secs(20);

type Endpoint = Arc<dyn Transport<HostBuffer>>;

/// Where a case plays.
struct Stage<'a> {
    backend: &'a dyn Backend,
    world_size: usize,
}

impl Stage<'_> {
    /// All ranks end without a panic, before any deadline.
    fn run(&self, body: impl Fn(Endpoint) + Sync) {
        let start = Instant::now();
        let panics = self.backend.run(self.world_size, PATIENT, &body);
        assert_eq!(panics, []);
        assert!(
            start.elapsed() < PATIENT,
            "somebody waited for the deadline"
        );
    }

    /// All ranks end without a panic, with a deadline short enough to wait for.
    fn run_impatiently(&self, body: impl Fn(Endpoint) + Sync) {
        let start = Instant::now();
        let panics = self.backend.run(self.world_size, IMPATIENT, &body);
        assert_eq!(panics, []);
        assert!(
            start.elapsed() < IMPATIENT + MARGIN,
            "somebody waited beyond the deadline"
        );
    }

    /// One rank panics, on purpose; the others end without, before any deadline.
    fn run_with_panic_of(&self, culprit: Rank, body: impl Fn(Endpoint) + Sync) {
        let start = Instant::now();
        let panics = self.backend.run(self.world_size, PATIENT, &body);
        let ranks: Vec<_> = panics.iter().map(|panic| panic.rank).collect();
        assert_eq!(ranks, [culprit], "{panics:#?}");
        assert!(
            start.elapsed() < PATIENT,
            "somebody waited for the deadline"
        );
    }
}

fn tag(step: u32) -> Tag {
    Tag::new(0, step, Payload::KeyValue)
}

fn f32s(len: usize) -> Expected {
    Expected {
        dtype: DType::F32,
        len,
    }
}

/// A buffer that tells one number.
fn telling(number: usize) -> HostBuffer {
    HostBuffer::F32(vec![number as f32])
}

fn send(endpoint: &Endpoint, peer: Rank, step: u32, number: usize) -> Result<(), CommError> {
    endpoint.isend(peer, tag(step), telling(number))?.wait()?;
    Ok(())
}

fn receive(endpoint: &Endpoint, peer: Rank, step: u32) -> Result<HostBuffer, CommError> {
    endpoint.irecv(peer, tag(step), f32s(1))?.wait()
}

/// Operation numbers for all-gathers that only order what ranks do, apart from those that a case is about.
fn meet(endpoint: &Endpoint, number: u64) -> Result<(), CommError> {
    const FIRST: u64 = 1 << 32;
    endpoint.all_gather_bytes(FIRST + number, Vec::new())?;
    Ok(())
}

/// `error` is, or passes on, a failure of `kind` at `culprit`; and so does every later call, of any kind.
fn assert_poisoned(endpoint: &Endpoint, error: &CommError, culprit: Rank, kind: &CommErrorKind) {
    assert_eq!(&error.root().kind, kind, "{error}");
    assert_stays_poisoned(endpoint, error, culprit);
}

/// The group's failure is that of `error`, at `culprit`, for every later call.
fn assert_stays_poisoned(endpoint: &Endpoint, error: &CommError, culprit: Rank) {
    let cause = error.root();
    assert_eq!(error.culprit(), culprit, "{error}");
    assert_eq!(endpoint.poisoned().as_ref(), Some(cause));

    let peer = (endpoint.rank() + 1) % endpoint.world_size();
    let later = [
        endpoint
            .isend(peer, tag(1000), telling(0))
            .map(drop_request)
            .unwrap_err(),
        endpoint
            .irecv(peer, tag(1000), f32s(1))
            .map(drop_request)
            .unwrap_err(),
        endpoint.all_gather_bytes(1000, Vec::new()).unwrap_err(),
    ];
    for error in later {
        assert_eq!(error.rank, endpoint.rank());
        if cause.rank == endpoint.rank() {
            assert_eq!(&error, cause, "the rank that failed repeats its own error");
        } else {
            assert_eq!(error.kind, CommErrorKind::Poisoned(Box::new(cause.clone())));
        }
    }
}

/// In a poisoned group this changes nothing.
fn drop_request<R>(request: R) {
    drop(request);
}
