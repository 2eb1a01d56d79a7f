//! What one rank knows of its group, and the rules of a transport on it: no input, no output, no clock of its own.
//!
//! Local calls and what the wire reports change the [`State`]; what it wants done on the wire it leaves in its
//! [outputs](State::take_outputs), in order.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    time::{Duration, Instant},
};

use super::{
    frame::{Completed, Failure, Frame},
    process::ProcessIdentity,
};
use crate::{
    attempt::gather_tag,
    buffer::{Buffer, DType, HostBuffer},
    error::{CommError, CommErrorKind},
    transport::{Expected, GroupId, MAX_OUTSTANDING_SENDS, Rank, Tag, Traffic},
};

/// How long a rank that failed waits for the verdict of the rank that decides which failure is the group's.
pub(super) const VERDICT_WITHIN: Duration = Duration::from_millis(500);
/// All-gathers whose results a failure brings along.
const REMEMBERED_GATHERS: usize = 8;

/// The outcome of trying a call once.
#[derive(Debug)]
pub(super) enum Attempt<T> {
    Done(T),
    /// Nothing can be done before this rank does something.
    Blocked(Rank),
    /// This rank has done its part, even if it has departed since; what it sent or takes is on its way.
    Underway(Rank),
    Failed(CommErrorKind),
}

/// Names one request.
pub(super) type Ticket = u64;

/// What the engine must do on the wire.
#[derive(Debug, PartialEq)]
pub(super) enum Output {
    Frame {
        peer: Rank,
        frame: Frame,
    },
    SendData {
        peer: Rank,
        sequence: u64,
        buffer: HostBuffer,
    },
    ReceiveData {
        peer: Rank,
        sequence: u64,
        buffer: HostBuffer,
    },
}

/// Whether anything can still come from a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    /// It has not joined yet.
    Awaited,
    Present,
    Departed,
    Lost,
}

#[derive(Debug)]
struct Peer {
    presence: Presence,
    sends: Vec<Send>,
    /// Messages it has offered and nobody has taken.
    offers: VecDeque<Offer>,
    receives: VecDeque<Receive>,
}

#[derive(Debug)]
struct Send {
    sequence: u64,
    taken: Option<Instant>,
    /// The memory, when the data has left.
    buffer: Option<HostBuffer>,
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    tag: Tag,
    dtype: DType,
    len: usize,
    sequence: u64,
}

#[derive(Debug)]
struct Receive {
    ticket: Ticket,
    tag: Tag,
    expected: Expected,
    progress: Progress,
}

/// How far a posted receive is.
#[derive(Debug)]
enum Progress {
    /// Nothing is offered yet; there may be memory for it.
    Open {
        memory: Option<HostBuffer>,
    },
    /// Something else is offered than what is expected.
    Refused {
        dtype: DType,
        len: usize,
    },
    Arriving {
        sequence: u64,
    },
    Arrived {
        buffer: HostBuffer,
        since: Instant,
    },
}

/// One number of an all-gather; forgotten when nothing of it is left.
#[derive(Debug)]
struct Gather {
    /// The members, while this rank takes part.
    joined: Option<Vec<Rank>>,
    /// By rank, the parts that have come, oldest first: a number may be used again.
    parts: Vec<VecDeque<Vec<u8>>>,
}

/// A failure of this rank that the group may or may not be told of.
#[derive(Debug)]
struct Proposal {
    failure: Failure,
    /// Who was asked.
    asked: Option<Rank>,
    /// When to decide without an answer.
    expiry: Instant,
}

#[derive(Debug)]
pub(super) struct State {
    rank: Rank,
    /// By rank; that of this rank itself is never used.
    peers: Vec<Peer>,
    gathers: BTreeMap<(GroupId, u64), Gather>,
    completed: VecDeque<Completed>,
    traffic: Traffic,
    cause: Option<CommError>,
    proposal: Option<Proposal>,
    outputs: Vec<Output>,
    next_ticket: Ticket,
    next_sequence: u64,
}

impl State {
    /// A rank that has not met anybody yet, of `process`. Its data is numbered from `first_sequence`.
    pub(super) fn new(
        rank: Rank,
        world_size: usize,
        first_sequence: u64,
        process: Option<ProcessIdentity>,
    ) -> Self {
        let mut state = Self {
            rank,
            peers: (0..world_size).map(|_| Peer::new()).collect(),
            gathers: BTreeMap::new(),
            completed: VecDeque::new(),
            traffic: Traffic::default(),
            cause: None,
            proposal: None,
            outputs: Vec::new(),
            next_ticket: 0,
            next_sequence: first_sequence,
        };
        state.peers[rank].presence = Presence::Present;
        state.tell_all(&Frame::Hello {
            world_size,
            process,
        });
        state
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.traffic
    }

    pub(super) fn cause(&self) -> Option<&CommError> {
        self.cause.as_ref()
    }

    pub(super) fn has_departed(&self, peer: Rank) -> bool {
        self.peers[peer].presence == Presence::Departed
    }

    /// What is to be done on the wire, in order.
    pub(super) fn take_outputs(&mut self) -> Vec<Output> {
        mem::take(&mut self.outputs)
    }

    pub(super) fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// Whether a message is expected or to be taken.
    pub(super) fn expects_something(&self) -> bool {
        let open = |receive: &Receive| !matches!(receive.progress, Progress::Arrived { .. });
        let peers = || self.peers.iter();
        self.proposal.is_some()
            || peers().any(|peer| !peer.sends.is_empty() || peer.receives.iter().any(open))
    }

    /// Whether data is being copied to or from this rank.
    pub(super) fn is_flowing(&self) -> bool {
        let arriving = |receive: &Receive| matches!(receive.progress, Progress::Arriving { .. });
        let leaving = |send: &Send| send.taken.is_some() && send.buffer.is_none();
        self.peers
            .iter()
            .any(|peer| peer.receives.iter().any(arriving) || peer.sends.iter().any(leaving))
    }
}

/// Calls of this rank.
impl State {
    /// Waits for all ranks to have joined.
    pub(super) fn meet(&self) -> Attempt<()> {
        let is_missing = |peer: &Peer| matches!(peer.presence, Presence::Awaited | Presence::Lost);
        match self.peers.iter().position(is_missing) {
            Some(peer) => Attempt::Blocked(peer),
            None => Attempt::Done(()),
        }
    }

    /// Sends the buffer, which is taken out of the option, if there is room.
    pub(super) fn send(
        &mut self,
        peer: Rank,
        tag: Tag,
        buffer: &mut Option<HostBuffer>,
    ) -> Attempt<Ticket> {
        let has_room = self.peers[peer].can_take_another();
        let Some(buffer) = buffer.take_if(|_| has_room) else {
            return Attempt::Blocked(peer);
        };
        self.traffic.messages_sent += 1;
        self.traffic.bytes_sent += buffer.byte_len() as u64;
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.peers[peer].sends.push(Send {
            sequence,
            taken: None,
            buffer: None,
        });
        let offer = Frame::Offer {
            tag,
            dtype: buffer.dtype(),
            len: buffer.len(),
            sequence,
        };
        self.tell(peer, offer);
        self.outputs.push(Output::SendData {
            peer,
            sequence,
            buffer,
        });
        Attempt::Done(sequence)
    }

    /// The memory of a send that was taken, and when it was.
    pub(super) fn finish(
        &mut self,
        peer: Rank,
        ticket: Ticket,
    ) -> Attempt<(Option<HostBuffer>, Instant)> {
        let sends = &mut self.peers[peer].sends;
        let Some(index) = sends.iter().position(|send| send.sequence == ticket) else {
            return Attempt::Blocked(peer);
        };
        match (sends[index].taken, sends[index].buffer.is_some()) {
            (None, _) => Attempt::Blocked(peer),
            (Some(_), false) => Attempt::Underway(peer),
            (Some(taken), true) => Attempt::Done((sends.swap_remove(index).buffer, taken)),
        }
    }

    pub(super) fn post(
        &mut self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<HostBuffer>,
    ) -> Ticket {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let offers = &mut self.peers[peer].offers;
        let oldest = offers.iter().position(|offer| offer.tag == tag);
        let mut receive = Receive {
            ticket,
            tag,
            expected,
            progress: Progress::Open { memory },
        };
        if let Some(offer) = oldest.and_then(|index| offers.remove(index)) {
            let outputs = receive.take(peer, offer);
            self.outputs.extend(outputs);
        }
        self.peers[peer].receives.push_back(receive);
        ticket
    }

    /// The message of a posted receive, which is over then, and when it arrived.
    pub(super) fn collect(&mut self, peer: Rank, ticket: Ticket) -> Attempt<(HostBuffer, Instant)> {
        let receives = &mut self.peers[peer].receives;
        let Some(index) = receives.iter().position(|receive| receive.ticket == ticket) else {
            return Attempt::Blocked(peer);
        };
        match &receives[index].progress {
            Progress::Open { .. } => return Attempt::Blocked(peer),
            Progress::Arriving { .. } => return Attempt::Underway(peer),
            &Progress::Refused { dtype, len } => {
                let expected = receives[index].expected;
                return Attempt::Failed(CommErrorKind::SizeMismatch {
                    expected_len: expected.len,
                    expected_dtype: expected.dtype,
                    got_len: len,
                    got_dtype: dtype,
                });
            }
            Progress::Arrived { .. } => {}
        }
        let arrived = receives.remove(index).map(|receive| receive.progress);
        let Some(Progress::Arrived { buffer, since }) = arrived else {
            return Attempt::Blocked(peer);
        };
        self.traffic.messages_received += 1;
        self.traffic.bytes_received += buffer.byte_len() as u64;
        Attempt::Done((buffer, since))
    }

    /// Sends the rank's part to the other members, once, and yields all parts when they are there.
    pub(super) fn all_gather(
        &mut self,
        key: (GroupId, u64),
        members: &[Rank],
        part: &mut Option<Vec<u8>>,
    ) -> Attempt<Vec<Vec<u8>>> {
        let world_size = self.world_size();
        if let Some(&stranger) = members.iter().find(|&&member| member >= world_size) {
            return Attempt::Failed(CommErrorKind::InvalidPeer(stranger));
        }
        if !members.contains(&self.rank) {
            return Attempt::Failed(CommErrorKind::InvalidPeer(self.rank));
        }
        self.join(key, members, part);
        if part.is_some() {
            // Another thread of this rank uses the number.
            return Attempt::Blocked(self.rank);
        }
        if let Some(absent) = self.first_absent(key, members) {
            return Attempt::Blocked(absent);
        }
        let parts = self.take_parts(key, members);
        self.remember(key, members, &parts);
        Attempt::Done(parts)
    }

    /// This rank wants nothing more; its requests may still be waited for.
    pub(super) fn depart(&mut self) {
        self.tell_all(&Frame::Depart);
    }

    /// Records a failure of this rank. The first rank that is there decides which of several failures at once is the
    /// group's; if that is another rank it is asked, and the cause is known when it answers or does not in time.
    pub(super) fn poison(&mut self, cause: CommError, now: Instant) {
        if self.cause.is_some() || self.proposal.is_some() {
            return;
        }
        let failure = Failure {
            origin: self.rank,
            cause,
            completed: self.completed.iter().cloned().collect(),
            failed: self.joined_in_vain(),
        };
        self.proposal = Some(Proposal {
            failure,
            asked: None,
            expiry: now + VERDICT_WITHIN,
        });
        self.ask_for_verdict();
    }

    /// Fails without telling anybody: there is no wire any more.
    pub(super) fn give_up(&mut self, reason: &str) {
        let culprit = self.rank;
        self.cause.get_or_insert(CommError {
            rank: culprit,
            peer: None,
            tag: None,
            kind: CommErrorKind::Aborted {
                culprit,
                reason: reason.to_owned(),
            },
        });
    }

    /// Decides about this rank's failure itself if the answer takes too long.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(proposal) = self.proposal.take_if(|proposal| proposal.expiry <= now) {
            self.decide(proposal.failure);
        }
    }

    /// What `peer` offers and this rank has not taken: messages, and all-gathers it has not joined.
    pub(super) fn untaken(&self, peer: Rank) -> Vec<Tag> {
        let offers = self.peers[peer].offers.iter().map(|offer| offer.tag);
        let joined_by_peer_only = |(_, gather): &(&(GroupId, u64), &Gather)| {
            gather.joined.is_none() && !gather.parts[peer].is_empty()
        };
        let gathers = self.gathers.iter().filter(joined_by_peer_only);
        offers
            .chain(gathers.map(|(&(group, operation), _)| gather_tag(group, operation)))
            .collect()
    }
}

/// What the wire reports.
impl State {
    pub(super) fn hear(&mut self, peer: Rank, frame: Frame, now: Instant) {
        match frame {
            Frame::Hello { world_size, .. } => self.welcome(peer, world_size, now),
            Frame::Offer {
                tag,
                dtype,
                len,
                sequence,
            } => self.offered(
                peer,
                Offer {
                    tag,
                    dtype,
                    len,
                    sequence,
                },
            ),
            Frame::Taken { sequence } => {
                if let Some(send) = self.peers[peer].send_mut(sequence) {
                    send.taken = Some(now);
                }
            }
            Frame::Gather {
                group,
                operation,
                bytes,
            } => self.gather_mut((group, operation)).parts[peer].push_back(bytes),
            Frame::Propose(failure) => {
                if self.cause.is_none() {
                    self.decide(failure);
                }
            }
            Frame::Poison(failure) => self.accept(failure),
            Frame::Depart => self.gone(peer, Presence::Departed),
            // Heard by the engine, between groups.
            Frame::Finish { .. } => {}
        }
    }

    pub(super) fn sent(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        if let Some(send) = self.peers[peer].send_mut(sequence) {
            send.buffer = Some(buffer);
        }
    }

    pub(super) fn received(
        &mut self,
        peer: Rank,
        sequence: u64,
        buffer: HostBuffer,
        since: Instant,
    ) {
        let is_arriving = |receive: &&mut Receive| matches!(receive.progress, Progress::Arriving { sequence: arriving } if arriving == sequence);
        let mut receives = self.peers[peer].receives.iter_mut();
        if let Some(receive) = receives.find(is_arriving) {
            receive.progress = Progress::Arrived { buffer, since };
        }
    }

    /// The peer cannot be reached any more: a failure, unless it has departed.
    pub(super) fn lost(&mut self, peer: Rank, reason: &str, now: Instant) {
        if matches!(
            self.peers[peer].presence,
            Presence::Departed | Presence::Lost
        ) {
            return;
        }
        self.gone(peer, Presence::Lost);
        let cause = CommError {
            rank: self.rank,
            peer: Some(peer),
            tag: None,
            kind: CommErrorKind::PeerLost {
                reason: reason.to_owned(),
            },
        };
        self.poison(cause, now);
    }
}

impl State {
    fn welcome(&mut self, peer: Rank, world_size: usize, now: Instant) {
        let own = self.world_size();
        if world_size != own {
            let reason = format!("it is in a group of {world_size} ranks, not of {own}");
            return self.lost(peer, &reason, now);
        }
        let presence = &mut self.peers[peer].presence;
        if *presence == Presence::Awaited {
            *presence = Presence::Present;
        }
    }

    fn offered(&mut self, peer: Rank, offer: Offer) {
        let receives = &mut self.peers[peer].receives;
        match receives
            .iter_mut()
            .find(|receive| receive.is_open_for(offer.tag))
        {
            Some(receive) => {
                let outputs = receive.take(peer, offer);
                self.outputs.extend(outputs);
            }
            None => self.peers[peer].offers.push_back(offer),
        }
    }

    fn gone(&mut self, peer: Rank, presence: Presence) {
        self.peers[peer].presence = presence;
        // It may be the one that was asked for its verdict.
        self.ask_for_verdict();
    }

    fn gather_mut(&mut self, key: (GroupId, u64)) -> &mut Gather {
        let world_size = self.world_size();
        self.gathers
            .entry(key)
            .or_insert_with(|| Gather::new(world_size))
    }

    fn join(&mut self, key: (GroupId, u64), members: &[Rank], part: &mut Option<Vec<u8>>) {
        let rank = self.rank;
        let gather = self.gather_mut(key);
        let is_free = gather.joined.is_none();
        let Some(bytes) = part.take_if(|_| is_free) else {
            return;
        };
        gather.joined = Some(members.to_vec());
        gather.parts[rank].push_back(bytes.clone());
        let (group, operation) = key;
        for &member in members.iter().filter(|&&member| member != rank) {
            let bytes = bytes.clone();
            self.tell(
                member,
                Frame::Gather {
                    group,
                    operation,
                    bytes,
                },
            );
        }
    }

    /// A member whose part is missing; one that has departed if there is such, because it will never come.
    fn first_absent(&self, key: (GroupId, u64), members: &[Rank]) -> Option<Rank> {
        let is_absent = |&rank: &Rank| {
            let gather = self.gathers.get(&key);
            gather.is_none_or(|gather| gather.parts[rank].is_empty())
        };
        let absent = || members.iter().copied().filter(is_absent);
        absent()
            .find(|&rank| self.has_departed(rank))
            .or_else(|| absent().next())
    }

    /// The oldest part of every member; ends this rank's part in the all-gather.
    fn take_parts(&mut self, key: (GroupId, u64), members: &[Rank]) -> Vec<Vec<u8>> {
        let gather = self.gather_mut(key);
        gather.joined = None;
        let mut take = |&member: &Rank| gather.parts[member].pop_front().unwrap_or_default();
        let parts = members.iter().map(&mut take).collect();
        if gather.parts.iter().all(VecDeque::is_empty) {
            self.gathers.remove(&key);
        }
        parts
    }

    fn remember(
        &mut self,
        (group, operation): (GroupId, u64),
        members: &[Rank],
        parts: &[Vec<u8>],
    ) {
        if self.world_size() == 1 {
            return;
        }
        if self.completed.len() == REMEMBERED_GATHERS {
            self.completed.pop_front();
        }
        let parts = members.iter().copied().zip(parts.iter().cloned());
        self.completed.push_back(Completed {
            group,
            operation,
            parts: parts.collect(),
        });
    }

    /// All-gathers that this rank takes part in and cannot finish.
    fn joined_in_vain(&self) -> Vec<(GroupId, u64)> {
        let in_vain = |(key, gather): (&(GroupId, u64), &Gather)| {
            let absent = self.first_absent(*key, gather.joined.as_ref()?);
            absent.map(|_| *key)
        };
        self.gathers.iter().filter_map(in_vain).collect()
    }

    /// Passes this rank's failure, if it has one, to the rank that decides.
    fn ask_for_verdict(&mut self) {
        let Some(mut proposal) = self.proposal.take() else {
            return;
        };
        let judge = self.judge(proposal.failure.cause.culprit());
        if judge == self.rank {
            return self.decide(proposal.failure);
        }
        if proposal.asked != Some(judge) {
            proposal.asked = Some(judge);
            self.tell(judge, Frame::Propose(proposal.failure.clone()));
        }
        self.proposal = Some(proposal);
    }

    /// The first rank that is there and does not itself give cause for complaint; this rank itself in the end.
    fn judge(&self, culprit: Rank) -> Rank {
        let is_there = |rank: Rank| self.peers[rank].presence == Presence::Present;
        let mut ranks = 0..self.world_size();
        ranks
            .find(|&rank| rank == self.rank || (is_there(rank) && rank != culprit))
            .unwrap_or(self.rank)
    }

    /// The group has failed by this, and everybody is told.
    fn decide(&mut self, failure: Failure) {
        self.tell_all(&Frame::Poison(failure.clone()));
        self.accept(failure);
    }

    fn accept(&mut self, failure: Failure) {
        if self.cause.is_some() {
            return;
        }
        for completed in failure.completed {
            self.complete_with(completed);
        }
        for key in failure.failed {
            if let Some(gather) = self.gathers.get_mut(&key) {
                gather.parts[failure.origin].clear();
            }
        }
        self.cause = Some(failure.cause);
        self.proposal = None;
    }

    /// Fills in what of a complete all-gather has not come yet, if this rank waits for it.
    fn complete_with(&mut self, completed: Completed) {
        let key = (completed.group, completed.operation);
        let gather = self.gathers.get_mut(&key);
        let Some(gather) = gather.filter(|gather| gather.joined.is_some()) else {
            return;
        };
        for (rank, part) in completed.parts {
            if let Some(parts) = gather.parts.get_mut(rank).filter(|parts| parts.is_empty()) {
                parts.push_back(part);
            }
        }
    }

    /// Tells all that can still hear.
    fn tell_all(&mut self, frame: &Frame) {
        for peer in 0..self.world_size() {
            self.tell(peer, frame.clone());
        }
    }

    fn tell(&mut self, peer: Rank, frame: Frame) {
        let can_hear = match self.peers[peer].presence {
            Presence::Awaited | Presence::Present => true,
            // It may still wait for its requests.
            Presence::Departed => matches!(frame, Frame::Poison(_)),
            Presence::Lost => false,
        };
        if can_hear && peer != self.rank {
            self.outputs.push(Output::Frame { peer, frame });
        }
    }
}

impl Peer {
    fn new() -> Self {
        Self {
            presence: Presence::Awaited,
            sends: Vec::new(),
            offers: VecDeque::new(),
            receives: VecDeque::new(),
        }
    }

    /// Not even an open receive lifts the limit: the sender cannot know of it.
    fn can_take_another(&self) -> bool {
        let untaken = self.sends.iter().filter(|send| send.taken.is_none());
        self.presence == Presence::Present && untaken.count() < MAX_OUTSTANDING_SENDS
    }

    fn send_mut(&mut self, sequence: u64) -> Option<&mut Send> {
        self.sends.iter_mut().find(|send| send.sequence == sequence)
    }
}

impl Receive {
    fn is_open_for(&self, tag: Tag) -> bool {
        self.tag == tag && matches!(self.progress, Progress::Open { .. })
    }

    /// Takes the message if it is what is expected: gives the wire memory for it, and tells the sender.
    fn take(&mut self, peer: Rank, offer: Offer) -> Vec<Output> {
        let Offer {
            dtype,
            len,
            sequence,
            ..
        } = offer;
        if (Expected { dtype, len }) != self.expected {
            self.progress = Progress::Refused { dtype, len };
            return Vec::new();
        }
        let taken = Progress::Arriving { sequence };
        let memory = match mem::replace(&mut self.progress, taken) {
            Progress::Open { memory } => memory,
            _ => None,
        };
        vec![
            Output::ReceiveData {
                peer,
                sequence,
                buffer: memory_for(self.expected, memory),
            },
            Output::Frame {
                peer,
                frame: Frame::Taken { sequence },
            },
        ]
    }
}

impl Gather {
    fn new(world_size: usize) -> Self {
        Self {
            joined: None,
            parts: vec![VecDeque::new(); world_size],
        }
    }
}

/// The memory that was brought, if it is of the right type, with the length of the message.
fn memory_for(expected: Expected, memory: Option<HostBuffer>) -> HostBuffer {
    let zeros = || HostBuffer::zeros(expected.dtype, expected.len);
    let Some(mut memory) = memory.filter(|memory| memory.dtype() == expected.dtype) else {
        return zeros();
    };
    if memory.capacity() < expected.len {
        return zeros();
    }
    match &mut memory {
        HostBuffer::F32(values) => values.resize(expected.len, Default::default()),
        HostBuffer::F16(values) => values.resize(expected.len, Default::default()),
        HostBuffer::BF16(values) => values.resize(expected.len, Default::default()),
    }
    memory
}
