//! What can go wrong before the ranks are connected.

use std::{net::SocketAddr, time::Duration};

use thiserror::Error;

use crate::{
    launch::{LaunchError, store::StoreError},
    transport::Rank,
};

/// Why the ranks could not be connected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TcpError {
    /// There are several ranks and nothing says where they meet.
    #[error(transparent)]
    Launch(LaunchError),
    /// The ranks could not meet in the store of rank 0: the port is in use, the token is another, a rank has come twice or
    /// counts another number of ranks, or has failed meanwhile.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Ranks did not come, or not all the way.
    #[error("rank {rank} has waited {deadline:?} in vain for rank {}", list(.missing))]
    Absent {
        /// The rank that waited.
        rank: Rank,
        /// Those that it waited for.
        missing: Vec<Rank>,
        /// How long.
        deadline: Duration,
    },
    /// This rank cannot listen for its peers.
    #[error("rank {rank} cannot listen at {address}: {reason}")]
    CannotListen {
        /// This rank.
        rank: Rank,
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// A peer cannot be reached at the address that it has told.
    #[error("rank {rank} could not reach rank {peer} at {address} within {deadline:?}: {last}")]
    Unreachable {
        /// This rank.
        rank: Rank,
        /// The peer.
        peer: Rank,
        /// Where it says that it listens.
        address: SocketAddr,
        /// How long this rank has tried.
        deadline: Duration,
        /// What came of the last attempt.
        last: String,
    },
    /// What listens where a peer should does not let this rank in, or does not prove that it is that peer.
    #[error("rank {rank} cannot join rank {peer} at {address}: {reason}")]
    Refused {
        /// This rank.
        rank: Rank,
        /// The peer.
        peer: Rank,
        /// Where it says that it listens.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// A peer has told an address that is none.
    #[error("rank {rank} cannot read the address of rank {peer}: do both run the same version?")]
    BadAddress {
        /// This rank.
        rank: Rank,
        /// The peer.
        peer: Rank,
    },
    /// The operating system refused a thread, random numbers, or the like.
    #[error("the operating system refused {what}: {reason}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        reason: String,
    },
}

impl From<LaunchError> for TcpError {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Store(error) => TcpError::Store(error),
            error => TcpError::Launch(error),
        }
    }
}

impl TcpError {
    /// What the operating system says when asked for something that it does not give.
    pub(super) fn system(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| TcpError::System {
            what,
            reason: error.to_string(),
        }
    }
}

fn list(ranks: &[Rank]) -> String {
    let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
    ranks.join(", ")
}
