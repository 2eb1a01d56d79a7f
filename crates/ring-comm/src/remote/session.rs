//! What the threads of one rank share while it is in a group: the state, and who waits for what.
//!
//! Calls of the rank's threads are attempts on the [`State`], repeated until they are done or the group, the peer or the
//! deadline forbids to go on. In between, the engine feeds the state with what the wire reports.

use std::{
    fmt,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::state::{Attempt, State, VERDICT_WITHIN};
use crate::{
    attempt::Subject,
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    recorder::{self, Call, FlightRecord, Progress, RecordNumber},
    transport::{Rank, Traffic},
};

/// How a call is remembered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    /// As something new, of so many bytes.
    New(Call, usize),
    /// As what a call before began.
    Request(Option<RecordNumber>),
    /// Not at all.
    None,
}

/// A rank's part in one group.
pub(super) struct Session<B> {
    rank: Rank,
    world_size: usize,
    deadline: Duration,
    inner: Mutex<Inner<B>>,
    /// For the callers: the state has changed.
    changed: Condvar,
    /// For the engine: there is something to do.
    work: Condvar,
}

pub(super) struct Inner<B> {
    pub(super) state: State<B>,
    /// Callers that wait.
    pub(super) waiting: usize,
    /// Rounds the engine has made: looked at the wire, and done on it what the state wanted.
    rounds: u64,
    /// Rounds that somebody waits for.
    awaited_rounds: u64,
    /// Endpoint and requests are gone.
    pub(super) is_closed: bool,
    /// The failure of the group has been written down, if that is asked for.
    is_reported: bool,
}

impl<B> fmt::Debug for Session<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Calls of the rank's threads.
impl<B: Buffer> Session<B> {
    pub(super) fn new(state: State<B>, deadline: Duration) -> Self {
        Self {
            rank: state.rank(),
            world_size: state.world_size(),
            deadline,
            inner: Mutex::new(Inner {
                state,
                waiting: 0,
                rounds: 0,
                awaited_rounds: 0,
                is_closed: false,
                is_reported: false,
            }),
            changed: Condvar::new(),
            work: Condvar::new(),
        }
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.lock().state.traffic()
    }

    pub(super) fn poisoned(&self) -> Option<CommError> {
        self.lock().state.cause().cloned()
    }

    pub(super) fn flight_record(&self) -> FlightRecord {
        self.lock().state.recorder().snapshot()
    }

    /// Repeats `attempt` until it is done; a failure poisons the group.
    pub(super) fn complete<T>(
        &self,
        subject: Subject,
        entry: Entry,
        attempt: impl FnMut(&mut State<B>) -> Attempt<T>,
    ) -> Result<T, CommError> {
        let expiry = Expiry::after(self.deadline);
        self.complete_until(expiry, self.lock(), subject, entry, attempt)
    }

    /// As [`complete`](Self::complete), with another deadline and without an entry in the record.
    pub(super) fn complete_within<T>(
        &self,
        deadline: Duration,
        subject: Subject,
        attempt: impl FnMut(&mut State<B>) -> Attempt<T>,
    ) -> Result<T, CommError> {
        let expiry = Expiry::after(deadline);
        self.complete_until(expiry, self.lock(), subject, Entry::None, attempt)
    }

    /// As [`complete`](Self::complete), but first looks at the wire for what peers have said before.
    pub(super) fn complete_informed<T>(
        &self,
        subject: Subject,
        entry: Entry,
        attempt: impl FnMut(&mut State<B>) -> Attempt<T>,
    ) -> Result<T, CommError> {
        let expiry = Expiry::after(self.deadline);
        let inner = self.lock();
        let inner = match self.world_size {
            1 => inner,
            _ => self.await_rounds(inner, expiry),
        };
        self.complete_until(expiry, inner, subject, entry, attempt)
    }

    fn complete_until<T>(
        &self,
        expiry: Expiry,
        mut inner: MutexGuard<'_, Inner<B>>,
        subject: Subject,
        entry: Entry,
        mut attempt: impl FnMut(&mut State<B>) -> Attempt<T>,
    ) -> Result<T, CommError> {
        let record = inner.record(subject, entry);
        inner.check(subject, record)?;
        loop {
            inner.state.set_current(record);
            let attempted = attempt(&mut inner.state);
            inner.state.set_current(None);
            if inner.state.has_outputs() {
                self.work.notify_one();
            }
            let (peer, can_depart) = match attempted {
                Attempt::Done(value) => {
                    self.changed.notify_all();
                    return Ok(value);
                }
                Attempt::Failed(kind) => return Err(self.fail(inner, subject, record, kind)),
                Attempt::Blocked(peer) => (peer, true),
                Attempt::Underway(peer) => (peer, false),
            };
            let subject = Subject {
                peer: Some(peer),
                ..subject
            };
            inner.check(subject, record)?;
            if can_depart && inner.state.has_departed(peer) {
                return Err(self.fail(inner, subject, record, CommErrorKind::Departed));
            }
            if expiry.has_passed() {
                let kind = CommErrorKind::Deadline {
                    deadline: expiry.deadline,
                    pending: inner.state.untaken(peer),
                };
                return Err(self.fail(inner, subject, record, kind));
            }
            inner = self.wait_for_change(inner, expiry);
        }
    }

    /// Poisons the group with `cause`, unless it is poisoned already; returns when the group is told.
    pub(super) fn poison(&self, cause: CommError) {
        drop(self.settle(self.lock(), cause));
    }

    /// This rank wants nothing more of the group.
    pub(super) fn depart(&self) {
        self.lock().state.depart();
        self.work.notify_one();
    }

    /// Neither the endpoint nor a request is left.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.work.notify_one();
    }

    fn fail(
        &self,
        mut inner: MutexGuard<'_, Inner<B>>,
        subject: Subject,
        record: Option<RecordNumber>,
        kind: CommErrorKind,
    ) -> CommError {
        let history = inner.failed(record);
        let own = subject.error(kind).with_history(history.clone());
        match self.settle(inner, own.clone()).state.cause() {
            Some(cause) => subject.poisoned_by(cause).with_history(history),
            None => own,
        }
    }

    /// A request is dropped before it was finished.
    pub(super) fn drop_request(&self, record: Option<RecordNumber>) {
        if let Some(number) = record {
            self.lock()
                .state
                .recorder()
                .advance(number, Progress::Dropped);
        }
    }

    /// Waits until the ranks have settled on this or another cause and this rank has told the others what it had to.
    fn settle<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner<B>>,
        cause: CommError,
    ) -> MutexGuard<'a, Inner<B>> {
        if inner.state.cause().is_some() {
            return inner;
        }
        inner.state.poison(cause, Instant::now());
        // The engine decides after two thirds of this if nobody answers; the rest is for a machine that is busy.
        let expiry = Expiry::after(3 * VERDICT_WITHIN);
        self.work.notify_one();
        while inner.state.cause().is_none() && !expiry.has_passed() {
            inner = self.wait_for_change(inner, expiry);
        }
        let inner = self.await_rounds(inner, expiry);
        self.changed.notify_all();
        inner
    }

    /// Waits for a whole round of the engine that begins after now.
    fn await_rounds<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner<B>>,
        expiry: Expiry,
    ) -> MutexGuard<'a, Inner<B>> {
        let awaited = inner.rounds + 2;
        inner.awaited_rounds = inner.awaited_rounds.max(awaited);
        self.work.notify_one();
        while inner.rounds < awaited && !expiry.has_passed() {
            inner = self.wait_for_change(inner, expiry);
        }
        inner
    }

    fn wait_for_change<'a>(
        &self,
        mut inner: MutexGuard<'a, Inner<B>>,
        expiry: Expiry,
    ) -> MutexGuard<'a, Inner<B>> {
        inner.waiting += 1;
        let mut inner = match expiry.at {
            None => self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner),
            Some(expiry) => {
                let remaining = expiry.saturating_duration_since(Instant::now());
                let woken = self.changed.wait_timeout(inner, remaining);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        inner.waiting -= 1;
        inner
    }

    /// The state is sound after a panic too, because no change to it is left half done; so lock poisoning is ignored.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner<B>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls of the engine.
impl<B: Buffer> Session<B> {
    /// Wakes the callers: the state has changed.
    pub(super) fn tell_change(&self) {
        self.changed.notify_all();
    }

    /// A round of the engine is over.
    pub(super) fn end_round<'a>(&'a self) -> MutexGuard<'a, Inner<B>> {
        let mut inner = self.lock();
        inner.report();
        inner.rounds += 1;
        if inner.rounds <= inner.awaited_rounds {
            self.changed.notify_all();
        }
        inner
    }

    /// Sleeps until a caller has work, at most for `longest`.
    pub(super) fn await_work(&self, inner: MutexGuard<'_, Inner<B>>, longest: Duration) {
        let woken = self.work.wait_timeout(inner, longest);
        drop(woken.unwrap_or_else(PoisonError::into_inner));
    }
}

impl<B: Buffer> Inner<B> {
    /// Whether the engine must not rest.
    pub(super) fn has_work(&self) -> bool {
        self.state.has_outputs() || self.rounds < self.awaited_rounds
    }

    fn check(&mut self, subject: Subject, record: Option<RecordNumber>) -> Result<(), CommError> {
        match self.state.cause().map(|cause| subject.poisoned_by(cause)) {
            Some(error) => Err(error.with_history(self.failed(record))),
            None => Ok(()),
        }
    }

    /// The number under which a call is recorded.
    fn record(&mut self, subject: Subject, entry: Entry) -> Option<RecordNumber> {
        match entry {
            Entry::New(call, bytes) => {
                let recorder = self.state.recorder();
                Some(recorder.begin(call, subject.peer, subject.tag, bytes))
            }
            Entry::Request(record) => record,
            Entry::None => None,
        }
    }

    /// What the rank remembers when a call has failed.
    fn failed(&mut self, record: Option<RecordNumber>) -> FlightRecord {
        let recorder = self.state.recorder();
        if let Some(number) = record {
            recorder.advance(number, Progress::Failed);
        }
        recorder.snapshot()
    }

    /// Writes down what the rank remembers when its group has failed, once, if the environment asks for it.
    fn report(&mut self) {
        if self.is_reported || recorder::path_asked_for().is_none() {
            return;
        }
        if let Some(cause) = self.state.cause().cloned() {
            self.is_reported = true;
            self.state.recorder().snapshot().report(&cause);
        }
    }
}

/// When a deadline passes.
#[derive(Clone, Copy)]
struct Expiry {
    deadline: Duration,
    /// A deadline too far away for the clock is none.
    at: Option<Instant>,
}

impl Expiry {
    fn after(deadline: Duration) -> Self {
        let at = Instant::now().checked_add(deadline);
        Self { deadline, at }
    }

    fn has_passed(self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}
