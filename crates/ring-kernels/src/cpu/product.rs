//! The one matrix product all five products of attention go through.
//!
//! `C = A B`, `C += A B` or `C = diag(f) C + A B` for small matrices that lie in cache, of words ([`Format`]). `C` is computed
//! in register blocks of `MR` rows by two vectors: each step along the depth loads the vectors of `B`, broadcasts `MR` words of
//! `A`, and does `2 MR` multiply-adds. With 8 rows that is 10 loads for 16 of them, so that the multipliers, not the loads, are
//! the limit. `B` lies in panels as wide as a register block ([`Panels`]), so that it is read from front to back.
//!
//! Every element of `C` is one chain of multiply-adds along the depth, begun at 0 or at `C`. Its value therefore does not
//! depend on how rows are grouped into blocks; the independence of results from the number of threads rests on this.

// `copy_from_slice` of a few vectors may become a call, which would spill them all.
#![allow(clippy::manual_memcpy)]

use super::format::{Format, Vectors};

/// Vectors that a panel is wide.
const PANEL_VECTORS: usize = 2;

/// Words that a panel is wide.
pub(super) const fn panel_width<S: Vectors>() -> usize {
    PANEL_VECTORS * S::F32_LANES
}

/// The right factor `B`, cut into panels of columns: panel `p` holds columns `p * width..(p + 1) * width` of all rows, one row
/// after the other.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) words: &'a [f32],
    /// Rows for which a panel has room.
    pub(super) room: usize,
}

impl Panels<'_> {
    /// Without the first `rows` rows.
    #[inline(always)]
    pub(super) fn skip_rows<S: Vectors>(self, rows: usize) -> Self {
        Self {
            words: &self.words[rows * panel_width::<S>()..],
            ..self
        }
    }
}

/// A row-major matrix to write to: row `i` starts at `i * stride`.
pub(super) struct Out<'a> {
    pub(super) numbers: &'a mut [f32],
    pub(super) stride: usize,
}

/// Sizes of a product: `C` is `rows x columns`, `A` is `rows x depth`, `B` is `depth x columns`.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) rows: usize,
    /// In words.
    pub(super) depth: usize,
    /// Rounded up to whole vectors.
    pub(super) columns: usize,
}

/// What becomes of the old contents of `C`.
#[derive(Clone, Copy)]
pub(super) enum Old<'a> {
    /// `C = A B`
    Replaced,
    /// `C += A B`
    Kept,
    /// `C = diag(factors) C + A B`
    Scaled(&'a [f32]),
}

/// The left factor `A`. No iterators: what they inline into is not sure to be compiled for the instruction set.
pub(super) trait Left: Copy {
    /// `MR` rows of it.
    type Rows<const MR: usize>: Columns<MR>;

    /// Rows `row..row + MR` of columns `0..depth`.
    fn rows<const MR: usize>(self, row: usize, depth: usize) -> Self::Rows<MR>;
}

/// Some rows, read column by column.
pub(super) trait Columns<const MR: usize> {
    /// Column `k`.
    fn column(&self, k: usize) -> [f32; MR];
}

/// Row `i` starts at `i * stride`.
#[derive(Clone, Copy)]
pub(super) struct RowMajor<'a> {
    pub(super) words: &'a [f32],
    pub(super) stride: usize,
}

impl<'a> Left for RowMajor<'a> {
    type Rows<const MR: usize> = [&'a [f32]; MR];

    #[inline(always)]
    fn rows<const MR: usize>(self, row: usize, depth: usize) -> [&'a [f32]; MR] {
        let mut rows: [&[f32]; MR] = [&[]; MR];
        for (i, line) in rows.iter_mut().enumerate() {
            *line = &self.words[(row + i) * self.stride..][..depth];
        }
        rows
    }
}

impl<const MR: usize> Columns<MR> for [&[f32]; MR] {
    #[inline(always)]
    fn column(&self, k: usize) -> [f32; MR] {
        let mut column = [0.0; MR];
        for (word, row) in column.iter_mut().zip(self) {
            *word = row[k];
        }
        column
    }
}

/// Column `k` starts at `k * stride`.
#[derive(Clone, Copy)]
pub(super) struct DepthMajor<'a> {
    pub(super) words: &'a [f32],
    pub(super) stride: usize,
}

impl<'a> Left for DepthMajor<'a> {
    type Rows<const MR: usize> = Self;

    #[inline(always)]
    fn rows<const MR: usize>(self, row: usize, _: usize) -> Self {
        Self {
            words: &self.words[row..],
            stride: self.stride,
        }
    }
}

impl<const MR: usize> Columns<MR> for DepthMajor<'_> {
    #[inline(always)]
    fn column(&self, k: usize) -> [f32; MR] {
        let start = k * self.stride;
        let mut column = [0.0; MR];
        let words = &self.words[start..start + MR];
        for (word, &from) in column.iter_mut().zip(words) {
            *word = from;
        }
        column
    }
}

/// Multiplies.
#[inline(always)]
pub(super) fn multiply<S: Vectors, F: Format<S>>(
    simd: S,
    format: F,
    size: Size,
    left: impl Left,
    right: Panels<'_>,
    out: Out<'_>,
    old: Old<'_>,
) {
    let width = panel_width::<S>();
    let columns = size.columns.next_multiple_of(S::F32_LANES);
    let mut block = Block {
        simd,
        format,
        size,
        left,
        panel: &[],
        out,
        old,
    };
    for (p, column) in (0..columns).step_by(width).enumerate() {
        block.panel = &right.words[p * right.room * width..][..size.depth * width];
        if column + width <= columns {
            block.all_rows::<PANEL_VECTORS>(column);
        } else {
            block.all_rows::<1>(column);
        }
    }
}

/// A panel's product.
struct Block<'a, S, F, L> {
    simd: S,
    format: F,
    size: Size,
    left: L,
    panel: &'a [f32],
    out: Out<'a>,
    old: Old<'a>,
}

impl<S: Vectors, F: Format<S>, L: Left> Block<'_, S, F, L> {
    /// All rows of `NV` vectors, in the tallest blocks whose sums stay in registers.
    #[inline(always)]
    fn all_rows<const NV: usize>(&mut self, column: usize) {
        let mut row = 0;
        if S::REGISTER_COUNT >= 32 {
            row = self.rows::<8, NV>(row, column);
        }
        row = self.rows::<4, NV>(row, column);
        row = self.rows::<2, NV>(row, column);
        self.rows::<1, NV>(row, column);
    }

    /// As many blocks of `MR` rows as fit below `row`; returns the first row that is left over.
    #[inline(always)]
    fn rows<const MR: usize, const NV: usize>(&mut self, mut row: usize, column: usize) -> usize {
        while row + MR <= self.size.rows {
            self.block::<MR, NV>(row, column);
            row += MR;
        }
        row
    }

    #[inline(always)]
    fn block<const MR: usize, const NV: usize>(&mut self, row: usize, column: usize) {
        let simd = self.simd;
        let mut sums = [[simd.splat_f32s(0.0); NV]; MR];
        match self.old {
            Old::Replaced => {}
            Old::Kept => {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let old = self.out_vectors::<NV>(row + i, column);
                    for j in 0..NV {
                        sums[j] = old[j];
                    }
                }
            }
            Old::Scaled(factors) => {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let factor = simd.splat_f32s(factors[row + i]);
                    let old = self.out_vectors::<NV>(row + i, column);
                    for j in 0..NV {
                        sums[j] = simd.mul_f32s(factor, old[j]);
                    }
                }
            }
        }
        let depth = self.size.depth;
        let left = self.left.rows::<MR>(row, depth);
        let (panel, _) = S::as_simd_f32s(self.panel).0.as_chunks::<PANEL_VECTORS>();
        let panel = &panel[..depth];
        // No iterator, as above.
        #[allow(clippy::needless_range_loop)]
        for k in 0..depth {
            let a = left.column(k);
            let b = panel[k];
            for i in 0..MR {
                let a = simd.splat_f32s(a[i]);
                for j in 0..NV {
                    sums[i][j] = self.format.dot(simd, a, b[j], sums[i][j]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let out = self.out_vectors::<NV>(row + i, column);
            for j in 0..NV {
                out[j] = sums[j];
            }
        }
    }

    #[inline(always)]
    fn out_vectors<const NV: usize>(&mut self, row: usize, column: usize) -> &mut [S::f32s] {
        let start = row * self.out.stride + column;
        S::as_mut_simd_f32s(&mut self.out.numbers[start..start + NV * S::F32_LANES]).0
    }
}

#[cfg(test)]
mod tests {
    use super::super::instruction_set::{InstructionSet, Work};
    use super::super::panels::row_panels;
    use super::*;

    /// Small integers, whose products and sums are exact whatever their order, and in bf16 too.
    fn integers(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0)
            .collect()
    }

    /// One product of numbers, in all orders of the left factor.
    struct Check {
        rows: usize,
        depth: usize,
        columns: usize,
        old: u8,
        set: InstructionSet,
    }

    impl Work for Check {
        #[inline(always)]
        fn run<S: Vectors, F: Format<S>>(self, simd: S, format: F) {
            let Self {
                rows,
                depth,
                columns,
                ..
            } = self;
            let stride = columns.next_multiple_of(32);
            let (a, b) = (integers(rows * depth, 1), integers(depth * stride, 2));
            let before = integers(rows * stride, 3);
            let factors = integers(rows, 4);
            let old = [Old::Replaced, Old::Kept, Old::Scaled(&factors)][usize::from(self.old)];
            let expected = |i: usize, j: usize| -> f32 {
                let sum: f32 = (0..depth)
                    .map(|k| a[i * depth + k] * b[k * stride + j])
                    .sum();
                let kept = match old {
                    Old::Replaced => 0.0,
                    Old::Kept => before[i * stride + j],
                    Old::Scaled(factors) => factors[i] * before[i * stride + j],
                };
                kept + sum
            };

            // Words: neighbours along the depth share one, an odd one has 0 beside it.
            let words = depth.div_ceil(F::DEPTH);
            let number = |row: usize, k: usize| if k < depth { a[row * depth + k] } else { 0.0 };
            let word = |row: usize, k: usize| match F::DEPTH {
                1 => number(row, k),
                _ => {
                    let half = |k| number(row, k).to_bits() >> 16;
                    f32::from_bits(half(2 * k) | half(2 * k + 1) << 16)
                }
            };
            let (row_stride, depth_stride) = (words + 3, rows + 2);
            let mut row_major = vec![f32::NAN; rows * row_stride];
            let mut depth_major = vec![f32::NAN; words * depth_stride];
            for i in 0..rows {
                for k in 0..words {
                    row_major[i * row_stride + k] = word(i, k);
                    depth_major[k * depth_stride + i] = word(i, k);
                }
            }
            let mut staged = vec![0.0; words * F::DEPTH * stride / F::DEPTH];
            for (row, words) in b
                .chunks_exact(stride)
                .zip(staged.chunks_exact_mut(stride / F::DEPTH))
            {
                match F::DEPTH {
                    1 => words.copy_from_slice(row),
                    _ => {
                        for (word, pair) in words.iter_mut().zip(row.chunks_exact(2)) {
                            let half = |x: f32| x.to_bits() >> 16;
                            *word = f32::from_bits(half(pair[0]) | half(pair[1]) << 16);
                        }
                    }
                }
            }
            let room = words + 1;
            let mut panels = vec![f32::NAN; room * stride];
            row_panels(
                simd,
                format,
                &staged,
                stride / F::DEPTH,
                depth,
                &mut panels,
                room,
            );
            let right = Panels {
                words: &panels,
                room,
            };
            let size = Size {
                rows,
                depth: words,
                columns,
            };
            let mut one = before.clone();
            let left = RowMajor {
                words: &row_major,
                stride: row_stride,
            };
            let out = Out {
                numbers: &mut one,
                stride,
            };
            multiply(simd, format, size, left, right, out, old);
            let mut other = before.clone();
            let left = DepthMajor {
                words: &depth_major,
                stride: depth_stride,
            };
            let out = Out {
                numbers: &mut other,
                stride,
            };
            multiply(simd, format, size, left, right, out, old);
            for got in [one, other] {
                for i in 0..rows {
                    for j in 0..columns {
                        let case = (self.set, rows, depth, columns, i, j);
                        assert_eq!(got[i * stride + j], expected(i, j), "{case:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn is_exact_on_integers_for_every_remainder_of_rows() {
        for set in InstructionSet::available() {
            for rows in 0..=21 {
                for (depth, columns) in [(1, 16), (5, 32), (20, 48), (63, 80), (7, 3)] {
                    for old in 0..3 {
                        for bf16 in [false, true] {
                            let check = Check {
                                rows,
                                depth,
                                columns,
                                old,
                                set,
                            };
                            set.run(bf16, check);
                        }
                    }
                }
            }
        }
    }
}
