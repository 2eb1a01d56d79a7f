//! What the ranks of a loopback group share: one lock around everything, one condition for "something changed".
//!
//! Every call of every rank is an [`Attempt`], repeated until it is done or the group, the peer or the deadline forbids
//! to go on ([`Group::complete`]). Whatever makes a call fail is recorded as the cause of death of the whole group. A
//! call that can be completed when a poison arrives is completed: so an all-gather to which every rank has contributed
//! gives its result to all of them, whatever the fastest does next.

use std::{
    collections::BTreeMap,
    fmt,
    sync::PoisonError,
    time::{Duration, Instant},
};

use super::{
    channel::{Channel, Ticket},
    sync::{Clock, Condvar, Expiry, Mutex, MutexGuard},
};
use crate::{
    attempt::{Subject, gather_tag},
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    recorder::{self, Call, FlightRecord, FlightRecorder, Progress},
    transport::{Expected, GroupId, Rank, Tag, Traffic},
};

/// How a call begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    /// With something new, of so many bytes.
    New(Call, usize),
    /// With a request made before.
    Request(Ticket),
}

/// The outcome of trying a call once.
pub(super) enum Attempt<T> {
    Done(T),
    /// Nothing can be done before this rank does something.
    Blocked(Rank),
    Failed(CommErrorKind),
}

/// One all-gather under way; forgotten when every member has taken its copy.
#[derive(Debug)]
struct Round {
    members: Vec<Rank>,
    /// Of each member.
    parts: Vec<Option<Vec<u8>>>,
    taken: usize,
}

#[derive(Debug)]
pub(super) struct State<B> {
    world_size: usize,
    /// From rank `s` to rank `d` at index `s * world_size + d`.
    channels: Vec<Channel<B>>,
    rounds: BTreeMap<(GroupId, u64), Round>,
    departed: Vec<bool>,
    traffic: Vec<Traffic>,
    recorders: Vec<FlightRecorder>,
    cause: Option<CommError>,
    clock: Clock,
}

pub(super) struct Group<B> {
    world_size: usize,
    deadline: Duration,
    state: Mutex<State<B>>,
    changed: Condvar,
}

/// Without the state: that would print every buffer on its way.
impl<B> fmt::Debug for Group<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("world_size", &self.world_size)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl<B: Buffer> Group<B> {
    pub(super) fn new(world_size: usize, deadline: Duration) -> Self {
        Self {
            world_size,
            deadline,
            state: Mutex::new(State::new(world_size)),
            changed: Condvar::new(),
        }
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Repeats `attempt` until it is done; a failure poisons the group.
    pub(super) fn complete<T>(
        &self,
        mut subject: Subject,
        entry: Entry,
        mut attempt: impl FnMut(&mut State<B>, Ticket) -> Attempt<T>,
    ) -> Result<T, CommError> {
        let expiry = Expiry::after(self.deadline);
        let mut state = self.lock();
        let ticket = state.enter(subject, entry);
        if state.cause.is_some() {
            return Err(self.fail(state, subject, ticket, None));
        }
        let failure = loop {
            match attempt(&mut state, ticket) {
                Attempt::Done(value) => {
                    self.changed.notify_all();
                    return Ok(value);
                }
                Attempt::Failed(kind) => break Some(kind),
                Attempt::Blocked(peer) => {
                    subject.peer = Some(peer);
                    if state.cause.is_some() {
                        break None;
                    }
                    let useless = self.no_use_waiting(&state, subject.rank, peer, expiry);
                    if useless.is_some() {
                        break useless;
                    }
                    state = expiry.wait(&self.changed, state);
                }
            }
        };
        Err(self.fail(state, subject, ticket, failure))
    }

    /// Records `cause` as the group's failure, found by `rank`, unless there was one before, and wakes everybody.
    pub(super) fn poison(&self, rank: Rank, cause: CommError) {
        let mut state = self.lock();
        if state.cause.is_some() {
            return;
        }
        let recorder = &mut state.recorders[rank];
        let number = recorder.begin(Call::Poison, cause.peer, cause.tag, 0);
        recorder.advance(number, Progress::Ended);
        let record = recorder.snapshot();
        state.cause = Some(cause.with_history(record));
        self.announce(state);
    }

    pub(super) fn poisoned(&self) -> Option<CommError> {
        self.lock().cause.clone()
    }

    /// Records that a request was dropped.
    pub(super) fn abandon(&self, rank: Rank, request: Ticket) {
        self.lock().recorders[rank].advance(request, Progress::Dropped);
    }

    pub(super) fn depart(&self, rank: Rank) {
        let mut state = self.lock();
        if !state.departed[rank] {
            state.departed[rank] = true;
            let recorder = &mut state.recorders[rank];
            let number = recorder.begin(Call::Depart, None, None, 0);
            recorder.advance(number, Progress::Ended);
        }
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn traffic(&self, rank: Rank) -> Traffic {
        self.lock().traffic[rank]
    }

    pub(super) fn flight_record(&self, rank: Rank) -> FlightRecord {
        self.lock().recorders[rank].snapshot()
    }

    /// Lets every wait's deadline pass.
    #[cfg(any(loom, shuttle))]
    pub(super) fn pass_deadline(&self) {
        self.lock().clock.deadline_has_passed = true;
        self.changed.notify_all();
    }

    /// Ends a call with `failure`, or else with that of the group.
    fn fail(
        &self,
        mut state: MutexGuard<'_, State<B>>,
        subject: Subject,
        ticket: Ticket,
        failure: Option<CommErrorKind>,
    ) -> CommError {
        let recorder = &mut state.recorders[subject.rank];
        recorder.advance(ticket, Progress::Failed);
        let record = recorder.snapshot();
        if let Some(cause) = &state.cause {
            return subject.poisoned_by(cause).with_history(record);
        }
        let kind = failure.expect("a call fails by itself if the group has not");
        let cause = subject.error(kind).with_history(record);
        state.cause = Some(cause.clone());
        self.announce(state);
        cause
    }

    /// Wakes everybody because the group has failed, and writes down what led to it if that is asked for.
    fn announce(&self, state: MutexGuard<'_, State<B>>) {
        drop(state);
        self.changed.notify_all();
        if recorder::path_asked_for().is_none() {
            return;
        }
        let state = self.lock();
        let records: Vec<_> = state
            .recorders
            .iter()
            .map(FlightRecorder::snapshot)
            .collect();
        let cause = state.cause.clone();
        drop(state);
        if let Some(cause) = cause {
            records.iter().for_each(|record| record.report(&cause));
        }
    }

    fn no_use_waiting(
        &self,
        state: &State<B>,
        rank: Rank,
        peer: Rank,
        expiry: Expiry,
    ) -> Option<CommErrorKind> {
        if state.departed[peer] {
            return Some(CommErrorKind::Departed);
        }
        expiry
            .has_passed(&state.clock)
            .then(|| CommErrorKind::Deadline {
                deadline: self.deadline,
                pending: state.untaken(peer, rank),
            })
    }

    /// The state is sound after a panic too, because no change to it is left half done; so lock poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Buffer> State<B> {
    fn new(world_size: usize) -> Self {
        Self {
            world_size,
            channels: (0..world_size * world_size)
                .map(|_| Channel::new())
                .collect(),
            rounds: BTreeMap::new(),
            departed: vec![false; world_size],
            traffic: vec![Traffic::default(); world_size],
            recorders: (0..world_size).map(FlightRecorder::new).collect(),
            cause: None,
            clock: Clock::default(),
        }
    }

    /// The number under which the call is recorded.
    fn enter(&mut self, subject: Subject, entry: Entry) -> Ticket {
        match entry {
            Entry::Request(ticket) => ticket,
            Entry::New(call, bytes) => {
                let recorder = &mut self.recorders[subject.rank];
                recorder.begin(call, subject.peer, subject.tag, bytes)
            }
        }
    }

    /// Records of a request just posted whether it has met `match_of_peer`, a request of the peer.
    fn posted(&mut self, rank: Rank, ticket: Ticket, peer: Rank, match_of_peer: Option<Ticket>) {
        let own = &mut self.recorders[rank];
        own.advance(ticket, Progress::Posted);
        if let Some(theirs) = match_of_peer {
            own.advance(ticket, Progress::Matched);
            self.recorders[peer].advance(theirs, Progress::Matched);
        }
    }

    pub(super) fn can_send(&self, rank: Rank, peer: Rank) -> bool {
        !self.departed[peer] && self.channel(rank, peer).has_room()
    }

    pub(super) fn send(&mut self, rank: Rank, ticket: Ticket, peer: Rank, tag: Tag, buffer: B) {
        let traffic = &mut self.traffic[rank];
        traffic.messages_sent += 1;
        traffic.bytes_sent += buffer.byte_len() as u64;
        let receive = self.channel_mut(rank, peer).send(ticket, tag, buffer);
        self.posted(rank, ticket, peer, receive);
    }

    /// What a send yields when it is taken, and since when it is.
    pub(super) fn finish(
        &mut self,
        rank: Rank,
        peer: Rank,
        send: Ticket,
    ) -> Attempt<(Option<B>, Instant)> {
        let Some(taken) = self.channel_mut(rank, peer).finish(send) else {
            return Attempt::Blocked(peer);
        };
        self.ended(rank, send);
        Attempt::Done(taken)
    }

    pub(super) fn post(
        &mut self,
        rank: Rank,
        ticket: Ticket,
        peer: Rank,
        tag: Tag,
        memory: Option<B>,
    ) {
        let send = self.channel_mut(peer, rank).post(ticket, tag, memory);
        self.posted(rank, ticket, peer, send);
    }

    pub(super) fn collect(
        &mut self,
        rank: Rank,
        peer: Rank,
        receive: Ticket,
        expected: Expected,
    ) -> Attempt<(B, Instant)> {
        let Some((buffer, arrived)) = self.channel_mut(peer, rank).collect(receive) else {
            return Attempt::Blocked(peer);
        };
        if buffer.dtype() != expected.dtype || buffer.len() != expected.len {
            return Attempt::Failed(CommErrorKind::SizeMismatch {
                expected_len: expected.len,
                expected_dtype: expected.dtype,
                got_len: buffer.len(),
                got_dtype: buffer.dtype(),
            });
        }
        let traffic = &mut self.traffic[rank];
        traffic.messages_received += 1;
        traffic.bytes_received += buffer.byte_len() as u64;
        self.ended(rank, receive);
        Attempt::Done((buffer, arrived))
    }

    /// Records that a call is over, with success.
    pub(super) fn ended(&mut self, rank: Rank, ticket: Ticket) {
        self.recorders[rank].advance(ticket, Progress::Ended);
    }

    /// Puts the rank's part into the round, once, and yields all parts when they are there.
    pub(super) fn all_gather(
        &mut self,
        rank: Rank,
        key: (GroupId, u64),
        members: &[Rank],
        part: &mut Option<Vec<u8>>,
    ) -> Attempt<Vec<Vec<u8>>> {
        let round = self
            .rounds
            .entry(key)
            .or_insert_with(|| Round::new(members));
        let Some(own) = round.part_of(rank) else {
            return Attempt::Failed(CommErrorKind::InvalidPeer(rank));
        };
        if let Some(part) = part.take_if(|_| own.is_none()) {
            *own = Some(part);
        }
        if part.is_some() {
            // This rank used the number before, and not every rank has taken that round's result.
            return Attempt::Blocked(rank);
        }
        if let Some(absent) = round.first_absent(&self.departed) {
            return Attempt::Blocked(absent);
        }
        let parts = round.parts.iter().flatten().cloned().collect();
        round.taken += 1;
        if round.taken == round.members.len() {
            self.rounds.remove(&key);
        }
        Attempt::Done(parts)
    }

    /// What `peer` offers to `rank` and `rank` has not taken: messages, and all-gathers it has not joined.
    fn untaken(&self, peer: Rank, rank: Rank) -> Vec<Tag> {
        let joined_by_peer_only = |round: &Round| {
            round.has_part_of(peer) == Some(true) && round.has_part_of(rank) == Some(false)
        };
        let rounds = self
            .rounds
            .iter()
            .filter(|(_, round)| joined_by_peer_only(round));
        self.channel(peer, rank)
            .untaken()
            .chain(rounds.map(|(&(group, operation), _)| gather_tag(group, operation)))
            .collect()
    }

    fn channel(&self, source: Rank, destination: Rank) -> &Channel<B> {
        &self.channels[source * self.world_size + destination]
    }

    fn channel_mut(&mut self, source: Rank, destination: Rank) -> &mut Channel<B> {
        &mut self.channels[source * self.world_size + destination]
    }
}

impl Round {
    fn new(members: &[Rank]) -> Self {
        Self {
            members: members.to_vec(),
            parts: vec![None; members.len()],
            taken: 0,
        }
    }

    /// Where a member's part lies; `None` for another rank.
    fn part_of(&mut self, rank: Rank) -> Option<&mut Option<Vec<u8>>> {
        let index = self.members.iter().position(|&member| member == rank)?;
        Some(&mut self.parts[index])
    }

    /// Whether a member's part is there; `None` for another rank.
    fn has_part_of(&self, rank: Rank) -> Option<bool> {
        let index = self.members.iter().position(|&member| member == rank)?;
        Some(self.parts[index].is_some())
    }

    /// A rank whose part is missing; one that has departed if there is such, because it will never come.
    fn first_absent(&self, departed: &[bool]) -> Option<Rank> {
        let parts = || self.members.iter().zip(&self.parts);
        let absent = || parts().filter_map(|(&rank, part)| part.is_none().then_some(rank));
        absent()
            .find(|&rank| departed[rank])
            .or_else(|| absent().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::HostBuffer;

    fn all_gather(
        state: &mut State<HostBuffer>,
        rank: Rank,
        part: &mut Option<Vec<u8>>,
    ) -> Attempt<Vec<Vec<u8>>> {
        let everybody: Vec<Rank> = (0..state.world_size).collect();
        state.all_gather(rank, (GroupId::WHOLE, 7), &everybody, part)
    }

    fn gather(state: &mut State<HostBuffer>, rank: Rank, part: u8) -> Attempt<Vec<Vec<u8>>> {
        all_gather(state, rank, &mut Some(vec![part]))
    }

    #[test]
    fn a_round_is_forgotten_when_all_have_taken_it() {
        let mut state = State::new(2);
        let mut first = Some(vec![10]);
        assert!(matches!(
            all_gather(&mut state, 0, &mut first),
            Attempt::Blocked(1)
        ));
        assert!(matches!(gather(&mut state, 1, 11), Attempt::Done(_)));
        assert_eq!(state.rounds.len(), 1);
        assert!(
            matches!(all_gather(&mut state, 0, &mut first), Attempt::Done(parts) if parts == [[10], [11]])
        );
        assert!(state.rounds.is_empty());
    }

    #[test]
    fn a_reused_number_waits_for_the_round_before() {
        let mut state = State::new(2);
        let mut first = Some(vec![10]);
        assert!(matches!(
            all_gather(&mut state, 0, &mut first),
            Attempt::Blocked(1)
        ));
        assert!(matches!(gather(&mut state, 1, 11), Attempt::Done(_)));

        let mut second = Some(vec![21]);
        assert!(matches!(
            all_gather(&mut state, 1, &mut second),
            Attempt::Blocked(1)
        ));
        assert!(
            second.is_some(),
            "the part is not mixed into the round before"
        );
        assert!(matches!(
            all_gather(&mut state, 0, &mut first),
            Attempt::Done(_)
        ));
        assert!(matches!(
            all_gather(&mut state, 1, &mut second),
            Attempt::Blocked(0)
        ));
        assert!(matches!(gather(&mut state, 0, 20), Attempt::Done(parts) if parts == [[20], [21]]));
    }

    #[test]
    fn a_round_names_the_departed_among_the_absent() {
        let mut state = State::<HostBuffer>::new(3);
        assert!(matches!(gather(&mut state, 0, 0), Attempt::Blocked(1)));
        state.departed[2] = true;
        assert!(matches!(
            all_gather(&mut state, 0, &mut None),
            Attempt::Blocked(2)
        ));
    }
}
