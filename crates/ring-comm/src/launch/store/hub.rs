//! What rank 0 knows: who has joined, what was set, who waits for what.

use std::{
    collections::{HashMap, HashSet},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use super::{
    MAX_STORED_BYTES, Membership,
    error::{Failure, FailureKind},
    handshake::Verdict,
    wire::{Answer, MAX_KEY_BYTES, MAX_REASON_BYTES, MAX_VALUE_BYTES, Question, Refusal, Request},
};
use crate::transport::Rank;

/// Connections that may be in their handshake at the same time; further ones are closed, and ranks try again.
pub const MAX_STRANGERS: usize = 64;

/// Answers that may be on their way to one rank; one that does not take them is lost.
const MAX_QUEUED_ANSWERS: usize = 1024;

/// What follows from a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Continue,
    Leave,
}

/// A rank that has joined.
#[derive(Debug)]
struct Member {
    queue: SyncSender<Answer>,
    stream: Arc<TcpStream>,
}

/// A connection that is open.
#[derive(Debug)]
struct Connection {
    stream: Arc<TcpStream>,
    /// Not yet through the handshake.
    stranger: bool,
}

/// A request of a rank that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiting {
    rank: Rank,
    number: u64,
}

/// A gather under way.
#[derive(Debug, Default)]
struct Gather {
    /// Who has contributed what.
    parts: HashMap<Rank, (Waiting, Vec<u8>)>,
    /// Who had, and does not wait any longer: it was not missing.
    gone: HashSet<Rank>,
}

#[derive(Debug, Default)]
struct State {
    closing: bool,
    connections: HashMap<u64, Connection>,
    next_connection: u64,
    members: HashMap<Rank, Member>,
    values: HashMap<String, Vec<u8>>,
    stored_bytes: usize,
    gets: HashMap<String, Vec<Waiting>>,
    gathers: HashMap<String, Gather>,
    failure: Option<Failure>,
}

/// What the threads of rank 0 share.
#[derive(Debug)]
pub(super) struct Hub {
    membership: Membership,
    state: Mutex<State>,
    changed: Condvar,
}

impl Hub {
    pub(super) fn new(membership: Membership) -> Self {
        Self {
            membership,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn membership(&self) -> &Membership {
        &self.membership
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a connection; nothing if there is no room for it.
    pub(super) fn connect(&self, stream: Arc<TcpStream>) -> Option<u64> {
        let mut state = self.lock();
        let connections = state.connections.values();
        let strangers = connections.filter(|connection| connection.stranger).count();
        if state.closing || strangers >= MAX_STRANGERS {
            return None;
        }
        let number = state.next_connection;
        state.next_connection += 1;
        let stranger = true;
        let connection = Connection { stream, stranger };
        state.connections.insert(number, connection);
        Some(number)
    }

    /// Takes note of the end of a connection.
    pub(super) fn disconnect(&self, connection: u64) {
        self.lock().connections.remove(&connection);
        self.changed.notify_all();
    }

    /// Makes a rank a member; returns what is to be sent to it.
    pub(super) fn admit(&self, connection: u64, rank: Rank) -> Result<Receiver<Answer>, Verdict> {
        let mut state = self.lock();
        if state.closing {
            return Err(Verdict::Closing);
        }
        if state.members.contains_key(&rank) {
            return Err(Verdict::DuplicateRank);
        }
        let Some(connection) = state.connections.get_mut(&connection) else {
            return Err(Verdict::Closing);
        };
        connection.stranger = false;
        let stream = Arc::clone(&connection.stream);
        let (queue, answers) = sync_channel(MAX_QUEUED_ANSWERS);
        state.members.insert(rank, Member { queue, stream });
        if let Some(failure) = state.failure.clone() {
            state.send(rank, Answer::Failed(failure));
        }
        Ok(answers)
    }

    /// Does what `rank` asks for.
    pub(super) fn handle(&self, rank: Rank, request: Request) -> Next {
        let mut state = self.lock();
        match request {
            Request::Ask { number, question } => {
                let waiting = Waiting { rank, number };
                match question {
                    Question::Set { key, value } => state.set(waiting, key, value),
                    Question::Get { key } => state.get(waiting, key),
                    Question::Gather { name, value } => {
                        state.gather(waiting, name, value, self.membership.world_size);
                    }
                }
            }
            Request::Forget { number } => {
                state.forget(Waiting { rank, number }, self.membership.world_size);
            }
            Request::Abort { reason } => {
                let kind = FailureKind::Aborted(shortened(&reason));
                state.fail(Failure { rank, kind });
            }
            Request::Goodbye => {
                state.remove(rank);
                return Next::Leave;
            }
        }
        Next::Continue
    }

    /// Takes note that the connection of `rank` has ended without a goodbye.
    pub(super) fn lose(&self, rank: Rank, reason: &str) {
        let mut state = self.lock();
        state.remove(rank);
        if !state.closing {
            let kind = FailureKind::Lost(shortened(reason));
            state.fail(Failure { rank, kind });
        }
    }

    /// Says farewell to everybody and lets nobody in any more.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        let ranks: Vec<Rank> = state.members.keys().copied().collect();
        for rank in ranks {
            state.send(rank, Answer::Farewell);
        }
        // Their queues end, and when all is sent their connections.
        state.members.clear();
        let connections = state.connections.values();
        for stranger in connections.filter(|connection| connection.stranger) {
            end(&stranger.stream);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits, `pause` at most; returns whether the hub is closing.
    pub(super) fn pause(&self, pause: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), pause, |state| !state.closing)
            .unwrap_or_else(PoisonError::into_inner);
        state.closing
    }

    /// Whether every rank has joined.
    pub(super) fn is_complete(&self) -> bool {
        self.lock().members.len() == self.membership.world_size
    }

    /// Waits until all connections have ended, and ends those that have not after `grace`.
    pub(super) fn end_connections(&self, grace: Duration) {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), grace, |state| !state.connections.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        for connection in state.connections.values() {
            end(&connection.stream);
        }
    }
}

impl State {
    fn set(&mut self, waiting: Waiting, key: String, value: Vec<u8>) {
        if key.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES {
            return self.refuse(waiting, Refusal::TooLong);
        }
        let replaced = self
            .values
            .get(&key)
            .map_or(0, |value| key.len() + value.len());
        let stored_bytes = self.stored_bytes - replaced + key.len() + value.len();
        if stored_bytes > MAX_STORED_BYTES {
            return self.refuse(waiting, Refusal::Full);
        }
        self.stored_bytes = stored_bytes;
        for waiting in self.gets.remove(&key).unwrap_or_default() {
            self.give(waiting, &value);
        }
        self.values.insert(key, value);
        let number = waiting.number;
        self.send(waiting.rank, Answer::Done { number });
    }

    fn get(&mut self, waiting: Waiting, key: String) {
        if key.len() > MAX_KEY_BYTES {
            return self.refuse(waiting, Refusal::TooLong);
        }
        match self.values.get(&key).cloned() {
            Some(value) => self.give(waiting, &value),
            None => self.gets.entry(key).or_default().push(waiting),
        }
    }

    fn give(&mut self, waiting: Waiting, value: &[u8]) {
        let number = waiting.number;
        let value = value.to_vec();
        self.send(waiting.rank, Answer::Value { number, value });
    }

    fn gather(&mut self, waiting: Waiting, name: String, value: Vec<u8>, world_size: usize) {
        if name.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES / world_size {
            return self.refuse(waiting, Refusal::TooLong);
        }
        let gather = self.gathers.entry(name.clone()).or_default();
        if gather.parts.contains_key(&waiting.rank) {
            return self.refuse(waiting, Refusal::GatheringAlready);
        }
        gather.parts.insert(waiting.rank, (waiting, value));
        if gather.parts.len() == world_size {
            let mut parts: Vec<_> = self
                .gathers
                .remove(&name)
                .unwrap_or_default()
                .parts
                .into_values()
                .collect();
            parts.sort_by_key(|(waiting, _)| waiting.rank);
            let (waiting, values): (Vec<Waiting>, Vec<Vec<u8>>) = parts.into_iter().unzip();
            for Waiting { rank, number } in waiting {
                let values = values.clone();
                self.send(rank, Answer::Gathered { number, values });
            }
        }
    }

    /// Ends a wait. The answer says who was missing; there is none if the request has been answered.
    fn forget(&mut self, waiting: Waiting, world_size: usize) {
        let everybody = 0..world_size;
        let gather = self.gathers.values_mut().find(|gather| {
            let part = gather.parts.get(&waiting.rank);
            part.is_some_and(|(other, _)| *other == waiting)
        });
        let missing = if let Some(gather) = gather {
            let missing = everybody
                .filter(|rank| !gather.parts.contains_key(rank) && !gather.gone.contains(rank))
                .collect();
            gather.parts.remove(&waiting.rank);
            gather.gone.insert(waiting.rank);
            missing
        } else if self.gets.values().flatten().any(|other| *other == waiting) {
            self.forget_gets(|other| other == waiting);
            everybody
                .filter(|rank| !self.members.contains_key(rank))
                .collect()
        } else {
            return;
        };
        self.gathers.retain(|_, gather| !gather.parts.is_empty());
        let number = waiting.number;
        self.send(waiting.rank, Answer::Forgotten { number, missing });
    }

    fn forget_gets(&mut self, forgotten: impl Fn(Waiting) -> bool) {
        self.gets.retain(|_, waiting| {
            waiting.retain(|&waiting| !forgotten(waiting));
            !waiting.is_empty()
        });
    }

    fn refuse(&mut self, waiting: Waiting, refusal: Refusal) {
        let number = waiting.number;
        self.send(waiting.rank, Answer::Refused { number, refusal });
    }

    /// Ends the store for everybody; only the first failure counts.
    fn fail(&mut self, failure: Failure) {
        if self.failure.is_some() {
            return;
        }
        self.failure = Some(failure.clone());
        let ranks: Vec<Rank> = self.members.keys().copied().collect();
        for rank in ranks {
            self.send(rank, Answer::Failed(failure.clone()));
        }
    }

    /// Forgets a member, and what it waits for.
    fn remove(&mut self, rank: Rank) {
        self.members.remove(&rank);
        self.forget_gets(|waiting| waiting.rank == rank);
        self.gathers.retain(|_, gather| {
            gather.parts.remove(&rank);
            !gather.parts.is_empty()
        });
    }

    fn send(&mut self, rank: Rank, answer: Answer) {
        let Some(member) = self.members.get(&rank) else {
            return;
        };
        if member.queue.try_send(answer).is_err() {
            // It takes no answers: the thread that reads from it finds the connection ended and reports it.
            end(&member.stream);
        }
    }
}

/// Ends a connection; fails only if it has ended already.
fn end(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

/// At most [`MAX_REASON_BYTES`] of `reason`.
pub(super) fn shortened(reason: &str) -> String {
    reason[..reason.floor_char_boundary(MAX_REASON_BYTES)].to_owned()
}
