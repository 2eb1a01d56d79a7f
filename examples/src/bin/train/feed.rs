//! The text, and the windows of it that steps train on.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::Device,
};
use ring_comm::checksum::Fnv1a;
use ring_multihead::TokenWindows;

use crate::args::Args;

/// The King James Version (1611, public domain), one verse a line.
const SHIPPED: &[u8] = include_bytes!("../../../data/kjv.txt");

/// Windows of held-out text that are scored after every checkpoint interval.
const VALIDATION_WINDOWS: usize = 4;

/// A text whose last 5% are held out.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    pub(crate) bytes: Arc<[u8]>,
    /// Where the held-out part begins.
    pub(crate) split: usize,
}

impl Text {
    /// Reads `file`, or the text shipped with the program.
    pub(crate) fn read(file: Option<&Path>, seq_length: usize) -> Result<Self, String> {
        let bytes = match file {
            Some(file) => fs::read(file)
                .map_err(|error| format!("cannot read {}: {error}", file.display()))?,
            None => SHIPPED.to_vec(),
        };
        let split = bytes.len() - bytes.len() / 20;
        if split <= seq_length || bytes.len() == split {
            return Err(format!(
                "the text has {} bytes; 95% of it must be longer than the sequence length {seq_length}, and something must be left to hold out",
                bytes.len()
            ));
        }
        Ok(Self {
            bytes: bytes.into(),
            split,
        })
    }

    pub(crate) fn train_len(&self) -> usize {
        self.split
    }

    pub(crate) fn held_out_len(&self) -> usize {
        self.bytes.len() - self.split
    }

    /// Tells texts apart, the same in every process.
    pub(crate) fn checksum(&self) -> u64 {
        Fnv1a::of(&self.bytes)
    }
}

/// What burn-train loads: windows that depend on the seed and the step alone, so that a resumed run goes on where it stopped.
#[derive(Debug)]
pub(crate) struct Feed {
    source: Source,
    /// Steps of the intervals that have been begun.
    begun: AtomicUsize,
}

#[derive(Clone, Debug)]
struct Source {
    text: Text,
    seq_length: usize,
    batch: usize,
    seed: u64,
    /// Steps in all, and per interval.
    steps: usize,
    interval: usize,
    validation: bool,
}

impl Feed {
    pub(crate) fn train(text: &Text, args: &Args) -> Self {
        Self {
            source: Source {
                text: text.clone(),
                seq_length: args.seq_length,
                batch: args.batch,
                seed: args.seed,
                steps: args.steps,
                interval: args.checkpoint_every,
                validation: false,
            },
            begun: AtomicUsize::new(args.first_step()),
        }
    }

    /// The same few held-out windows every time, evenly spaced.
    pub(crate) fn validation(text: &Text, args: &Args) -> Self {
        let mut feed = Self::train(text, args);
        feed.source.validation = true;
        feed.source.interval = VALIDATION_WINDOWS;
        feed
    }
}

impl Source {
    /// The windows of a step.
    fn windows(&self, step: usize) -> TokenWindows {
        let starts = if self.validation {
            vec![self.held_out_start(step % self.interval)]
        } else {
            let windows = self.text.split - self.seq_length;
            (0..self.batch)
                .map(|entry| {
                    let index = (step * self.batch + entry) as u64;
                    (scramble(self.seed, index) % windows as u64) as usize
                })
                .collect()
        };
        TokenWindows::new(
            Arc::clone(&self.text.bytes),
            starts,
            self.seq_length,
            scramble(self.seed ^ 0x5eed, step as u64),
        )
    }

    /// Start of a validation window; in a text too short for it, the last window of all.
    fn held_out_start(&self, index: usize) -> usize {
        let last = self.text.bytes.len() - 1 - self.seq_length;
        let first = self.text.split.min(last);
        first + (last - first) * index / (VALIDATION_WINDOWS - 1)
    }

    /// Steps of the interval that begins at `first`.
    fn interval_len(&self, first: usize) -> usize {
        if self.validation {
            self.interval
        } else {
            self.interval.min(self.steps.saturating_sub(first))
        }
    }
}

/// SplitMix64: a number that looks random, of a seed and an index.
pub(crate) fn scramble(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

struct Interval<'a> {
    source: &'a Source,
    first: usize,
    done: usize,
    len: usize,
}

impl Iterator for Interval<'_> {
    type Item = Result<TokenWindows, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done == self.len {
            return None;
        }
        let windows = self.source.windows(self.first + self.done);
        self.done += 1;
        Some(Ok(windows))
    }
}

impl DataLoaderIterator<TokenWindows> for Interval<'_> {
    fn progress(&self) -> Progress {
        Progress::new(self.done, self.len, Some("steps".into()))
    }
}

impl DataLoader<TokenWindows> for Feed {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenWindows> + 'a> {
        let first = self
            .begun
            .fetch_add(self.source.interval, Ordering::Relaxed);
        Box::new(Interval {
            source: &self.source,
            first,
            done: 0,
            len: self.source.interval_len(first),
        })
    }

    fn num_items(&self) -> usize {
        self.source.interval_len(self.begun.load(Ordering::Relaxed))
    }

    fn to_device(&self, _: &Device) -> Arc<dyn DataLoader<TokenWindows>> {
        Arc::new(Self {
            source: self.source.clone(),
            begun: AtomicUsize::new(self.begun.load(Ordering::Relaxed)),
        })
    }

    /// Windows are not divided among ranks: every rank works on all of them.
    fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<TokenWindows>> {
        self.to_device(&Device::flex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_depend_on_seed_and_step_alone() {
        let numbers: Vec<u64> = (0..4).map(|index| scramble(7, index)).collect();
        assert_eq!(
            numbers,
            (0..4).map(|index| scramble(7, index)).collect::<Vec<_>>()
        );
        assert_ne!(
            numbers,
            (0..4).map(|index| scramble(8, index)).collect::<Vec<_>>()
        );
    }
}
