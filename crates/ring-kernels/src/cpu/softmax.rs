//! Softmax on tiles of scores: one step of the online softmax (forward), and its derivative (backward).
//!
//! A tile holds scores transposed: a row for each key, a lane for each query. What belongs to a query, its maximum, its
//! denominator, its log-sum-exp, is a lane of a vector, and nothing is ever reduced across lanes. Weights take the place of the
//! scores they are made of, as words that the next product reads.
//!
//! Everything is to base 2: scores are multiplied by `scale log2 e`.

// `copy_from_slice` of a few vectors may become a call, which would spill them all.
#![allow(clippy::manual_memcpy)]

use std::ops::Range;

use super::format::{Format, Vectors};
use super::rows::{flipped, seen};
use super::scratch::QUERY_TILE;
use crate::{Mask, Rows};

/// Lanes of a tile, numbered.
const LANES: [f32; QUERY_TILE] = {
    let mut lanes = [0.0; QUERY_TILE];
    let mut i = 0;
    while i < QUERY_TILE {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

/// Vectors treated together: their chains of additions overlap.
const VECTORS: usize = 4;

/// The array of a value for each `j`. Not `array::from_fn`: a closure is not sure to be compiled for the instruction set.
macro_rules! each {
    ($simd:expr, |$j:ident| $value:expr) => {{
        let mut values = [$simd.splat_f32s(0.0); N];
        for $j in 0..N {
            values[$j] = $value;
        }
        values
    }};
}

/// What the queries of a tile see of its keys.
pub(super) struct Sight<'a> {
    mask: Mask,
    /// Queries of the tile.
    pub(super) queries: &'a Rows,
    /// Keys of the tile.
    pub(super) keys: &'a Rows,
    /// From the first key that any query sees, or the word it shares, to the last. The others need not be computed.
    pub(super) seen: Range<usize>,
    /// Keys that every query sees, within `seen`.
    seen_by_all: Range<usize>,
}

impl<'a> Sight<'a> {
    /// `None` if no query sees a key. Words hold `depth` keys.
    #[inline(always)]
    pub(super) fn new(mask: Mask, depth: usize, queries: &'a Rows, keys: &'a Rows) -> Option<Self> {
        let last = queries.count.checked_sub(1)?;
        let first = seen(mask, queries.position(0), keys);
        let last = seen(mask, queries.position(last), keys);
        if first.start >= last.end {
            return None;
        }
        let range = first.start / depth * depth..last.end;
        Some(Self {
            mask,
            queries,
            keys,
            seen_by_all: if last.start < first.end {
                last.start..first.end
            } else {
                range.end..range.end
            },
            seen: range,
        })
    }

    /// Words of a row of the tile that hold queries: whole vectors.
    #[inline(always)]
    pub(super) fn lanes<S: Vectors>(&self) -> usize {
        self.queries.count.next_multiple_of(S::F32_LANES)
    }

    /// `values` of the queries of some vectors and of one key, with `-inf` for queries that do not see it.
    #[inline(always)]
    fn hide<S: Vectors, const N: usize>(
        &self,
        simd: S,
        key: usize,
        lane: usize,
        values: [S::f32s; N],
    ) -> [S::f32s; N] {
        let seeing = seen(flipped(self.mask), self.keys.position(key), self.queries);
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let lanes: [_; N] = load::<S, N>(&LANES, lane);
        let first = simd.splat_f32s(seeing.start as f32);
        let values = each!(simd, |j| {
            simd.select_f32s(simd.less_than_f32s(lanes[j], first), lowest, values[j])
        });
        if self.mask.left.is_none() {
            return values;
        }
        let end = simd.splat_f32s(seeing.end as f32);
        each!(simd, |j| {
            simd.select_f32s(simd.less_than_f32s(lanes[j], end), values[j], lowest)
        })
    }
}

/// Running maximum and denominator of the queries of a tile, one lane each, and what a step does to them.
pub(super) struct RowState<'a> {
    /// `m = max S` over the keys seen so far, to base 2.
    pub(super) max: &'a mut [f32],
    /// `sum 2^(S - m)`
    pub(super) denominator: &'a mut [f32],
    /// `2^(m_old - m_new)`, by which everything summed so far must be multiplied.
    pub(super) correction: &'a mut [f32],
}

/// Turns products of queries and keys into weights `2^(factor S - m_new)` and updates the state of the queries.
///
/// `factor` is not negative. A query that sees no key here keeps its state (`-inf - -inf` is never formed), and its weights
/// are 0. NaN among the scores of a query makes its denominator NaN. With dropout, weights are multiplied by `kept` once the
/// denominator has counted them.
#[inline(always)]
pub(super) fn online_softmax<S: Vectors, F: Format<S>>(
    simd: S,
    format: F,
    scores: &mut [f32],
    sight: &Sight<'_>,
    factor: f32,
    kept: Option<&[f32]>,
    state: &mut RowState<'_>,
) {
    let step = OnlineSoftmax {
        simd,
        format,
        scores,
        sight,
        factor,
        kept: kept.unwrap_or_default(),
    };
    match kept {
        None => step.all_vectors::<false>(state),
        Some(_) => step.all_vectors::<true>(state),
    }
}

struct OnlineSoftmax<'a, S, F> {
    simd: S,
    format: F,
    scores: &'a mut [f32],
    sight: &'a Sight<'a>,
    factor: f32,
    /// Read only with dropout.
    kept: &'a [f32],
}

impl<S: Vectors, F: Format<S>> OnlineSoftmax<'_, S, F> {
    #[inline(always)]
    fn all_vectors<const DROPOUT: bool>(mut self, state: &mut RowState<'_>) {
        let vectors = self.sight.queries.count.div_ceil(S::F32_LANES);
        let mut vector = 0;
        while vector + VECTORS <= vectors {
            self.vectors::<VECTORS, DROPOUT>(vector * S::F32_LANES, state);
            vector += VECTORS;
        }
        while vector < vectors {
            self.vectors::<1, DROPOUT>(vector * S::F32_LANES, state);
            vector += 1;
        }
    }

    /// The queries of `N` vectors from `lane` on.
    #[inline(always)]
    fn vectors<const N: usize, const DROPOUT: bool>(
        &mut self,
        lane: usize,
        state: &mut RowState<'_>,
    ) {
        let simd = self.simd;
        let factor = simd.splat_f32s(self.factor);
        let old: [_; N] = load::<S, N>(state.max, lane);
        let largest = self.largest::<N>(lane);
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let max: [_; N] = each!(simd, |j| simd
            .max_f32s(old[j], simd.mul_f32s(largest[j], factor)));
        // What a query that has seen nothing is compared with does not matter, as long as it is not -inf.
        let nothing = simd.splat_f32s(0.0);
        let shift = each!(simd, |j| simd.select_f32s(
            simd.equal_f32s(max[j], lowest),
            nothing,
            max[j]
        ));
        let correction: [_; N] = each!(simd, |j| simd.exp2(simd.sub_f32s(old[j], shift[j])));
        let sums = self.weights::<N, DROPOUT>(lane, factor, shift);
        let before: [_; N] = load::<S, N>(state.denominator, lane);
        store::<S, N>(
            state.denominator,
            lane,
            each!(simd, |j| simd.mul_add_e_f32s(
                before[j],
                correction[j],
                sums[j]
            )),
        );
        store::<S, N>(state.max, lane, max);
        store::<S, N>(state.correction, lane, correction);
    }

    /// The largest scores; those that are not seen become `-inf`.
    #[inline(always)]
    fn largest<const N: usize>(&mut self, lane: usize) -> [S::f32s; N] {
        let simd = self.simd;
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let mut largest = [lowest; N];
        let all = &self.sight.seen_by_all;
        for key in all.clone() {
            let row: [_; N] = load::<S, N>(self.scores, key * QUERY_TILE + lane);
            largest = each!(simd, |j| simd.max_f32s(largest[j], row[j]));
        }
        let seen = &self.sight.seen;
        for some in [seen.start..all.start, all.end..seen.end] {
            for key in some {
                let at = key * QUERY_TILE + lane;
                let row: [_; N] = load::<S, N>(self.scores, at);
                let row = self.sight.hide(simd, key, lane, row);
                store::<S, N>(self.scores, at, row);
                largest = each!(simd, |j| simd.max_f32s(largest[j], row[j]));
            }
        }
        largest
    }

    /// The weights, and their sums.
    #[inline(always)]
    fn weights<const N: usize, const DROPOUT: bool>(
        &mut self,
        lane: usize,
        factor: S::f32s,
        shift: [S::f32s; N],
    ) -> [S::f32s; N] {
        let simd = self.simd;
        let minus_shift: [_; N] = each!(simd, |j| simd.neg_f32s(shift[j]));
        let mut sums = [simd.splat_f32s(0.0); N];
        for key in self.sight.seen.clone().step_by(F::DEPTH) {
            let mut weights = [[simd.splat_f32s(0.0); N]; 2];
            let rows = F::DEPTH.min(self.sight.seen.end - key);
            for (i, weights) in weights.iter_mut().enumerate().take(rows) {
                let at = (key + i) * QUERY_TILE + lane;
                let row: [_; N] = load::<S, N>(self.scores, at);
                for j in 0..N {
                    let exponent = simd.mul_add_e_f32s(row[j], factor, minus_shift[j]);
                    weights[j] = simd.exp2(exponent);
                    sums[j] = simd.add_f32s(sums[j], weights[j]);
                }
                if DROPOUT {
                    let kept: [_; N] = load::<S, N>(self.kept, at);
                    *weights = each!(simd, |j| simd.mul_f32s(weights[j], kept[j]));
                }
            }
            let words = match F::DEPTH {
                1 => weights[0],
                _ => each!(simd, |j| self.format.pair(
                    simd,
                    weights[0][j],
                    weights[1][j]
                )),
            };
            store::<S, N>(self.scores, key / F::DEPTH * QUERY_TILE + lane, words);
        }
        sums
    }
}

/// What the derivative of softmax needs of the queries of a tile, one lane each.
pub(super) struct GradientRows<'a> {
    /// Log-sum-exp over all keys, to base 2; `inf` where nothing is visible, so that all weights become 0.
    pub(super) log_sum_exp: &'a [f32],
    /// `scale Delta`
    pub(super) delta: &'a [f32],
}

/// The factors of the scores and of their gradients.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    /// `scale log2 e`
    pub(super) score: f32,
    /// `scale output_scale`
    pub(super) gradient: f32,
}

impl Factors {
    /// What there is to multiply by has been.
    pub(super) const NONE: Self = Self {
        score: 1.0,
        gradient: 1.0,
    };
}

/// A tile of scores and of their gradients; rows are [`QUERY_TILE`] words apart.
pub(super) struct GradientTile<'a> {
    /// `Q K^T`; becomes `P`, words of neighbouring queries.
    pub(super) scores: &'a mut [f32],
    /// `dO V^T`; becomes `scale dS`, words of neighbouring queries.
    pub(super) gradients: &'a mut [f32],
    /// Becomes `scale dS`, words of neighbouring keys. Only if a word holds several numbers.
    pub(super) by_keys: &'a mut [f32],
}

/// `P = 2^(factor S - L)`, `scale dS = P (scale output_scale dP - scale Delta)`. With dropout, `P` is then multiplied by `kept`;
/// `dP` must have been.
#[inline(always)]
pub(super) fn softmax_gradient<S: Vectors, F: Format<S>>(
    simd: S,
    format: F,
    tile: GradientTile<'_>,
    sight: &Sight<'_>,
    factors: Factors,
    kept: Option<&[f32]>,
    rows: &GradientRows<'_>,
) {
    let step = SoftmaxGradient {
        simd,
        format,
        tile,
        sight,
        factors,
        rows,
        kept: kept.unwrap_or_default(),
    };
    match kept {
        None => step.all_vectors::<false>(),
        Some(_) => step.all_vectors::<true>(),
    }
}

struct SoftmaxGradient<'a, S, F> {
    simd: S,
    format: F,
    tile: GradientTile<'a>,
    sight: &'a Sight<'a>,
    factors: Factors,
    rows: &'a GradientRows<'a>,
    /// Read only with dropout.
    kept: &'a [f32],
}

impl<S: Vectors, F: Format<S>> SoftmaxGradient<'_, S, F> {
    #[inline(always)]
    fn all_vectors<const DROPOUT: bool>(mut self) {
        let vectors = self.sight.queries.count.div_ceil(S::F32_LANES);
        let mut vector = 0;
        while vector + VECTORS <= vectors {
            self.vectors::<VECTORS, DROPOUT>(vector * S::F32_LANES);
            vector += VECTORS;
        }
        while vector + 2 <= vectors {
            self.vectors::<2, DROPOUT>(vector * S::F32_LANES);
            vector += 2;
        }
        while vector < vectors {
            self.vectors::<1, DROPOUT>(vector * S::F32_LANES);
            vector += 1;
        }
    }

    /// The queries of `N` vectors from `lane` on.
    #[inline(always)]
    fn vectors<const N: usize, const DROPOUT: bool>(&mut self, lane: usize) {
        let simd = self.simd;
        let zero = [simd.splat_f32s(0.0); N];
        for key in self.sight.seen.clone().step_by(F::DEPTH) {
            let mut gradients = [zero; 2];
            let rows = F::DEPTH.min(self.sight.seen.end - key);
            for (i, gradients) in gradients.iter_mut().enumerate().take(rows) {
                *gradients = self.row::<N, DROPOUT>(key + i, lane);
            }
            if F::DEPTH > 1 {
                let words = each!(simd, |j| {
                    self.format.pair(simd, gradients[0][j], gradients[1][j])
                });
                let at = key / F::DEPTH * QUERY_TILE + lane;
                store::<S, N>(self.tile.by_keys, at, words);
            }
        }
    }

    /// One key; returns the gradients of its scores.
    #[inline(always)]
    fn row<const N: usize, const DROPOUT: bool>(
        &mut self,
        key: usize,
        lane: usize,
    ) -> [S::f32s; N] {
        let simd = self.simd;
        let start = key * QUERY_TILE;
        let score_factor = simd.splat_f32s(self.factors.score);
        let gradient_factor = simd.splat_f32s(self.factors.gradient);
        let log_sum_exp: [_; N] = load::<S, N>(self.rows.log_sum_exp, lane);
        let delta: [_; N] = load::<S, N>(self.rows.delta, lane);
        let scores: [_; N] = load::<S, N>(self.tile.scores, start + lane);
        let gradients: [_; N] = load::<S, N>(self.tile.gradients, start + lane);

        let mut exponents: [_; N] = each!(simd, |j| {
            simd.mul_add_e_f32s(scores[j], score_factor, simd.neg_f32s(log_sum_exp[j]))
        });
        if !self.sight.seen_by_all.contains(&key) {
            exponents = self.sight.hide(simd, key, lane, exponents);
        }
        let mut weights: [_; N] = each!(simd, |j| simd.exp2(exponents[j]));
        let gradients: [_; N] = each!(simd, |j| {
            let difference =
                simd.mul_add_e_f32s(gradients[j], gradient_factor, simd.neg_f32s(delta[j]));
            simd.mul_f32s(weights[j], difference)
        });
        if DROPOUT {
            let kept: [_; N] = load::<S, N>(self.kept, start + lane);
            weights = each!(simd, |j| simd.mul_f32s(weights[j], kept[j]));
        }
        self.store_row(self.format, start, lane, weights, gradients);
        gradients
    }

    /// Words of neighbouring queries take the place of numbers that have been read.
    #[inline(always)]
    fn store_row<const N: usize>(
        &mut self,
        format: F,
        start: usize,
        lane: usize,
        weights: [S::f32s; N],
        gradients: [S::f32s; N],
    ) {
        let simd = self.simd;
        let GradientTile {
            scores,
            gradients: grad_scores,
            ..
        } = &mut self.tile;
        if F::DEPTH == 1 {
            store::<S, N>(scores, start + lane, weights);
            store::<S, N>(grad_scores, start + lane, gradients);
            return;
        }
        let word = start + lane / F::DEPTH;
        for j in (0..N).step_by(2) {
            let at = word + j / 2 * S::F32_LANES;
            let neighbour = |row: &[S::f32s; N]| match row.get(j + 1) {
                Some(&next) => next,
                None => simd.splat_f32s(0.0),
            };
            let weights = format.join(simd, weights[j], neighbour(&weights));
            store::<S, 1>(scores, at, [weights]);
            let gradients = format.join(simd, gradients[j], neighbour(&gradients));
            store::<S, 1>(grad_scores, at, [gradients]);
        }
    }
}

#[inline(always)]
fn load<S: Vectors, const N: usize>(numbers: &[f32], start: usize) -> [S::f32s; N] {
    let vectors = S::as_simd_f32s(&numbers[start..start + N * S::F32_LANES]).0;
    let mut values = [vectors[0]; N];
    for j in 0..N {
        values[j] = vectors[j];
    }
    values
}

#[inline(always)]
fn store<S: Vectors, const N: usize>(numbers: &mut [f32], start: usize, values: [S::f32s; N]) {
    let vectors = S::as_mut_simd_f32s(&mut numbers[start..start + N * S::F32_LANES]).0;
    for j in 0..N {
        vectors[j] = values[j];
    }
}
