//! Any transport of host memory, for buffers elsewhere: [`Staged`].

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use crate::{
    buffer::{Buffer, HostBuffer},
    error::{CommError, CommErrorKind},
    pool::BufferPool,
    recorder::FlightRecord,
    transport::{
        Expected, GroupId, PendingRecv, PendingSend, Rank, RecvRequest, SendRequest, Tag, Traffic,
        Transport,
    },
};

/// A buffer whose contents can be copied to host memory and back: what [`Staged`] carries.
pub trait Staging: Buffer {
    /// Where such buffers are made.
    type Device: fmt::Debug + Send + Sync + 'static;
    /// Why a copy failed.
    type Error: fmt::Display;

    /// Copies the contents to `host`, which has the same element type and length; returns when they are there.
    ///
    /// # Errors
    /// Whatever keeps the device from copying.
    fn copy_to_host(&self, host: &mut HostBuffer) -> Result<(), Self::Error>;

    /// A buffer with the contents of `host`: `memory` if it will do (element type, [capacity](Buffer::capacity)), otherwise a new one.
    /// Returns when nothing reads `host` any more.
    ///
    /// # Errors
    /// Whatever keeps the device from copying, or a lack of memory.
    fn copy_from_host(
        device: &Self::Device,
        host: &HostBuffer,
        memory: Option<Self>,
    ) -> Result<Self, Self::Error>;
}

/// A transport of host memory as one of other buffers: each message is copied to the host by its sender and from there by its receiver.
/// For GPUs between which there is no NCCL.
///
/// A send yields its own buffer; a receive uses the memory it brings. What passes through on the host is kept for the next messages. If
/// a copy fails the group is poisoned.
pub struct Staged<B: Staging> {
    shared: Arc<Shared>,
    device: Arc<B::Device>,
    buffers: PhantomData<fn() -> B>,
}

/// What an endpoint shares with its requests.
struct Shared {
    transport: Arc<dyn Transport<HostBuffer>>,
    host: BufferPool<HostBuffer>,
}

impl<B: Staging> fmt::Debug for Staged<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staged")
            .field("transport", &self.shared.transport)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl<B: Staging> Staged<B> {
    /// Carries buffers of `device` over `transport`.
    pub fn new(transport: Arc<dyn Transport<HostBuffer>>, device: B::Device) -> Self {
        Self {
            shared: Arc::new(Shared {
                transport,
                host: BufferPool::default(),
            }),
            device: Arc::new(device),
            buffers: PhantomData,
        }
    }

    fn transport(&self) -> &dyn Transport<HostBuffer> {
        self.shared.transport.as_ref()
    }
}

impl Shared {
    /// Host memory for a message, with arbitrary contents.
    fn host_memory(&self, expected: Expected) -> Result<HostBuffer, CommError> {
        let memory = self.host.take(expected.dtype, expected.len);
        crate::remote::host_room_for(expected, memory).map_err(|reason| self.fail(&reason))
    }

    /// The error of a copy that failed, which ends the group.
    fn fail(&self, reason: &dyn fmt::Display) -> CommError {
        let culprit = self.transport.global_rank(self.transport.rank());
        let reason = format!("a message cannot be copied between host and device: {reason}");
        let kind = CommErrorKind::Aborted { culprit, reason };
        let error = CommError::new(culprit, None, None, kind);
        self.transport.poison(error.clone());
        error.with_history(self.transport.flight_record())
    }
}

impl<B: Staging> Transport<B> for Staged<B> {
    fn rank(&self) -> Rank {
        self.transport().rank()
    }

    fn world_size(&self) -> usize {
        self.transport().world_size()
    }

    fn global_rank(&self, rank: Rank) -> Rank {
        self.transport().global_rank(rank)
    }

    fn deadline(&self) -> Duration {
        self.transport().deadline()
    }

    fn isend(&self, peer: Rank, tag: Tag, buffer: B) -> Result<SendRequest<B>, CommError> {
        let mut host = self.shared.host_memory(Expected {
            dtype: buffer.dtype(),
            len: buffer.len(),
        })?;
        let copied = buffer.copy_to_host(&mut host);
        copied.map_err(|error| self.shared.fail(&error))?;
        let request = self.transport().isend(peer, tag, host)?;
        Ok(SendRequest::new(StagedSend {
            request,
            buffer,
            shared: Arc::clone(&self.shared),
        }))
    }

    fn irecv(&self, peer: Rank, tag: Tag, expected: Expected) -> Result<RecvRequest<B>, CommError> {
        self.irecv_into(peer, tag, expected, None)
    }

    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<B>,
    ) -> Result<RecvRequest<B>, CommError> {
        let host = Some(self.shared.host_memory(expected)?);
        let request = self.transport().irecv_into(peer, tag, expected, host)?;
        Ok(RecvRequest::new(StagedReceive {
            request,
            memory,
            device: Arc::clone(&self.device),
            shared: Arc::clone(&self.shared),
        }))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        self.transport()
            .all_gather_bytes_among(group, members, operation, bytes)
    }

    fn poison(&self, cause: CommError) {
        self.transport().poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.transport().poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.transport().traffic()
    }

    fn flight_record(&self) -> FlightRecord {
        self.transport().flight_record()
    }
}

/// A send whose contents have been copied.
struct StagedSend<B: Buffer> {
    request: SendRequest<HostBuffer>,
    buffer: B,
    shared: Arc<Shared>,
}

impl<B: Buffer> PendingSend<B> for StagedSend<B> {
    fn wait(self: Box<Self>) -> Result<Option<B>, CommError> {
        if let Some(host) = self.request.wait()? {
            self.shared.host.give(host);
        }
        Ok(Some(self.buffer))
    }
}

/// A receive whose contents will be copied when it is waited for.
struct StagedReceive<B: Staging> {
    request: RecvRequest<HostBuffer>,
    memory: Option<B>,
    device: Arc<B::Device>,
    shared: Arc<Shared>,
}

impl<B: Staging> PendingRecv<B> for StagedReceive<B> {
    fn wait(self: Box<Self>) -> Result<B, CommError> {
        let host = self.request.wait()?;
        let copied = B::copy_from_host(&self.device, &host, self.memory);
        self.shared.host.give(host);
        copied.map_err(|error| self.shared.fail(&error))
    }
}

impl<B: Buffer> fmt::Debug for StagedSend<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StagedSend").field(&self.request).finish()
    }
}

impl<B: Staging> fmt::Debug for StagedReceive<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StagedReceive").field(&self.request).finish()
    }
}

#[cfg(test)]
mod tests;
