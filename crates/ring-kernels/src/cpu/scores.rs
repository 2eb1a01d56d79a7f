//! Softcap and ALiBi: what scores go through between product and softmax, and dropout, which weights go through after it.
//!
//! All of it is a pass over a tile that is only made if it is asked for. After it scores are to base 2, and softmax multiplies them by
//! 1.

use std::f32::consts::LOG2_E;

use super::format::Vectors;
use super::keep::Keep;
use super::scratch::QUERY_TILE;
use super::softmax::{Factors, Sight};
use super::tanh::tanh;
use crate::{Problem, Rows};

/// What scores and weights of one query head in one block go through beside scale and softmax.
#[derive(Clone, Copy)]
pub(super) struct Weighting {
    /// Bound on the scores.
    softcap: Option<f32>,
    /// ALiBi's slope of the query head.
    slope: Option<f32>,
    /// Which weights are kept, with dropout.
    pub(super) keep: Option<Keep>,
}

impl Weighting {
    /// That of a query head of a batch entry in a block of `branch`.
    pub(super) fn new(problem: &Problem, (entry, head): (usize, usize), branch: u32) -> Self {
        let scores = &problem.scores;
        Self {
            softcap: scores.softcap,
            slope: scores.alibi_slopes.as_ref().map(|slopes| slopes[head]),
            keep: scores.dropout.map(|dropout| Keep {
                dropout,
                stream: dropout.stream(entry, problem.query_heads, head),
                branch,
            }),
        }
    }

    /// Whether scores go through [`scores`](Self::scores).
    pub(super) fn changes_scores(&self) -> bool {
        self.softcap.is_some() || self.slope.is_some()
    }

    /// Whether scores and gradients go through [`gradients`](Self::gradients).
    pub(super) fn changes_gradients(&self) -> bool {
        self.changes_scores() || self.keep.is_some()
    }

    /// Turns products of queries and keys into scores, to base 2: `c tanh(scale S / c) - slope |n - m|`. `factor` is
    /// `scale log2 e`.
    #[inline(always)]
    pub(super) fn scores<S: Vectors>(
        &self,
        simd: S,
        scores: &mut [f32],
        sight: &Sight<'_>,
        factor: f32,
    ) {
        let lanes = sight.lanes::<S>();
        let positions = self
            .slope
            .map(|slope| (slope, Positions::new(sight.queries)));
        for key in sight.seen.clone() {
            let scores = &mut scores[key * QUERY_TILE..][..lanes];
            self.capped::<S, false>(simd, scores, &mut [], factor);
            if let Some((slope, positions)) = &positions {
                positions.add_bias(simd, scores, sight.keys.position(key), *slope);
            }
        }
    }

    /// Does what [`scores`](Self::scores) does, and turns `dP` into `(kept factor dP - scale Delta) (1 - tanh^2)`: what the weights
    /// are multiplied by to be `scale dS`.
    #[inline(always)]
    pub(super) fn gradients<S: Vectors>(
        &self,
        simd: S,
        (scores, gradients): (&mut [f32], &mut [f32]),
        sight: &Sight<'_>,
        factors: Factors,
        delta: &[f32],
        kept: Option<&[f32]>,
    ) {
        let lanes = sight.lanes::<S>();
        let delta = &delta[..lanes];
        let positions = self
            .slope
            .map(|slope| (slope, Positions::new(sight.queries)));
        for key in sight.seen.clone() {
            let row = key * QUERY_TILE..key * QUERY_TILE + lanes;
            let (scores, gradients) = (&mut scores[row.clone()], &mut gradients[row.clone()]);
            let kept = kept.map(|kept| &kept[row]);
            differences(simd, gradients, factors.gradient, delta, kept);
            self.capped::<S, true>(simd, scores, gradients, factors.score);
            if let Some((slope, positions)) = &positions {
                positions.add_bias(simd, scores, sight.keys.position(key), *slope);
            }
        }
    }

    /// Scale and softcap of the scores of a key, and with `GRADIENTS` the softcap's derivative on the gradients. `factor` is to base 2.
    #[inline(always)]
    fn capped<S: Vectors, const GRADIENTS: bool>(
        &self,
        simd: S,
        scores: &mut [f32],
        gradients: &mut [f32],
        factor: f32,
    ) {
        let (scores, _) = S::as_mut_simd_f32s(scores);
        let (gradients, _) = S::as_mut_simd_f32s(gradients);
        let Some(softcap) = self.softcap else {
            let factor = simd.splat_f32s(factor);
            for score in scores {
                *score = simd.mul_f32s(*score, factor);
            }
            return;
        };
        // Finite whatever the softcap is, so that 0 stays 0.
        let bound = (softcap * LOG2_E).min(f32::MAX);
        let inward = simd.splat_f32s((factor / bound).clamp(-f32::MAX, f32::MAX));
        let bound = simd.splat_f32s(bound);
        for i in 0..scores.len() {
            let (tanh, derivative) = tanh(simd, simd.mul_f32s(scores[i], inward));
            scores[i] = simd.mul_f32s(tanh, bound);
            if GRADIENTS {
                gradients[i] = simd.mul_f32s(gradients[i], derivative);
            }
        }
    }
}

/// `kept factor dP - Delta` for one key.
#[inline(always)]
fn differences<S: Vectors>(
    simd: S,
    gradients: &mut [f32],
    factor: f32,
    delta: &[f32],
    kept: Option<&[f32]>,
) {
    let (gradients, _) = S::as_mut_simd_f32s(gradients);
    let (delta, _) = S::as_simd_f32s(delta);
    let factor = simd.splat_f32s(factor);
    if let Some(kept) = kept {
        let (kept, _) = S::as_simd_f32s(kept);
        for i in 0..gradients.len() {
            gradients[i] = simd.mul_f32s(gradients[i], kept[i]);
        }
    }
    for i in 0..gradients.len() {
        gradients[i] = simd.mul_add_e_f32s(gradients[i], factor, simd.neg_f32s(delta[i]));
    }
}

/// Positions of the queries of a tile, relative to the first: `high 2^20 + low`. Positions are too large for f32, but both parts
/// of their differences are exact, so that a distance is rounded once.
struct Positions {
    first: i64,
    high: [f32; QUERY_TILE],
    low: [f32; QUERY_TILE],
}

/// Bits of the lower part.
const LOW_BITS: u32 = 20;

/// The parts of a position.
fn parts(position: i64) -> (f32, f32) {
    let low = position & ((1 << LOW_BITS) - 1);
    ((position >> LOW_BITS) as f32, low as f32)
}

impl Positions {
    #[inline(always)]
    fn new(queries: &Rows) -> Self {
        let mut positions = Self {
            first: queries.position(0),
            high: [0.0; QUERY_TILE],
            low: [0.0; QUERY_TILE],
        };
        for i in 0..queries.count {
            let (high, low) = parts(i as i64 * queries.position_step);
            (positions.high[i], positions.low[i]) = (high, low);
        }
        positions
    }

    /// Adds `-slope |n - m|`, to base 2, to the scores of a key at position `m`.
    #[inline(always)]
    fn add_bias<S: Vectors>(&self, simd: S, scores: &mut [f32], key: i64, slope: f32) {
        let (scores, _) = S::as_mut_simd_f32s(scores);
        let (high, _) = S::as_simd_f32s(&self.high);
        let (low, _) = S::as_simd_f32s(&self.low);
        let (first_high, first_low) = parts(self.first.saturating_sub(key));
        let (first_high, first_low) = (simd.splat_f32s(first_high), simd.splat_f32s(first_low));
        let unit = simd.splat_f32s((1 << LOW_BITS) as f32);
        let slope = simd.splat_f32s(-slope * LOG2_E);
        for i in 0..scores.len() {
            let high = simd.add_f32s(high[i], first_high);
            let low = simd.add_f32s(low[i], first_low);
            let difference = simd.mul_add_e_f32s(high, unit, low);
            let distance = simd.max_f32s(difference, simd.neg_f32s(difference));
            scores[i] = simd.mul_add_e_f32s(distance, slope, scores[i]);
        }
    }
}
