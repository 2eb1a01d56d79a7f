//! Validation of host buffers; what does not depend on the kind of memory is in [`crate::check`].

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use super::scratch::HostTensor;
use crate::check::{self, own_keys, source_tensor};
pub(super) use crate::check::{
    blocks, dtype, elements, gradient_layout, key_rows, packed_rows, problem, shaped_tensor, size,
};
use crate::{HeadBlocks, KernelError, KeyValue, Problem};

/// The first `len` elements of an f32 view.
pub(super) fn f32s<'a>(
    what: &'static str,
    view: HostView<'a>,
    len: usize,
) -> Result<&'a [f32], KernelError> {
    size(what, view.len(), len)?;
    match view {
        HostView::F32(values) => Ok(&values[..len]),
        other => Err(KernelError::DType {
            what,
            got: other.dtype(),
            expected: "f32".into(),
        }),
    }
}

/// The first `len` elements of an f32 buffer, for writing.
pub(super) fn f32s_mut<'a>(
    what: &'static str,
    buffer: &'a mut HostBuffer,
    len: usize,
) -> Result<&'a mut [f32], KernelError> {
    dtype(what, buffer.dtype(), DType::F32)?;
    size(what, buffer.len(), len)?;
    match buffer {
        HostBuffer::F32(values) => Ok(&mut values[..len]),
        _ => unreachable!("the element type was checked"),
    }
}

/// Checks a tensor of the problem's queries.
pub(super) fn query_tensor(
    what: &'static str,
    of: HostTensor<'_>,
    problem: &Problem,
) -> Result<(), KernelError> {
    check::query_tensor(what, of.data.len(), of.layout, problem)
}

/// Checks the key/value source of checked blocks; returns its keys and its values.
pub(super) fn key_value<'a>(
    problem: &Problem,
    key_value: &KeyValue<'a, HostBuffer>,
    expected: DType,
    blocks: &[HeadBlocks],
) -> Result<(HostTensor<'a>, HostTensor<'a>), KernelError> {
    let (key, value) = match *key_value {
        KeyValue::Own { key, value } => {
            own_keys(problem, blocks)?;
            (key.into(), value.into())
        }
        KeyValue::Slot { slot, layout } => {
            let (key, value) = halves(slot.view());
            (
                HostTensor { data: key, layout },
                HostTensor {
                    data: value,
                    layout,
                },
            )
        }
    };
    for (what, part) in [("key", key), ("value", value)] {
        dtype(what, part.data.dtype(), expected)?;
        source_tensor(what, part.data.len(), part.layout, problem, blocks)?;
    }
    Ok((key, value))
}

fn halves(view: HostView<'_>) -> (HostView<'_>, HostView<'_>) {
    fn split<T>(values: &[T]) -> (&[T], &[T]) {
        values.split_at(values.len() / 2)
    }
    match view {
        HostView::F32(values) => {
            let (key, value) = split(values);
            (HostView::F32(key), HostView::F32(value))
        }
        HostView::F16(values) => {
            let (key, value) = split(values);
            (HostView::F16(key), HostView::F16(value))
        }
        HostView::BF16(values) => {
            let (key, value) = split(values);
            (HostView::BF16(key), HostView::BF16(value))
        }
    }
}
