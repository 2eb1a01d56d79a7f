//! Dropout whose mask depends on a seed and global positions, never on the number of ranks or on the sharding.

use std::ops::Range;

use burn::{
    module::{Flag, Module, Param},
    tensor::{Tensor, TensorData},
};
use ring_burn::{Ring, philox};

/// Dropout on `[batch, own positions, channels]`, active on autodiff devices while training.
///
/// The mask is a pure function of (the ring's seed, this layer's stream, batch entry, global position, channel), by a
/// counter-based generator (Philox4x32-10; Salmon et al., SC 2011): one rank and a hundred drop the same elements.
#[derive(Module, Debug)]
pub struct PositionDropout {
    probability: f64,
    /// Tells the layers of a model apart.
    #[module(skip)]
    stream: u32,
    /// Switched off where a part of a model is frozen.
    training: Param<Flag>,
}

impl PositionDropout {
    /// Drops elements with `probability` (in `[0, 1)`, checked by the configurations that use it).
    pub(crate) fn new(probability: f64, stream: u32) -> Self {
        Self {
            probability,
            stream,
            training: Param::from_bool(true),
        }
    }

    /// Drops, and scales what is kept by `1 / (1 - probability)`.
    pub fn forward(&self, input: Tensor<3>, ring: &Ring) -> Tensor<3> {
        let device = input.device();
        if self.probability == 0.0 || !self.training.is_enabled() || !device.is_autodiff() {
            return input;
        }
        let [batch, rows, channels] = input.dims();
        let entries = ring.first_batch_entry()..ring.first_batch_entry() + batch;
        let mask = self.mask(entries, &ring.positions(), channels, ring.seed());
        debug_assert_eq!(mask.len(), batch * rows * channels);
        let mask = Tensor::from_data(TensorData::new(mask, [batch, rows, channels]), &device);
        input * mask
    }

    /// Factors on the elements of `[batch, positions, channels]`.
    fn mask(
        &self,
        entries: Range<usize>,
        positions: &[usize],
        channels: usize,
        seed: u64,
    ) -> Vec<f32> {
        let keep = (1.0 / (1.0 - self.probability)) as f32;
        // Dropped are the draws below the threshold.
        let threshold = (self.probability * 2.0_f64.powi(32)) as u64;
        let key = [seed as u32, (seed >> 32) as u32];
        let mut mask = Vec::with_capacity(entries.len() * positions.len() * channels);
        for entry in entries {
            for &position in positions {
                for block in 0..channels.div_ceil(4) {
                    // 2^40 positions, 2^24 batch entries.
                    let high = (position >> 32) as u32 | (entry as u32) << 8;
                    let draws = philox([block as u32, position as u32, high, self.stream], key);
                    let factors = draws.map(|draw| {
                        if u64::from(draw) < threshold {
                            0.0
                        } else {
                            keep
                        }
                    });
                    let left = (channels - 4 * block).min(4);
                    mask.extend_from_slice(&factors[..left]);
                }
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_elements_are_dropped_does_not_change_from_version_to_version() {
        // Seed and counter such that the generator yields a known answer of the Random123 library: 6627e8d5 e169c58d bc57ac4c
        // 9b00dbd8, that is 0.40, 0.88, 0.74 and 0.61.
        let mask = PositionDropout::new(0.7, 0).mask(0..1, &[0], 4, 0);
        let dropped: Vec<bool> = mask.iter().map(|&factor| factor == 0.0).collect();
        assert_eq!(dropped, [true, false, false, true]);
    }

    #[test]
    fn a_shard_drops_what_the_whole_drops() {
        let dropout = PositionDropout::new(0.3, 5);
        let whole = dropout.mask(0..2, &(0..20).collect::<Vec<_>>(), 7, 42);
        let own = [3, 4, 11];
        let part = dropout.mask(0..2, &own, 7, 42);
        for batch in 0..2 {
            for (row, position) in own.into_iter().enumerate() {
                assert_eq!(
                    part[(batch * 3 + row) * 7..][..7],
                    whole[(batch * 20 + position) * 7..][..7]
                );
            }
        }
        let second = dropout.mask(1..2, &own, 7, 42);
        assert_eq!(second, part[3 * 7..], "a part of the batch");
        assert_ne!(
            whole,
            dropout.mask(0..2, &(0..20).collect::<Vec<_>>(), 7, 43)
        );
        assert_ne!(part[..7], part[7..14]);
    }

    #[test]
    fn the_rate_and_the_mean_are_right() {
        let mask = PositionDropout::new(0.25, 0).mask(0..1, &(0..1000).collect::<Vec<_>>(), 64, 1);
        let dropped =
            mask.iter().filter(|&&factor| factor == 0.0).count() as f64 / mask.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        let mean: f32 = mask.iter().sum::<f32>() / mask.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
    }
}
