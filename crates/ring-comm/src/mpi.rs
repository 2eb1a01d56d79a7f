//! The MPI backend: ranks are processes, started by `mpirun`.
//!
//! [`Mpi::init`] starts a thread that makes all MPI calls of the process (so `MPI_THREAD_FUNNELED` is enough, and messages move while
//! other threads compute). [`Mpi::group`] joins all processes into a group; one can follow another. Without `mpirun` a
//! process is a world of its own.
//!
//! What it adds to the rules at the head of [`Transport`](crate::Transport)'s module:
//!
//! - A send copies: it yields its own buffer when the peer has it. A receive lands in the memory that was brought for it.
//! - A process that dies is a [`PeerLost`](crate::CommErrorKind::PeerLost) on the others: within a fraction of a second if it runs on the same machine, or
//!   if MPI reports failures (Open MPI 5 with `mpirun --with-ft ulfm`); else the deadline passes. For anybody to see it,
//!   `mpirun` must not kill all processes when one dies: with Open MPI 4 that takes `--enable-recovery`, with Open MPI 5
//!   `--with-ft ulfm` or `--enable-recovery`; MPICH's launcher always does when one is killed.
//! - `MPI_Finalize` is called when all processes leave in peace. If one has died, panicked, or does not come to an end within
//!   the deadline, the others leave without, because `MPI_Finalize` would wait for it; `mpirun` then reports that, and
//!   ends the rest unless it is told otherwise as above. So drop everything at about the same time on all ranks.
//!
//! Linking needs an MPI library with its headers; `mpicc` finds it, or what the variable `MPICC` names.

mod call;
mod failures;
mod wire;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use thiserror::Error;

use crate::{
    error::CommError,
    remote::{Engine, RemoteEndpoint, StartError},
    transport::Rank,
};
use wire::{LARGEST_CHUNK, MpiWire};

/// MPI can be started once in a process.
static IS_STARTED: AtomicBool = AtomicBool::new(false);

/// This process's place in the world of MPI. Leaves it when this and all endpoints and requests are dropped.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
///
/// use ring_comm::{Communicator, Mpi, buffer::HostBuffer, collective::all_reduce_sum_f64};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mpi = Mpi::init(Duration::from_secs(60))?;
/// let endpoint = mpi.group(Duration::from_secs(60))?;
/// let communicator = Communicator::<HostBuffer>::new(Arc::new(endpoint));
/// let ranks = all_reduce_sum_f64(&communicator, &[1.0])?;
/// println!("rank {} of {}", communicator.rank(), ranks[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Mpi {
    engine: Arc<Engine>,
}

/// Why MPI cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MpiError {
    /// A call of MPI failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// What MPI says.
        reason: String,
    },
    /// MPI was started before in this process; it cannot be started again, even when it is over.
    #[error("MPI was started before in this process, which is possible only once")]
    StartedBefore,
    /// The MPI library cannot be used from a thread.
    #[error("this MPI library does not support programs with threads (MPI_THREAD_FUNNELED)")]
    NoThreads,
    /// Not all processes have started.
    #[error("MPI did not start within the deadline of {0:?}")]
    Deadline(Duration),
    /// The operating system refused a thread.
    #[error("no thread for MPI: {0}")]
    Thread(String),
}

/// MPI is started by whoever gets past this.
fn claim() -> Result<(), MpiError> {
    match IS_STARTED.swap(true, Ordering::SeqCst) {
        true => Err(MpiError::StartedBefore),
        false => Ok(()),
    }
}

/// Starts MPI on this thread, for another transport's frames.
#[cfg(feature = "nccl")]
pub(crate) fn start_wire() -> Result<wire::MpiWire, MpiError> {
    claim()?;
    MpiWire::start(LARGEST_CHUNK)
}

impl Mpi {
    /// Starts MPI. Waits for all processes, up to `deadline`; dropping waits as long for them to leave.
    ///
    /// # Errors
    /// [`MpiError`] if MPI fails to start, was started before in this process, or takes longer than the deadline.
    pub fn init(deadline: Duration) -> Result<Self, MpiError> {
        Self::init_with_chunks(deadline, LARGEST_CHUNK)
    }

    /// As [`init`](Self::init), with messages cut into pieces of `largest_chunk` bytes: to test that without large ones.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    #[doc(hidden)]
    pub fn init_with_chunks(deadline: Duration, largest_chunk: usize) -> Result<Self, MpiError> {
        claim()?;
        let make_wire = move || MpiWire::start(largest_chunk);
        let engine = Engine::start(deadline, make_wire).map_err(|error| match error {
            StartError::Wire(error) => error,
            StartError::Deadline => MpiError::Deadline(deadline),
            StartError::Thread(error) => MpiError::Thread(error.to_string()),
        })?;
        Ok(Self {
            engine: Arc::new(engine),
        })
    }

    /// This process's rank.
    pub fn rank(&self) -> Rank {
        self.engine.rank()
    }

    /// Number of processes.
    pub fn world_size(&self) -> usize {
        self.engine.world_size()
    }

    /// The endpoint of a new group of all processes, all of which must call this; the group before must be over on this rank. No wait
    /// in it, nor for the others to join, takes longer than `deadline`.
    ///
    /// # Errors
    /// [`CommError`] that names a rank that has not joined in time, or is gone. If another rank finds that first, or the group fails
    /// otherwise meanwhile, the first call in it says so.
    pub fn group(&self, deadline: Duration) -> Result<RemoteEndpoint, CommError> {
        self.engine.join(deadline)
    }

    /// As [`group`](Self::group), but waits up to `patience` for the others to join.
    ///
    /// # Errors
    /// As [`group`](Self::group).
    pub fn group_within(
        &self,
        patience: Duration,
        deadline: Duration,
    ) -> Result<RemoteEndpoint, CommError> {
        self.engine.join_within(patience, deadline)
    }
}
