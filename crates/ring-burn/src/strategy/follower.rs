//! A rank that is a process of its own and does what rank 0 announces, on the items of its own loaders.

use std::sync::Arc;

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::Device,
    train::{InferenceStep, Learner, LearnerModel, TrainStep},
};

use super::{
    SequenceItem,
    order::Announced,
    worker::{Split, Worker},
};

/// A rank, and the loaders it reads.
pub(super) struct Follower<M: LearnerModel> {
    pub(super) worker: Worker<M>,
    pub(super) train: Arc<dyn DataLoader<<M as TrainStep>::Input>>,
    pub(super) valid: Arc<dyn DataLoader<<M as InferenceStep>::Input>>,
}

impl<M: LearnerModel> Follower<M>
where
    <M as TrainStep>::Input: SequenceItem,
    <M as InferenceStep>::Input: SequenceItem,
{
    /// Follows to the end; the learner that is left.
    ///
    /// # Panics
    /// If the exchange fails, or the items are not those of rank 0.
    pub(super) fn run(mut self, device: &Device) -> Learner<M> {
        self.worker.start(device);
        let (mut training, mut validating) = (None, None);
        loop {
            match self.next_order() {
                Announced::Begin(split) => {
                    match split {
                        Split::Train => training = Some(self.train.iter()),
                        Split::Valid => validating = Some(self.valid.iter()),
                    }
                    self.worker.begin(split);
                }
                Announced::Train { identity, update } => {
                    let item = self.item(training.as_mut(), identity);
                    self.worker.train(item, update);
                }
                Announced::Validate { identity } => {
                    let item = self.item(validating.as_mut(), identity);
                    self.worker.validate(item);
                }
                Announced::End => break,
            }
        }
        drop((training, validating));
        self.worker.into_learner()
    }

    fn next_order(&self) -> Announced {
        match Announced::receive(&self.worker.place().group.everyone) {
            Ok(Some(order)) => order,
            Ok(None) => panic!("rank 0 runs another version of this program"),
            Err(error) => panic!("no order of rank 0: {error}"),
        }
    }

    fn item<I: SequenceItem>(
        &self,
        items: Option<&mut Box<dyn DataLoaderIterator<I> + '_>>,
        identity: u64,
    ) -> I {
        let rank = self.worker.place().group.everyone.rank();
        let item = match items.and_then(|items| items.next()) {
            Some(Ok(item)) => item,
            Some(Err(error)) => panic!("rank {rank} cannot load an item: {error}"),
            None => panic!("the loader of rank {rank} has fewer items than that of rank 0"),
        };
        assert!(
            item.identity() == identity,
            "the loader of rank {rank} gives another item than that of rank 0: give both the same data in the same order"
        );
        item
    }
}
