//! The transport of a rank that is a process, and its requests.
//!
//! An endpoint is its rank's membership: dropping it means the rank has departed, or has panicked. Requests keep the
//! engine going, so they can be finished after the endpoint is gone. A request owns its memory only until it is given to
//! the engine, which keeps it until the network is done with it, whatever becomes of the request.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    engine::Engine,
    session::{Entry, Session},
    state::{Attempt, Ticket},
};
use crate::{
    attempt::{Subject, gather_tag, panicked},
    buffer::{Buffer, HostBuffer},
    error::{CommError, CommErrorKind},
    recorder::{Call, FlightRecord, RecordNumber},
    transport::{
        Expected, GroupId, PendingRecv, PendingSend, Rank, RecvRequest, SendRequest, Tag, Traffic,
        Transport,
    },
};

/// One rank of a group whose ranks are processes.
#[derive(Debug)]
pub struct RemoteEndpoint<B: Buffer = HostBuffer> {
    membership: Membership<B>,
}

/// Ends a rank's part in the group when dropped, in the way the thread ends.
#[derive(Debug)]
pub(super) struct Membership<B: Buffer>(Arc<Handle<B>>);

/// Keeps the group going for this rank: held by the endpoint and by every request.
#[derive(Debug)]
struct Handle<B: Buffer> {
    session: Arc<Session<B>>,
    /// Dropped after the session is closed.
    _engine: Arc<Engine<B>>,
}

impl<B: Buffer> Drop for Handle<B> {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl<B: Buffer> Drop for Membership<B> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.session.poison(panicked(self.0.session.rank()));
        }
        self.0.session.depart();
    }
}

impl<B: Buffer> RemoteEndpoint<B> {
    pub(super) fn new(engine: Arc<Engine<B>>, session: Arc<Session<B>>) -> Self {
        Self {
            membership: Membership(Arc::new(Handle {
                session,
                _engine: engine,
            })),
        }
    }

    /// A second membership of the same rank; the first to be dropped ends the rank's part.
    #[cfg(test)]
    pub(super) fn membership(&self) -> Membership<B> {
        Membership(Arc::clone(self.handle()))
    }

    fn handle(&self) -> &Arc<Handle<B>> {
        &self.membership.0
    }

    fn session(&self) -> &Session<B> {
        &self.handle().session
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

    fn request(
        &self,
        subject: Subject,
        peer: Rank,
        ticket: Ticket,
        record: Option<RecordNumber>,
    ) -> Request<B> {
        Request {
            record,
            handle: Arc::clone(self.handle()),
            subject,
            peer,
            ticket,
            is_finished: false,
        }
    }
}

impl<B: Buffer> Transport<B> for RemoteEndpoint<B> {
    fn rank(&self) -> Rank {
        self.session().rank()
    }

    fn world_size(&self) -> usize {
        self.session().world_size()
    }

    fn deadline(&self) -> Duration {
        self.session().deadline()
    }

    fn isend(&self, peer: Rank, tag: Tag, buffer: B) -> Result<SendRequest<B>, CommError> {
        let subject = self.subject(peer, tag)?;
        let entry = Entry::New(Call::Send, buffer.byte_len());
        let mut buffer = Some(buffer);
        let mut record = None;
        let ticket = self.session().complete(subject, entry, |state| {
            record = state.current();
            state.send(peer, tag, &mut buffer)
        })?;
        let request = self.request(subject, peer, ticket, record);
        Ok(SendRequest::new(RemoteSend(request)))
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
        let subject = self.subject(peer, tag)?;
        let entry = Entry::New(
            Call::Receive,
            expected.len.saturating_mul(expected.dtype.size()),
        );
        let mut record = None;
        let ticket = self.session().complete(subject, entry, |state| {
            record = state.current();
            Attempt::Done(state.post(peer, tag, expected, memory.take()))
        })?;
        let request = self.request(subject, peer, ticket, record);
        Ok(RecvRequest::new(RemoteReceive(request)))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let subject = Subject {
            rank: self.rank(),
            peer: None,
            tag: Some(gather_tag(group, operation)),
        };
        let entry = Entry::New(Call::AllGather, bytes.len());
        let mut part = Some(bytes);
        self.session().complete_informed(subject, entry, |state| {
            state.all_gather((group, operation), members, &mut part)
        })
    }

    fn poison(&self, cause: CommError) {
        self.session().poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.session().poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.session().traffic()
    }

    fn flight_record(&self) -> FlightRecord {
        self.session().flight_record()
    }
}

/// What a send and a receive in progress have in common: dropping it unfinished poisons the group.
#[derive(Debug)]
struct Request<B: Buffer> {
    handle: Arc<Handle<B>>,
    subject: Subject,
    peer: Rank,
    ticket: Ticket,
    record: Option<RecordNumber>,
    is_finished: bool,
}

impl<B: Buffer> Drop for Request<B> {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        self.handle.session.drop_request(self.record);
        let culprit = self.subject.rank;
        self.handle.session.poison(if thread::panicking() {
            panicked(culprit)
        } else {
            self.subject
                .error(CommErrorKind::RequestDropped { culprit })
        });
    }
}

#[derive(Debug)]
struct RemoteSend<B: Buffer>(Request<B>);

impl<B: Buffer> PendingSend<B> for RemoteSend<B> {
    fn wait(self: Box<Self>) -> Result<Option<B>, CommError> {
        self.wait_timed().map(|(memory, _)| memory)
    }

    fn wait_timed(mut self: Box<Self>) -> Result<(Option<B>, Instant), CommError> {
        let request = &mut self.0;
        let (peer, ticket) = (request.peer, request.ticket);
        let entry = Entry::Request(request.record);
        let session = &request.handle.session;
        let finished =
            session.complete(request.subject, entry, |state| state.finish(peer, ticket))?;
        request.is_finished = true;
        Ok(finished)
    }
}

#[derive(Debug)]
struct RemoteReceive<B: Buffer>(Request<B>);

impl<B: Buffer> PendingRecv<B> for RemoteReceive<B> {
    fn wait(self: Box<Self>) -> Result<B, CommError> {
        self.wait_timed().map(|(buffer, _)| buffer)
    }

    fn wait_timed(mut self: Box<Self>) -> Result<(B, Instant), CommError> {
        let request = &mut self.0;
        let (peer, ticket) = (request.peer, request.ticket);
        let entry = Entry::Request(request.record);
        let session = &request.handle.session;
        let collected =
            session.complete(request.subject, entry, |state| state.collect(peer, ticket))?;
        request.is_finished = true;
        Ok(collected)
    }
}
