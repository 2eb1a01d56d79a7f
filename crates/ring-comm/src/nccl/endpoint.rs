//! The transport of a rank with a GPU.

use std::{fmt, time::Duration};

use super::{
    cuda::CudaDevice,
    error::NcclError,
    handed::Handed,
    memory::{CudaBuffer, DeviceMemory},
};
use crate::{
    error::{CommError, CommErrorKind},
    recorder::FlightRecord,
    remote::RemoteEndpoint,
    transport::{
        Expected, GroupId, PendingRecv, PendingSend, Rank, RecvRequest, SendRequest, Tag, Traffic,
        Transport,
    },
};

/// One rank of a group that exchanges device memory by NCCL; made by [`Nccl::group`](super::Nccl::group).
pub struct NcclEndpoint<M: DeviceMemory = CudaBuffer> {
    remote: RemoteEndpoint<Handed<M>>,
    device: CudaDevice,
}

impl<M: DeviceMemory> fmt::Debug for NcclEndpoint<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclEndpoint")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl<M: DeviceMemory> NcclEndpoint<M> {
    pub(super) fn new(remote: RemoteEndpoint<Handed<M>>, device: CudaDevice) -> Self {
        Self { remote, device }
    }

    /// Gives memory to the transport, to be used when what is on its stream now is done.
    fn hand_over(&self, memory: M) -> Result<Handed<M>, CommError> {
        let current = self.device.make_current();
        let handed = current.and_then(|_current| Handed::new(memory));
        handed.map_err(|error| self.fail(&error))
    }

    /// This rank cannot go on.
    fn fail(&self, error: &NcclError) -> CommError {
        let culprit = self.rank();
        let reason = error.to_string();
        let kind = CommErrorKind::Aborted { culprit, reason };
        let error = CommError::new(culprit, None, None, kind).with_history(self.flight_record());
        self.poison(error.clone());
        error
    }
}

impl<M: DeviceMemory> Transport<M> for NcclEndpoint<M> {
    fn rank(&self) -> Rank {
        self.remote.rank()
    }

    fn world_size(&self) -> usize {
        self.remote.world_size()
    }

    fn deadline(&self) -> Duration {
        self.remote.deadline()
    }

    fn isend(&self, peer: Rank, tag: Tag, buffer: M) -> Result<SendRequest<M>, CommError> {
        let request = self.remote.isend(peer, tag, self.hand_over(buffer)?)?;
        Ok(SendRequest::new(HandedSend(request)))
    }

    fn irecv(&self, peer: Rank, tag: Tag, expected: Expected) -> Result<RecvRequest<M>, CommError> {
        self.irecv_into(peer, tag, expected, None)
    }

    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<M>,
    ) -> Result<RecvRequest<M>, CommError> {
        let memory = memory.map(|memory| self.hand_over(memory)).transpose()?;
        let request = self.remote.irecv_into(peer, tag, expected, memory)?;
        Ok(RecvRequest::new(HandedReceive(request)))
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        self.remote
            .all_gather_bytes_among(group, members, operation, bytes)
    }

    fn poison(&self, cause: CommError) {
        self.remote.poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.remote.poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.remote.traffic()
    }

    fn flight_record(&self) -> FlightRecord {
        self.remote.flight_record()
    }
}

#[derive(Debug)]
struct HandedSend<M: DeviceMemory>(SendRequest<Handed<M>>);

impl<M: DeviceMemory> PendingSend<M> for HandedSend<M> {
    fn wait(self: Box<Self>) -> Result<Option<M>, CommError> {
        Ok(self.0.wait()?.map(Handed::into_memory))
    }
}

#[derive(Debug)]
struct HandedReceive<M: DeviceMemory>(RecvRequest<Handed<M>>);

impl<M: DeviceMemory> PendingRecv<M> for HandedReceive<M> {
    fn wait(self: Box<Self>) -> Result<M, CommError> {
        self.0.wait().map(Handed::into_memory)
    }
}
