//! A transport of other buffers as one of host memory, so that the suite can run over it: [`Hosted`].

use std::{sync::Arc, time::Duration};

use crate::{
    buffer::{Buffer, HostBuffer},
    error::CommError,
    recorder::FlightRecord,
    staged::Staging,
    transport::{
        Expected, GroupId, PendingRecv, PendingSend, Rank, RecvRequest, SendRequest, Tag, Traffic,
        Transport,
    },
};

/// The other way round than [`Staged`](crate::Staged): host memory over a transport of `B`. Copies to and from the device for every message, so
/// it is for tests.
///
/// Its methods panic if a copy fails.
#[derive(Debug)]
pub struct Hosted<B: Staging, T> {
    transport: T,
    device: Arc<B::Device>,
}

impl<B: Staging, T: Transport<B>> Hosted<B, T> {
    /// Carries host memory over `transport`, in buffers of `device`.
    pub fn new(transport: T, device: B::Device) -> Self {
        Self {
            transport,
            device: Arc::new(device),
        }
    }

    fn on_device(&self, host: &HostBuffer) -> B {
        B::copy_from_host(&self.device, host, None)
            .unwrap_or_else(|error| panic!("a copy to the device failed: {error}"))
    }
}

/// The contents of a buffer, in host memory.
fn on_host<B: Staging>(buffer: &B) -> HostBuffer {
    let mut host = HostBuffer::zeros(buffer.dtype(), buffer.len());
    buffer
        .copy_to_host(&mut host)
        .unwrap_or_else(|error| panic!("a copy from the device failed: {error}"));
    host
}

impl<B: Staging, T: Transport<B>> Transport<HostBuffer> for Hosted<B, T> {
    fn rank(&self) -> Rank {
        self.transport.rank()
    }

    fn world_size(&self) -> usize {
        self.transport.world_size()
    }

    fn global_rank(&self, rank: Rank) -> Rank {
        self.transport.global_rank(rank)
    }

    fn deadline(&self) -> Duration {
        self.transport.deadline()
    }

    fn isend(
        &self,
        peer: Rank,
        tag: Tag,
        buffer: HostBuffer,
    ) -> Result<SendRequest<HostBuffer>, CommError> {
        let request = self.transport.isend(peer, tag, self.on_device(&buffer))?;
        Ok(SendRequest::new(HostedSend(request)))
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
        let memory = memory.map(|memory| self.on_device(&memory));
        let request = self.transport.irecv_into(peer, tag, expected, memory)?;
        Ok(RecvRequest::new(HostedReceive(request)))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        self.transport
            .all_gather_bytes_among(group, members, operation, bytes)
    }

    fn poison(&self, cause: CommError) {
        self.transport.poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.transport.poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.transport.traffic()
    }

    fn flight_record(&self) -> FlightRecord {
        self.transport.flight_record()
    }
}

#[derive(Debug)]
struct HostedSend<B: Buffer>(SendRequest<B>);

impl<B: Staging> PendingSend<HostBuffer> for HostedSend<B> {
    fn wait(self: Box<Self>) -> Result<Option<HostBuffer>, CommError> {
        let memory = self.0.wait()?;
        Ok(memory.map(|memory| HostBuffer::zeros(memory.dtype(), memory.capacity())))
    }
}

#[derive(Debug)]
struct HostedReceive<B: Buffer>(RecvRequest<B>);

impl<B: Staging> PendingRecv<HostBuffer> for HostedReceive<B> {
    fn wait(self: Box<Self>) -> Result<HostBuffer, CommError> {
        Ok(on_host(&self.0.wait()?))
    }
}
