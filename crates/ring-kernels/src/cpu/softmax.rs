//! Softmax on tiles: one step of the online softmax (forward), and its derivative (backward).
//!
//! A query sees the first `visible` keys of a tile, because positions ascend; the mask is one number per row.

use pulp::{Arch, Simd, WithSimd};

use super::exp::exp;
use super::tile::{QUERY_TILE, Tile};

/// Running maximum and denominator of the query rows of a tile, and what a step does to them.
pub(super) struct RowState {
    /// `m = max S` over the keys seen so far.
    pub(super) max: [f32; QUERY_TILE],
    /// `sum exp(S - m)`
    pub(super) denominator: [f32; QUERY_TILE],
    /// `exp(m_old - m_new)`, by which everything summed so far must be multiplied.
    pub(super) correction: [f32; QUERY_TILE],
}

impl RowState {
    /// Nothing seen, nothing to correct.
    pub(super) fn new() -> Self {
        Self {
            max: [f32::NEG_INFINITY; QUERY_TILE],
            denominator: [0.0; QUERY_TILE],
            correction: [1.0; QUERY_TILE],
        }
    }
}

/// Turns scores into weights `exp(S - m_new)` and updates the state of their rows.
///
/// `width` is the number of score columns that were computed, whole vectors. A row that sees no key here keeps its state
/// (`-inf - -inf` is never formed), and its weights are 0. NaN among the scores of a row makes its denominator NaN.
pub(super) fn online_softmax(
    arch: Arch,
    scores: &mut Tile,
    visible: &[usize],
    width: usize,
    state: &mut RowState,
) {
    arch.dispatch(OnlineSoftmax {
        scores,
        visible,
        width,
        state,
    });
}

struct OnlineSoftmax<'a> {
    scores: &'a mut Tile,
    visible: &'a [usize],
    width: usize,
    state: &'a mut RowState,
}

impl WithSimd for OnlineSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            scores,
            visible,
            width,
            state,
        } = self;
        let mut sums = [0.0; QUERY_TILE];
        // The exponents are collected and taken to the power all at once.
        state.correction.fill(0.0);
        for (i, (row, &visible)) in scores.rows_mut().zip(visible).enumerate() {
            let row = &mut row[..width];
            if visible == 0 {
                row.fill(0.0);
                continue;
            }
            row[visible..].fill(f32::NEG_INFINITY);
            let max = state.max[i].max(largest(simd, row));
            state.correction[i] = state.max[i] - max;
            state.max[i] = max;
            sums[i] = exponentiate(simd, row, max);
        }
        for x in S::as_mut_simd_f32s(&mut state.correction).0 {
            *x = exp(simd, *x);
        }
        for (i, sum) in sums.iter().enumerate() {
            state.denominator[i] = state.denominator[i] * state.correction[i] + sum;
        }
    }
}

/// The largest element of whole vectors.
#[inline(always)]
fn largest<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for &x in S::as_simd_f32s(row).0 {
        max = simd.max_f32s(max, x);
    }
    simd.reduce_max_f32s(max)
}

/// `x = exp(x - shift)`; returns the sum.
#[inline(always)]
fn exponentiate<S: Simd>(simd: S, row: &mut [f32], shift: f32) -> f32 {
    let shift = simd.splat_f32s(shift);
    let mut sum = simd.splat_f32s(0.0);
    for x in S::as_mut_simd_f32s(row).0 {
        *x = exp(simd, simd.sub_f32s(*x, shift));
        sum = simd.add_f32s(sum, *x);
    }
    simd.reduce_sum_f32s(sum)
}

/// `row = row * factor + term`: an output row takes up what a tile adds to it.
pub(super) fn scale_and_add(arch: Arch, row: &mut [f32], factor: f32, term: &[f32]) {
    arch.dispatch(
        #[inline(always)]
        || {
            for (x, term) in row.iter_mut().zip(term) {
                *x = *x * factor + term;
            }
        },
    );
}

/// Turns scores `S` into weights `P = exp(S - L)` and `dP = dO V^T` into `dS = P * (dP - Delta)`.
///
/// `L` is the log-sum-exp of the row over all its keys, on all ranks. Rows with `L = -inf` have no keys: `P = dS = 0`.
pub(super) fn softmax_gradient(
    arch: Arch,
    scores: &mut Tile,
    grad_scores: &mut Tile,
    width: usize,
    rows: &[GradientRow],
) {
    arch.dispatch(SoftmaxGradient {
        scores,
        grad_scores,
        width,
        rows,
    });
}

/// What the backward pass knows of a query row.
pub(super) struct GradientRow {
    /// Keys of the tile that the query sees.
    pub(super) visible: usize,
    /// `L`
    pub(super) log_sum_exp: f32,
    /// `Delta = dO . O - dL`
    pub(super) delta: f32,
}

struct SoftmaxGradient<'a> {
    scores: &'a mut Tile,
    grad_scores: &'a mut Tile,
    width: usize,
    rows: &'a [GradientRow],
}

impl WithSimd for SoftmaxGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let tiles = self.scores.rows_mut().zip(self.grad_scores.rows_mut());
        for ((p, ds), row) in tiles.zip(self.rows) {
            let (p, ds) = (&mut p[..self.width], &mut ds[..self.width]);
            if row.log_sum_exp == f32::NEG_INFINITY {
                p.fill(0.0);
                ds.fill(0.0);
                continue;
            }
            p[row.visible..].fill(f32::NEG_INFINITY);
            let log_sum_exp = simd.splat_f32s(row.log_sum_exp);
            let delta = simd.splat_f32s(row.delta);
            let vectors = S::as_mut_simd_f32s(p)
                .0
                .iter_mut()
                .zip(S::as_mut_simd_f32s(ds).0);
            for (p, ds) in vectors {
                *p = exp(simd, simd.sub_f32s(*p, log_sum_exp));
                *ds = simd.mul_f32s(*p, simd.sub_f32s(*ds, delta));
            }
        }
    }
}
