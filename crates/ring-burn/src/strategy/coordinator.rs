//! The thread that reads data, feeds the ranks, and owns everything of burn-train's.

use std::sync::Arc;

use burn::{
    data::dataloader::{DataLoader, Progress},
    train::{
        EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearnerModel, TrainStep,
        TrainingComponents, TrainingError, TrainingItem,
    },
};

use super::{
    SequenceItem,
    worker::{RankGone, Split, Workers},
};

/// Drives a whole training.
pub(super) struct Coordinator<M: LearnerModel> {
    pub(super) train: Arc<dyn DataLoader<<M as TrainStep>::Input>>,
    pub(super) valid: Arc<dyn DataLoader<<M as InferenceStep>::Input>>,
    pub(super) components: TrainingComponents<M>,
}

impl<M: LearnerModel> Coordinator<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    /// All epochs; the learner at the end, or nothing if a rank was lost.
    pub(super) fn run(
        &mut self,
        workers: &Workers<M>,
        starting_epoch: usize,
    ) -> Option<Learner<M>> {
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
        workers.begin(Split::Train)?;
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
        workers.begin(Split::Valid)?;
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
