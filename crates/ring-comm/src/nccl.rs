//! The NCCL backend: device memory straight from one NVIDIA GPU to another.
//!
//! [`Nccl::init`] connects a process with all others of its job, as its [`Launch`] describes it, a GPU each; [`Nccl::group`] joins them
//! into a group; one can follow another. Control frames travel over TCP (or MPI, with `Nccl::init_over_mpi`), data by NCCL on a
//! stream of its own, issued in one order that all ranks find together (the head of `nccl/order.rs` has the argument why they never wait for
//! one another in a circle).
//!
//! What it adds to the rules at the head of [`Transport`](crate::Transport)'s module:
//!
//! - Buffers are [`DeviceMemory`], such as [`CudaBuffer`]. A send waits, on the GPU, for what is on the buffer's stream when it is called, and
//!   yields its own buffer when the data has left. A receive lands in the memory that was brought for it, once what was on that memory's stream is
//!   done. When it has been waited for, the contents are there for every stream.
//! - No call waits for the GPU but those that wait for a message. When a group fails while something is on a stream, every rank
//!   that has something there aborts its communicator at once, the others when the next group begins or when they leave; then comes a new one.
//! - A rank is a process: NCCL reads and writes the memory of another rank of the same process directly, for which [`CudaBuffer`] is not
//!   prepared.
//! - Leaving takes all ranks, as with MPI: drop everything at about the same time.
//!
//! # What it needs
//!
//! To build: nothing. To run: CUDA's driver, and NCCL 2.22 or newer, found as `libnccl.so.2` or `libnccl.so` where the system looks for
//! libraries, or in the file that [`RING_NCCL_LIBRARY`](LIBRARY_VARIABLE) names (`nvidia/nccl/lib/libnccl.so.2` in the Python
//! package `nvidia-nccl-cu12` or `nvidia-nccl-cu13`). All ranks must have the same version. What is missing is a [`NcclError`].
//! `NCCL_COMM_BLOCKING` must not be set: with it no deadline holds.
//!
//! # Two ranks on one GPU
//!
//! NCCL refuses that by default. From 2.30 on it is possible with `NCCL_MULTI_RANK_GPU_ENABLE=1` in the environment of all ranks, each of
//! which must be given the GPU's number. Any version can be made to believe that the ranks are on different hosts
//! with another `NCCL_HOSTID` for each; data goes through NCCL's network transport then, which finds no network on a machine that has
//! only the loopback unless `NCCL_SOCKET_IFNAME=lo`. Both are for tests: kernels of processes that wait for one another take turns on the
//! GPU, so it is slow, and hangs if there is no room for all of them (`NCCL_MAX_CTAS` makes them smaller).

mod communicator;
mod cuda;
mod deadline;
mod device;
mod endpoint;
mod error;
#[cfg(test)]
mod fake;
mod frame;
mod gpu;
mod handed;
mod library;
mod meeting;
mod memory;
mod order;
#[cfg(test)]
mod tests;
mod wire;

use std::{fmt, sync::Arc, time::Duration};

pub use self::{
    cuda::CudaDevice,
    endpoint::NcclEndpoint,
    error::NcclError,
    library::{LIBRARY_VARIABLE, NcclLibrary, UniqueId, Version},
    memory::{CudaBuffer, CudaView, DeviceMemory},
};
use self::{deadline::Deadline, gpu::Gpu, handed::Handed, wire::NcclWire};
use crate::{
    buffer::HostBuffer,
    error::CommError,
    launch::Launch,
    remote::{End, Engine, StartError, Wire},
    tcp::{self, TcpWire},
    transport::Rank,
};

/// How much later than the deadline a start that hangs is given up: after whoever knows better what it hangs in.
const MARGIN: Duration = Duration::from_secs(2);

/// This process's place among ranks with a GPU each. Leaves it when this and all endpoints and requests are dropped.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
///
/// use ring_comm::{
///     Communicator, Nccl, launch,
///     buffer::{DType, HostBuffer},
///     nccl::CudaBuffer,
///     Staging, Transport, Expected, Tag, Payload,
/// };
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let nccl = Nccl::init(&launch::from_env()?, None)?;
/// let endpoint = nccl.group(Duration::from_secs(60))?;
/// let (rank, world_size) = (nccl.rank(), nccl.world_size());
/// let own = HostBuffer::F32(vec![rank as f32; 1024]);
/// let own = CudaBuffer::copy_from_host(nccl.device(), &own, None)?;
///
/// let tag = Tag::new(0, 0, Payload::KeyValue);
/// let expected = Expected { dtype: DType::F32, len: 1024 };
/// let receive = endpoint.irecv((rank + world_size - 1) % world_size, tag, expected)?;
/// let send = endpoint.isend((rank + 1) % world_size, tag, own)?;
/// let received: CudaBuffer = receive.wait()?;
/// send.wait()?;
/// # drop(received);
/// # Ok(())
/// # }
/// ```
pub struct Nccl<M: DeviceMemory = CudaBuffer> {
    engine: Arc<Engine<Handed<M>>>,
    device: CudaDevice,
    version: Version,
}

/// What a rank that can use NCCL has.
struct Opened<M: DeviceMemory> {
    library: NcclLibrary,
    device: CudaDevice,
    allocator: M::Allocator,
}

impl<M: DeviceMemory> fmt::Debug for Nccl<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("engine", &self.engine)
            .field("device", &self.device)
            .field("version", &self.version)
            .finish()
    }
}

impl Nccl {
    /// Connects this process with all others of its job, for buffers of CUDA's own memory, on GPU `device`: if `None`, the local rank's, or that
    /// of the rank modulo the number of GPUs if the launcher does not tell a local rank.
    ///
    /// Waits for the others up to the deadline of `launch`; dropping waits as long for them to leave.
    ///
    /// # Errors
    /// [`NcclError`] if NCCL or the GPU cannot be used, here or on another rank, or the ranks do not meet by the deadline.
    pub fn init(launch: &Launch, device: Option<usize>) -> Result<Self, NcclError> {
        Self::init_with(launch, device, |device| Ok(device.clone()))
    }

    /// As [`init`](Self::init), with MPI instead of TCP for control; `launch` tells only the local rank and the deadline.
    ///
    /// # Errors
    /// As [`init`](Self::init); and if MPI fails to start, or was started before in this process.
    #[cfg(feature = "mpi")]
    pub fn init_over_mpi(launch: &Launch, device: Option<usize>) -> Result<Self, NcclError> {
        Self::init_over_mpi_with(launch, device, |device| Ok(device.clone()))
    }
}

impl<M: DeviceMemory> Nccl<M> {
    /// As [`init`](Nccl::init), for other device memory than [`CudaBuffer`]; `allocator` makes what makes it.
    ///
    /// # Errors
    /// As [`init`](Nccl::init), and what `allocator` returns.
    pub fn init_with(
        launch: &Launch,
        device: Option<usize>,
        allocator: impl FnOnce(&CudaDevice) -> Result<M::Allocator, NcclError>,
    ) -> Result<Self, NcclError> {
        let deadline = Deadline::after(launch.deadline.value);
        let opened = Opened::open(launch, device, allocator);
        let launch = launch.clone();
        Self::start(deadline, opened, move || connect(&launch, deadline))
    }

    /// As [`init_over_mpi`](Nccl::init_over_mpi), for other device memory than [`CudaBuffer`].
    ///
    /// # Errors
    /// As [`init_over_mpi`](Nccl::init_over_mpi), and what `allocator` returns.
    #[cfg(feature = "mpi")]
    pub fn init_over_mpi_with(
        launch: &Launch,
        device: Option<usize>,
        allocator: impl FnOnce(&CudaDevice) -> Result<M::Allocator, NcclError>,
    ) -> Result<Self, NcclError> {
        let deadline = Deadline::after(launch.deadline.value);
        let opened = Opened::open(launch, device, allocator);
        Self::start(deadline, opened, || Ok(crate::mpi::start_wire()?))
    }

    fn start<C: Wire<HostBuffer>>(
        deadline: Deadline,
        opened: Result<Opened<M>, NcclError>,
        control: impl FnOnce() -> Result<C, NcclError> + Send + 'static,
    ) -> Result<Self, NcclError> {
        let known = opened
            .as_ref()
            .map(|opened| (opened.device.clone(), opened.library.version()));
        let known = known.map_err(Clone::clone);
        let make_wire = move || begin(control()?, opened, deadline);
        let engine = Engine::start(deadline.remaining().saturating_add(MARGIN), make_wire);
        let engine = engine.map_err(|error| match error {
            StartError::Wire(error) => error,
            StartError::Deadline => NcclError::Deadline {
                what: "NCCL to start".to_owned(),
                deadline: deadline.duration(),
            },
            StartError::Thread(error) => NcclError::Thread(error.to_string()),
        })?;
        let (device, version) = known?;
        Ok(Self {
            engine: Arc::new(engine),
            device,
            version,
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

    /// The GPU of this process.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// The version of NCCL, on all ranks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The endpoint of a new group of all processes, all of which must call this; the group before must be over on this rank. No
    /// wait in it, nor for the others to join, takes longer than `deadline`.
    ///
    /// # Errors
    /// [`CommError`] that names a rank that has not joined in time, or is gone. If another rank finds that first, or the group
    /// fails otherwise meanwhile, the first call in it says so.
    pub fn group(&self, deadline: Duration) -> Result<NcclEndpoint<M>, CommError> {
        self.group_within(deadline, deadline)
    }

    /// As [`group`](Self::group), but waits up to `patience` for the others to join.
    ///
    /// # Errors
    /// As [`group`](Self::group).
    pub fn group_within(
        &self,
        patience: Duration,
        deadline: Duration,
    ) -> Result<NcclEndpoint<M>, CommError> {
        let remote = self.engine.join_within(patience, deadline)?;
        Ok(NcclEndpoint::new(remote, self.device.clone()))
    }
}

impl<M: DeviceMemory> Opened<M> {
    /// The library first: without it a GPU is of no use.
    fn open(
        launch: &Launch,
        device: Option<usize>,
        allocator: impl FnOnce(&CudaDevice) -> Result<M::Allocator, NcclError>,
    ) -> Result<Self, NcclError> {
        let library = NcclLibrary::load()?;
        let local_rank = launch.local_rank.map(|local_rank| local_rank.value);
        let number = match device.or(local_rank) {
            Some(number) => number,
            None => launch.rank.value % CudaDevice::count()?,
        };
        let device = CudaDevice::open(number)?;
        let allocator = allocator(&device)?;
        Ok(Self {
            library,
            device,
            allocator,
        })
    }
}

/// Connects this process with all others for control.
fn connect(launch: &Launch, deadline: Deadline) -> Result<TcpWire, NcclError> {
    if launch.world_size.value == 1 {
        return Ok(TcpWire::alone());
    }
    let store = launch.open_store()?;
    Ok(tcp::wire_over(&store, launch, deadline.instant())?)
}

/// Meets the others and makes the first communicator with them.
fn begin<M: DeviceMemory, C: Wire<HostBuffer>>(
    mut control: C,
    opened: Result<Opened<M>, NcclError>,
    deadline: Deadline,
) -> Result<NcclWire<Handed<M>, C, Gpu<M>>, NcclError> {
    let mut heard = Vec::new();
    let own = opened
        .as_ref()
        .map(|opened| &opened.library)
        .map_err(Clone::clone);
    let met = meeting::meet(&mut control, &mut heard, own, deadline).and_then(|id| {
        let Opened {
            library,
            device,
            allocator,
        } = opened?;
        Ok((id, Gpu::new(library, device, allocator)?))
    });
    match met {
        Ok((id, gpu)) => NcclWire::start(control, gpu, &id, heard, deadline),
        Err(error) => {
            control.close(End::Alone);
            Err(error)
        }
    }
}

/// The first part of [`Nccl::init`], for which no GPU is needed: what the ranks will find one another by, the same on all of them.
///
/// # Errors
/// As [`Nccl::init`].
#[doc(hidden)]
pub fn rendezvous(launch: &Launch) -> Result<UniqueId, NcclError> {
    let deadline = Deadline::after(launch.deadline.value);
    let library = NcclLibrary::load();
    let mut control = connect(launch, deadline)?;
    let own = library.as_ref().map_err(Clone::clone);
    let met = meeting::meet(&mut control, &mut Vec::new(), own, deadline);
    control.close(End::Together);
    met
}
