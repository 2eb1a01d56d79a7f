//! A rank's place in the group, and what it owns: [`Ring`].

use std::{
    num::NonZero,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread::available_parallelism,
};

use ring_comm::{Communicator, buffer::HostBuffer};
use ring_core::{
    AttentionSpec, Auto, Choice, Documents, Plan, Recovery, RecoveryPolicy, Sharding, Span,
    Strategy,
};
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
/// Of these, plans of one module that differ in the documents and the padding of the batch alone.
const CACHED_BATCHES: usize = 2;

/// How computations are divided among the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Division {
    /// By one strategy.
    By(Strategy),
    /// By the one that costs least.
    Auto(Auto),
}

/// What a sequence-parallel module needs to know beside its inputs: the group, how sequences are sharded over it, and the batch
/// at hand: how long its sequences are, which documents they consist of, where they end. Cheap to clone.
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
    query_offset: Option<i64>,
    documents: Option<Documents>,
    key_lengths: Option<Arc<[usize]>>,
    seed: u64,
    first_batch_entry: usize,
    recovery: Option<Recovery>,
    /// The one of [`recovering`](Self::recovering), once it was asked for.
    own_recovery: Arc<OnceLock<Recovery>>,
    plans: Arc<Mutex<Vec<Arc<Plan>>>>,
    division: Option<Division>,
    /// What was chosen for computations.
    choices: Arc<Mutex<Vec<(AttentionSpec, Auto, Choice)>>>,
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
            query_offset: None,
            documents: None,
            key_lengths: None,
            seed: 0,
            first_batch_entry: 0,
            recovery: None,
            own_recovery: Arc::default(),
            plans: Arc::default(),
            division: None,
            choices: Arc::default(),
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

    /// The same place, for self-attention over sequences of another length, without the documents, key lengths and query offset
    /// of the batch before.
    #[must_use]
    pub fn with_sequence_length(self, sequence_length: usize) -> Self {
        Self {
            documents: None,
            key_lengths: None,
            query_length: sequence_length,
            key_length: sequence_length,
            key_sharding: self.query_sharding,
            query_offset: None,
            ..self
        }
    }

    /// The same place, with keys and values of another sharding and length than the queries (cross-attention).
    ///
    /// Key `m` stands at position `m`. Where queries stand follows from the pattern, unless
    /// [`with_query_offset`](Self::with_query_offset) says it: if keys after the query are hidden (causal, or a window that
    /// reaches 0 positions ahead), the last query stands at the last key, so query `i` at position `i + keys - queries`, and
    /// queries before position 0 see nothing; otherwise query `i` stands at position `i`.
    ///
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use ring_burn::{Ring, RingAttentionConfig, Sharding};
    ///
    /// let draw = |n| Tensor::<4>::random([1, 2, n, 8], Distribution::Default, &Device::flex());
    /// let ring = Ring::single(10)?.with_keys(Sharding::Contiguous, 64);
    /// // Ten queries that stand at the last ten of 64 keys.
    /// let attention = RingAttentionConfig::new().with_causal(true).init();
    /// let output = attention.forward(draw(10), draw(64), draw(64), &ring);
    /// assert_eq!(output.dims(), [1, 2, 10, 8]);
    /// # Ok::<(), ring_burn::RingError>(())
    /// ```
    #[must_use]
    pub fn with_keys(self, sharding: Sharding, length: usize) -> Self {
        Self {
            key_sharding: sharding,
            key_length: length,
            ..self
        }
    }

    /// The same place, with query `i` at position `i + offset` among the keys: for queries that are a part of a sequence whose
    /// keys are all there, say. Positions may be negative, and lie after the last key.
    #[must_use]
    pub fn with_query_offset(self, offset: i64) -> Self {
        Self {
            query_offset: Some(offset),
            ..self
        }
    }

    /// The same place, for a batch whose sequences are documents packed one after the other: a query sees keys of its own
    /// document alone, in every attention that gets this ring. Positions stay those of the whole sequence.
    ///
    /// They belong to the batch at hand: one list of lengths for all its entries, or one for each
    /// ([`Documents::per_entry`]); where a batch is a part of a larger one, those of the part. Attention refuses lengths that
    /// do not add up to the number of keys, or lists for another number of entries. All ranks give the same.
    ///
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use ring_burn::{Documents, Ring, RingAttentionConfig};
    ///
    /// let draw = || Tensor::<4>::random([2, 4, 100, 16], Distribution::Default, &Device::flex());
    /// let documents = Documents::per_entry(vec![vec![30, 70], vec![20, 20, 60]]);
    /// let ring = Ring::single(100)?.with_documents(documents);
    /// let output = RingAttentionConfig::new().init().forward(draw(), draw(), draw(), &ring);
    /// assert_eq!(output.dims(), [2, 4, 100, 16]);
    /// # Ok::<(), ring_burn::RingError>(())
    /// ```
    #[must_use]
    pub fn with_documents(self, documents: Documents) -> Self {
        Self {
            documents: Some(documents),
            ..self
        }
    }

    /// The same place, for a batch with `lengths[entry]` keys in each entry: the keys at later positions are padding, which
    /// nothing sees. Outputs of queries there are still computed.
    ///
    /// As with [`with_documents`](Self::with_documents), they belong to the batch at hand; attention refuses another number of
    /// them than there are entries, and lengths beyond the number of keys.
    #[must_use]
    pub fn with_key_lengths(self, lengths: Vec<usize>) -> Self {
        Self {
            key_lengths: Some(lengths.into()),
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

    /// The same place, where attention recovers from refused memory: every pass reserves what it needs before ranks exchange anything,
    /// and all try again with less if one cannot. Results are the same bits. Give every rank one of the same policy; clones
    /// of it, [`Recovery::statistics`] among them, tell what happened. On a GPU, kernels need what they need, and a retry only
    /// releases what is kept between calls.
    ///
    /// Memory that is refused for good is [`RingError::Run`] with `ring_core::Error::Memory` in a forward, on all ranks, after which the group is
    /// as good as before. A backward cannot return an error: it panics, on all ranks.
    ///
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use ring_burn::{Recovery, RecoveryPolicy, Ring, RingAttentionConfig};
    ///
    /// let draw = || Tensor::<4>::random([1, 2, 100, 8], Distribution::Default, &Device::flex());
    /// let recovery = Recovery::new(RecoveryPolicy::default());
    /// let ring = Ring::single(100)?.with_recovery(recovery.clone());
    /// RingAttentionConfig::new().init().forward(draw(), draw(), draw(), &ring);
    /// assert_eq!((recovery.statistics().passes, recovery.statistics().refusals), (1, 0));
    /// # Ok::<(), ring_burn::RingError>(())
    /// ```
    #[must_use]
    pub fn with_recovery(self, recovery: Recovery) -> Self {
        Self {
            recovery: Some(recovery),
            ..self
        }
    }

    /// How attention recovers, if it does.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.recovery.as_ref()
    }

    /// The same place with a recovery: the one that it has, or one by the default policy, which all clones of this ring share.
    #[must_use]
    pub fn recovering(self) -> Self {
        if self.recovery.is_some() {
            return self;
        }
        let own = || Recovery::new(RecoveryPolicy::default());
        let recovery = self.own_recovery.get_or_init(own).clone();
        self.with_recovery(recovery)
    }

    /// The same place, with computations divided among the ranks by `strategy`; without one it is [`Strategy::Ring`]. Results are
    /// the same, to rounding. All ranks give the same; a strategy that cannot serve is refused when attention is computed.
    ///
    /// ```
    /// use ring_burn::{Ring, Strategy};
    /// let ring = Ring::single(4096)?.with_strategy(Strategy::HeadParallel);
    /// assert_eq!(ring.strategy(), Some(Strategy::HeadParallel));
    /// # Ok::<(), ring_burn::RingError>(())
    /// ```
    #[must_use]
    pub fn with_strategy(self, strategy: Strategy) -> Self {
        Self {
            division: Some(Division::By(strategy)),
            ..self
        }
    }

    /// The same place, with computations divided by the strategy that costs least ([`Auto`]). All ranks give the same.
    ///
    /// What was chosen is kept for the next time; for documents or padding that were not met before it is chosen anew, so that it
    /// depends on the batch at hand alone.
    #[must_use]
    pub fn with_auto(self, auto: Auto) -> Self {
        Self {
            division: Some(Division::Auto(auto)),
            ..self
        }
    }

    #[cfg(feature = "train")]
    pub(crate) fn with_division(self, division: Option<Division>) -> Self {
        Self { division, ..self }
    }

    /// The strategy, if one was given.
    pub fn strategy(&self) -> Option<Strategy> {
        match self.division {
            Some(Division::By(strategy)) => Some(strategy),
            _ => None,
        }
    }

    /// Whether a strategy, or a way to choose one, was given.
    pub fn is_division_given(&self) -> bool {
        self.division.is_some()
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

    /// How keys and values are dealt out; as the queries but in cross-attention.
    pub fn key_sharding(&self) -> Sharding {
        self.key_sharding
    }

    /// The position of query 0, if it was given.
    pub fn query_offset(&self) -> Option<i64> {
        self.query_offset
    }

    /// The documents of the batch, if there are any.
    pub fn documents(&self) -> Option<&Documents> {
        self.documents.as_ref()
    }

    /// The number of keys of every batch entry, if there is padding.
    pub fn key_lengths(&self) -> Option<&[usize]> {
        self.key_lengths.as_deref()
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

    /// A computation over this group, on the batch at hand.
    pub(crate) fn spec(&self, base: AttentionSpec) -> Result<AttentionSpec, RingError> {
        let mut spec = base.with_lengths(self.query_length, self.key_length)?;
        if let Some(offset) = self.query_offset {
            spec = spec.with_query_offset(offset);
        }
        spec = spec
            .sharded(self.query_sharding, self.world_size())?
            .with_key_sharding(self.key_sharding);
        if let Some(documents) = &self.documents {
            spec = spec.with_documents(documents.clone())?;
        }
        if let Some(lengths) = &self.key_lengths {
            spec = spec.with_key_lengths(lengths.to_vec())?;
        }
        Ok(spec)
    }

    /// The same computation, divided among the ranks as this ring says.
    pub(crate) fn divided(&self, spec: AttentionSpec) -> Result<AttentionSpec, RingError> {
        let strategy = match self.division {
            None => Strategy::Ring,
            Some(Division::By(strategy)) => strategy,
            Some(Division::Auto(auto)) => self.choice(&spec, auto)?.strategy,
        };
        Ok(spec.with_strategy(strategy)?)
    }

    /// What `auto` chooses for a computation, kept for the next time.
    fn choice(&self, spec: &AttentionSpec, auto: Auto) -> Result<Choice, RingError> {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |(of, by, _): &(AttentionSpec, Auto, Choice)| (of, *by) == (spec, auto);
        let found = match choices.iter().position(is_known) {
            Some(index) => choices.remove(index),
            None => (spec.clone(), auto, auto.choose(spec)?),
        };
        let choice = found.2.clone();
        if choices.len() == CACHED_PLANS {
            choices.remove(0);
        }
        choices.push(found);
        Ok(choice)
    }

    /// How this ring divides a computation, and why, in plain words.
    pub(crate) fn explain(&self, spec: &AttentionSpec) -> Result<String, RingError> {
        let told = |strategy: Strategy, why: &str| -> Result<String, RingError> {
            let spec = spec.clone().with_strategy(strategy)?;
            let costs = Auto::default().choose(&spec)?;
            Ok(format!(
                "{strategy}, because {why}; by cost it would be {costs}"
            ))
        };
        match self.division {
            None => told(Strategy::Ring, "nothing else was asked for"),
            Some(Division::By(strategy)) => told(strategy, "it was asked for"),
            Some(Division::Auto(auto)) => Ok(auto.choose(spec)?.explain()),
        }
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
        // What was planned for the documents and the padding of another batch will hardly be asked for again.
        if without_batch(spec) != *spec {
            let is_other_batch = |plan: &Arc<Plan>| {
                let of_plan = without_batch(plan.spec());
                of_plan != *plan.spec() && of_plan == without_batch(spec)
            };
            let others = plans.iter().filter(|plan| is_other_batch(plan)).count();
            if others >= CACHED_BATCHES {
                let oldest = plans.iter().position(is_other_batch);
                oldest.map(|index| plans.remove(index));
            }
        }
        if plans.len() == CACHED_PLANS {
            plans.remove(0);
        }
        plans.push(Arc::clone(&plan));
        Ok(plan)
    }
}

/// A computation without what belongs to one batch.
fn without_batch(spec: &AttentionSpec) -> AttentionSpec {
    AttentionSpec {
        documents: None,
        key_lengths: None,
        ..spec.clone()
    }
}
