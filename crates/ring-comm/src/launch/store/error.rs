//! What can go wrong with a store.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MAX_WORLD_SIZE;
use crate::transport::Rank;

/// What ended a store: the first rank that failed, and how.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("rank {rank} {kind}")]
pub struct Failure {
    /// The rank that failed.
    pub rank: Rank,
    /// How.
    pub kind: FailureKind,
}

/// How a rank failed.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum FailureKind {
    /// It said so.
    #[error("aborted: {0}")]
    Aborted(String),
    /// Its connection ended without a goodbye.
    #[error("was lost: {0}")]
    Lost(String),
}

/// Why a call on a store failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// Rank 0 cannot listen because something else does.
    #[error(
        "rank 0 cannot listen at {address}: the port is in use; choose another, the same on all ranks"
    )]
    AddressInUse {
        /// The address.
        address: String,
    },
    /// Rank 0 cannot listen for another reason, such as an address that is not one of its host.
    #[error("rank 0 cannot listen at {address}: {reason}")]
    CannotListen {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// Nobody answered as rank 0 would, until the deadline.
    #[error("rank {rank} could not reach rank 0 at {address} within {deadline:?}: {last}")]
    Unreachable {
        /// The rank that tried.
        rank: Rank,
        /// Where.
        address: String,
        /// How long.
        deadline: Duration,
        /// What came of the last attempt.
        last: String,
    },
    /// Something else listens there.
    #[error(
        "what answers at {address} is not the store of rank 0: expected {expected:?}, got {got:?}"
    )]
    NotAStore {
        /// Where.
        address: SocketAddr,
        /// What a store says first.
        expected: String,
        /// What came.
        got: String,
    },
    /// Rank 0 runs another version of this library.
    #[error(
        "rank 0 at {address} speaks version {theirs} of the protocol, rank {rank} version {ours}"
    )]
    Version {
        /// The rank that tried.
        rank: Rank,
        /// Where.
        address: SocketAddr,
        /// Its version of the protocol.
        ours: u32,
        /// That of rank 0.
        theirs: u32,
    },
    /// Rank 0 has another token.
    #[error("rank 0 at {address} refuses rank {rank}: its job token is another")]
    WrongToken {
        /// The rank that was refused.
        rank: Rank,
        /// Where.
        address: SocketAddr,
    },
    /// What let this rank in does not know the token itself.
    #[error("what answers at {address} as rank 0 does not know the job token of rank {rank}")]
    Impostor {
        /// The rank that tried.
        rank: Rank,
        /// Where.
        address: SocketAddr,
    },
    /// Rank 0 is of another job.
    #[error("rank 0 at {address} is of job {expected:?}, rank {rank} of job {got:?}")]
    WrongJob {
        /// The rank that was refused.
        rank: Rank,
        /// Where.
        address: SocketAddr,
        /// The job of rank 0.
        expected: String,
        /// That of the rank.
        got: String,
    },
    /// Rank 0 counts another number of ranks.
    #[error("rank 0 at {address} has world size {expected}, rank {rank} has {got}")]
    WrongWorldSize {
        /// The rank that was refused.
        rank: Rank,
        /// Where.
        address: SocketAddr,
        /// The world size of rank 0.
        expected: usize,
        /// That of the rank.
        got: usize,
    },
    /// Another process has joined as this rank.
    #[error("rank 0 at {address} refuses rank {rank}: another process has joined as that rank")]
    DuplicateRank {
        /// The rank that was refused.
        rank: Rank,
        /// Where.
        address: SocketAddr,
    },
    /// There is no such rank.
    #[error("rank {rank} must be less than the world size {world_size}")]
    RankOutOfRange {
        /// The rank.
        rank: Rank,
        /// The world size.
        world_size: usize,
    },
    /// More ranks than a store serves.
    #[error("world size {world_size} is more than the {MAX_WORLD_SIZE} ranks that a store serves")]
    TooManyRanks {
        /// The world size.
        world_size: usize,
    },
    /// A key, value or name that is too long.
    #[error("{what} of {len} bytes: at most {limit} are allowed")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The most allowed.
        limit: usize,
    },
    /// Rank 0 keeps no more.
    #[error("the store is full: keys and values would take more than {limit} bytes")]
    Full {
        /// The most that they may take, in bytes.
        limit: usize,
    },
    /// Two calls of one rank contribute to the same gather.
    #[error("rank {rank} is contributing to {name:?} already")]
    GatheringAlready {
        /// The rank.
        rank: Rank,
        /// The name of the gather.
        name: String,
    },
    /// No answer in time.
    #[error("rank {rank}: {what}: no answer within {deadline:?}{}", missing_ranks(.missing))]
    Deadline {
        /// The rank that waited.
        rank: Rank,
        /// For what.
        what: String,
        /// How long.
        deadline: Duration,
        /// Of a gather, the ranks that have not contributed; of a get, those that have not joined. Empty if rank 0 itself
        /// does not answer.
        missing: Vec<Rank>,
    },
    /// A rank has failed, and the store has ended.
    #[error("the store has ended: {0}")]
    Failed(Failure),
    /// Rank 0 has left in peace, and the store has ended.
    #[error("the store has ended: rank 0 has left")]
    Closed,
    /// Too many calls are under way.
    #[error("rank {rank} has too many calls under way")]
    Busy {
        /// The rank.
        rank: Rank,
    },
    /// Rank 0 answered something else than what was asked.
    #[error("rank 0 answered something else than what was asked")]
    UnexpectedAnswer,
    /// The operating system refused a thread, random numbers, or the like.
    #[error("the operating system refused {what}: {reason}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        reason: String,
    },
}

fn missing_ranks(ranks: &[Rank]) -> String {
    if ranks.is_empty() {
        return String::new();
    }
    let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
    format!("; missing: rank {}", ranks.join(", "))
}
