//! What every rank does, on a thread of its own.

use std::sync::mpsc::{Receiver, Sender, SyncSender};

use burn::{
    optim::{
        GradientsAccumulator, GradientsParams,
        lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    },
    tensor::Device,
    train::{InferenceStep, Learner, LearnerModel, TrainStep},
};

use ring_comm::{CommErrorKind, Communicator, buffer::HostBuffer};

use super::{DataGroup, SequenceItem, order::Announced};
use crate::{
    gradient::{parameter_checksum, sum_gradients},
    ring::Ring,
};

/// A part of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    Train,
    Valid,
}

/// Where a rank stands: in the ring that shares its sequences, and among the groups that share the samples.
pub(super) struct Place {
    pub(super) ring: Ring,
    pub(super) group: DataGroup,
}

/// What the coordinator asks of every rank.
pub(super) enum Order<M: LearnerModel> {
    /// Items of this part follow.
    Begin(Split),
    /// Train on an item; `update` ends an accumulation.
    Train {
        item: <M as TrainStep>::Input,
        update: bool,
    },
    /// Validate on an item.
    Validate(<M as InferenceStep>::Input),
    /// Hand the learner over; of rank 0 alone.
    Snapshot,
    /// Stop, and say nothing: the other processes have been told why.
    Abandon,
}

/// What rank 0 answers.
pub(super) enum Answer<M: LearnerModel> {
    Trained(<M as TrainStep>::Output, ModuleLearningRate),
    Validated(<M as InferenceStep>::Output),
    Snapshot(Box<Learner<M>>),
}

/// One rank's thread.
pub(super) struct Worker<M: LearnerModel> {
    learner: Learner<M>,
    place: Place,
    accumulator: GradientsAccumulator<M>,
    accumulates: bool,
    /// The model without autodiff, made when the first item of a validation arrives.
    validating: Option<M>,
    answers: Option<Sender<Answer<M>>>,
    /// Ranks that are other processes hear of every order from this one.
    announces: bool,
    has_compared_after_update: bool,
}

impl<M: LearnerModel> Worker<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    pub(super) fn new(learner: Learner<M>, place: Place, accumulates: bool) -> Self {
        Self {
            learner,
            place,
            accumulator: GradientsAccumulator::new(),
            accumulates,
            validating: None,
            answers: None,
            announces: false,
            has_compared_after_update: false,
        }
    }

    /// The worker that answers the coordinator, and tells it to other processes if there are any.
    #[must_use]
    pub(super) fn leading(self, answers: Sender<Answer<M>>, announces: bool) -> Self {
        Self {
            answers: Some(answers),
            announces,
            ..self
        }
    }

    /// The learner as it is now.
    pub(super) fn into_learner(self) -> Learner<M> {
        self.learner
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Moves the model to the rank's own leaves of the autodiff graph.
    pub(super) fn start(&mut self, device: &Device) {
        self.learner.fork(device);
        self.compare_parameters("ranks start from different parameters");
    }

    /// Obeys the coordinator until it is gone.
    pub(super) fn run(mut self, device: &Device, orders: &Receiver<Order<M>>) {
        self.start(device);
        while let Ok(order) = orders.recv() {
            // Only other processes need an item's identity, which may take long to compute.
            if self.announces
                && let Some(announced) = Announced::of(&order)
            {
                self.announce(announced);
            }
            match order {
                Order::Begin(split) => self.begin(split),
                Order::Train { item, update } => self.train(item, update),
                Order::Validate(item) => self.validate(item),
                Order::Snapshot => self.answer(Answer::Snapshot(Box::new(self.learner.clone()))),
                Order::Abandon => return,
            }
        }
        if self.announces {
            self.announce(Announced::End);
        }
    }

    fn announce(&self, announced: Announced) {
        announced
            .send(&self.place.group.everyone)
            .unwrap_or_else(|error| panic!("the other ranks cannot be told what to do: {error}"));
    }

    /// Ranks whose parameters differ would train something else than the user's model.
    fn compare_parameters(&self, otherwise: &str) {
        let checksum = parameter_checksum(&self.learner.model());
        let fields = [("parameter checksum".to_string(), format!("{checksum:016x}"))];
        if let Err(error) = self.place.group.everyone.agree("training", &fields) {
            match &error.root().kind {
                CommErrorKind::Disagreement(_) => panic!("{otherwise}: {error}"),
                _ => panic!("comparing parameters failed: {error}"),
            }
        }
    }

    /// Every epoch begins with a comparison.
    pub(super) fn begin(&self, split: Split) {
        if split == Split::Train {
            self.compare_parameters("parameters have become different");
        }
    }

    pub(super) fn train(&mut self, item: <M as TrainStep>::Input, update: bool) {
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
            // States of the optimizer cannot be compared, but what they do to the parameters can.
            if !self.has_compared_after_update {
                self.has_compared_after_update = true;
                self.compare_parameters("optimizers start from different states");
            }
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

    pub(super) fn validate(&mut self, item: <M as InferenceStep>::Input) {
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
pub(super) struct Workers<M: LearnerModel> {
    pub(super) orders: Vec<SyncSender<Order<M>>>,
    pub(super) answers: Receiver<Answer<M>>,
}

/// A rank is gone; its thread has the reason.
pub(super) struct RankGone;

impl<M: LearnerModel> Workers<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    /// Tells every rank which items follow.
    pub(super) fn begin(&self, split: Split) -> Result<(), RankGone> {
        self.tell(|| Order::Begin(split))
    }

    fn tell(&self, order: impl Fn() -> Order<M>) -> Result<(), RankGone> {
        for rank in &self.orders {
            rank.send(order()).map_err(|_| RankGone)?;
        }
        Ok(())
    }

    /// Gives every rank an order and waits for rank 0's answer.
    fn ask(&self, order: impl Fn() -> Order<M>) -> Result<Answer<M>, RankGone> {
        self.tell(order)?;
        self.answers.recv().map_err(|_| RankGone)
    }

    pub(super) fn train(
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

    pub(super) fn validate(
        &self,
        item: &<M as InferenceStep>::Input,
    ) -> Result<<M as InferenceStep>::Output, RankGone> {
        match self.ask(|| Order::Validate(item.clone()))? {
            Answer::Validated(output) => Ok(output),
            _ => Err(RankGone),
        }
    }

    /// The training has failed outside of the ranks: those that are other processes must not take it for its end.
    pub(super) fn abandon(&self, everyone: &Communicator<HostBuffer>, reason: &str) {
        everyone.abort(reason);
        // A rank that is gone has its own reason.
        let _ = self.tell(|| Order::Abandon);
    }

    pub(super) fn snapshot(&self) -> Result<Learner<M>, RankGone> {
        self.orders[0].send(Order::Snapshot).map_err(|_| RankGone)?;
        match self.answers.recv().map_err(|_| RankGone)? {
            Answer::Snapshot(learner) => Ok(*learner),
            _ => Err(RankGone),
        }
    }
}
