//! Tiles: the small f32 matrices, aligned and padded, that the micro-kernel works on.

use std::array;

use half::slice::HalfFloatSliceExt;
use ring_comm::buffer::{HostBuffer, HostView};

use super::memory::zeroed;
use super::microkernel::{Matrix, MatrixMut, Transposed};
use crate::{KernelError, RowLayout, Rows, Tensor};

/// Query rows of a tile.
pub(super) const QUERY_TILE: usize = 64;
/// Key rows of a tile. With head size 64, scores and keys of a tile take 32 KiB each: they stay in the second-level cache.
pub(super) const KEY_TILE: usize = 128;
/// Tile rows are padded to a multiple of this: the longest vector (512 bits) and the length of a cache line.
const LINE: usize = 16;

/// A [`Tensor`] of host memory; unlike that one it may stand in for a tensor of a shorter lifetime.
#[derive(Clone, Copy)]
pub(super) struct HostTensor<'a> {
    pub(super) data: HostView<'a>,
    pub(super) layout: &'a RowLayout,
}

impl<'a> From<Tensor<'a, HostBuffer>> for HostTensor<'a> {
    fn from(Tensor { data, layout }: Tensor<'a, HostBuffer>) -> Self {
        Self { data, layout }
    }
}

/// `columns`, rounded up to whole vectors.
pub(super) const fn padded(columns: usize) -> usize {
    columns.next_multiple_of(LINE)
}

/// A row-major f32 matrix whose rows start on cache lines. What lies in the padding is arbitrary.
pub(super) struct Tile {
    memory: Vec<f32>,
    start: usize,
    len: usize,
    stride: usize,
}

impl Tile {
    pub(super) fn new(rows: usize, columns: usize) -> Result<Self, KernelError> {
        let stride = padded(columns);
        let len = rows * stride;
        let memory = zeroed::<f32>(len + LINE, None)?;
        // `align_offset` may give up and return `usize::MAX`; a tile that is not aligned is only slower.
        let start = memory
            .as_ptr()
            .align_offset(LINE * size_of::<f32>())
            .min(LINE);
        Ok(Self {
            memory,
            start,
            len,
            stride,
        })
    }

    /// Bytes that [`Tile::new`] allocates.
    pub(super) const fn bytes(rows: usize, columns: usize) -> usize {
        (rows * padded(columns) + LINE) * size_of::<f32>()
    }

    /// Bytes that were really allocated.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.memory.capacity() * size_of::<f32>()
    }

    pub(super) fn data(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(super) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.len]
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.data().chunks_exact(self.stride)
    }

    pub(super) fn rows_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let stride = self.stride;
        self.data_mut().chunks_exact_mut(stride)
    }

    pub(super) fn matrix(&self) -> Matrix<'_> {
        Matrix {
            data: self.data(),
            stride: self.stride,
        }
    }

    pub(super) fn transposed(&self) -> Transposed<'_> {
        Transposed(self.matrix())
    }

    pub(super) fn matrix_mut(&mut self) -> MatrixMut<'_> {
        let stride = self.stride;
        MatrixMut {
            data: self.data_mut(),
            stride,
        }
    }

    /// Reads `rows` of one head, as f32, multiplied by `factor`.
    pub(super) fn read(
        &mut self,
        tensor: HostTensor<'_>,
        (batch, head): (usize, usize),
        rows: &Rows,
        head_dim: usize,
        factor: f32,
    ) {
        for (i, target) in self.rows_mut().take(rows.count).enumerate() {
            let target = &mut target[..head_dim];
            widen(
                tensor.data,
                tensor.layout.offset(batch, head, rows.row(i)),
                target,
            );
            if factor != 1.0 {
                target.iter_mut().for_each(|x| *x *= factor);
            }
        }
    }

    /// Becomes the transpose of the first `rows` rows and `columns` columns of `source`.
    ///
    /// A cache line of every target row is filled at a time; what lies beyond `rows` in the last one is arbitrary.
    pub(super) fn transpose(&mut self, source: &Tile, rows: usize, columns: usize) {
        for first in (0..rows).step_by(LINE) {
            let lines: [&[f32]; LINE] =
                array::from_fn(|i| &source.data()[(first + i) * source.stride..][..columns]);
            for (column, target) in self.rows_mut().take(columns).enumerate() {
                let target = &mut target[first..first + LINE];
                for i in 0..LINE {
                    target[i] = lines[i][column];
                }
            }
        }
    }
}

/// Copies elements from `offset` on into `target`, as f32 (exact for every element type).
pub(super) fn widen(source: HostView<'_>, offset: usize, target: &mut [f32]) {
    let range = offset..offset + target.len();
    match source {
        HostView::F32(values) => target.copy_from_slice(&values[range]),
        HostView::F16(values) => values[range].convert_to_f32_slice(target),
        HostView::BF16(values) => values[range].convert_to_f32_slice(target),
    }
}
