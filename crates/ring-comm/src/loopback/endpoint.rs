//! One rank's end of a loopback group, and its requests.
//!
//! An endpoint is its rank's membership: dropping it means the rank has departed, or has panicked. Requests keep only the
//! group alive, so they can be finished after the endpoint is gone.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    channel::Ticket,
    group::{Attempt, Entry, Group},
};
use crate::{
    attempt::{Subject, gather_tag, panicked},
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    recorder::{Call, FlightRecord},
    transport::{Expected, GroupId, Rank, RecvRequest, SendRequest, Tag, Traffic, Transport},
};

/// One rank of a [`Loopback`](super::Loopback) group.
#[derive(Debug)]
pub struct LoopbackEndpoint<B: Buffer> {
    membership: Membership<B>,
}

/// Ends a rank's part in the group when dropped, in the way the thread ends.
#[derive(Debug)]
pub(super) struct Membership<B: Buffer> {
    group: Arc<Group<B>>,
    rank: Rank,
}

impl<B: Buffer> Drop for Membership<B> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.group.poison(self.rank, panicked(self.rank));
        } else {
            self.group.depart(self.rank);
        }
    }
}

impl<B: Buffer> LoopbackEndpoint<B> {
    pub(super) fn new(group: Arc<Group<B>>, rank: Rank) -> Self {
        Self {
            membership: Membership { group, rank },
        }
    }

    /// A second membership of the same rank; the first to be dropped ends the rank's part.
    pub(super) fn membership(&self) -> Membership<B> {
        Membership {
            group: Arc::clone(self.group()),
            rank: self.rank(),
        }
    }

    fn group(&self) -> &Arc<Group<B>> {
        &self.membership.group
    }

    fn subject(&self, peer: Rank, tag: Tag) -> Result<Subject, CommError> {
        let subject = Subject {
            rank: self.rank(),
            peer: Some(peer),
            tag: Some(tag),
        };
        if peer == self.rank() || peer >= self.world_size() {
            let error = subject.error(CommErrorKind::InvalidPeer(peer));
            return Err(error.with_history(self.flight_record()));
        }
        Ok(subject)
    }

    /// Lets the deadline of every wait in the group pass, as a model checker cannot.
    #[cfg(any(loom, shuttle))]
    pub fn pass_deadline(&self) {
        self.group().pass_deadline();
    }

    fn request(&self, subject: Subject, peer: Rank, ticket: Ticket) -> Request<B> {
        Request {
            group: Arc::clone(self.group()),
            subject,
            peer,
            ticket,
            is_finished: false,
        }
    }
}

impl<B: Buffer> Transport<B> for LoopbackEndpoint<B> {
    fn rank(&self) -> Rank {
        self.membership.rank
    }

    fn world_size(&self) -> usize {
        self.group().world_size()
    }

    fn deadline(&self) -> Duration {
        self.group().deadline()
    }

    fn isend(&self, peer: Rank, tag: Tag, buffer: B) -> Result<SendRequest<B>, CommError> {
        let rank = self.rank();
        let subject = self.subject(peer, tag)?;
        let entry = Entry::New(Call::Send, buffer.byte_len());
        let mut buffer = Some(buffer);
        let ticket = self.group().complete(subject, entry, |state, ticket| {
            let Some(buffer) = buffer.take_if(|_| state.can_send(rank, peer)) else {
                return Attempt::Blocked(peer);
            };
            state.send(rank, ticket, peer, tag, buffer);
            Attempt::Done(ticket)
        })?;
        let request = self.request(subject, peer, ticket);
        Ok(SendRequest::loopback(LoopbackSend(request)))
    }

    fn irecv(&self, peer: Rank, tag: Tag, expected: Expected) -> Result<RecvRequest<B>, CommError> {
        self.irecv_into(peer, tag, expected, None)
    }

    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        mut memory: Option<B>,
    ) -> Result<RecvRequest<B>, CommError> {
        let rank = self.rank();
        let subject = self.subject(peer, tag)?;
        let bytes = expected.len.saturating_mul(expected.dtype.size());
        let entry = Entry::New(Call::Receive, bytes);
        let ticket = self.group().complete(subject, entry, |state, ticket| {
            state.post(rank, ticket, peer, tag, memory.take());
            Attempt::Done(ticket)
        })?;
        let request = self.request(subject, peer, ticket);
        Ok(RecvRequest::loopback(LoopbackRecv { request, expected }))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let rank = self.rank();
        let subject = Subject {
            rank,
            peer: None,
            tag: Some(gather_tag(group, operation)),
        };
        let entry = Entry::New(Call::AllGather, bytes.len());
        let mut part = Some(bytes);
        self.group().complete(subject, entry, |state, ticket| {
            let outcome = state.all_gather(rank, (group, operation), members, &mut part);
            if let Attempt::Done(_) = outcome {
                state.ended(rank, ticket);
            }
            outcome
        })
    }

    fn poison(&self, cause: CommError) {
        self.group().poison(self.rank(), cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.group().poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.group().traffic(self.rank())
    }

    fn flight_record(&self) -> FlightRecord {
        self.group().flight_record(self.rank())
    }
}

/// What a send and a receive in progress have in common: dropping it unfinished poisons the group.
#[derive(Debug)]
struct Request<B: Buffer> {
    group: Arc<Group<B>>,
    subject: Subject,
    peer: Rank,
    ticket: Ticket,
    is_finished: bool,
}

impl<B: Buffer> Drop for Request<B> {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let culprit = self.subject.rank;
        self.group.abandon(culprit, self.ticket);
        let cause = if thread::panicking() {
            panicked(culprit)
        } else {
            self.subject
                .error(CommErrorKind::RequestDropped { culprit })
        };
        self.group.poison(culprit, cause);
    }
}

#[derive(Debug)]
pub(crate) struct LoopbackSend<B: Buffer>(Request<B>);

impl<B: Buffer> LoopbackSend<B> {
    /// The receiver's memory, and when it took the message.
    pub(crate) fn wait(mut self) -> Result<(Option<B>, Instant), CommError> {
        let Request {
            subject,
            peer,
            ticket,
            ..
        } = self.0;
        let entry = Entry::Request(ticket);
        let taken = self.0.group.complete(subject, entry, |state, _| {
            state.finish(subject.rank, peer, ticket)
        })?;
        self.0.is_finished = true;
        Ok(taken)
    }
}

#[derive(Debug)]
pub(crate) struct LoopbackRecv<B: Buffer> {
    request: Request<B>,
    expected: Expected,
}

impl<B: Buffer> LoopbackRecv<B> {
    /// The message, and when it arrived.
    pub(crate) fn wait(mut self) -> Result<(B, Instant), CommError> {
        let Request {
            subject,
            peer,
            ticket,
            ..
        } = self.request;
        let entry = Entry::Request(ticket);
        let arrived = self.request.group.complete(subject, entry, |state, _| {
            state.collect(subject.rank, peer, ticket, self.expected)
        })?;
        self.request.is_finished = true;
        Ok(arrived)
    }
}
