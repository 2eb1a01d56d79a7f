//! The one matrix product all five products of attention go through.
//!
//! `C = A B` or `C += A B` for small matrices that lie in cache. `C` is computed in register blocks of `MR` rows by `NV`
//! vectors: each step along the depth loads `NV` vectors of `B`, broadcasts `MR` elements of `A`, and does `MR * NV` fused
//! multiply-adds. With 8 x 2 vectors that is 10 loads for 16 of them, so that the multipliers, not the loads, are the limit.
//!
//! Every element of `C` is one chain of multiply-adds along the depth, begun at 0 or at `C`. Its value therefore does not
//! depend on how rows are grouped into blocks; the independence of results from the number of threads rests on this.

use std::array;

use pulp::{Arch, Simd, WithSimd};

/// A row-major matrix: row `i` starts at `i * stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
}

/// A row-major matrix to write to.
pub(super) struct MatrixMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) stride: usize,
}

/// The transpose of a row-major matrix.
#[derive(Clone, Copy)]
pub(super) struct Transposed<'a>(pub(super) Matrix<'a>);

/// Sizes of a product: `C` is `rows x width`, `A` is `rows x depth`, `B` is `depth x width`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) depth: usize,
    /// A multiple of the vector length.
    pub(super) width: usize,
}

/// What happens to the old contents of `C`.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Old {
    /// `C = A B`
    Replaced,
    /// `C += A B`
    Kept,
}

/// Multiplies on the widest vectors of this machine.
pub(super) fn multiply<L: Left>(
    arch: Arch,
    shape: Shape,
    left: L,
    right: Matrix<'_>,
    out: MatrixMut<'_>,
    old: Old,
) {
    arch.dispatch(Product {
        shape,
        left,
        right,
        out,
        old,
    });
}

/// The factor `A`, read column by column.
pub(super) trait Left: Copy {
    /// Elements `row..row + MR` of columns `0..depth`.
    fn columns<const MR: usize>(self, row: usize, depth: usize) -> impl Iterator<Item = [f32; MR]>;
}

impl Left for Matrix<'_> {
    #[inline(always)]
    fn columns<const MR: usize>(self, row: usize, depth: usize) -> impl Iterator<Item = [f32; MR]> {
        let rows: [&[f32]; MR] = array::from_fn(|i| &self.data[(row + i) * self.stride..][..depth]);
        (0..depth).map(move |k| array::from_fn(|i| rows[i][k]))
    }
}

impl Left for Transposed<'_> {
    #[inline(always)]
    fn columns<const MR: usize>(self, row: usize, depth: usize) -> impl Iterator<Item = [f32; MR]> {
        let columns = self.0.data.chunks_exact(self.0.stride).take(depth);
        columns.map(move |column| array::from_fn(|i| column[row..row + MR][i]))
    }
}

struct Product<'a, L> {
    shape: Shape,
    left: L,
    right: Matrix<'a>,
    out: MatrixMut<'a>,
    old: Old,
}

impl<L: Left> WithSimd for Product<'_, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        debug_assert_eq!(self.shape.width % S::F32_LANES, 0);
        let mut column = 0;
        while column + 2 * S::F32_LANES <= self.shape.width {
            self.column_strip::<S, 2>(simd, column);
            column += 2 * S::F32_LANES;
        }
        if column < self.shape.width {
            self.column_strip::<S, 1>(simd, column);
        }
    }
}

impl<L: Left> Product<'_, L> {
    /// All rows of `NV` vectors, from `column` on, in the tallest blocks whose sums stay in registers.
    #[inline(always)]
    fn column_strip<S: Simd, const NV: usize>(&mut self, simd: S, column: usize) {
        let mut row = 0;
        if S::REGISTER_COUNT >= 32 {
            row = self.blocks::<S, 8, NV>(simd, row, column);
        }
        row = self.blocks::<S, 4, NV>(simd, row, column);
        self.blocks::<S, 1, NV>(simd, row, column);
    }

    /// As many blocks of `MR` rows as fit below `row`; returns the first row that is left over.
    #[inline(always)]
    fn blocks<S: Simd, const MR: usize, const NV: usize>(
        &mut self,
        simd: S,
        mut row: usize,
        column: usize,
    ) -> usize {
        while row + MR <= self.shape.rows {
            self.block::<S, MR, NV>(simd, row, column);
            row += MR;
        }
        row
    }

    #[inline(always)]
    fn block<S: Simd, const MR: usize, const NV: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let mut sums = [[simd.splat_f32s(0.0); NV]; MR];
        if self.old == Old::Kept {
            for (i, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(self.out_vectors::<S, NV>(row + i, column));
            }
        }
        let right = self.right.data.chunks_exact(self.right.stride);
        for (a, b) in self.left.columns::<MR>(row, self.shape.depth).zip(right) {
            let (b, _) = S::as_simd_f32s(&b[column..column + NV * S::F32_LANES]);
            for i in 0..MR {
                let a = simd.splat_f32s(a[i]);
                for j in 0..NV {
                    sums[i][j] = simd.mul_add_e_f32s(a, b[j], sums[i][j]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            self.out_vectors::<S, NV>(row + i, column)
                .copy_from_slice(sums);
        }
    }

    #[inline(always)]
    fn out_vectors<S: Simd, const NV: usize>(
        &mut self,
        row: usize,
        column: usize,
    ) -> &mut [S::f32s] {
        let start = row * self.out.stride + column;
        S::as_mut_simd_f32s(&mut self.out.data[start..start + NV * S::F32_LANES]).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, whose products and sums are exact whatever their order.
    fn integers(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0)
            .collect()
    }

    fn check(arch: Arch, shape: Shape, old: Old) {
        let Shape { rows, depth, width } = shape;
        let (a_stride, b_stride, out_stride) = (depth + 3, width + 16, width + 1);
        let a = integers(rows * a_stride, 1);
        let b = integers(depth * b_stride, 2);
        let before = integers(rows * out_stride, 3);
        let mut expected = before.clone();
        for i in 0..rows {
            for j in 0..width {
                let sum: f32 = (0..depth)
                    .map(|k| a[i * a_stride + k] * b[k * b_stride + j])
                    .sum();
                let kept = if old == Old::Kept {
                    before[i * out_stride + j]
                } else {
                    0.0
                };
                expected[i * out_stride + j] = kept + sum;
            }
        }
        let transposed_stride = rows + 2;
        let mut transposed = vec![0.0; depth * transposed_stride];
        for i in 0..rows {
            for k in 0..depth {
                transposed[k * transposed_stride + i] = a[i * a_stride + k];
            }
        }
        let right = Matrix {
            data: &b,
            stride: b_stride,
        };

        let mut out = before.clone();
        let target = MatrixMut {
            data: &mut out,
            stride: out_stride,
        };
        multiply(
            arch,
            shape,
            Matrix {
                data: &a,
                stride: a_stride,
            },
            right,
            target,
            old,
        );
        assert_eq!(out, expected);

        let mut out = before;
        let target = MatrixMut {
            data: &mut out,
            stride: out_stride,
        };
        let left = Transposed(Matrix {
            data: &transposed,
            stride: transposed_stride,
        });
        multiply(arch, shape, left, right, target, old);
        assert_eq!(out, expected);
    }

    #[test]
    fn is_exact_on_integers_for_every_remainder_of_rows() {
        for arch in [Arch::new(), Arch::Scalar] {
            for rows in 0..=21 {
                for (depth, width) in [(1, 16), (5, 32), (20, 48), (64, 80)] {
                    for old in [Old::Replaced, Old::Kept] {
                        check(arch, Shape { rows, depth, width }, old);
                    }
                }
            }
        }
    }
}
