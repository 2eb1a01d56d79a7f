//! The seam between the algorithm and the network: [`Transport`].
//!
//! The rules every backend keeps, and every caller may rely on:
//!
//! - A send takes ownership of its buffer, a receive yields one. A send is complete when the peer has taken it.
//! - Memory for memory: a receive may bring memory for its message ([`Transport::irecv_into`]), a send may yield memory when
//!   it is complete. Ranks that bring as much as a message takes neither gain nor lose memory, however often they exchange.
//! - Messages are matched by `(peer, tag)`; two messages with the same peer and tag arrive in the order sent, in the
//!   receives in the order posted.
//! - A message is *taken* as soon as a posted receive matches it, whether or not that receive is being waited for. A rank
//!   therefore holds at most its posted receives and [`MAX_OUTSTANDING_SENDS`] messages per peer.
//! - At most [`MAX_OUTSTANDING_SENDS`] sends to one peer may be untaken; a further `isend` waits, up to the deadline.
//! - Every wait ends by the deadline, with the result or with a typed error.
//! - The first error poisons the group: every rank's pending and later calls return that original cause.
//! - A request must be waited for. Dropping one without is a programming error that poisons the group, because its
//!   peer would otherwise wait for a message that nobody takes. This does not depend on whether the message was already
//!   taken, so that the mistake shows on every run.
//! - Groups that are split off ([`Communicator::split`](crate::Communicator::split)) share the fate of the whole: what poisons
//!   one poisons all, and errors number the ranks as the whole does.
//! - Every rank remembers its last operations, and every error tells them ([`CommError::history`]).
//! - A rank that panics poisons the group; one that simply drops its endpoint has *departed*: what it sent can still be
//!   received, and whoever needs anything more from it gets an error that names it.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    buffer::{Buffer, DType},
    checksum::Fnv1a,
    error::{CommError, CommErrorKind},
    loopback::{LoopbackRecv, LoopbackSend},
    recorder::{FlightRecord, FlightRecorder},
};

/// Number of a rank in its group, `0..world_size`.
pub type Rank = usize;

/// Sends to one peer that may be untaken at the same time: rows of one hop, the few numbers that go along with them, and
/// gradients of another hop. With that many, no rank that walks a plan ever waits to send.
pub const MAX_OUTSTANDING_SENDS: usize = 3;

/// What a message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Payload {
    /// Selected key and value rows, in a forward pass.
    KeyValue,
    /// The same rows again, in the backward pass of that forward pass.
    KeyValueAgain,
    /// Gradients of key and value rows, on their way home.
    KeyValueGradient,
    /// Query rows, in a backward pass with the gradients of their outputs.
    Query,
    /// Numbers of query rows: log-sum-exp, delta.
    Statistics,
    /// Gradients of query rows, on their way home.
    QueryGradient,
    /// Outputs of query rows, on their way home.
    Output,
    /// A part of a collective operation.
    Collective,
    /// Anything else, numbered by the caller.
    Custom(u32),
}

/// Tells groups of the same ranks apart: the group that the transport was made for, and those split off it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct GroupId(u64);

impl GroupId {
    /// All ranks of the transport.
    pub const WHOLE: GroupId = GroupId(0);

    /// The group that `operation` splits off for `color`.
    pub(crate) fn split_off(operation: u64, color: u64) -> Self {
        Self(Fnv1a::of(
            [operation, color].map(u64::to_le_bytes).as_flattened(),
        ))
    }

    /// What group `inner` of this group is called outside.
    pub(crate) fn within(self, inner: Self) -> Self {
        match inner {
            Self::WHOLE => self,
            Self(inner) => Self(Fnv1a::of(
                [self.0, inner].map(u64::to_le_bytes).as_flattened(),
            )),
        }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0 >> 32)
    }
}

/// Identifies a message between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tag {
    /// The group whose operation it is. Set by the group itself; users of a transport leave it at [`GroupId::WHOLE`].
    pub group: GroupId,
    /// Sequence number of the operation (one attention with its backward, one collective) within its group.
    pub operation: u64,
    /// Step of the operation.
    pub step: u32,
    /// What the message carries.
    pub payload: Payload,
}

impl Tag {
    /// A message of the group that sends it.
    pub const fn new(operation: u64, step: u32, payload: Payload) -> Self {
        Self {
            group: GroupId::WHOLE,
            operation,
            step,
            payload,
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of operation {} step {}",
            self.payload, self.operation, self.step
        )?;
        match self.group {
            GroupId::WHOLE => Ok(()),
            group => write!(f, " of group {group}"),
        }
    }
}

/// What a receive expects; anything else is an error, never a cast or a truncation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Element type.
    pub dtype: DType,
    /// Number of elements.
    pub len: usize,
}

/// What one rank has sent and received so far, in all groups it is in: the payloads of its messages, without the control data
/// of [`Transport::all_gather_bytes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes of all buffers sent.
    pub bytes_sent: u64,
    /// Bytes of all buffers received.
    pub bytes_received: u64,
    /// Number of messages sent.
    pub messages_sent: u64,
    /// Number of messages received.
    pub messages_received: u64,
}

/// One rank's endpoint in a group of `world_size` ranks that exchange buffers of type `B`.
pub trait Transport<B: Buffer>: fmt::Debug + Send + Sync {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks in the group.
    fn world_size(&self) -> usize;

    /// What errors call `rank` of this group: its number among all ranks, if this group was split off theirs.
    fn global_rank(&self, rank: Rank) -> Rank {
        rank
    }

    /// Longest time any single wait may take.
    fn deadline(&self) -> Duration;

    /// Starts sending `buffer` to `peer`.
    ///
    /// Returns at once unless [`MAX_OUTSTANDING_SENDS`] sends to that peer are untaken; then it waits for one to be taken.
    ///
    /// # Errors
    /// [`CommError`] if the group is poisoned, the peer departed, the rank is out of range, or the deadline passed.
    fn isend(&self, peer: Rank, tag: Tag, buffer: B) -> Result<SendRequest<B>, CommError>;

    /// Starts receiving the message `tag` from `peer`.
    ///
    /// # Errors
    /// [`CommError`] if the group is poisoned or the rank is out of range.
    fn irecv(&self, peer: Rank, tag: Tag, expected: Expected) -> Result<RecvRequest<B>, CommError>;

    /// As [`irecv`](Self::irecv), and brings `memory`, with room for what is expected.
    ///
    /// A transport that copies receives into it. One that moves buffers gives it to the sender, whose send yields it. One
    /// that needs no memory, as by default, drops it.
    ///
    /// # Errors
    /// As [`irecv`](Self::irecv).
    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<B>,
    ) -> Result<RecvRequest<B>, CommError> {
        drop(memory);
        self.irecv(peer, tag, expected)
    }

    /// Gives every rank's `bytes` to every rank, in rank order. For control data (hashes, fields), not for tensors.
    ///
    /// All ranks must call it, with the same `operation` number.
    ///
    /// # Errors
    /// [`CommError`] if the group is poisoned, a peer departed, or the deadline passed.
    fn all_gather_bytes(&self, operation: u64, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CommError> {
        let everybody: Vec<Rank> = (0..self.world_size()).collect();
        self.all_gather_bytes_among(GroupId::WHOLE, &everybody, operation, bytes)
    }

    /// As [`all_gather_bytes`](Self::all_gather_bytes), among the ranks `members`, of which this is one; in their order.
    ///
    /// All of them must call it, with the same group, members and `operation` number.
    ///
    /// # Errors
    /// As [`all_gather_bytes`](Self::all_gather_bytes).
    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError>;

    /// Poisons the group: every rank's pending and later calls return an error that carries `reason` and names this rank.
    fn abort(&self, reason: &str) {
        let culprit = self.global_rank(self.rank());
        let kind = CommErrorKind::Aborted {
            culprit,
            reason: reason.to_owned(),
        };
        self.poison(CommError::new(culprit, None, None, kind));
    }

    /// Poisons the group with `cause`, an error found above the transport; does nothing if the group is poisoned already.
    /// A cause without a history gets this rank's.
    fn poison(&self, cause: CommError);

    /// The error that poisoned the group, if one did.
    fn poisoned(&self) -> Option<CommError>;

    /// What this rank has sent and received so far.
    fn traffic(&self) -> Traffic;

    /// The last operations of this rank, in all groups it is in. Empty, as by default, if the transport records none.
    fn flight_record(&self) -> FlightRecord {
        FlightRecorder::with_capacity(self.global_rank(self.rank()), 0).snapshot()
    }
}

/// What a backend implements for a send in progress. Dropping it unfinished must poison the group.
pub trait PendingSend<B>: Send + fmt::Debug {
    /// Waits until the peer has taken the message. Yields memory for the next one, with arbitrary contents: the buffer if the
    /// transport copied out of it, or what the receiver brought if the buffer moved; `None` if there is none.
    ///
    /// # Errors
    /// [`CommError`] on poison, departure of the peer, or when the deadline passes.
    fn wait(self: Box<Self>) -> Result<Option<B>, CommError>;

    /// As [`wait`](Self::wait), and tells when the message was taken; by default, the end of the wait.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    fn wait_timed(self: Box<Self>) -> Result<(Option<B>, Instant), CommError> {
        self.wait().map(|memory| (memory, Instant::now()))
    }
}

/// What a backend implements for a receive in progress. Dropping it unfinished must poison the group.
pub trait PendingRecv<B>: Send + fmt::Debug {
    /// Waits for the message.
    ///
    /// # Errors
    /// [`CommError`] on poison, departure of the peer, a message of another size or type, or when the deadline passes.
    fn wait(self: Box<Self>) -> Result<B, CommError>;

    /// As [`wait`](Self::wait), and tells when the message arrived; by default, the end of the wait.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    fn wait_timed(self: Box<Self>) -> Result<(B, Instant), CommError> {
        self.wait().map(|buffer| (buffer, Instant::now()))
    }
}

/// A send in progress; must be waited for, once:
///
/// ```compile_fail,E0382
/// # use ring_comm::{CommError, SendRequest, buffer::HostBuffer};
/// fn wait_twice(send: SendRequest<HostBuffer>) -> Result<(), CommError> {
///     send.wait()?;
///     send.wait()?; // it was moved by the first
///     Ok(())
/// }
/// ```
#[must_use = "a send must be waited for; dropping it poisons the group"]
#[derive(Debug)]
pub struct SendRequest<B: Buffer>(Request<LoopbackSend<B>, dyn PendingSend<B>>);

/// A receive in progress; must be waited for, once:
///
/// ```compile_fail,E0382
/// # use ring_comm::{CommError, RecvRequest, buffer::HostBuffer};
/// fn wait_twice(receive: RecvRequest<HostBuffer>) -> Result<(), CommError> {
///     receive.wait()?;
///     receive.wait()?; // it was moved by the first
///     Ok(())
/// }
/// ```
#[must_use = "a receive must be waited for; dropping it poisons the group"]
#[derive(Debug)]
pub struct RecvRequest<B: Buffer>(Request<LoopbackRecv<B>, dyn PendingRecv<B>>);

/// Loopback's requests lie here in place, so that a message there costs no allocation; those of other backends in a box.
#[derive(Debug)]
enum Request<L, D: ?Sized> {
    Loopback(L),
    Other(Box<D>),
}

impl<B: Buffer> SendRequest<B> {
    /// Wraps a backend's request.
    pub fn new(pending: impl PendingSend<B> + 'static) -> Self {
        Self(Request::Other(Box::new(pending)))
    }

    pub(crate) fn loopback(pending: LoopbackSend<B>) -> Self {
        Self(Request::Loopback(pending))
    }

    /// Waits until the peer has taken the message; yields memory for the next one if the transport has any to give.
    ///
    /// # Errors
    /// [`CommError`] on poison, departure of the peer, or when the deadline passes.
    pub fn wait(self) -> Result<Option<B>, CommError> {
        self.wait_timed().map(|(memory, _)| memory)
    }

    /// As [`wait`](Self::wait), and tells when the message was taken; the end of the wait if the transport does not know.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_timed(self) -> Result<(Option<B>, Instant), CommError> {
        match self.0 {
            Request::Loopback(pending) => pending.wait(),
            Request::Other(pending) => pending.wait_timed(),
        }
    }
}

impl<B: Buffer> RecvRequest<B> {
    /// Wraps a backend's request.
    pub fn new(pending: impl PendingRecv<B> + 'static) -> Self {
        Self(Request::Other(Box::new(pending)))
    }

    pub(crate) fn loopback(pending: LoopbackRecv<B>) -> Self {
        Self(Request::Loopback(pending))
    }

    /// Waits for the message.
    ///
    /// # Errors
    /// [`CommError`] on poison, departure of the peer, a message of another size or type, or when the deadline passes.
    pub fn wait(self) -> Result<B, CommError> {
        self.wait_timed().map(|(buffer, _)| buffer)
    }

    /// As [`wait`](Self::wait), and tells when the message arrived; the end of the wait if the transport does not know.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_timed(self) -> Result<(B, Instant), CommError> {
        match self.0 {
            Request::Loopback(pending) => pending.wait(),
            Request::Other(pending) => pending.wait_timed(),
        }
    }
}
