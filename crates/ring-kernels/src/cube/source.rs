//! Arguments that were checked: every index a kernel forms of them lies inside its buffer.

use ring_comm::buffer::{Buffer, DType};

use super::buffer::{CubeBuffer, CubeView};
use crate::check;
use crate::{HeadBlocks, KernelError, KeyValue, KeyValueGradient, Problem, RowLayout, Tensor};

/// Rows in a buffer, `offset` elements beyond where their layout says.
#[derive(Clone, Copy)]
pub(super) struct Placed<'a> {
    pub(super) buffer: &'a CubeBuffer,
    pub(super) layout: &'a RowLayout,
    pub(super) offset: usize,
}

impl<'a> From<Tensor<'a, CubeBuffer>> for Placed<'a> {
    fn from(tensor: Tensor<'a, CubeBuffer>) -> Self {
        Self {
            buffer: tensor.data.buffer,
            layout: tensor.layout,
            offset: 0,
        }
    }
}

/// Elements that are read and written at once.
const VECTOR: usize = 4;

/// How many elements of rows kernels read at once: 4 if every row of `placed` begins at a multiple of 4 elements, as all rows of
/// `contiguous` then do; else 1.
pub(super) fn width(head_dim: usize, placed: &[Placed], contiguous: &[&CubeBuffer]) -> usize {
    let aligned = head_dim.is_multiple_of(VECTOR)
        && placed.iter().all(Placed::is_aligned)
        && contiguous.iter().all(|buffer| is_aligned(buffer));
    if aligned { VECTOR } else { 1 }
}

/// Whether memory begins at a multiple of 4 elements.
fn is_aligned(buffer: &CubeBuffer) -> bool {
    let start = buffer.handle().offset_start.unwrap_or(0);
    start.is_multiple_of((VECTOR * buffer.dtype().size()) as u64)
}

impl Placed<'_> {
    fn is_aligned(&self) -> bool {
        let layout = self.layout;
        let starts = layout.head_base.iter().map(|base| base + self.offset);
        let strides = [layout.batch_stride, layout.row_stride];
        let mut all = starts.chain(strides);
        is_aligned(self.buffer) && all.all(|distance| distance.is_multiple_of(VECTOR))
    }
}

/// Checks a tensor of the problem's queries.
pub(super) fn query_tensor<'a>(
    what: &'static str,
    tensor: Tensor<'a, CubeBuffer>,
    dtype: DType,
    problem: &Problem,
) -> Result<Placed<'a>, KernelError> {
    let placed = Placed::from(tensor);
    check::dtype(what, placed.buffer.dtype(), dtype)?;
    check::query_tensor(what, placed.buffer.len(), placed.layout, problem)?;
    Ok(placed)
}

/// Checks the key/value source of checked blocks; returns its keys and its values.
pub(super) fn key_value<'a>(
    problem: &Problem,
    key_value: &KeyValue<'a, CubeBuffer>,
    dtype: DType,
    blocks: &[HeadBlocks],
) -> Result<(Placed<'a>, Placed<'a>), KernelError> {
    let (key, value, room) = match *key_value {
        KeyValue::Own { key, value } => {
            check::own_keys(problem, blocks)?;
            let (key, value) = (Placed::from(key), Placed::from(value));
            (key, value, [key.buffer.len(), value.buffer.len()])
        }
        KeyValue::Slot { slot, layout } => {
            let half = slot.len() / 2;
            let at = |offset| Placed {
                buffer: slot,
                layout,
                offset,
            };
            (at(0), at(half), [half; 2])
        }
    };
    for (what, part, room) in [("key", key, room[0]), ("value", value, room[1])] {
        check::dtype(what, part.buffer.dtype(), dtype)?;
        check::source_tensor(what, room, part.layout, problem, blocks)?;
    }
    Ok((key, value))
}

/// Checks where the key and value gradients of checked blocks go to. `own` is the layout of own ones.
pub(super) fn key_value_gradient<'a>(
    problem: &Problem,
    gradient: KeyValueGradient<'a, CubeBuffer>,
    own: &'a RowLayout,
    blocks: &[HeadBlocks],
) -> Result<(Placed<'a>, Placed<'a>), KernelError> {
    let (key, value, room) = match gradient {
        KeyValueGradient::Own { key, value } => {
            check::own_keys(problem, blocks)?;
            let at = |buffer: &'a CubeBuffer| Placed {
                buffer,
                layout: own,
                offset: 0,
            };
            let room = [key.len(), value.len()];
            (at(key), at(value), room)
        }
        KeyValueGradient::Slot { slot, layout } => {
            let half = slot.len() / 2;
            let slot: &'a CubeBuffer = slot;
            let at = |offset| Placed {
                buffer: slot,
                layout,
                offset,
            };
            (at(0), at(half), [half; 2])
        }
    };
    for (what, part, room) in [("grad_key", key, room[0]), ("grad_value", value, room[1])] {
        check::dtype(what, part.buffer.dtype(), DType::F32)?;
        check::gradient_layout(problem, part.layout, blocks, room)?;
    }
    Ok((key, value))
}

/// Checks an f32 buffer of at least `len` elements.
pub(super) fn f32s<'a>(
    what: &'static str,
    buffer: &'a CubeBuffer,
    len: usize,
) -> Result<&'a CubeBuffer, KernelError> {
    check::dtype(what, buffer.dtype(), DType::F32)?;
    check::size(what, buffer.len(), len)?;
    Ok(buffer)
}

/// Checks an f32 view of at least `len` elements.
pub(super) fn f32_view<'a>(
    what: &'static str,
    view: CubeView<'a>,
    len: usize,
) -> Result<&'a CubeBuffer, KernelError> {
    f32s(what, view.buffer, len)
}
