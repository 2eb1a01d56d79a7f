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
    sync::{Condvar, Mutex, MutexGuard},
};
use crate::{
    attempt::{Subject, gather_tag},
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    transport::{Expected, GroupId, Rank, Tag, Traffic},
};

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
    cause: Option<CommError>,
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
        subject: Subject,
        mut attempt: impl FnMut(&mut State<B>) -> Attempt<T>,
    ) -> Result<T, CommError> {
        // A deadline too far away for the clock is none.
        let expiry = Instant::now().checked_add(self.deadline);
        let mut state = self.lock();
        state.check(subject)?;
        loop {
            match attempt(&mut state) {
                Attempt::Done(value) => {
                    self.changed.notify_all();
                    return Ok(value);
                }
                Attempt::Failed(kind) => return Err(self.fail(&mut state, subject, kind)),
                Attempt::Blocked(peer) => {
                    let subject = Subject {
                        peer: Some(peer),
                        ..subject
                    };
                    state.check(subject)?;
                    if let Some(kind) = self.no_use_waiting(&state, subject.rank, peer, expiry) {
                        return Err(self.fail(&mut state, subject, kind));
                    }
                    state = self.wait_for_change(state, expiry);
                }
            }
        }
    }

    /// Records `cause` as the group's failure unless there was one before, and wakes everybody.
    pub(super) fn poison(&self, cause: CommError) {
        self.lock().cause.get_or_insert(cause);
        self.changed.notify_all();
    }

    pub(super) fn poisoned(&self) -> Option<CommError> {
        self.lock().cause.clone()
    }

    pub(super) fn depart(&self, rank: Rank) {
        self.lock().departed[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn traffic(&self, rank: Rank) -> Traffic {
        self.lock().traffic[rank]
    }

    fn fail(&self, state: &mut State<B>, subject: Subject, kind: CommErrorKind) -> CommError {
        let cause = state.cause.get_or_insert_with(|| subject.error(kind));
        self.changed.notify_all();
        subject.poisoned_by(cause)
    }

    fn no_use_waiting(
        &self,
        state: &State<B>,
        rank: Rank,
        peer: Rank,
        expiry: Option<Instant>,
    ) -> Option<CommErrorKind> {
        if state.departed[peer] {
            return Some(CommErrorKind::Departed);
        }
        let expired = expiry.is_some_and(|expiry| Instant::now() >= expiry);
        expired.then(|| CommErrorKind::Deadline {
            deadline: self.deadline,
            pending: state.untaken(peer, rank),
        })
    }

    /// The state is sound after a panic too, because no change to it is left half done; so lock poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_change<'a>(
        &self,
        state: MutexGuard<'a, State<B>>,
        expiry: Option<Instant>,
    ) -> MutexGuard<'a, State<B>> {
        let Some(expiry) = expiry else {
            return self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        let remaining = expiry.saturating_duration_since(Instant::now());
        let woken = self.changed.wait_timeout(state, remaining);
        woken.unwrap_or_else(PoisonError::into_inner).0
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
            cause: None,
        }
    }

    pub(super) fn can_send(&self, rank: Rank, peer: Rank) -> bool {
        !self.departed[peer] && self.channel(rank, peer).has_room()
    }

    pub(super) fn send(&mut self, rank: Rank, peer: Rank, tag: Tag, buffer: B) -> Ticket {
        let traffic = &mut self.traffic[rank];
        traffic.messages_sent += 1;
        traffic.bytes_sent += buffer.byte_len() as u64;
        self.channel_mut(rank, peer).send(tag, buffer)
    }

    /// What a send yields when it is taken, and since when it is.
    pub(super) fn finish(
        &mut self,
        rank: Rank,
        peer: Rank,
        send: Ticket,
    ) -> Attempt<(Option<B>, Instant)> {
        match self.channel_mut(rank, peer).finish(send) {
            Some(taken) => Attempt::Done(taken),
            None => Attempt::Blocked(peer),
        }
    }

    pub(super) fn post(&mut self, rank: Rank, peer: Rank, tag: Tag, memory: Option<B>) -> Ticket {
        self.channel_mut(peer, rank).post(tag, memory)
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
        Attempt::Done((buffer, arrived))
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

    fn check(&self, subject: Subject) -> Result<(), CommError> {
        match &self.cause {
            Some(cause) => Err(subject.poisoned_by(cause)),
            None => Ok(()),
        }
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
