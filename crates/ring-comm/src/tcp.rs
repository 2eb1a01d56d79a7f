//! The TCP backend: ranks are processes, started by anything that tells them their place.
//!
//! [`Tcp::init`] connects a process with all others of its job, as its [`Launch`] describes it; [`Tcp::group`] joins them
//! into a group; one can follow another. A single rank needs no network. Two ranks, in two shells of one machine:
//!
//! ```sh
//! export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 RING_JOB_TOKEN="$(cat token)"
//! RANK=0 ./program        # in the one shell
//! RANK=1 ./program        # in the other
//! ```
//!
//! [`launch`](crate::launch) lists all variables, those of other launchers among them. On several hosts `MASTER_ADDR` is the
//! address of rank 0's host, and each rank is reached at the address with which it reaches rank 0: nothing listens on any
//! other, and nothing at all when all are connected. The token is a secret of the job: without it whoever can reach the ports can
//! join. What travels is neither encrypted nor signed.
//!
//! What it adds to the rules at the head of [`Transport`](crate::Transport)'s module:
//!
//! - A send copies: it yields its own buffer when the data has left. A receive lands in the memory that was brought for it.
//! - A process that ends is a [`PeerLost`](crate::CommErrorKind::PeerLost) on the others at once. So is a host or a link that
//!   fails, also when nothing is sent: a quarter later than [`Launch::deadline`] at most, not before five seconds, nor when a
//!   wait has passed its own deadline before. If something is on its way just then, only Linux keeps to that; other systems
//!   take as long as they please.
//! - Control data waits for no message: messages travel when their receiver has asked for them, and in pieces of 1 MiB.
//! - Every rank has a connection to every other, and looks at all of them again and again: for tens of ranks, not for
//!   thousands.

mod door;
mod error;
mod incoming;
mod link;
mod mesh;
mod outgoing;
mod record;
#[cfg(test)]
mod tests;
mod wire;

use std::{convert::Infallible, sync::Arc, time::Duration};

pub use self::error::TcpError;
use self::mesh::Mesh;
pub(crate) use self::wire::TcpWire;
use crate::{
    error::CommError,
    launch::Launch,
    remote::{Engine, RemoteEndpoint, StartError},
    transport::Rank,
};
#[cfg(feature = "nccl")]
use {crate::launch::store::Store, std::time::Instant};

/// A wire to all ranks that have the store open. Waits for them until `until`.
#[cfg(feature = "nccl")]
pub(crate) fn wire_over(
    store: &Store,
    launch: &Launch,
    until: Instant,
) -> Result<TcpWire, TcpError> {
    let mesh = Mesh::connect_over(store, launch, until)?;
    TcpWire::new(mesh).map_err(|never| match never {})
}

/// This process's place among ranks that are connected by TCP. Leaves it when this and all endpoints and requests are dropped.
///
/// ```
/// use std::{sync::Arc, time::Duration};
///
/// use ring_comm::{Communicator, Tcp, buffer::HostBuffer, collective::all_reduce_sum_f64, launch};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tcp = Tcp::init(&launch::from_env()?)?;
/// let endpoint = tcp.group(Duration::from_secs(60))?;
/// let communicator = Communicator::<HostBuffer>::new(Arc::new(endpoint));
/// let ranks = all_reduce_sum_f64(&communicator, &[1.0])?;
/// println!("rank {} of {}", communicator.rank(), ranks[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Tcp {
    engine: Arc<Engine>,
}

impl Tcp {
    /// Connects this process with all others of its job. Waits for them up to the deadline of `launch`; dropping waits as long
    /// for them to leave.
    ///
    /// # Errors
    /// [`TcpError`] if the ranks cannot meet or cannot be connected by the deadline. It ends all ranks that are still
    /// waiting, with an error that says so.
    pub fn init(launch: &Launch) -> Result<Self, TcpError> {
        let mesh = match launch.world_size.value {
            1 => Mesh::alone(),
            _ => Mesh::connect(launch)?,
        };
        Self::over(mesh, launch.deadline.value)
    }

    fn over(mesh: Mesh, deadline: Duration) -> Result<Self, TcpError> {
        let engine = Engine::start(deadline, move || TcpWire::new(mesh));
        let engine = engine.map_err(|error: StartError<Infallible>| match error {
            StartError::Wire(never) => match never {},
            StartError::Deadline => TcpError::System {
                what: "a thread",
                reason: format!("it has not run within {deadline:?}"),
            },
            StartError::Thread(error) => TcpError::system("a thread")(error),
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

    /// The endpoint of a new group of all processes, all of which must call this; the group before must be over on this rank. No
    /// wait in it, nor for the others to join, takes longer than `deadline`.
    ///
    /// # Errors
    /// [`CommError`] that names a rank that has not joined in time, or is gone. If another rank finds that first, or the group
    /// fails otherwise meanwhile, the first call in it says so.
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
