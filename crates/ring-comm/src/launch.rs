//! Where a process stands in its group, as its launcher tells it, and how the ranks find one another.
//!
//! [`from_env`] reads the place of this process from its environment; [`store`] is the small key/value store over TCP with
//! which ranks exchange addresses and the like before a faster transport is up, and which then stays open as the channel
//! over which they learn of one another's failures.
//!
//! # Environment
//!
//! | launcher | rank | world size | local rank | job |
//! |---|---|---|---|---|
//! | explicit | `RING_RANK` | `RING_WORLD_SIZE` | `RING_LOCAL_RANK` | |
//! | torchrun | `RANK` | `WORLD_SIZE` | `LOCAL_RANK` | `TORCHELASTIC_RUN_ID` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK` | `OMPI_COMM_WORLD_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK` | |
//! | PMI (MPICH, Intel MPI) | `PMI_RANK` | `PMI_SIZE` | `MPI_LOCALRANKID` | |
//! | SLURM (srun) | `SLURM_PROCID` | `SLURM_NTASKS` | `SLURM_LOCALID` | `SLURM_JOB_ID` |
//!
//! Besides, `RING_RENDEZVOUS=host:port` (otherwise `MASTER_ADDR` and `MASTER_PORT`) says where rank 0 listens,
//! `RING_JOB_TOKEN` is the secret that the ranks of the job share, and `RING_DEADLINE_SECONDS` bounds every wait.
//!
//! The first launcher of the table that is set decides. Those after it must say the same: two that contradict each other in
//! rank or world size are an error, as is a rank without a world size. If none is set, the process is the only rank.
//!
//! **SLURM is asked last, and only if no other launcher is set.** `mpirun` and `torchrun` inside a SLURM job pass on
//! SLURM's variables, which then describe the batch script or the launcher's own daemons. A process of which SLURM says
//! that it is task 0 but not of which step (no `SLURM_STEP_ID`) is the batch script itself, not one of the `SLURM_NTASKS`
//! tasks, and is the only rank; so is a shell of an allocation, which has no `SLURM_PROCID`.
//!
//! **torchrun listens on `MASTER_PORT` itself** when `TORCHELASTIC_USE_AGENT_STORE` is `True`; the rendezvous is then the
//! port after it (before it, for the last one). `RING_RENDEZVOUS` overrides that.

mod environment;
mod error;
pub mod store;

use std::{fmt, time::Duration};

pub use environment::{from_env, from_variables};
pub use error::LaunchError;

use self::store::{Membership, Store};
use crate::transport::Rank;

/// How long a wait may take unless something else is asked for.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(300);

/// Who started a process, as far as its environment tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody who says so.
    None,
    /// The variables of this crate.
    Explicit,
    /// torchrun, or whoever sets its variables.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// The `mpiexec` of MPICH or Intel MPI, or another that speaks PMI.
    Pmi,
    /// SLURM's `srun`.
    Slurm,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::None => "nobody",
            Launcher::Explicit => "RING_RANK",
            Launcher::Torchrun => "torchrun",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Pmi => "PMI",
            Launcher::Slurm => "SLURM",
        })
    }
}

/// Where a setting came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing said otherwise.
    Default,
    /// The environment variables of these names.
    Variables(&'static [&'static str]),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Variables(names) => f.write_str(&names.join(", ")),
        }
    }
}

/// A value, and where it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub origin: Origin,
}

/// Where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Name or address of the host, an IPv6 address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl fmt::Display for Rendezvous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A secret that the ranks of one job share. Is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Vec<u8>);

impl Token {
    /// A token of these bytes. With none at all, whoever speaks the protocol is let in.
    pub fn new(secret: impl Into<Vec<u8>>) -> Self {
        Self(secret.into())
    }

    pub(in crate::launch) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The place of a process in its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// This rank.
    pub rank: Setting<Rank>,
    /// Number of ranks in the group.
    pub world_size: Setting<usize>,
    /// Number of this rank among those on the same host, if the launcher tells: which device to take.
    pub local_rank: Option<Setting<Rank>>,
    /// Where rank 0 listens, if anything tells.
    pub rendezvous: Option<Setting<Rendezvous>>,
    /// What the launcher calls the job: keeps ranks of different jobs apart, is no secret.
    pub job_id: Option<Setting<String>>,
    /// The secret of the job.
    pub token: Option<Setting<Token>>,
    /// Longest time any single wait may take.
    pub deadline: Setting<Duration>,
}

impl Launch {
    /// Who gave this process its rank.
    pub fn launcher(&self) -> Launcher {
        environment::launcher(self.rank.origin)
    }

    /// Who this process is to the store.
    pub fn membership(&self) -> Membership {
        let mut membership = Membership::new(self.rank.value, self.world_size.value);
        if let Some(job_id) = &self.job_id {
            membership = membership.job_id(&job_id.value);
        }
        if let Some(token) = &self.token {
            membership = membership.token(token.value.clone());
        }
        membership
    }

    /// Opens the store of this job: rank 0 serves it at the rendezvous, every rank connects.
    ///
    /// A single rank without a rendezvous serves itself, on a free port of the loopback interface.
    ///
    /// # Errors
    /// [`LaunchError::NoRendezvous`] if there are several ranks and no rendezvous; [`LaunchError::Store`] if the store
    /// cannot be opened by the deadline.
    pub fn open_store(&self) -> Result<Store, LaunchError> {
        let address = match (&self.rendezvous, self.world_size.value) {
            (Some(rendezvous), _) => rendezvous.value.to_string(),
            (None, 1) => "127.0.0.1:0".to_owned(),
            (None, world_size) => return Err(LaunchError::NoRendezvous { world_size }),
        };
        Ok(Store::open(
            &address,
            self.membership(),
            self.deadline.value,
        )?)
    }
}
