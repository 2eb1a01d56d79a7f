//! How the ranks of a sequence-parallel group exchange buffers.
//!
//! A long sequence is spread over several workers, each of which owns a part. To compute attention they must see one
//! another's keys and values: this crate moves them. It knows nothing of attention; it promises that a message arrives
//! whole, once and in order, or that **every** worker is told in time who failed at what. The rules are at the head of the
//! module of [`Transport`], and [`conformance`] tests a backend against them.
//!
//! - [`buffer`]: the memory that travels;
//! - [`Transport`]: one rank's endpoint, the seam between backends and users;
//! - [`Loopback`]: the backend in which ranks are threads of one process;
//! - [`Tcp`]: the backend in which ranks are processes, started by anything that tells them their place;
//! - `Mpi`: with the feature `mpi`, the backend in which ranks are processes under `mpirun`;
//! - `Nccl`: with the feature `nccl`, the backend in which ranks are processes with an NVIDIA GPU each, and device memory travels;
//! - [`Staged`]: any transport of host memory, for buffers that are elsewhere;
//! - [`Communicator`]: a transport with the numbering of operations and the check that all ranks plan the same;
//!   [`Communicator::from_env`] makes one for however the process was started;
//! - [`BufferPool`]: memory of messages, kept for the next ones;
//! - [`Trace`]: who computed, sent and waited when, as a file to look at;
//! - [`FlightRecorder`]: the last operations of a rank, part of every error;
//! - [`collective`]: sums over ranks in a fixed order;
//! - [`checksum`]: by which ranks see that they hold the same;
//! - [`launch`]: where a process stands in its group, and how the ranks find one another;
//! - [`CommError`]: who failed, with whom, about which message, and why.
//!
//! # Glossary
//!
//! - **Rank**: one worker of a group, by its number `0..world size`.
//! - **World size**: the number of ranks in the group.
//! - **Operation**: something all ranks do together (one forward pass, one backward pass, one sum); numbered, the same on
//!   every rank.
//! - **Step**: a part of an operation; numbered within it.
//! - **Tag**: operation, step and kind of payload; together with the two ranks it identifies a message.
//! - **Taken**: of a message, matched by a receive that its destination has posted.
//! - **Departed**: of a rank, ended in peace; what it has sent can still be received.
//! - **Poison**: the first error of a group, which ends all communication in it and is what every rank gets to see.
//! - **History**: of an error, the last operations of the rank that reports it.
//!
//! # Example
//!
//! Two ranks exchange a buffer each, then sum a number:
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use ring_comm::{
//!     CommError, Communicator, Expected, Loopback, LoopbackEndpoint, Payload, Tag,
//!     buffer::{DType, HostBuffer},
//!     collective::all_reduce_sum_f64,
//! };
//!
//! fn swap(endpoint: LoopbackEndpoint<HostBuffer>) -> Result<(HostBuffer, f64), CommError> {
//!     let communicator = Communicator::new(Arc::new(endpoint));
//!     let tag = Tag::new(communicator.next_operation(), 0, Payload::KeyValue);
//!     let peer = 1 - communicator.rank();
//!
//!     // Post the receive, then the send, then do something useful, then wait.
//!     let expected = Expected { dtype: DType::F32, len: 1 };
//!     let receive = communicator.transport().irecv(peer, tag, expected)?;
//!     let own = HostBuffer::F32(vec![communicator.rank() as f32]);
//!     let send = communicator.transport().isend(peer, tag, own)?;
//!     let received = receive.wait()?;
//!     send.wait()?;
//!
//!     let sum = all_reduce_sum_f64(&communicator, &[1.5])?;
//!     Ok((received, sum[0]))
//! }
//!
//! let results = Loopback::run(2, Duration::from_secs(10), swap);
//! assert_eq!(results[0], Ok(Ok((HostBuffer::F32(vec![1.0]), 3.0))));
//! assert_eq!(results[1], Ok(Ok((HostBuffer::F32(vec![0.0]), 3.0))));
//! ```

mod agreement;
mod attempt;
mod backend;
pub mod buffer;
pub mod checksum;
pub mod collective;
mod communicator;
pub mod conformance;
mod error;
pub mod launch;
mod loopback;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod pool;
pub mod recorder;
mod remote;
mod staged;
mod subgroup;
pub mod tcp;
pub mod trace;
mod transport;

pub use backend::{ConnectError, TransportKind, UnknownTransport};
pub use communicator::{Communicator, REMEMBERED_AGREEMENTS};
pub use error::{CommError, CommErrorKind, Disagreement};
pub use loopback::{Loopback, LoopbackEndpoint, RankPanic};
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, MpiError};
#[cfg(feature = "nccl")]
pub use nccl::{Nccl, NcclEndpoint, NcclError};
pub use pool::BufferPool;
pub use recorder::{FlightRecord, FlightRecorder};
pub use remote::RemoteEndpoint;
pub use staged::{Staged, Staging};
pub use tcp::{Tcp, TcpError};
pub use trace::Trace;
pub use transport::*;
