//! What one rank knows of its group, and the rules of a transport on it: no input, no output, no clock of its own.
//!
//! Local calls and what the wire reports change the [`State`]; what it wants done on the wire it leaves in its
//! [outputs](State::take_outputs), in order.

mod failure;
mod gathers;
mod messages;
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
    buffer::{Buffer, DType},
    error::{CommError, CommErrorKind},
    recorder::{self, Call, FlightRecorder, RecordNumber},
    transport::{Expected, GroupId, Rank, Tag, Traffic},
};

/// How long a rank that failed waits for the verdict of the rank that decides which failure is the group's; then as long for that
/// of the next.
pub(super) const VERDICT_WITHIN: Duration = Duration::from_millis(500);
/// How long the rank that decides waits for further complaints when a deadline has passed.
pub(super) const HEARING: Duration = Duration::from_millis(50);
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
#[derive(Debug)]
pub(super) enum Output<B> {
    Frame {
        peer: Rank,
        frame: Frame,
    },
    SendData {
        peer: Rank,
        sequence: u64,
        buffer: B,
    },
    ReceiveData {
        peer: Rank,
        sequence: u64,
        expected: Expected,
        /// What the receive has brought.
        memory: Option<B>,
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
struct Peer<B> {
    presence: Presence,
    sends: Vec<Send<B>>,
    /// Messages it has offered and nobody has taken.
    offers: VecDeque<Offer>,
    receives: VecDeque<Receive<B>>,
}

#[derive(Debug)]
struct Send<B> {
    sequence: u64,
    record: Option<RecordNumber>,
    taken: Option<Instant>,
    /// The memory, when the data has left.
    buffer: Option<B>,
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    tag: Tag,
    dtype: DType,
    len: usize,
    sequence: u64,
}

#[derive(Debug)]
struct Receive<B> {
    ticket: Ticket,
    record: Option<RecordNumber>,
    tag: Tag,
    expected: Expected,
    progress: Progress<B>,
}

/// How far a posted receive is.
#[derive(Debug)]
enum Progress<B> {
    /// Nothing is offered yet; there may be memory for it.
    Open {
        memory: Option<B>,
    },
    /// Something else is offered than what is expected.
    Refused {
        dtype: DType,
        len: usize,
        sequence: u64,
    },
    Arriving {
        sequence: u64,
    },
    Arrived {
        buffer: B,
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
    /// Who was asked before and did not answer.
    silent: Option<Rank>,
    /// When to go on without an answer.
    expiry: Instant,
}

/// Deadlines that have passed, of which this rank decides which is the group's failure.
///
/// Ranks that wait for ranks that wait lose their patience at about the same time. The one to blame is who is waited for and does not
/// complain.
#[derive(Debug)]
struct Trial {
    complaints: Vec<Failure>,
    /// When to decide.
    expiry: Instant,
}

#[derive(Debug)]
pub(super) struct State<B> {
    rank: Rank,
    /// By rank; that of this rank itself is never used.
    peers: Vec<Peer<B>>,
    gathers: BTreeMap<(GroupId, u64), Gather>,
    completed: VecDeque<Completed>,
    traffic: Traffic,
    cause: Option<CommError>,
    proposal: Option<Proposal>,
    trial: Option<Trial>,
    outputs: Vec<Output<B>>,
    next_ticket: Ticket,
    next_sequence: u64,
    recorder: FlightRecorder,
    /// The operation of the call that is being tried.
    current: Option<RecordNumber>,
}

impl<B: Buffer> State<B> {
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
            trial: None,
            outputs: Vec::new(),
            next_ticket: 0,
            next_sequence: first_sequence,
            recorder: FlightRecorder::new(rank),
            current: None,
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

    pub(super) fn recorder(&mut self) -> &mut FlightRecorder {
        &mut self.recorder
    }

    /// The operation of the call that is being tried.
    pub(super) fn current(&self) -> Option<RecordNumber> {
        self.current
    }

    pub(super) fn set_current(&mut self, record: Option<RecordNumber>) {
        self.current = record;
    }

    fn advance(&mut self, record: Option<RecordNumber>, progress: recorder::Progress) {
        if let Some(number) = record {
            self.recorder.advance(number, progress);
        }
    }

    /// What is to be done on the wire, in order.
    pub(super) fn take_outputs(&mut self) -> Vec<Output<B>> {
        mem::take(&mut self.outputs)
    }

    pub(super) fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// Whether a message is expected or to be taken.
    pub(super) fn expects_something(&self) -> bool {
        let open = |receive: &Receive<B>| !matches!(receive.progress, Progress::Arrived { .. });
        let unfinished = |send: &Send<B>| send.taken.is_none() || send.buffer.is_none();
        let peers = || self.peers.iter();
        self.proposal.is_some()
            || self.trial.is_some()
            || peers()
                .any(|peer| peer.sends.iter().any(unfinished) || peer.receives.iter().any(open))
    }

    /// Whether data is being copied to or from this rank.
    pub(super) fn is_flowing(&self) -> bool {
        let arriving = |receive: &Receive<B>| matches!(receive.progress, Progress::Arriving { .. });
        let leaving = |send: &Send<B>| send.taken.is_some() && send.buffer.is_none();
        self.peers
            .iter()
            .any(|peer| peer.receives.iter().any(arriving) || peer.sends.iter().any(leaving))
    }
}

/// Calls of this rank.
impl<B: Buffer> State<B> {
    /// Waits for all ranks to have joined.
    pub(super) fn meet(&self) -> Attempt<()> {
        let is_missing =
            |peer: &Peer<B>| matches!(peer.presence, Presence::Awaited | Presence::Lost);
        match self.peers.iter().position(is_missing) {
            Some(peer) => Attempt::Blocked(peer),
            None => Attempt::Done(()),
        }
    }

    /// This rank wants nothing more; its requests may still be waited for.
    pub(super) fn depart(&mut self) {
        let number = self.recorder.begin(Call::Depart, None, None, 0);
        self.recorder.advance(number, recorder::Progress::Ended);
        self.tell_all(&Frame::Depart);
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
impl<B: Buffer> State<B> {
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
                    let record = send.record;
                    self.advance(record, recorder::Progress::Matched);
                }
            }
            Frame::Gather {
                group,
                operation,
                bytes,
            } => self.gather_mut((group, operation)).parts[peer].push_back(bytes),
            Frame::Propose(failure) => {
                if self.cause.is_none() {
                    self.consider(failure, now);
                }
            }
            Frame::Poison(failure) => self.accept(failure),
            Frame::Depart => self.gone(peer, Presence::Departed, now),
            // Heard by the engine, between groups.
            Frame::Finish { .. } => {}
        }
    }
}

impl<B: Buffer> State<B> {
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

    fn gone(&mut self, peer: Rank, presence: Presence, now: Instant) {
        self.peers[peer].presence = presence;
        // It may be the one that was asked for its verdict.
        self.ask_for_verdict(now);
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

impl<B> Peer<B> {
    fn new() -> Self {
        Self {
            presence: Presence::Awaited,
            sends: Vec::new(),
            offers: VecDeque::new(),
            receives: VecDeque::new(),
        }
    }
}
