//! The side of every rank: a thread that reads answers, one that writes requests, and callers that wait between them.

use std::{
    collections::HashMap,
    fmt,
    net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    MAX_STORED_BYTES, Membership,
    connection::{self, Timed, after},
    error::{Failure, FailureKind, StoreError},
    handshake::{self, JoinError},
    hub::shortened,
    wire::{Answer, FrameError, MAX_FRAME, Question, Refusal, Request, read_frame, write_queue},
};
use crate::transport::Rank;

/// Requests that may wait to be sent.
const MAX_QUEUED_REQUESTS: usize = 256;

/// Pauses between attempts to connect, the first and the longest.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(250)];

/// How long a caller whose deadline has passed waits to hear who was missing.
const FORGET_GRACE: Duration = Duration::from_millis(500);

/// How long an abort waits to hear that rank 0 knows of it.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// How long a rank that leaves waits for what it has sent to be taken.
const LEAVING_GRACE: Duration = Duration::from_secs(2);

type Callback = Box<dyn FnOnce(&Failure) + Send>;

#[derive(Default)]
struct State {
    next_number: u64,
    /// Requests that wait, and their answers.
    pending: HashMap<u64, Option<Answer>>,
    failure: Option<Failure>,
    /// Rank 0 knows of the failure.
    confirmed: bool,
    /// Rank 0 has left in peace.
    closed: bool,
    /// This rank is leaving in peace.
    leaving: bool,
    /// Nothing is read any more.
    ended: bool,
    callbacks: Vec<Callback>,
}

/// What the threads of a client share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// One rank's connection to rank 0.
pub(super) struct Client {
    rank: Rank,
    world_size: usize,
    address: SocketAddr,
    shared: Arc<Shared>,
    stream: Arc<TcpStream>,
    queue: Option<SyncSender<Request>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Joins the store at `address`, trying until it is there or the deadline has passed.
    pub(super) fn connect(
        address: &str,
        membership: &Membership,
        deadline: Duration,
    ) -> Result<Self, StoreError> {
        let until = after(deadline);
        let [mut pause, longest] = RETRY_PAUSES;
        loop {
            let last = match attempt(address, membership, until) {
                Ok((stream, address)) => return Self::start(stream, address, membership),
                Err(JoinError::Final(error)) => return Err(error),
                Err(JoinError::Retry(reason)) => reason,
            };
            if Instant::now() + pause >= until {
                return Err(StoreError::Unreachable {
                    rank: membership.rank,
                    address: address.to_owned(),
                    deadline,
                    last,
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
    }

    fn start(
        stream: TcpStream,
        address: SocketAddr,
        membership: &Membership,
    ) -> Result<Self, StoreError> {
        let (queue, requests) = sync_channel(MAX_QUEUED_REQUESTS);
        let mut client = Self {
            rank: membership.rank,
            world_size: membership.world_size,
            address,
            shared: Arc::default(),
            stream: Arc::new(stream),
            queue: Some(queue),
            threads: Vec::new(),
        };
        let stream = Arc::clone(&client.stream);
        client.spawn("ring-store-ask", move || write_queue(&stream, requests))?;
        let (stream, shared) = (Arc::clone(&client.stream), Arc::clone(&client.shared));
        client.spawn("ring-store-hear", move || {
            let ending = Ending(&shared);
            let error = shared.hear(&stream);
            shared.hear_no_more(&error);
            // Rank 0 waits for this at its end. Fails only if the connection has ended already.
            let _ = stream.shutdown(Shutdown::Both);
            drop(ending);
        })?;
        Ok(client)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), StoreError> {
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|error| {
                self.shared.lock().ended = true;
                StoreError::System {
                    what: "a thread",
                    reason: error.to_string(),
                }
            })?;
        self.threads.push(thread);
        Ok(())
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    pub(super) fn peer_address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn local_address(&self) -> Result<SocketAddr, StoreError> {
        self.stream
            .local_addr()
            .map_err(|error| StoreError::System {
                what: "the address of a connection",
                reason: error.to_string(),
            })
    }

    /// Asks rank 0 and waits for its answer.
    pub(super) fn ask(&self, question: Question, deadline: Duration) -> Result<Answer, StoreError> {
        let until = after(deadline);
        let (verb, key) = question.about();
        let what = format!("{verb} {key:?}");
        let key = key.to_owned();
        let number = self.shared.enter()?;
        let request = Request::Ask { number, question };
        let answer = match self.send(request) {
            true => self.shared.answer(number, until),
            false => Err(StoreError::Busy { rank: self.rank }),
        };
        let answer = match answer {
            // The answer may still come; if not, it is said who was missing.
            Ok(None) if self.send(Request::Forget { number }) => {
                self.shared.answer(number, Instant::now() + FORGET_GRACE)
            }
            answer => answer,
        };
        self.shared.lock().pending.remove(&number);
        let missing = match answer? {
            Some(Answer::Refused { refusal, .. }) => return Err(self.refused(refusal, key)),
            Some(Answer::Forgotten { missing, .. }) => missing,
            Some(answer) => return Ok(answer),
            None => Vec::new(),
        };
        Err(StoreError::Deadline {
            rank: self.rank,
            what,
            deadline,
            missing,
        })
    }

    fn refused(&self, refusal: Refusal, key: String) -> StoreError {
        match refusal {
            Refusal::Full => StoreError::Full {
                limit: MAX_STORED_BYTES,
            },
            Refusal::GatheringAlready => StoreError::GatheringAlready {
                rank: self.rank,
                name: key,
            },
            // Checked before it is sent.
            Refusal::TooLong => StoreError::UnexpectedAnswer,
        }
    }

    /// Puts a request into the queue; whether there was room.
    fn send(&self, request: Request) -> bool {
        self.queue
            .as_ref()
            .is_some_and(|queue| queue.try_send(request).is_ok())
    }

    pub(super) fn abort(&self, reason: &str) {
        let reason = shortened(reason);
        let failure = Failure {
            rank: self.rank,
            kind: FailureKind::Aborted(reason.clone()),
        };
        if !self.shared.fail(failure, false) || !self.send(Request::Abort { reason }) {
            return;
        }
        if !self.on_own_thread() {
            let confirmed = |state: &State| state.confirmed || state.ended;
            drop(self.shared.wait(ABORT_GRACE, confirmed));
        }
    }

    pub(super) fn failure(&self) -> Option<Failure> {
        self.shared.lock().failure.clone()
    }

    pub(super) fn wait_for_failure(&self, timeout: Duration) -> Option<Failure> {
        self.shared
            .wait(timeout, |state| state.failure.is_some() || state.closed)
            .failure
            .clone()
    }

    pub(super) fn on_failure(&self, callback: Callback) {
        let mut state = self.shared.lock();
        match state.failure.clone() {
            None => state.callbacks.push(callback),
            Some(failure) => {
                drop(state);
                callback(&failure);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Breaks the connection without a goodbye.
    #[cfg(test)]
    pub(super) fn cut(&self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }

    /// Whether a callback is calling.
    fn on_own_thread(&self) -> bool {
        let current = thread::current().id();
        self.threads
            .iter()
            .any(|thread| thread.thread().id() == current)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort("it panicked");
        }
        self.shared.lock().leaving = true;
        self.send(Request::Goodbye);
        // The thread that writes ends when the queue is sent.
        self.queue = None;
        if !self.on_own_thread() {
            drop(self.shared.wait(LEAVING_GRACE, |state| state.ended));
        }
        // Fails only if the connection has ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
        let current = thread::current().id();
        for thread in self.threads.drain(..) {
            if thread.thread().id() != current {
                // Fails only if it panicked, which it has said already.
                let _ = thread.join();
            }
        }
    }
}

/// Says at the end of the thread that reads, also if a callback panics, that there will be no answers.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, timeout: Duration, until: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_timeout_while(self.lock(), timeout, |state| !until(state))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// The number of a new request, unless the store has ended.
    fn enter(&self) -> Result<u64, StoreError> {
        let mut state = self.lock();
        state.check()?;
        let number = state.next_number;
        state.next_number += 1;
        state.pending.insert(number, None);
        Ok(number)
    }

    /// Waits for the answer to a request; nothing if there is none in time.
    fn answer(&self, number: u64, until: Instant) -> Result<Option<Answer>, StoreError> {
        let timeout = until.saturating_duration_since(Instant::now());
        let has_answer = |state: &State| state.pending.get(&number).is_some_and(Option::is_some);
        let mut state = self.wait(timeout, |state| has_answer(state) || state.check().is_err());
        match state.pending.get_mut(&number).and_then(Option::take) {
            Some(answer) => Ok(Some(answer)),
            None => state.check().map(|()| None),
        }
    }

    /// Takes in what rank 0 sends, to the end of the connection.
    fn hear(&self, mut stream: &TcpStream) -> FrameError {
        loop {
            match read_frame(&mut stream, MAX_FRAME) {
                Ok(Answer::Failed(failure)) => {
                    self.fail(failure, true);
                }
                Ok(Answer::Farewell) => {
                    self.lock().closed = true;
                    return FrameError::Closed;
                }
                Ok(answer) => self.take(answer),
                Err(error) => return error,
            }
            self.changed.notify_all();
        }
    }

    fn take(&self, answer: Answer) {
        let number = answer.number();
        let mut state = self.lock();
        if let Some(place) = number.and_then(|number| state.pending.get_mut(&number)) {
            *place = Some(answer);
        }
    }

    /// The connection has ended: rank 0 is lost, unless it or this rank has left in peace.
    fn hear_no_more(&self, error: &FrameError) {
        let state = self.lock();
        if state.closed || state.leaving {
            return;
        }
        drop(state);
        let kind = FailureKind::Lost(error.to_string());
        self.fail(Failure { rank: 0, kind }, false);
    }

    /// Takes note of a failure; whether it is the first.
    fn fail(&self, failure: Failure, confirmed: bool) -> bool {
        let mut state = self.lock();
        state.confirmed |= confirmed;
        let first = state.failure.is_none();
        let mut callbacks = Vec::new();
        if first {
            state.failure = Some(failure.clone());
            callbacks = std::mem::take(&mut state.callbacks);
        }
        drop(state);
        self.changed.notify_all();
        for callback in callbacks {
            callback(&failure);
        }
        first
    }
}

impl State {
    fn check(&self) -> Result<(), StoreError> {
        match &self.failure {
            Some(failure) => Err(StoreError::Failed(failure.clone())),
            None if self.closed || self.ended => Err(StoreError::Closed),
            None => Ok(()),
        }
    }
}

/// Tries once to connect and to be let in.
fn attempt(
    address: &str,
    membership: &Membership,
    until: Instant,
) -> Result<(TcpStream, SocketAddr), JoinError> {
    let mut last = JoinError::Retry("the name has no address".to_owned());
    for candidate in address.to_socket_addrs()? {
        let stream = match connection::connect(candidate, until) {
            Ok(stream) => stream,
            Err(error) => {
                last = error.into();
                continue;
            }
        };
        let mut timed = Timed::new(&stream, until);
        handshake::join(&mut timed, candidate, membership)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        return Ok((stream, candidate));
    }
    Err(last)
}
