//! A transport that keeps the memory accounts of [`heap`](crate::heap) right when messages change hands.
//!
//! Loopback moves a buffer from thread to thread without a copy, so one piece of memory serves sender and receiver. Elsewhere
//! there are two: the sender's, until the message is taken, and the receiver's, from the moment the receive is posted. Each
//! rank is charged for that, whatever the other does:
//!
//! - a sender holds its message from `isend` to the end of the send's wait, and then what the send yields;
//! - a receiver holds room for its message from `irecv` to the end of the receive's wait, and then the message itself. Memory
//!   that it brings is that room.

use std::{fmt, time::Duration};

use ring_comm::{
    CommError, Expected, GroupId, PendingRecv, PendingSend, Rank, RecvRequest, SendRequest, Tag,
    Traffic, Transport,
    buffer::{Buffer, HostBuffer},
};

use crate::heap::charge;

/// A transport whose messages are charged to the rank that holds them.
#[derive(Debug)]
pub struct Metered<T>(pub T);

impl<T: Transport<HostBuffer> + fmt::Debug> Transport<HostBuffer> for Metered<T> {
    fn rank(&self) -> Rank {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn deadline(&self) -> Duration {
        self.0.deadline()
    }

    fn isend(
        &self,
        peer: Rank,
        tag: Tag,
        buffer: HostBuffer,
    ) -> Result<SendRequest<HostBuffer>, CommError> {
        let bytes = held_by(&buffer);
        let inner = self.0.isend(peer, tag, buffer)?;
        Ok(SendRequest::new(MeteredSend { inner, bytes }))
    }

    fn irecv(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
    ) -> Result<RecvRequest<HostBuffer>, CommError> {
        self.irecv_into(peer, tag, expected, None)
    }

    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<HostBuffer>,
    ) -> Result<RecvRequest<HostBuffer>, CommError> {
        let room = (expected.len * expected.dtype.size()) as i64;
        let brought = memory.as_ref().map(held_by);
        let inner = self.0.irecv_into(peer, tag, expected, memory)?;
        if brought.is_none() {
            charge(room);
        }
        let bytes = brought.unwrap_or(room);
        Ok(RecvRequest::new(MeteredRecv { inner, bytes }))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        self.0
            .all_gather_bytes_among(group, members, operation, bytes)
    }

    fn global_rank(&self, rank: Rank) -> Rank {
        self.0.global_rank(rank)
    }

    fn poison(&self, cause: CommError) {
        self.0.poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.0.poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.0.traffic()
    }
}

#[derive(Debug)]
struct MeteredSend {
    inner: SendRequest<HostBuffer>,
    bytes: i64,
}

impl PendingSend<HostBuffer> for MeteredSend {
    fn wait(self: Box<Self>) -> Result<Option<HostBuffer>, CommError> {
        let returned = self.inner.wait()?;
        // The receiver has the message now, and will release it.
        charge(returned.as_ref().map_or(0, held_by) - self.bytes);
        Ok(returned)
    }
}

#[derive(Debug)]
struct MeteredRecv {
    inner: RecvRequest<HostBuffer>,
    bytes: i64,
}

impl PendingRecv<HostBuffer> for MeteredRecv {
    fn wait(self: Box<Self>) -> Result<HostBuffer, CommError> {
        let buffer = self.inner.wait()?;
        charge(held_by(&buffer) - self.bytes);
        Ok(buffer)
    }
}

/// Bytes that a release of the buffer gives back: of its memory, which may be larger than its contents.
fn held_by(buffer: &HostBuffer) -> i64 {
    let elements = match buffer {
        HostBuffer::F32(values) => values.capacity(),
        HostBuffer::F16(values) => values.capacity(),
        HostBuffer::BF16(values) => values.capacity(),
    };
    (elements * buffer.dtype().size()) as i64
}
