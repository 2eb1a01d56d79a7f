//! A rank's place in the group, and what it owns: [`Ring`].

use std::{
    num::NonZero,
    sync::{Arc, Mutex, PoisonError},
    thread::available_parallelism,
};

use ring_comm::{Communicator, buffer::HostBuffer};
use ring_core::{AttentionSpec, Plan, Sharding, Span};
use ring_kernels::CpuKernels;
#[cfg(feature = "cube")]
use ring_kernels::{CubeBuffer, CubeDevice, CubeKernels, KernelError, cubecl::client::Client};

use crate::error::RingError;
#[cfg(feature = "cube")]
use crate::op::Site;
#[cfg(feature = "cube")]
use std::sync::MutexGuard;

/// Plans kept for reuse.
const CACHED_PLANS: usize = 32;

/// What a sequence-parallel module needs to know beside its inputs: the group, how sequences are sharded over it, how long the
/// sequence at hand is. Cheap to clone.
///
/// ```
/// use ring_burn::{Ring, Sharding};
/// let ring = Ring::single(4096)?;
/// assert_eq!((ring.rank(), ring.world_size(), ring.shard_len()), (0, 1, 4096));
/// # Ok::<(), ring_burn::RingError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ring {
    communicator: Communicator<HostBuffer>,
    kernels: CpuKernels,
    query_sharding: Sharding,
    key_sharding: Sharding,
    query_length: usize,
    key_length: usize,
    seed: u64,
    first_batch_entry: usize,
    plans: Arc<Mutex<Vec<Arc<Plan>>>>,
    /// Kernels and communicators for the GPUs that tensors were found on.
    #[cfg(feature = "cube")]
    devices: Arc<Mutex<Vec<Site<CubeBuffer, CubeKernels>>>>,
}

impl Ring {
    /// This rank's place in a group, for self-attention over `sequence_length` positions.
    ///
    /// Tensors decide where attention is computed. For tensors on a GPU messages are copied to host memory and back, so that
    /// any communicator serves.
    ///
    /// The kernels get this process's cores divided by the number of ranks on its machine, at least one thread; see
    /// [`with_threads`](Self::with_threads).
    ///
    /// # Errors
    /// [`RingError::Kernel`] if threads cannot be started.
    pub fn new(
        communicator: Communicator<HostBuffer>,
        sharding: Sharding,
        sequence_length: usize,
    ) -> Result<Self, RingError> {
        let cores = available_parallelism().map_or(1, NonZero::get);
        let threads = (cores / communicator.ranks_on_this_machine()).max(1);
        Ok(Self {
            communicator,
            kernels: CpuKernels::new(threads)?,
            query_sharding: sharding,
            key_sharding: sharding,
            query_length: sequence_length,
            key_length: sequence_length,
            seed: 0,
            first_batch_entry: 0,
            plans: Arc::default(),
            #[cfg(feature = "cube")]
            devices: Arc::default(),
        })
    }

    /// A group of one: no communication, attention is a trainable flash attention.
    ///
    /// # Errors
    /// [`RingError::Kernel`] if threads cannot be started.
    pub fn single(sequence_length: usize) -> Result<Self, RingError> {
        Self::new(
            Communicator::single(),
            Sharding::Contiguous,
            sequence_length,
        )
    }

    /// The same place with another number of kernel threads for this rank.
    ///
    /// # Errors
    /// [`RingError::Kernel`] for zero threads, or if they cannot be started.
    pub fn with_threads(self, threads: usize) -> Result<Self, RingError> {
        Ok(Self {
            kernels: CpuKernels::new(threads)?,
            ..self
        })
    }

    /// The same place, for self-attention over sequences of another length.
    #[must_use]
    pub fn with_sequence_length(self, sequence_length: usize) -> Self {
        Self {
            query_length: sequence_length,
            key_length: sequence_length,
            key_sharding: self.query_sharding,
            ..self
        }
    }

    /// The same place, with keys and values of another sharding and length than the queries (cross-attention).
    #[must_use]
    pub fn with_keys(self, sharding: Sharding, length: usize) -> Self {
        Self {
            key_sharding: sharding,
            key_length: length,
            ..self
        }
    }

    /// The same place, with another seed for dropout. Give every training step its own seed, the same on all ranks: dropout
    /// depends on it and on global positions, never on the number of ranks.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The same place, where batches are a part of a larger one whose entries are counted from `entry`: dropout depends on
    /// the entry too.
    #[must_use]
    pub fn with_first_batch_entry(self, entry: usize) -> Self {
        Self {
            first_batch_entry: entry,
            ..self
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    /// The group.
    pub fn communicator(&self) -> &Communicator<HostBuffer> {
        &self.communicator
    }

    /// The kernels of this rank.
    pub fn kernels(&self) -> &CpuKernels {
        &self.kernels
    }

    /// How sequences are dealt out.
    pub fn sharding(&self) -> Sharding {
        self.query_sharding
    }

    /// Length of the whole sequence.
    pub fn sequence_length(&self) -> usize {
        self.query_length
    }

    /// Length of the whole sequence of keys; that of the queries but in cross-attention.
    pub fn key_length(&self) -> usize {
        self.key_length
    }

    /// The seed for dropout.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Number of the first batch entry in the whole batch, for dropout.
    pub fn first_batch_entry(&self) -> usize {
        self.first_batch_entry
    }

    /// The spans of positions that this rank owns, ascending.
    pub fn spans(&self) -> Vec<Span> {
        self.query_sharding
            .spans(self.query_length, self.world_size(), self.rank())
    }

    /// The positions that this rank owns, ascending: row `i` of its tensors stands at the `i`-th.
    pub fn positions(&self) -> Vec<usize> {
        self.spans()
            .iter()
            .flat_map(|span| span.start..span.end)
            .collect()
    }

    /// Number of positions that this rank owns.
    pub fn shard_len(&self) -> usize {
        self.spans().iter().map(Span::len).sum()
    }

    /// Number of keys that this rank owns.
    pub fn key_shard_len(&self) -> usize {
        self.key_sharding
            .shard_len(self.key_length, self.world_size(), self.rank())
    }

    /// The same place, with a communicator of its own for tensors on `device`: over NCCL, say, which moves them directly.
    ///
    /// # Errors
    /// [`RingError::Value`] if it is for another rank or another number of ranks, [`RingError::Kernel`] for a device that
    /// cannot run the kernels.
    #[cfg(feature = "cube")]
    pub fn with_device_communicator(
        self,
        device: CubeDevice,
        communicator: Communicator<CubeBuffer>,
    ) -> Result<Self, RingError> {
        let place = (communicator.rank(), communicator.world_size());
        if place != (self.rank(), self.world_size()) {
            return Err(RingError::Value(format!(
                "the communicator of the device is rank {} of {}, that of the host is rank {} of {}",
                place.0,
                place.1,
                self.rank(),
                self.world_size()
            )));
        }
        let id = device.client().service_id();
        let site = Site {
            kernels: CubeKernels::new(device)?,
            communicator,
        };
        let mut devices = self.devices().clone();
        devices.retain(|site| site.kernels.device().client().service_id() != id);
        devices.push(site);
        Ok(Self {
            devices: Arc::new(Mutex::new(devices)),
            ..self
        })
    }

    #[cfg(feature = "cube")]
    fn devices(&self) -> MutexGuard<'_, Vec<Site<CubeBuffer, CubeKernels>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kernels and communicator for tensors of a GPU.
    #[cfg(feature = "cube")]
    pub(crate) fn on_device(
        &self,
        client: &Client,
    ) -> Result<Site<CubeBuffer, CubeKernels>, KernelError> {
        let mut devices = self.devices();
        let id = client.service_id();
        let known = devices
            .iter()
            .find(|site| site.kernels.device().client().service_id() == id);
        if let Some(site) = known {
            return Ok(site.clone());
        }
        let device = CubeDevice::new(client.clone());
        let site = Site {
            kernels: CubeKernels::new(device.clone())?,
            communicator: self.communicator.staged(device),
        };
        devices.push(site.clone());
        Ok(site)
    }

    /// Ends the group because this rank cannot go on: its peers must not wait for it. Alone, nothing is lost by an error.
    pub(crate) fn tell_others(&self, error: &RingError) {
        if self.world_size() > 1 {
            self.communicator.abort(&error.to_string());
        }
    }

    /// A computation over this group.
    pub(crate) fn spec(&self, base: AttentionSpec) -> Result<AttentionSpec, RingError> {
        Ok(base
            .with_lengths(self.query_length, self.key_length)?
            .sharded(self.query_sharding, self.world_size())?
            .with_key_sharding(self.key_sharding))
    }

    /// This rank's plan for a computation; made once, then reused.
    pub(crate) fn plan(&self, spec: &AttentionSpec) -> Result<Arc<Plan>, RingError> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = plans.iter().position(|plan| plan.spec() == spec) {
            let plan = plans.remove(index);
            plans.push(Arc::clone(&plan));
            return Ok(plan);
        }
        let plan = Arc::new(Plan::new(spec, self.rank())?);
        if plans.len() == CACHED_PLANS {
            plans.remove(0);
        }
        plans.push(Arc::clone(&plan));
        Ok(plan)
    }
}
