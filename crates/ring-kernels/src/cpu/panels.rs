//! Packing: rows of a tensor become operands of a product, once, for all the tiles that use them.
//!
//! Rows are read where they lie, strided or not, into rows of words; from there they become a right factor either transposed
//! (depth along the head size: for scores) or as they are (depth along the rows: for weighted sums).

use std::array;

use super::format::{Format, Vectors, copy};
use super::product::panel_width;
use super::scratch::HostTensor;
use crate::Rows;

/// Rows read at a time when transposing.
const LINES: usize = 8;

/// Reads `rows` of one head into rows of `stride` words. Words beyond the head size are 0, and so is a row that fills up the
/// last word along the rows.
#[inline(always)]
pub(super) fn read_rows<S: Vectors, F: Format<S>>(
    format: F,
    tensor: HostTensor<'_>,
    (batch, head): (usize, usize),
    rows: &Rows,
    head_dim: usize,
    words: &mut [f32],
    stride: usize,
) {
    for (i, words) in words.chunks_exact_mut(stride).take(rows.count).enumerate() {
        let offset = tensor.layout.offset(batch, head, rows.row(i));
        format.read(tensor.data, offset, head_dim, words);
    }
    if !rows.count.is_multiple_of(F::DEPTH) {
        words[rows.count * stride..][..stride].fill(0.0);
    }
}

/// The transpose of `rows` rows of `depth` words, as panels with room for `depth` rows. Lanes beyond the last row, up to a
/// whole vector, are 0.
#[inline(always)]
pub(super) fn transposed_panels<S: Vectors>(
    _: S,
    words: &[f32],
    stride: usize,
    rows: usize,
    depth: usize,
    panels: &mut [f32],
) {
    let width = panel_width::<S>();
    for (panel, first) in panels
        .chunks_exact_mut(depth * width)
        .zip((0..rows).step_by(width))
    {
        let lanes = (rows - first).min(width);
        let mut lane = 0;
        while lane + LINES <= lanes {
            let lines: [&[f32]; LINES] =
                array::from_fn(|i| &words[(first + lane + i) * stride..][..depth]);
            for (k, row) in panel.chunks_exact_mut(width).enumerate() {
                let row = &mut row[lane..lane + LINES];
                for i in 0..LINES {
                    row[i] = lines[i][k];
                }
            }
            lane += LINES;
        }
        for lane in lane..lanes.next_multiple_of(S::F32_LANES) {
            for (k, row) in panel.chunks_exact_mut(width).enumerate() {
                row[lane] = if lane < lanes {
                    words[(first + lane) * stride + k]
                } else {
                    0.0
                };
            }
        }
    }
}

/// `rows` rows of words as panels with room for `room` rows of words; see [`read_rows`] for an odd last row.
#[inline(always)]
pub(super) fn row_panels<S: Vectors, F: Format<S>>(
    _: S,
    format: F,
    words: &[f32],
    stride: usize,
    rows: usize,
    panels: &mut [f32],
    room: usize,
) {
    let width = panel_width::<S>();
    let columns = stride * F::DEPTH;
    for (panel, first) in panels
        .chunks_exact_mut(room * width)
        .zip((0..columns).step_by(width))
    {
        for (k, packed) in panel
            .chunks_exact_mut(width)
            .take(rows.div_ceil(F::DEPTH))
            .enumerate()
        {
            let row = &words[k * F::DEPTH * stride..][..stride];
            if F::DEPTH == 1 {
                copy(&row[first..first + width], packed);
            } else {
                let odd = &words[(2 * k + 1) * stride..][..stride];
                format.interleave(row, odd, first, packed);
            }
        }
    }
}
