//! Brings what every process has to the one that reports.

use ring_comm::{
    CommError, Communicator, Expected, Payload, Rank, Tag,
    buffer::{Buffer, DType, HostBuffer},
};
use serde::{Deserialize, Serialize};

use super::{
    outcome::{Pass, RankOutcome, Results},
    ranks::RankError,
};

/// What a rank has, but for the numbers.
#[derive(Serialize, Deserialize)]
struct Header {
    forward: Vec<Pass>,
    backward: Vec<Pass>,
    /// Type and length of its results, in the order they are sent in.
    results: Vec<(DType, usize)>,
}

/// The outcomes of all ranks, on rank 0; nothing on the others. All must call it.
pub(super) fn gather(
    own: RankOutcome,
    communicator: &Communicator<HostBuffer>,
) -> Result<Option<Vec<RankOutcome>>, RankError> {
    let RankOutcome {
        forward,
        backward,
        results,
    } = own;
    let buffers: Vec<HostBuffer> = results.map(Results::into_buffers).unwrap_or_default();
    let header = Header {
        results: buffers
            .iter()
            .map(|buffer| (buffer.dtype(), buffer.len()))
            .collect(),
        forward,
        backward,
    };
    let header = serde_json::to_vec(&header).expect("numbers can be written");
    let headers = communicator.all_gather_bytes("results", &header)?;
    let operation = communicator.next_operation();
    if communicator.rank() > 0 {
        send(buffers, operation, communicator)?;
        return Ok(None);
    }
    let mut own = Some(buffers);
    let mut outcomes = Vec::new();
    for (rank, header) in headers.iter().enumerate() {
        let header: Header = serde_json::from_slice(header).map_err(|error| {
            RankError::Tensor(format!("rank {rank} runs another version: {error}"))
        })?;
        let buffers = match own.take() {
            Some(own) => own,
            None => receive(rank, &header.results, operation, communicator)?,
        };
        outcomes.push(RankOutcome {
            forward: header.forward,
            backward: header.backward,
            results: Results::from_buffers(buffers),
        });
    }
    Ok(Some(outcomes))
}

fn tag(operation: u64, index: usize) -> Tag {
    Tag::new(operation, index as u32, Payload::Custom(0))
}

fn send(
    buffers: Vec<HostBuffer>,
    operation: u64,
    communicator: &Communicator<HostBuffer>,
) -> Result<(), CommError> {
    for (index, buffer) in buffers.into_iter().enumerate() {
        let transport = communicator.transport();
        transport.isend(0, tag(operation, index), buffer)?.wait()?;
    }
    Ok(())
}

fn receive(
    rank: Rank,
    results: &[(DType, usize)],
    operation: u64,
    communicator: &Communicator<HostBuffer>,
) -> Result<Vec<HostBuffer>, CommError> {
    let receive = |(index, &(dtype, len)): (usize, &(DType, usize))| {
        let transport = communicator.transport();
        let expected = Expected { dtype, len };
        transport
            .irecv(rank, tag(operation, index), expected)?
            .wait()
    };
    results.iter().enumerate().map(receive).collect()
}

impl Results {
    fn into_buffers(self) -> Vec<HostBuffer> {
        let gradients = self.gradients.into_iter().flatten();
        [self.output, self.log_sum_exp]
            .into_iter()
            .chain(gradients)
            .collect()
    }

    /// Nothing if there are none.
    fn from_buffers(buffers: Vec<HostBuffer>) -> Option<Self> {
        let mut buffers = buffers.into_iter();
        let (output, log_sum_exp) = (buffers.next()?, buffers.next()?);
        let gradients: Vec<HostBuffer> = buffers.collect();
        Some(Self {
            output,
            log_sum_exp,
            gradients: gradients.try_into().ok(),
        })
    }
}
