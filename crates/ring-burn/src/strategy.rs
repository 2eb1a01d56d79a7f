//! A burn-train strategy that trains one model over ranks that are threads or processes: [`RingStrategy`].
//!
//! Every rank of a group works on the same samples, each on the positions it owns; several groups divide the samples. Gradients
//! are summed over all before the optimizer's step, so all ranks hold the same parameters at all times. Rank 0's outputs go to
//! burn-train's metrics, progress and checkpoints.
//!
//! Ranks as threads must not share leaves of the autodiff graph: Burn holds one lock per graph during a backward, and a
//! backward here waits for other ranks. So each rank forks the model, which gives it leaves of its own.

mod coordinator;
mod follower;
mod order;
mod worker;

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        mpsc::{channel, sync_channel},
    },
    thread,
    time::Duration,
};

use burn::{
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Learner, LearnerModel, LearningResult,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
        TrainingComponents, TrainingError, ValidLoader, train::WorkerFailure,
    },
};
use ring_comm::{
    Communicator, Loopback,
    buffer::{Buffer, HostBuffer},
};
use ring_core::{Auto, Recovery, RecoveryPolicy, Sharding, Strategy};
#[cfg(feature = "cube")]
use ring_kernels::{CubeBuffer, CubeDevice};

use crate::{
    error::RingError,
    ring::{Division, Ring},
};
use coordinator::Coordinator;
use follower::Follower;
use worker::{Place, Worker, Workers};

/// A training item that every rank receives alike and makes its own part of.
///
/// An item names a sample (an offset into a text, say); `on_rank` tells it whose part it stands for. No rank needs to build a
/// tensor of the whole sequence.
pub trait SequenceItem: Clone + Send + 'static {
    /// The item for the rank that `ring` describes. `ring` has length 0: the item sets its own
    /// ([`Ring::with_sequence_length`]), a seed ([`Ring::with_seed`]) if the model has dropout, and, of its own samples,
    /// documents and padding ([`Ring::with_documents`], [`Ring::with_key_lengths`]) if there are any.
    #[must_use]
    fn on_rank(self, ring: &Ring) -> Self;

    /// The part of the item's samples that is `group`'s ([`DataGroup::share`]), if several groups divide them among
    /// themselves. The loss stays a part of the loss of *all* samples, and dropout that of all
    /// ([`Ring::with_first_batch_entry`]).
    #[must_use]
    fn in_group(self, group: &DataGroup) -> Self;

    /// A number that tells samples apart, the same for the same sample in every process: a hash of all that the step depends on.
    ///
    /// Ranks that are processes read data of their own, and compare these before they work together on an item.
    fn identity(&self) -> u64;
}

/// One of the groups that divide the samples of a batch among themselves; each is a ring that shares its samples' sequences.
#[derive(Clone, Debug)]
pub struct DataGroup {
    index: usize,
    count: usize,
    everyone: Communicator<HostBuffer>,
}

impl DataGroup {
    /// Its number, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of groups.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The ranks of all groups.
    pub fn everyone(&self) -> &Communicator<HostBuffer> {
        &self.everyone
    }

    /// Its part of `samples`: consecutive ones, as many as any other group's or one fewer.
    pub fn share(&self, samples: usize) -> Range<usize> {
        let bound = |index: usize| samples * index / self.count;
        bound(self.index)..bound(self.index + 1)
    }
}

/// Trains one model over several ranks. They share every sequence, or, as several groups
/// ([`with_data_parallel`](Self::with_data_parallel)), the samples too.
///
/// Pass it to burn-train: `training.with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))`.
///
/// # Ranks that are processes
///
/// With [`new`](Self::new) all ranks are threads of this process. With [`of_process`](Self::of_process) this process is one rank, and
/// the same program runs once for each of the others. It changes nothing else, but:
///
/// - All of them must start from the same parameters and read the same items in the same order: seed both. They compare both, and
///   stop with an error if they differ.
/// - Rank 0 decides when the training ends, and is alone in having metrics, progress and checkpoints; the others show and write
///   nothing, but make the checkpoints' directory. They still load a checkpoint, to resume.
/// - They wait for what rank 0 says next no longer than the communicator's deadline: that is how long a checkpoint, a metric or
///   the validation of the first group may take.
/// - burn-train opens its log, and a dashboard if there is a terminal, before any strategy is asked. So give the others
///   `with_application_logger(None)`, and, where they have terminals, a renderer that does nothing.
#[derive(Clone, Debug)]
pub struct RingStrategy {
    ranks: Ranks,
    groups: usize,
    sharding: Sharding,
    /// What ranks that are threads take in turn; at least one.
    devices: Vec<Device>,
    /// Of the rank that is this process, for tensors on its GPU.
    #[cfg(feature = "cube")]
    on_device: Option<(CubeDevice, Communicator<CubeBuffer>)>,
    threads_per_rank: Option<usize>,
    division: Option<Division>,
    recovery: Option<RecoveryPolicy>,
}

/// Who the ranks are.
#[derive(Clone, Debug)]
enum Ranks {
    /// Threads of this process, so many in each group.
    Threads {
        per_group: usize,
        deadline: Duration,
    },
    /// This process and others.
    Processes(Communicator<HostBuffer>),
}

impl RingStrategy {
    /// Longest wait of a rank that is a thread for another, unless set: generous, since a step may take minutes on a small machine.
    pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);

    /// A strategy over one group of `ranks` ranks, which are threads of this process, on an autodiff `device`.
    ///
    /// # Errors
    /// [`RingError::Value`] for no ranks, or a device without autodiff.
    pub fn new(ranks: usize, sharding: Sharding, device: Device) -> Result<Self, RingError> {
        if ranks == 0 {
            return Err(RingError::Value("training needs at least one rank".into()));
        }
        let ranks = Ranks::Threads {
            per_group: ranks,
            deadline: Self::DEFAULT_DEADLINE,
        };
        Self::over(ranks, sharding, device)
    }

    /// A strategy in which this process is the rank that `everyone` says, on an autodiff `device`; see
    /// [above](Self#ranks-that-are-processes).
    ///
    /// # Errors
    /// [`RingError::Value`] for a device without autodiff.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use ring_burn::{Communicator, RingStrategy, Sharding};
    ///
    /// let communicator = Communicator::from_env()?; // under mpirun, one of many; here, alone
    /// let strategy = RingStrategy::of_process(communicator, Sharding::Zigzag, Device::flex().autodiff())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn of_process(
        everyone: Communicator<HostBuffer>,
        sharding: Sharding,
        device: Device,
    ) -> Result<Self, RingError> {
        Self::over(Ranks::Processes(everyone), sharding, device)
    }

    fn over(ranks: Ranks, sharding: Sharding, device: Device) -> Result<Self, RingError> {
        check_autodiff(&device)?;
        Ok(Self {
            ranks,
            groups: 1,
            sharding,
            devices: vec![device],
            #[cfg(feature = "cube")]
            on_device: None,
            threads_per_rank: None,
            division: None,
            recovery: None,
        })
    }

    /// `groups` groups, which divide the samples of every item: data parallelism across, context parallelism within. Ranks that are
    /// threads become so many times as many; ranks that are processes are divided. Rank `r` of group `g` is rank
    /// `g * ranks + r` of all. Validation is left to the first group.
    ///
    /// # Errors
    /// [`RingError::Value`] for no groups, or processes that cannot be divided into so many groups of one size.
    pub fn with_data_parallel(self, groups: usize) -> Result<Self, RingError> {
        if groups == 0 {
            let message = "training needs at least one group of ranks";
            return Err(RingError::Value(message.into()));
        }
        if let Ranks::Processes(everyone) = &self.ranks
            && !everyone.world_size().is_multiple_of(groups)
        {
            return Err(RingError::Value(format!(
                "{} ranks cannot be divided into {groups} groups of one size",
                everyone.world_size()
            )));
        }
        Ok(Self { groups, ..self })
    }

    /// Another longest wait of a rank for another. Ranks that are processes keep that of their communicator.
    #[must_use]
    pub fn with_deadline(mut self, longest: Duration) -> Self {
        if let Ranks::Threads { deadline, .. } = &mut self.ranks {
            *deadline = longest;
        }
        self
    }

    /// Other devices, which ranks that are threads take in turn: one GPU for each, say. A rank that is a process takes the first.
    ///
    /// # Errors
    /// [`RingError::Value`] for no devices, or one without autodiff.
    pub fn with_devices(self, devices: Vec<Device>) -> Result<Self, RingError> {
        if devices.is_empty() {
            return Err(RingError::Value("training needs a device".into()));
        }
        devices.iter().try_for_each(check_autodiff)?;
        Ok(Self { devices, ..self })
    }

    /// A communicator of its own for tensors on `device`, over NCCL say; see [`Ring::with_device_communicator`]. For a rank that is a
    /// process.
    ///
    /// # Errors
    /// [`RingError::Value`] if the ranks are threads, or it is for another rank or another number of ranks.
    #[cfg(feature = "cube")]
    pub fn with_device_communicator(
        self,
        device: CubeDevice,
        communicator: Communicator<CubeBuffer>,
    ) -> Result<Self, RingError> {
        let place = (communicator.rank(), communicator.world_size());
        match &self.ranks {
            Ranks::Processes(everyone) if (everyone.rank(), everyone.world_size()) == place => {}
            Ranks::Processes(everyone) => {
                return Err(RingError::Value(format!(
                    "the communicator of the device is rank {} of {}, that of the host is rank {} of {}",
                    place.0,
                    place.1,
                    everyone.rank(),
                    everyone.world_size()
                )));
            }
            Ranks::Threads { .. } => {
                let message =
                    "a communicator of a device is that of one process, and the ranks are threads";
                return Err(RingError::Value(message.into()));
            }
        }
        Ok(Self {
            on_device: Some((device, communicator)),
            ..self
        })
    }

    /// The device of this process's rank number `index`.
    fn device(&self, index: usize) -> &Device {
        &self.devices[index % self.devices.len()]
    }

    /// Kernel threads of each rank, instead of the cores divided by the ranks of this machine.
    #[must_use]
    pub fn with_threads_per_rank(self, threads: usize) -> Self {
        Self {
            threads_per_rank: Some(threads),
            ..self
        }
    }

    /// How the ranks of a group divide attention among them; [`Strategy::Ring`] unless said.
    #[must_use]
    pub fn with_attention_strategy(self, strategy: Strategy) -> Self {
        Self {
            division: Some(Division::By(strategy)),
            ..self
        }
    }

    /// The same, by the strategy that costs least.
    #[must_use]
    pub fn with_auto(self, auto: Auto) -> Self {
        Self {
            division: Some(Division::Auto(auto)),
            ..self
        }
    }

    /// Memory that attention is refused is tried for again ([`Ring::with_recovery`]).
    #[must_use]
    pub fn with_recovery(self, policy: RecoveryPolicy) -> Self {
        Self {
            recovery: Some(policy),
            ..self
        }
    }

    /// The ranks that run in this process.
    fn own_ranks(&self) -> Vec<Communicator<HostBuffer>> {
        match &self.ranks {
            Ranks::Processes(everyone) => vec![everyone.clone()],
            Ranks::Threads {
                per_group,
                deadline,
            } => Loopback::group::<HostBuffer>(self.groups * per_group, *deadline)
                .into_iter()
                .map(|endpoint| Communicator::new(Arc::new(endpoint)))
                .collect(),
        }
    }

    /// The communicator of a rank that is led by another process.
    fn led(&self) -> Option<&Communicator<HostBuffer>> {
        match &self.ranks {
            Ranks::Processes(everyone) if everyone.rank() > 0 => Some(everyone),
            _ => None,
        }
    }

    /// Whether other processes must be told what to do.
    fn announces(&self) -> bool {
        matches!(&self.ranks, Ranks::Processes(everyone) if everyone.world_size() > 1)
    }

    /// The place of a rank; all ranks must ask at the same time.
    fn place(&self, everyone: Communicator<HostBuffer>) -> Result<Place, RingError> {
        let index = everyone.rank() / (everyone.world_size() / self.groups);
        let group = group_of(&everyone, index, self.groups)?;
        let threads = self.threads_per_rank.unwrap_or_else(|| {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            (cores / everyone.ranks_on_this_machine()).max(1)
        });
        let ring = Ring::new(group, self.sharding, 0)?
            .with_threads(threads)?
            .with_division(self.division);
        let ring = match self.recovery {
            Some(policy) => ring.with_recovery(Recovery::new(policy)),
            None => ring,
        };
        #[cfg(feature = "cube")]
        let ring = match &self.on_device {
            Some((device, everyone)) => {
                let group = group_of(everyone, index, self.groups)?;
                ring.with_device_communicator(device.clone(), group)?
            }
            None => ring,
        };
        Ok(Place {
            ring,
            group: DataGroup {
                index,
                count: self.groups,
                everyone,
            },
        })
    }
}

impl<M: LearnerModel + Send> SupervisedLearningStrategy<M> for RingStrategy
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    fn train(
        &self,
        learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        components: TrainingComponents<M>,
    ) -> LearningResult<M> {
        if self.led().is_none() {
            return Leader(self).train(learner, train, valid, components);
        }
        let interrupter = components.interrupter.clone();
        let first_epoch = components.checkpoint.unwrap_or(0) + 1;
        let (model, processor) = self.fit(components, learner, train, valid, first_epoch);
        LearningResult {
            model: model.valid(),
            renderer: processor.renderer(),
            interrupted: interrupter.interruption(),
            error: interrupter.error(),
        }
    }

    fn fit(
        &self,
        components: TrainingComponents<M>,
        mut learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        // Parameters are drawn when first used: here, once, not on every rank anew.
        let device = self.device(0);
        learner.fork(device);
        let train = train.to_device(device);
        let valid = valid.to_device(&device.clone().inner());
        let interrupter = components.interrupter.clone();
        let (model, failures, processor) = match self.led() {
            Some(everyone) => {
                let (model, failure) = self.follow(everyone, &components, learner, train, valid);
                (model, Vec::from_iter(failure), components.event_processor)
            }
            None => {
                let mut coordinator = Coordinator {
                    train,
                    valid,
                    components,
                };
                let (model, failures) = self.lead(&mut coordinator, learner, starting_epoch);
                (model, failures, coordinator.components.event_processor)
            }
        };
        if !failures.is_empty() {
            interrupter.fail(TrainingError::Workers(failures));
        }
        (model, processor)
    }
}

/// Drives a training as burn-train does, from rank 0.
struct Leader<'a>(&'a RingStrategy);

impl<M: LearnerModel + Send> SupervisedLearningStrategy<M> for Leader<'_>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    fn fit(
        &self,
        components: TrainingComponents<M>,
        learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        self.0
            .fit(components, learner, train, valid, starting_epoch)
    }
}

impl RingStrategy {
    /// Has the ranks of this process, each a thread, do what the coordinator says.
    fn lead<M: LearnerModel + Send>(
        &self,
        coordinator: &mut Coordinator<M>,
        learner: Learner<M>,
        starting_epoch: usize,
    ) -> (M, Vec<WorkerFailure>)
    where
        <M as TrainStep>::Input: SequenceItem,
        <M as InferenceStep>::Input: SequenceItem,
    {
        let accumulates = coordinator.components.grad_accumulation.is_some();
        let (answers, from_rank_0) = channel();
        let mut answers = Some(answers);
        thread::scope(|scope| {
            let mut orders = Vec::new();
            let mut threads = Vec::new();
            for (index, everyone) in self.own_ranks().into_iter().enumerate() {
                let (order, incoming) = sync_channel(1);
                orders.push(order);
                let rank = everyone.rank();
                let learner = learner.clone();
                let answers = answers.take();
                let run = move || {
                    guarded(&everyone, || {
                        let place = self.place(everyone.clone());
                        let place = place.unwrap_or_else(|error| panic!("{error}"));
                        let mut worker = Worker::new(learner, place, accumulates);
                        if let Some(answers) = answers {
                            worker = worker.leading(answers, self.announces());
                        }
                        worker.run(self.device(index), &incoming);
                    })
                    .err()
                };
                let thread = thread::Builder::new()
                    .name(format!("rank-{rank}"))
                    .spawn_scoped(scope, run);
                threads.push(thread.expect("a thread for each rank"));
            }
            let workers = Workers {
                orders,
                answers: from_rank_0,
            };
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                coordinator.run(&workers, starting_epoch)
            }));
            let error = match &outcome {
                Ok(_) => coordinator
                    .components
                    .interrupter
                    .error()
                    .map(|error| error.to_string()),
                Err(payload) => Some(text(payload.as_ref())),
            };
            if let (Ranks::Processes(everyone), Some(error)) = (&self.ranks, error) {
                workers.abandon(everyone, &error);
            }
            drop(workers);
            let failures = threads
                .into_iter()
                .enumerate()
                .filter_map(|(rank, thread)| {
                    let message = thread
                        .join()
                        .unwrap_or_else(|payload| Some(text(payload.as_ref())))?;
                    Some(failure(rank, message))
                })
                .collect();
            let outcome = outcome.unwrap_or_else(|payload| resume_unwind(payload));
            (outcome.unwrap_or(learner).model(), failures)
        })
    }

    /// Does what rank 0 says, which is another process.
    fn follow<M: LearnerModel>(
        &self,
        everyone: &Communicator<HostBuffer>,
        components: &TrainingComponents<M>,
        learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
    ) -> (M, Option<WorkerFailure>)
    where
        <M as TrainStep>::Input: SequenceItem,
        <M as InferenceStep>::Input: SequenceItem,
    {
        let accumulates = components.grad_accumulation.is_some();
        let untrained = learner.clone();
        let trained = guarded(everyone, || {
            let place = self.place(everyone.clone());
            let place = place.unwrap_or_else(|error| panic!("{error}"));
            let follower = Follower {
                worker: Worker::new(learner, place, accumulates),
                train,
                valid,
            };
            follower.run(self.device(0))
        });
        match trained {
            Ok(learner) => (learner.model(), None),
            Err(message) => (untrained.model(), Some(failure(everyone.rank(), message))),
        }
    }
}

/// The ranks of group `index` of so many.
fn group_of<B: Buffer>(
    everyone: &Communicator<B>,
    index: usize,
    groups: usize,
) -> Result<Communicator<B>, RingError> {
    Ok(match groups {
        1 => everyone.clone(),
        _ => everyone
            .split(Some(index as u64), 0)?
            .expect("every rank has a group"),
    })
}

fn check_autodiff(device: &Device) -> Result<(), RingError> {
    if device.is_autodiff() {
        return Ok(());
    }
    let message = "training needs an autodiff device: Device::flex().autodiff(), say";
    Err(RingError::Value(message.into()))
}

fn failure(rank: usize, message: String) -> WorkerFailure {
    WorkerFailure {
        device_id: rank,
        message,
    }
}

/// Does a rank's work; if it panics, tells the group why, and returns the reason.
fn guarded<T>(everyone: &Communicator<HostBuffer>, work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let message = text(payload.as_ref());
        everyone.abort(&message);
        message
    })
}

fn text(payload: &(dyn Any + Send)) -> String {
    let message = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    message.unwrap_or("panicked without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_all_samples_in_order_and_evenly() {
        for (samples, count) in [(1, 1), (7, 3), (8, 4), (2, 5), (0, 2)] {
            let share = |index| {
                let everyone = Communicator::single();
                DataGroup {
                    index,
                    count,
                    everyone,
                }
                .share(samples)
            };
            let shares: Vec<Range<usize>> = (0..count).map(share).collect();
            let all: Vec<usize> = shares.iter().cloned().flatten().collect();
            assert_eq!(all, Vec::from_iter(0..samples));
            let least = samples / count;
            let sizes = least..=samples.div_ceil(count);
            assert!(shares.iter().all(|share| sizes.contains(&share.len())));
        }
    }

    #[test]
    fn processes_must_divide_into_groups() {
        let strategy = |groups| {
            RingStrategy::of_process(
                Communicator::single(),
                Sharding::Zigzag,
                Device::flex().autodiff(),
            )
            .unwrap()
            .with_data_parallel(groups)
        };
        assert!(strategy(1).is_ok());
        let error = strategy(2).unwrap_err().to_string();
        assert!(
            error.contains("1 ranks cannot be divided into 2 groups"),
            "{error}"
        );
        assert!(strategy(0).is_err());
    }
}
