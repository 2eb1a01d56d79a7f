//! One communicator for this process, over whatever transport fits how it was started: [`Communicator::from_env`].

use std::{fmt, fs, str::FromStr, sync::Arc};

use thiserror::Error;

use crate::{
    Tcp, TcpError,
    buffer::HostBuffer,
    communicator::Communicator,
    error::CommError,
    launch::{self, Launch, LaunchError, Launcher},
    transport::{Rank, Transport},
};

/// How ranks exchange buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TransportKind {
    /// Ranks are threads of one process.
    Loopback,
    /// Ranks are processes that know where to meet.
    Tcp,
    /// Ranks are processes under `mpirun` or `srun`. Needs the feature `mpi`.
    Mpi,
    /// Ranks are processes with a GPU each, for memory on it. Needs the feature `nccl`.
    Nccl,
}

/// A name that no transport has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no transport {0:?}; valid: {names}", names = TransportKind::names())]
pub struct UnknownTransport(pub String);

/// Why a process could not join its group.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum ConnectError {
    /// The environment does not say where this process stands, or contradicts itself.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The transport was left out when this was built.
    #[error("the transport {kind} is not compiled in: build with the feature `{kind}`")]
    NotCompiledIn {
        /// The transport.
        kind: TransportKind,
    },
    /// Loopback's ranks are threads of one process, and there are more processes.
    #[error(
        "loopback connects threads of one process, but this is one of {world_size} processes: take another transport"
    )]
    SeveralProcesses {
        /// Number of processes.
        world_size: usize,
    },
    /// A transport for memory on GPUs, and buffers of the host.
    #[error(
        "the transport {kind} moves memory of GPUs, and this program's is the processor's: take another transport"
    )]
    DeviceMemoryOnly {
        /// The transport.
        kind: TransportKind,
    },
    /// Who started the process says something else than the transport; every process for itself, mostly.
    #[error(
        "{launcher} says that this is rank {rank} of {world_size}, but the transport {kind} finds rank {found_rank} of {found_world_size}: \
         is `mpirun` of the same MPI library as this program was built with?"
    )]
    AnotherPlace {
        /// The transport.
        kind: TransportKind,
        /// Who started the process.
        launcher: Launcher,
        /// The rank it gave.
        rank: Rank,
        /// The world size it gave.
        world_size: usize,
        /// The rank that the transport found.
        found_rank: Rank,
        /// The world size that the transport found.
        found_world_size: usize,
    },
    /// The processes cannot be connected.
    #[error(transparent)]
    Tcp(#[from] TcpError),
    /// MPI does not start.
    #[cfg(feature = "mpi")]
    #[error(transparent)]
    Mpi(#[from] crate::mpi::MpiError),
    /// The ranks do not come together.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl TransportKind {
    /// Every kind there is, compiled in or not.
    pub const ALL: [TransportKind; 4] = [
        TransportKind::Loopback,
        TransportKind::Tcp,
        TransportKind::Mpi,
        TransportKind::Nccl,
    ];

    /// Whether this build has it.
    pub const fn is_compiled_in(self) -> bool {
        match self {
            TransportKind::Loopback | TransportKind::Tcp => true,
            TransportKind::Mpi => cfg!(feature = "mpi"),
            TransportKind::Nccl => cfg!(feature = "nccl"),
        }
    }

    /// The transport for host memory that fits how a process was started: MPI under its own launchers; TCP for ranks that were told
    /// where to meet.
    pub fn fitting(launch: &Launch) -> Self {
        match launch.launcher() {
            _ if launch.world_size.value == 1 => TransportKind::Loopback,
            Launcher::OpenMpi | Launcher::Pmi => TransportKind::Mpi,
            Launcher::Slurm if launch.rendezvous.is_none() => TransportKind::Mpi,
            Launcher::Slurm | Launcher::Explicit | Launcher::Torchrun | Launcher::None => {
                TransportKind::Tcp
            }
        }
    }

    const fn name(self) -> &'static str {
        match self {
            TransportKind::Loopback => "loopback",
            TransportKind::Tcp => "tcp",
            TransportKind::Mpi => "mpi",
            TransportKind::Nccl => "nccl",
        }
    }

    fn names() -> String {
        Self::ALL.map(TransportKind::name).join(", ")
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for TransportKind {
    type Err = UnknownTransport;

    fn from_str(name: &str) -> Result<Self, UnknownTransport> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownTransport(name.to_owned()))
    }
}

impl Communicator<HostBuffer> {
    /// The group of the processes that were started together with this one; this process alone if nothing says otherwise.
    ///
    /// [`launch`] says which variables are read, [`TransportKind::fitting`] which transport is taken.
    ///
    /// # Errors
    /// [`ConnectError`]; every process of the group gets one, by the deadline.
    ///
    /// ```
    /// use ring_comm::Communicator;
    ///
    /// let communicator = Communicator::from_env()?;
    /// println!("rank {} of {}", communicator.rank(), communicator.world_size());
    /// # Ok::<(), ring_comm::ConnectError>(())
    /// ```
    pub fn from_env() -> Result<Self, ConnectError> {
        let launch = launch::from_env()?;
        Self::connect(TransportKind::fitting(&launch), &launch)
    }

    /// The group that `launch` describes, over a transport of choice. Can be called once in a process if it is MPI.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn connect(kind: TransportKind, launch: &Launch) -> Result<Self, ConnectError> {
        if !kind.is_compiled_in() {
            return Err(ConnectError::NotCompiledIn { kind });
        }
        match kind {
            TransportKind::Loopback => match launch.world_size.value {
                1 => Ok(Self::single()),
                world_size => Err(ConnectError::SeveralProcesses { world_size }),
            },
            TransportKind::Nccl => Err(ConnectError::DeviceMemoryOnly { kind }),
            TransportKind::Tcp => {
                let tcp = Tcp::init(launch)?;
                Ok(Self::among_processes(Arc::new(
                    tcp.group(launch.deadline.value)?,
                ))?)
            }
            #[cfg(feature = "mpi")]
            TransportKind::Mpi => {
                let deadline = launch.deadline.value;
                let mpi = crate::mpi::Mpi::init(deadline)?;
                check_place(kind, launch, mpi.rank(), mpi.world_size())?;
                Ok(Self::among_processes(Arc::new(mpi.group(deadline)?))?)
            }
            #[cfg(not(feature = "mpi"))]
            TransportKind::Mpi => Err(ConnectError::NotCompiledIn { kind }),
        }
    }

    /// Finds out how many of the processes run on this machine's processors, or on those of it that this process may use.
    fn among_processes(transport: Arc<dyn Transport<HostBuffer>>) -> Result<Self, CommError> {
        let communicator = Self::new(transport);
        let machine = machine();
        let machines = communicator.all_gather_bytes("machines", machine.as_bytes())?;
        let here = machines
            .iter()
            .filter(|other| **other == machine.as_bytes());
        Ok(communicator.with_ranks_on_this_machine(here.count()))
    }
}

/// A process that the launcher did not mention may be anywhere.
#[cfg_attr(
    not(any(feature = "mpi", test)),
    expect(dead_code, reason = "TCP goes by what the launcher says")
)]
fn check_place(
    kind: TransportKind,
    launch: &Launch,
    found_rank: Rank,
    found_world_size: usize,
) -> Result<(), ConnectError> {
    let (rank, world_size) = (launch.rank.value, launch.world_size.value);
    let launcher = launch.launcher();
    if launcher == Launcher::None || (rank, world_size) == (found_rank, found_world_size) {
        return Ok(());
    }
    Err(ConnectError::AnotherPlace {
        kind,
        launcher,
        rank,
        world_size,
        found_rank,
        found_world_size,
    })
}

/// Tells apart the machines of a network, and the processors of one that ranks are confined to (`mpirun --bind-to`, `srun
/// --cpus-per-task`): those that have some to themselves share them with nobody.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let boot = read("/proc/sys/kernel/random/boot_id");
    let name = read("/proc/sys/kernel/hostname");
    let status = read("/proc/thread-self/status");
    let processors = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let processors = processors.unwrap_or_default();
    format!("{} {} {}", boot.trim(), name.trim(), processors.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::from_variables;

    fn launch(variables: &[(&str, &str)]) -> Launch {
        let lookup = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).into())
        };
        from_variables(lookup).unwrap()
    }

    #[test]
    fn names_are_read_back() {
        for kind in TransportKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "carrier pigeon".parse::<TransportKind>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no transport \"carrier pigeon\"; valid: loopback, tcp, mpi, nccl"
        );
    }

    #[test]
    fn a_process_alone_is_a_group_of_one() {
        let communicator = Communicator::connect(TransportKind::Loopback, &launch(&[])).unwrap();
        assert_eq!((communicator.rank(), communicator.world_size()), (0, 1));
        assert_eq!(communicator.ranks_on_this_machine(), 1);
    }

    #[test]
    fn the_transport_follows_from_the_launcher() {
        let fitting = |variables: &[_]| TransportKind::fitting(&launch(variables));
        assert_eq!(fitting(&[]), TransportKind::Loopback);
        assert_eq!(
            fitting(&[("RANK", "0"), ("WORLD_SIZE", "1")]),
            TransportKind::Loopback
        );
        assert_eq!(
            fitting(&[("RANK", "0"), ("WORLD_SIZE", "2")]),
            TransportKind::Tcp
        );
        assert_eq!(
            fitting(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]),
            TransportKind::Mpi
        );
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")];
        assert_eq!(fitting(&slurm), TransportKind::Mpi);
        let met = [&slurm[..], &[("RING_RENDEZVOUS", "host:4000")]].concat();
        assert_eq!(fitting(&met), TransportKind::Tcp);
    }

    #[test]
    fn ranks_over_tcp_know_how_many_share_the_machine() {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
            .to_string();
        let connect = |rank: &str| {
            let place = launch(&[
                ("RANK", rank),
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
                ("RING_DEADLINE_SECONDS", "30"),
            ]);
            Communicator::connect(TransportKind::Tcp, &place).unwrap()
        };
        std::thread::scope(|scope| {
            for rank in ["0", "1"] {
                scope.spawn(move || {
                    let communicator = connect(rank);
                    assert_eq!(communicator.rank().to_string(), rank);
                    assert_eq!(communicator.ranks_on_this_machine(), 2);
                });
            }
        });
    }

    #[test]
    fn loopback_is_not_for_processes() {
        let two = launch(&[("RING_RANK", "1"), ("RING_WORLD_SIZE", "2")]);
        let error = Communicator::connect(TransportKind::Loopback, &two).unwrap_err();
        assert_eq!(error, ConnectError::SeveralProcesses { world_size: 2 });
    }

    #[test]
    fn what_is_not_compiled_in_says_which_feature() {
        for kind in TransportKind::ALL {
            let result = Communicator::connect(kind, &launch(&[]));
            if !kind.is_compiled_in() {
                let text = result.unwrap_err().to_string();
                assert!(text.contains(&format!("feature `{kind}`")), "{text}");
            }
        }
    }

    #[test]
    fn a_transport_that_finds_another_place_is_refused() {
        let second = launch(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]);
        let error = check_place(TransportKind::Mpi, &second, 0, 1).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with(
                "Open MPI says that this is rank 1 of 2, but the transport mpi finds rank 0 of 1"
            ),
            "{text}"
        );
        assert_eq!(check_place(TransportKind::Mpi, &second, 1, 2), Ok(()));
        assert_eq!(check_place(TransportKind::Mpi, &launch(&[]), 1, 2), Ok(()));
    }
}
