//! Where the ranks of a program run: all in this process, or one here and the others in processes like it.

#[cfg(feature = "nccl")]
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "nccl")]
use ring_comm::Nccl;
use ring_comm::{
    Communicator, ConnectError, TransportKind,
    buffer::HostBuffer,
    launch::{self, Launch, Origin},
};
#[cfg(feature = "cube")]
use ring_kernels::{CubeBuffer, CubeDevice, cubecl};

use crate::command_line::Failure;
#[cfg(feature = "cube")]
use crate::device::Device;

/// Longest time a rank waits for another, unless the command line or `RING_DEADLINE_SECONDS` says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);

/// More ranks are a mistake: each is a thread or a process.
pub const MAX_RANKS: usize = 1024;

/// Who the ranks are.
#[derive(Clone, Debug)]
pub enum Ranks {
    /// Threads of this process.
    Threads(usize),
    /// This process and others, each with a rank.
    Processes(Communicator<HostBuffer>),
}

/// The ranks of a program, and how long they wait for one another.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Who they are.
    pub ranks: Ranks,
    /// How they exchange rows.
    pub transport: TransportKind,
    /// Longest time one waits for another.
    pub deadline: Duration,
    /// How this process was started, if anybody asked.
    launch: Option<Launch>,
}

/// What the command line says of the ranks.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// How ranks exchange rows; by default loopback, or what fits how the process was started.
    pub transport: Option<TransportKind>,
    /// Number of ranks in all.
    pub ranks: Option<usize>,
    /// Number of ranks if nobody says and they are threads.
    pub threads: usize,
    /// Longest time one waits for another.
    pub deadline: Option<Duration>,
}

/// NCCL was asked for, and the device has no such memory.
#[cfg(feature = "cube")]
fn needs_cuda(device: &Device) -> Failure {
    Failure::Input(format!(
        "--transport nccl carries the memory of NVIDIA GPUs, and --device is {device}: give --device cuda"
    ))
}

impl Placement {
    /// Joins the group of the processes that were started together with this one, or makes one of threads.
    ///
    /// # Errors
    /// [`Failure::Input`] if what the command line wishes is not how the process was started, or the environment contradicts itself;
    /// [`Failure::Unsupported`] for a transport that is not compiled in or does not carry the processor's memory;
    /// [`Failure::Run`] if the processes do not come together.
    pub fn join(wishes: &Wishes) -> Result<Self, Failure> {
        let mut launch = launch::from_env().map_err(Failure::input)?;
        let deadline = match (wishes.deadline, launch.deadline.origin) {
            (Some(deadline), _) => deadline,
            (None, Origin::Default) => DEFAULT_DEADLINE,
            (None, Origin::Variables(_)) => launch.deadline.value,
        };
        launch.deadline.value = deadline;
        let kind = wishes
            .transport
            .unwrap_or_else(|| TransportKind::fitting(&launch));
        if kind == TransportKind::Loopback && launch.world_size.value == 1 {
            let ranks = wishes.ranks.unwrap_or(wishes.threads);
            return Ok(Self::threads(ranks, deadline));
        }
        // NCCL carries the memory of GPUs; everything else goes another way.
        let for_the_host = match kind {
            TransportKind::Nccl if kind.is_compiled_in() => TransportKind::Tcp,
            _ => kind,
        };
        let communicator = Communicator::connect(for_the_host, &launch).map_err(explain)?;
        let processes = communicator.world_size();
        if let Some(ranks) = wishes.ranks
            && ranks != processes
        {
            return Err(Failure::Input(format!(
                "{ranks} ranks are asked for, but over {kind} each is a process, and {processes} were started"
            )));
        }
        Ok(Self {
            ranks: Ranks::Processes(communicator),
            transport: kind,
            deadline,
            launch: Some(launch),
        })
    }

    /// Ranks that are threads of this process.
    pub fn threads(ranks: usize, deadline: Duration) -> Self {
        Self {
            ranks: Ranks::Threads(ranks),
            transport: TransportKind::Loopback,
            deadline,
            launch: None,
        }
    }

    /// The GPU of a rank of this process, of which it has `communicator`, and its group for buffers there; none if it computes on
    /// the processor.
    ///
    /// # Errors
    /// As [`Device::of_rank`]; [`Failure::Input`] if the ranks' transport does not fit the device, [`Failure::Run`] if it does not
    /// work.
    #[cfg(feature = "cube")]
    pub fn gpu(
        &self,
        device: &Device,
        communicator: &Communicator<HostBuffer>,
    ) -> Result<Option<(CubeDevice, Communicator<CubeBuffer>)>, Failure> {
        let Some(gpu) = device.of_rank(self.rank_on_this_machine(communicator.rank()))? else {
            return match self.transport {
                TransportKind::Nccl => Err(needs_cuda(device)),
                _ => Ok(None),
            };
        };
        let cube = CubeDevice::new(gpu.client());
        let communicator = match self.transport {
            TransportKind::Nccl => self.over_nccl(device, &gpu, &cube)?,
            _ => communicator.staged(cube.clone()),
        };
        Ok(Some((cube, communicator)))
    }

    #[cfg(feature = "nccl")]
    fn over_nccl(
        &self,
        device: &Device,
        gpu: &cubecl::Device,
        cube: &CubeDevice,
    ) -> Result<Communicator<CubeBuffer>, Failure> {
        let cubecl::Device::Cuda(cuda) = gpu else {
            return Err(needs_cuda(device));
        };
        let launch = self.launch.as_ref().ok_or_else(|| needs_cuda(device))?;
        let nccl = Nccl::init_with(launch, Some(cuda.index), |_| Ok(cube.clone()));
        let nccl = nccl.map_err(|error| Failure::Run(error.to_string()))?;
        let group = nccl.group(self.deadline);
        let group = group.map_err(|error| Failure::Run(error.to_string()))?;
        Ok(Communicator::new(Arc::new(group)))
    }

    #[cfg(all(feature = "cube", not(feature = "nccl")))]
    fn over_nccl(
        &self,
        device: &Device,
        _gpu: &cubecl::Device,
        _cube: &CubeDevice,
    ) -> Result<Communicator<CubeBuffer>, Failure> {
        Err(needs_cuda(device))
    }

    /// The number of a rank of this process among the ranks of its machine, as far as anybody tells: which GPU is its.
    pub fn rank_on_this_machine(&self, rank: usize) -> usize {
        match &self.ranks {
            Ranks::Threads(_) => rank,
            Ranks::Processes(_) => {
                let local_rank =
                    |launch: &Launch| launch.local_rank.as_ref().map(|rank| rank.value);
                self.launch.as_ref().and_then(local_rank).unwrap_or(rank)
            }
        }
    }

    /// Number of ranks in all.
    pub fn world_size(&self) -> usize {
        match &self.ranks {
            Ranks::Threads(ranks) => *ranks,
            Ranks::Processes(communicator) => communicator.world_size(),
        }
    }

    /// Whether rank 0 runs in this process: it reports for all.
    pub fn has_first_rank(&self) -> bool {
        match &self.ranks {
            Ranks::Threads(_) => true,
            Ranks::Processes(communicator) => communicator.rank() == 0,
        }
    }

    /// Checks that all processes were started with the same `fields`; all of them must ask.
    ///
    /// # Errors
    /// [`Failure::Run`] that names the first rank that differs and the field in which it does, or if the processes cannot be
    /// reached.
    pub fn agree(&self, topic: &str, fields: &[(&str, String)]) -> Result<(), Failure> {
        let Ranks::Processes(communicator) = &self.ranks else {
            return Ok(());
        };
        let fields: Vec<(String, String)> = fields
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        communicator
            .agree(topic, &fields)
            .map_err(|error| Failure::Run(error.root().to_string()))
    }

    /// Tells the other processes, if there are any, why this one cannot go on.
    pub fn abort(&self, failure: &Failure) {
        if let Ranks::Processes(communicator) = &self.ranks {
            communicator.abort(&failure.to_string());
        }
    }

    /// What `value` is in each process, in the order of ranks; all of them must ask.
    ///
    /// # Errors
    /// [`Failure::Run`] if the processes cannot be reached.
    pub fn of_all_processes(&self, purpose: &str, value: f64) -> Result<Vec<f64>, Failure> {
        let Ranks::Processes(communicator) = &self.ranks else {
            return Ok(vec![value]);
        };
        let all = communicator
            .all_gather_bytes(purpose, &value.to_le_bytes())
            .map_err(|error| Failure::Run(error.to_string()))?;
        let read = |bytes: Vec<u8>| bytes.try_into().map_or(f64::NAN, f64::from_le_bytes);
        Ok(all.into_iter().map(read).collect())
    }
}

fn explain(error: ConnectError) -> Failure {
    let text = error.to_string();
    match error {
        ConnectError::NotCompiledIn { .. } | ConnectError::DeviceMemoryOnly { .. } => {
            Failure::Unsupported(text)
        }
        ConnectError::Launch(_)
        | ConnectError::SeveralProcesses { .. }
        | ConnectError::AnotherPlace { .. } => Failure::Input(text),
        _ => Failure::Run(text),
    }
}
