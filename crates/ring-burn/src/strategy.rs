//! A burn-train strategy that trains one model over ranks that are threads: [`RingStrategy`].
//!
//! Every rank of a group works on the same samples, each on the positions it owns; several groups divide the samples. Gradients
//! are summed over all before the optimizer's step, so all ranks hold the same parameters at all times. Rank 0's outputs go to burn-train's metrics, progress and checkpoints.
//!
//! Ranks as threads must not share leaves of the autodiff graph: Burn holds one lock per graph during a backward, and a
//! backward here waits for other ranks. So each rank forks the model, which gives it leaves of its own.

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use burn::{
    data::dataloader::{DataLoader, Progress},
    optim::{
        GradientsAccumulator, GradientsParams,
        lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    },
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearnerModel,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
        TrainingComponents, TrainingError, TrainingItem, ValidLoader, train::WorkerFailure,
    },
};
use ring_comm::{Communicator, Loopback, buffer::HostBuffer};
use ring_core::Sharding;

use crate::{
    error::RingError,
    gradient::{parameter_checksum, sum_gradients},
    ring::Ring,
};

/// A training item that every rank receives alike and makes its own part of.
///
/// An item names a sample (an offset into a text, say); `on_rank` tells it whose part it stands for. No rank needs to build a
/// tensor of the whole sequence.
pub trait SequenceItem: Clone + Send + 'static {
    /// The item for the rank that `ring` describes. `ring` has length 0: the item sets its own
    /// ([`Ring::with_sequence_length`]), and a seed ([`Ring::with_seed`]) if the model has dropout.
    #[must_use]
    fn on_rank(self, ring: &Ring) -> Self;

    /// The part of the item's samples that is `group`'s ([`DataGroup::share`]), if several groups divide them among
    /// themselves. The loss stays a part of the loss of *all* samples, and dropout that of all
    /// ([`Ring::with_first_batch_entry`]).
    #[must_use]
    fn in_group(self, group: &DataGroup) -> Self;
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

/// Trains one model over several ranks, each a thread of this process, connected by loopback. They share every sequence, or, as
/// several groups ([`with_data_parallel`](Self::with_data_parallel)), the samples too.
///
/// Pass it to burn-train: `training.with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))`.
#[derive(Clone, Debug)]
pub struct RingStrategy {
    ranks: usize,
    groups: usize,
    sharding: Sharding,
    device: Device,
    deadline: Duration,
    threads_per_rank: Option<usize>,
}

impl RingStrategy {
    /// Longest wait of a rank for another, unless set: generous, since a step may take minutes on a small machine.
    pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);

    /// A strategy over one group of `ranks` ranks on an autodiff `device`.
    ///
    /// # Errors
    /// [`RingError::Value`] for no ranks, or a device without autodiff.
    pub fn new(ranks: usize, sharding: Sharding, device: Device) -> Result<Self, RingError> {
        if ranks == 0 {
            return Err(RingError::Value("training needs at least one rank".into()));
        }
        if !device.is_autodiff() {
            let message = "training needs an autodiff device: Device::flex().autodiff()";
            return Err(RingError::Value(message.into()));
        }
        Ok(Self {
            ranks,
            groups: 1,
            sharding,
            device,
            deadline: Self::DEFAULT_DEADLINE,
            threads_per_rank: None,
        })
    }

    /// `groups` groups of as many ranks each, which divide the samples of every item: data parallelism across, context
    /// parallelism within. Rank `r` of group `g` is rank `g * ranks + r` of all. Validation is left to the first group.
    ///
    /// # Errors
    /// [`RingError::Value`] for no groups.
    pub fn with_data_parallel(self, groups: usize) -> Result<Self, RingError> {
        if groups == 0 {
            let message = "training needs at least one group of ranks";
            return Err(RingError::Value(message.into()));
        }
        Ok(Self { groups, ..self })
    }

    /// Another longest wait of a rank for another.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Kernel threads of each rank, instead of the cores divided by the ranks.
    #[must_use]
    pub fn with_threads_per_rank(self, threads: usize) -> Self {
        Self {
            threads_per_rank: Some(threads),
            ..self
        }
    }

    /// All ranks of all groups.
    fn everyone(&self) -> impl Iterator<Item = Communicator<HostBuffer>> {
        Loopback::group::<HostBuffer>(self.groups * self.ranks, self.deadline)
            .into_iter()
            .map(|endpoint| Communicator::new(Arc::new(endpoint)))
    }

    /// The place of a rank; all ranks must ask at the same time.
    fn place(&self, everyone: Communicator<HostBuffer>) -> Result<Place, RingError> {
        let index = everyone.rank() / self.ranks;
        let group = match self.groups {
            1 => everyone.clone(),
            _ => everyone
                .split(Some(index as u64), 0)?
                .expect("every rank has a group"),
        };
        let threads = self.threads_per_rank.unwrap_or_else(|| {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            (cores / everyone.world_size()).max(1)
        });
        Ok(Place {
            ring: Ring::new(group, self.sharding, 0)?.with_threads(threads)?,
            group: DataGroup {
                index,
                count: self.groups,
                everyone,
            },
        })
    }
}

/// Where a rank stands: in the ring that shares its sequences, and among the groups that share the samples.
struct Place {
    ring: Ring,
    group: DataGroup,
}

/// What the coordinator asks of every rank.
enum Order<M: LearnerModel> {
    /// Train on an item; `update` ends an accumulation.
    Train {
        item: <M as TrainStep>::Input,
        update: bool,
    },
    /// Validate on an item.
    Validate(<M as InferenceStep>::Input),
    /// Hand the learner over; of rank 0 alone.
    Snapshot,
}

/// What rank 0 answers.
enum Answer<M: LearnerModel> {
    Trained(<M as TrainStep>::Output, ModuleLearningRate),
    Validated(<M as InferenceStep>::Output),
    Snapshot(Box<Learner<M>>),
}

/// One rank's thread.
struct Worker<M: LearnerModel> {
    learner: Learner<M>,
    place: Place,
    accumulator: GradientsAccumulator<M>,
    accumulates: bool,
    /// The model without autodiff, made when the first item of a validation arrives.
    validating: Option<M>,
    answers: Option<Sender<Answer<M>>>,
}

impl<M: LearnerModel> Worker<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    fn run(mut self, device: &Device, orders: &Receiver<Order<M>>) {
        self.learner.fork(device);
        self.compare_parameters();
        while let Ok(order) = orders.recv() {
            match order {
                Order::Train { item, update } => self.train(item, update),
                Order::Validate(item) => self.validate(item),
                Order::Snapshot => self.answer(Answer::Snapshot(Box::new(self.learner.clone()))),
            }
        }
    }

    /// Ranks that start from different parameters would train something else than the user's model.
    fn compare_parameters(&self) {
        let checksum = parameter_checksum(&self.learner.model());
        let fields = [("parameter checksum".to_string(), format!("{checksum:016x}"))];
        self.place
            .group
            .everyone
            .agree("training", &fields)
            .unwrap_or_else(|error| panic!("ranks start from different parameters: {error}"));
    }

    fn train(&mut self, item: <M as TrainStep>::Input, update: bool) {
        self.validating = None;
        let Place { ring, group } = &self.place;
        let item = match group.count {
            1 => item,
            _ => item.in_group(group),
        };
        let output = self.learner.train_step(item.on_rank(ring));
        if let Some(gradients) = self.accumulate(output.grads, update) {
            let everyone = &self.place.group.everyone;
            let gradients = sum_gradients(&self.learner.model(), gradients, everyone)
                .unwrap_or_else(|error| panic!("summing gradients failed: {error}"));
            self.learner.lr_step();
            self.learner.optimizer_step(gradients);
        }
        self.answer(Answer::Trained(output.item, self.learner.lr_current()));
    }

    /// The gradients to step with, if it is time.
    fn accumulate(&mut self, gradients: GradientsParams, update: bool) -> Option<GradientsParams> {
        if !self.accumulates {
            return Some(gradients);
        }
        self.accumulator
            .accumulate(&self.learner.model(), gradients);
        update.then(|| self.accumulator.grads())
    }

    fn validate(&mut self, item: <M as InferenceStep>::Input) {
        if self.place.group.index > 0 {
            return;
        }
        let model = self
            .validating
            .get_or_insert_with(|| self.learner.model().valid());
        let output = InferenceStep::step(model, item.on_rank(&self.place.ring));
        self.answer(Answer::Validated(output));
    }

    fn answer(&self, answer: Answer<M>) {
        if let Some(answers) = &self.answers {
            // The coordinator stops listening only when it is itself about to end.
            let _ = answers.send(answer);
        }
    }
}

/// The ranks, seen from the thread that feeds them.
struct Workers<M: LearnerModel> {
    orders: Vec<SyncSender<Order<M>>>,
    answers: Receiver<Answer<M>>,
}

/// A rank is gone; its thread has the reason.
struct RankGone;

impl<M: LearnerModel> Workers<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    /// Gives every rank an order and waits for rank 0's answer.
    fn ask(&self, order: impl Fn() -> Order<M>) -> Result<Answer<M>, RankGone> {
        for rank in &self.orders {
            rank.send(order()).map_err(|_| RankGone)?;
        }
        self.answers.recv().map_err(|_| RankGone)
    }

    fn train(
        &self,
        item: &<M as TrainStep>::Input,
        update: bool,
    ) -> Result<(<M as TrainStep>::Output, ModuleLearningRate), RankGone> {
        let order = || Order::Train {
            item: item.clone(),
            update,
        };
        match self.ask(order)? {
            Answer::Trained(output, rate) => Ok((output, rate)),
            _ => Err(RankGone),
        }
    }

    fn validate(
        &self,
        item: &<M as InferenceStep>::Input,
    ) -> Result<<M as InferenceStep>::Output, RankGone> {
        match self.ask(|| Order::Validate(item.clone()))? {
            Answer::Validated(output) => Ok(output),
            _ => Err(RankGone),
        }
    }

    fn snapshot(&self) -> Result<Learner<M>, RankGone> {
        self.orders[0].send(Order::Snapshot).map_err(|_| RankGone)?;
        match self.answers.recv().map_err(|_| RankGone)? {
            Answer::Snapshot(learner) => Ok(*learner),
            _ => Err(RankGone),
        }
    }
}

impl<M: LearnerModel + Send> SupervisedLearningStrategy<M> for RingStrategy
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    fn fit(
        &self,
        components: TrainingComponents<M>,
        mut learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        // Parameters are drawn when first used: here, once, not on every rank anew.
        learner.fork(&self.device);
        let interrupter = components.interrupter.clone();
        let (answers, from_rank_0) = channel();
        let mut coordinator = Coordinator {
            train: train.to_device(&self.device),
            valid: valid.to_device(&self.device.clone().inner()),
            components,
        };
        let (outcome, failures) = thread::scope(|scope| {
            let mut orders = Vec::new();
            let mut threads = Vec::new();
            let mut answers = Some(answers);
            for everyone in self.everyone() {
                let (order, incoming) = sync_channel(1);
                orders.push(order);
                let rank = everyone.rank();
                let learner = learner.clone();
                let accumulates = coordinator.components.grad_accumulation.is_some();
                let answers = if rank == 0 { answers.take() } else { None };
                let worker = move |place| Worker {
                    learner,
                    place,
                    accumulator: GradientsAccumulator::new(),
                    accumulates,
                    validating: None,
                    answers,
                };
                let run = move || {
                    guarded(&everyone, || {
                        let place = self.place(everyone.clone());
                        let place = place.unwrap_or_else(|error| panic!("{error}"));
                        worker(place).run(&self.device, &incoming);
                    })
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
            let outcome = coordinator.run(&workers, starting_epoch);
            drop(workers);
            let failures: Vec<WorkerFailure> = threads
                .into_iter()
                .enumerate()
                .filter_map(|(rank, thread)| {
                    let message = thread
                        .join()
                        .unwrap_or_else(|payload| Some(text(payload.as_ref())))?;
                    Some(WorkerFailure {
                        device_id: rank,
                        message,
                    })
                })
                .collect();
            (outcome, failures)
        });
        if !failures.is_empty() {
            interrupter.fail(TrainingError::Workers(failures));
        }
        let model = match outcome {
            Some(trained) => trained.model(),
            None => learner.model(),
        };
        (model, coordinator.components.event_processor)
    }
}

/// Does a rank's work; if it panics, tells the group why, and returns the reason.
fn guarded(everyone: &Communicator<HostBuffer>, work: impl FnOnce()) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(work)).err()?;
    let message = text(payload.as_ref());
    everyone.abort(&message);
    Some(message)
}

fn text(payload: &(dyn Any + Send)) -> String {
    let message = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    message.unwrap_or("panicked without a message").to_owned()
}

/// The thread that reads data, feeds the ranks, and owns everything of burn-train's.
struct Coordinator<M: LearnerModel> {
    train: Arc<dyn DataLoader<<M as TrainStep>::Input>>,
    valid: Arc<dyn DataLoader<<M as InferenceStep>::Input>>,
    components: TrainingComponents<M>,
}

impl<M: LearnerModel> Coordinator<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    /// All epochs; the learner at the end, or nothing if a rank was lost.
    fn run(&mut self, workers: &Workers<M>, starting_epoch: usize) -> Option<Learner<M>> {
        for epoch in starting_epoch..=self.components.num_epochs {
            self.epoch(workers, epoch).ok()?;
            if self.components.interrupter.should_stop() {
                break;
            }
            let learner = workers.snapshot().ok()?;
            if let Some(checkpointer) = &mut self.components.checkpointer {
                checkpointer.checkpoint(&learner, epoch, &self.components.event_store);
            }
            if let Some(early_stopping) = &mut self.components.early_stopping
                && early_stopping.should_stop(epoch, &self.components.event_store)
            {
                break;
            }
        }
        workers.snapshot().ok()
    }

    fn epoch(&mut self, workers: &Workers<M>, epoch: usize) -> Result<(), RankGone> {
        self.process_train(LearnerEvent::StartSplit {
            epoch_number: epoch,
            total_items: self.train.num_items(),
        });
        self.train_split(workers)?;
        self.process_train(LearnerEvent::EndSplit(epoch));
        if self.components.interrupter.should_stop() {
            return Ok(());
        }
        self.process_valid(LearnerEvent::StartSplit {
            epoch_number: epoch,
            total_items: self.valid.num_items(),
        });
        self.valid_split(workers)?;
        self.process_valid(LearnerEvent::EndSplit(epoch));
        self.process_train(LearnerEvent::EndEpoch(epoch));
        // Checkpointing and early stopping read what the events said.
        let flushed = self.components.event_processor.flush();
        self.components.interrupter.fail_on_error(flushed);
        Ok(())
    }

    fn train_split(&mut self, workers: &Workers<M>) -> Result<(), RankGone> {
        let loader = Arc::clone(&self.train);
        let mut items = loader.iter();
        let mut iteration = 0;
        let mut accumulated = 0;
        while let Some(item) = items.next() {
            let Some(item) = self.loaded(item) else { break };
            let progress: Progress = items.progress();
            iteration += 1;
            accumulated += 1;
            let update = match self.components.grad_accumulation {
                Some(steps) => accumulated >= steps || progress.is_completed(),
                None => true,
            };
            if update {
                accumulated = 0;
            }
            let (output, rate) = workers.train(&item, update)?;
            self.process_train(LearnerEvent::ProcessedItem(TrainingItem::new(
                output,
                progress,
                Some(iteration),
                Some(rate),
            )));
            if self.components.interrupter.should_stop() {
                break;
            }
        }
        Ok(())
    }

    fn valid_split(&mut self, workers: &Workers<M>) -> Result<(), RankGone> {
        let loader = Arc::clone(&self.valid);
        let mut items = loader.iter();
        let mut iteration = 0;
        while let Some(item) = items.next() {
            let Some(item) = self.loaded(item) else { break };
            let progress = items.progress();
            iteration += 1;
            let output = workers.validate(&item)?;
            self.process_valid(LearnerEvent::ProcessedItem(TrainingItem::new(
                output,
                progress,
                Some(iteration),
                None,
            )));
            if self.components.interrupter.should_stop() {
                break;
            }
        }
        Ok(())
    }

    /// The item, or nothing and a failed training.
    fn loaded<T, E: Into<TrainingError>>(&self, item: Result<T, E>) -> Option<T> {
        item.map_err(|error| self.components.interrupter.fail(error))
            .ok()
    }

    fn process_train(&mut self, event: LearnerEvent<<M as TrainStep>::Output>) {
        let done = self.components.event_processor.process_train(event);
        self.components.interrupter.fail_on_error(done);
    }

    fn process_valid(&mut self, event: LearnerEvent<<M as InferenceStep>::Output>) {
        let done = self.components.event_processor.process_valid(event);
        self.components.interrupter.fail_on_error(done);
    }
}
