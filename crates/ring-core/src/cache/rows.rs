//! Memory for keys or values that grows: [`GrowingRows`].

use std::ops::Range;

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};
use ring_kernels::{KernelError, Kernels, RowLayout, Tensor};

/// Rows added at least when memory runs out.
const LEAST_GROWTH: usize = 64;

/// A `[batch, heads, rows, head_dim]` tensor with room for more rows. The rows of a head are neighbours, for kernels that read them
/// one after the other. When the room is used up a quarter is added, so that a row is copied about four times at most on average, and
/// at most a fifth of the memory lies idle.
#[derive(Debug)]
pub(super) struct GrowingRows {
    data: HostBuffer,
    batch: usize,
    heads: usize,
    head_dim: usize,
    capacity: usize,
    layout: RowLayout,
}

impl GrowingRows {
    /// No rows, with room for none.
    pub(super) fn new([batch, heads, head_dim]: [usize; 3], dtype: DType) -> Self {
        Self {
            data: HostBuffer::zeros(dtype, 0),
            batch,
            heads,
            head_dim,
            capacity: 0,
            layout: RowLayout::contiguous(heads, 0, head_dim),
        }
    }

    /// The rows, to be read.
    pub(super) fn tensor(&self) -> Tensor<'_, HostBuffer> {
        Tensor {
            data: self.data.view(),
            layout: &self.layout,
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.data.byte_len()
    }

    /// Makes room for `rows` rows, of which `used` are there.
    pub(super) fn reserve(
        &mut self,
        kernels: &impl Kernels<HostBuffer>,
        used: usize,
        rows: usize,
    ) -> Result<(), KernelError> {
        if rows <= self.capacity {
            return Ok(());
        }
        let grown = self.capacity + (self.capacity / 4).max(LEAST_GROWTH);
        let capacity = rows.max(if self.capacity == 0 { rows } else { grown });
        let elements = [self.batch, self.heads, capacity, self.head_dim];
        let len = elements
            .iter()
            .try_fold(1_usize, |product, &size| product.checked_mul(size))
            .ok_or_else(|| KernelError::Invalid(format!("{elements:?} is too large a cache")))?;
        let dtype = self.data.dtype();
        let data = kernels.allocate(dtype, len, None)?;
        let layout = RowLayout::contiguous(self.heads, capacity, self.head_dim);
        let old = std::mem::replace(&mut self.data, data);
        let old_layout = std::mem::replace(&mut self.layout, layout);
        self.capacity = capacity;
        let old = Tensor {
            data: old.view(),
            layout: &old_layout,
        };
        self.write(old, 0..used, 0);
        Ok(())
    }

    /// Copies `rows` of `source` to where row `at` is; there must be room for them, and `source` must have them.
    pub(super) fn write(&mut self, source: Tensor<'_, HostBuffer>, rows: Range<usize>, at: usize) {
        let head_dim = self.head_dim;
        // Rows that are neighbours at both ends are copied at once.
        let (step, len) = match source.layout.row_stride == head_dim {
            true => (rows.len().max(1), rows.len() * head_dim),
            false => (1, head_dim),
        };
        for batch in 0..self.batch {
            for head in 0..self.heads {
                for row in rows.clone().step_by(step) {
                    let from = source.layout.offset(batch, head, row);
                    let to = self.layout.offset(batch, head, at + row - rows.start);
                    copy(&mut self.data, to, source.data, from, len);
                }
            }
        }
    }
}

/// Copies `len` elements; types that differ were refused before.
fn copy(target: &mut HostBuffer, to: usize, source: HostView<'_>, from: usize, len: usize) {
    let (to, from) = (to..to + len, from..from + len);
    match (target, source) {
        (HostBuffer::F32(target), HostView::F32(source)) => {
            target[to].copy_from_slice(&source[from]);
        }
        (HostBuffer::F16(target), HostView::F16(source)) => {
            target[to].copy_from_slice(&source[from]);
        }
        (HostBuffer::BF16(target), HostView::BF16(source)) => {
            target[to].copy_from_slice(&source[from]);
        }
        _ => debug_assert!(false, "the element type was checked"),
    }
}
