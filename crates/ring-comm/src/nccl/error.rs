//! Why NCCL cannot be used.

use std::time::Duration;

use thiserror::Error;

use super::library::{LIBRARY_VARIABLE, Version};
#[cfg(feature = "mpi")]
use crate::mpi::MpiError;
use crate::{launch::LaunchError, tcp::TcpError, transport::Rank};

/// Why NCCL cannot be used, or cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NcclError {
    /// NCCL's library is not there.
    #[error("NCCL's library was not found, looked for {}; {LIBRARY_VARIABLE} can name its file: {reason}", searched.join(", "))]
    LibraryMissing {
        /// Names and paths that were tried.
        searched: Vec<String>,
        /// What the system says to the last.
        reason: String,
    },
    /// The library that was found is not NCCL, or lacks something.
    #[error(
        "{library} lacks {symbol}: it is not NCCL, or one older than {}",
        Version::OLDEST
    )]
    SymbolMissing {
        /// Its name or path.
        library: String,
        /// The function.
        symbol: &'static str,
    },
    /// The library that was found is too old.
    #[error("NCCL {version} is too old; at least {} is needed", Version::OLDEST)]
    TooOld {
        /// Its version.
        version: Version,
    },
    /// CUDA's driver is not there.
    #[error(
        "CUDA's driver (libcuda) was not found: this machine has no NVIDIA GPU, or its driver is not installed"
    )]
    DriverMissing,
    /// CUDA's driver is too old.
    #[error("CUDA's driver is for CUDA {version}; at least {needed} is needed")]
    DriverTooOld {
        /// The latest version of CUDA it can do.
        version: String,
        /// The oldest that will do.
        needed: &'static str,
    },
    /// There is no GPU.
    #[error("CUDA's driver sees no GPU")]
    NoDevice,
    /// There are GPUs, but not that one.
    #[error("there is no GPU {device}: the GPUs here are 0 to {}", count - 1)]
    DeviceOutOfRange {
        /// The number asked for.
        device: usize,
        /// How many there are; at least one.
        count: usize,
    },
    /// The GPU has no memory pools, and allocating without may wait for a transfer that waits for this rank.
    #[error(
        "GPU {device} cannot allocate in the order of a stream (memory pools), which messages need"
    )]
    NoMemoryPools {
        /// The GPU.
        device: usize,
    },
    /// A call of NCCL failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// The result, and what NCCL says about its last error.
        reason: String,
    },
    /// A call of CUDA's driver failed.
    #[error("{call} failed: {reason}")]
    Driver {
        /// Name of the function.
        call: &'static str,
        /// What CUDA says.
        reason: String,
    },
    /// The ranks have different versions of NCCL.
    #[error("rank {rank} has NCCL {theirs}, rank 0 has {ours}")]
    Versions {
        /// The first rank that differs from rank 0.
        rank: Rank,
        /// Its version.
        theirs: Version,
        /// That of rank 0.
        ours: Version,
    },
    /// The ranks do not agree on how many they are.
    #[error("rank {rank} is in a world of {theirs} ranks, rank 0 in one of {ours}")]
    WorldSizes {
        /// The first rank that differs from rank 0.
        rank: Rank,
        /// Its world size.
        theirs: usize,
        /// That of rank 0.
        ours: usize,
    },
    /// Another rank cannot use NCCL.
    #[error("rank {rank} cannot use NCCL: {reason}")]
    Elsewhere {
        /// The first such rank.
        rank: Rank,
        /// Why.
        reason: String,
    },
    /// A rank cannot be reached while the ranks meet.
    #[error("rank {rank} is lost: {reason}")]
    PeerLost {
        /// The rank.
        rank: Rank,
        /// What is known of it.
        reason: String,
    },
    /// The ranks could not exchange what they need to begin.
    #[error("the ranks could not meet: {0}")]
    Rendezvous(String),
    /// It takes too long.
    #[error("waited in vain for {what}, within the deadline of {deadline:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The time waited.
        deadline: Duration,
    },
    /// Nothing says where the ranks meet, or they cannot meet there.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The ranks cannot be connected by TCP, for control.
    #[error(transparent)]
    Tcp(#[from] TcpError),
    /// MPI, which is to connect the ranks for control, cannot be used.
    #[cfg(feature = "mpi")]
    #[error(transparent)]
    Mpi(#[from] MpiError),
    /// The operating system refused a thread.
    #[error("no thread for NCCL: {0}")]
    Thread(String),
}
