//! What scores and weights go through, as configurations say it: window, scale, softcap, ALiBi, dropout.

use ring_core::{AttentionSpec, DropoutSeed, Pattern, Shape, SpecError};
use ring_kernels::philox;

use crate::{error::RingError, ring::Ring};

/// The pattern under causality and a window `(left, right)`, in which -1 is no bound.
///
/// # Errors
/// [`RingError::Window`] for any other negative bound.
pub(crate) fn masked(
    pattern: Pattern,
    causal: bool,
    window: Option<(i64, i64)>,
) -> Result<Pattern, RingError> {
    let pattern = if causal { pattern.causal() } else { pattern };
    let Some((left, right)) = window else {
        return Ok(pattern);
    };
    let bound = |bound: i64| match bound {
        -1 => Ok(None),
        _ => u64::try_from(bound)
            .map(Some)
            .map_err(|_| RingError::Window { left, right }),
    };
    Ok(pattern.with_window(bound(left)?, bound(right)?))
}

/// ALiBi's usual slopes (arXiv 2108.12409), one for each of `heads` query heads.
///
/// For a power of two they are `2^(-8/heads), 2^(-16/heads), ..`; for other numbers those of the next smaller power of two, and
/// then every second one of twice that power, as in the paper's code.
///
/// ```
/// assert_eq!(ring_burn::alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
/// assert_eq!(ring_burn::alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
/// ```
pub fn alibi_slopes(heads: usize) -> Vec<f64> {
    let slope = |index: usize, heads: usize| (-8.0 * (index + 1) as f64 / heads as f64).exp2();
    let Some(power) = heads.checked_ilog2().map(|log| 1_usize << log) else {
        return Vec::new();
    };
    let first = (0..power).map(|index| slope(index, power));
    let others = (0..heads - power).map(|index| slope(2 * index, 2 * power));
    first.chain(others).collect()
}

/// Scale, softcap, ALiBi and dropout of a module.
#[derive(Clone, Debug)]
pub(crate) struct Scores {
    scale: Option<f32>,
    softcap: Option<f32>,
    alibi_slopes: Option<Vec<f32>>,
    dropout: f32,
    stream: u32,
}

impl Scores {
    pub(crate) fn new(
        scale: Option<f64>,
        softcap: Option<f64>,
        alibi_slopes: Option<&[f64]>,
    ) -> Self {
        Self {
            scale: scale.map(|scale| scale as f32),
            softcap: softcap.map(|softcap| softcap as f32),
            alibi_slopes: alibi_slopes
                .map(|slopes| slopes.iter().map(|&slope| slope as f32).collect()),
            dropout: 0.0,
            stream: 0,
        }
    }

    pub(crate) fn with_dropout(self, probability: f64, stream: u32) -> Self {
        Self {
            dropout: probability as f32,
            stream,
            ..self
        }
    }

    /// Refuses what would be refused for tensors of any size.
    pub(crate) fn check(&self, pattern: &Pattern) -> Result<(), RingError> {
        let heads = match &self.alibi_slopes {
            Some(slopes) => slopes.len().max(1),
            None => pattern.branches().len(),
        };
        let shape = Shape {
            batch: 1,
            query_heads: heads,
            kv_heads: heads,
            head_dim: 1,
        };
        self.of(AttentionSpec::new(pattern.clone(), shape, 0)?, true)?;
        Ok(())
    }

    /// The computation with these scores; weights are dropped if it `drops`.
    pub(crate) fn of(
        &self,
        mut spec: AttentionSpec,
        drops: bool,
    ) -> Result<AttentionSpec, SpecError> {
        if let Some(scale) = self.scale {
            spec = spec.with_scale(scale)?;
        }
        if let Some(softcap) = self.softcap {
            spec = spec.with_softcap(softcap)?;
        }
        if let Some(slopes) = &self.alibi_slopes {
            spec = spec.with_alibi_slopes(slopes.clone())?;
        }
        if drops {
            spec = spec.with_dropout(self.dropout)?;
        }
        Ok(spec)
    }

    /// What chooses the weights that are dropped.
    ///
    /// # Errors
    /// [`SpecError::DropoutCounter`] if entries of the whole batch could not be told apart.
    pub(crate) fn seed(&self, spec: &AttentionSpec, ring: &Ring) -> Result<DropoutSeed, SpecError> {
        if spec.dropout == 0.0 {
            return Ok(DropoutSeed::default());
        }
        spec.check_first_entry(ring.first_batch_entry())?;
        Ok(DropoutSeed {
            seed: seed_of(ring.seed(), self.stream),
            first_entry: ring.first_batch_entry() as u32,
        })
    }
}

/// The seed of a layer: what `seed` is for the model, `stream` tells the layers apart.
fn seed_of(seed: u64, stream: u32) -> u64 {
    // No counter of the model's other dropout has these words.
    let counter = [stream, u32::MAX, u32::MAX, u32::MAX];
    let [low, high, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn slopes_are_those_of_the_paper() {
        let eighths: Vec<f64> = (1..=8).map(|power| (-f64::from(power)).exp2()).collect();
        assert_eq!(alibi_slopes(8), eighths);
        assert_eq!(alibi_slopes(1), [1.0 / 256.0]);
        assert_eq!(alibi_slopes(0), [0.0; 0]);
        // get_slopes(12): those of 8 heads, then 4 of every second of 16.
        let expected = [
            eighths,
            [0.5, 1.5, 2.5, 3.5].map(|x| f64::exp2(-x)).to_vec(),
        ]
        .concat();
        assert_eq!(alibi_slopes(12), expected);
    }

    #[test]
    fn neither_layers_nor_steps_share_a_seed() {
        let seeds: HashSet<u64> = (0..100)
            .flat_map(|seed| (0..100).map(move |stream| seed_of(seed, stream)))
            .collect();
        assert_eq!(seeds.len(), 10_000);
    }
}
