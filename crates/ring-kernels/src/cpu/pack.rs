//! Rows that travel: copied into a message by their owner, copied or added to where they belong when they arrive.

use half::{bf16, f16};
use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use super::check;
use super::memory::{Element, room};
use super::scratch::HostTensor;
use super::threads::Threads;
use crate::{KernelError, PackedRows, RowLayout, TensorShape};

/// Copies the rows that travel into a message; see [`Kernels::pack`](crate::Kernels::pack).
pub(super) fn pack(
    threads: &Threads,
    shape: TensorShape,
    tensors: &[HostTensor<'_>],
    rows: &PackedRows,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    check::packed_rows(shape, rows, tensors.len())?;
    let dtype = tensors
        .first()
        .map_or(DType::F32, |tensor| tensor.data.dtype());
    for tensor in tensors {
        check::dtype("a tensor to pack", tensor.data.dtype(), dtype)?;
        check::shaped_tensor("a tensor to pack", tensor.data.len(), tensor.layout, shape)?;
    }
    match dtype {
        DType::F32 => copy::<f32>(threads, shape, tensors, rows, reuse),
        DType::F16 => copy::<f16>(threads, shape, tensors, rows, reuse),
        DType::BF16 => copy::<bf16>(threads, shape, tensors, rows, reuse),
    }
}

/// Elements that a view may have.
trait Viewed: Element {
    /// The elements of a view of this type, none of another.
    fn of(view: HostView<'_>) -> &[Self];

    /// The elements of a buffer of this type, none of another.
    fn of_mut(buffer: &mut HostBuffer) -> &mut [Self];
}

macro_rules! viewed {
    ($type:ty, $variant:ident) => {
        impl Viewed for $type {
            fn of(view: HostView<'_>) -> &[Self] {
                match view {
                    HostView::$variant(values) => values,
                    _ => &[],
                }
            }

            fn of_mut(buffer: &mut HostBuffer) -> &mut [Self] {
                match buffer {
                    HostBuffer::$variant(values) => values,
                    _ => &mut [],
                }
            }
        }
    };
}

viewed!(f32, F32);
viewed!(f16, F16);
viewed!(bf16, BF16);

fn copy<T: Viewed>(
    threads: &Threads,
    shape: TensorShape,
    tensors: &[HostTensor<'_>],
    rows: &PackedRows,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    let mut message = room::<T>(threads, rows.len(), reuse)?;
    if !message.is_empty() {
        let parts = message.chunks_mut(rows.part_len);
        for (part, tensor) in parts.zip(tensors) {
            let source = T::of(tensor.data);
            for_each_row(shape, rows, tensor.layout, |row, packed| {
                part[packed..packed + shape.head_dim]
                    .copy_from_slice(&source[row..row + shape.head_dim]);
            });
        }
    }
    Ok(T::wrap(message))
}

/// Copies rows to where they belong; see [`Kernels::place_rows`](crate::Kernels::place_rows).
pub(super) fn place_rows(
    shape: TensorShape,
    message: &HostBuffer,
    rows: &PackedRows,
    targets: &mut [&mut HostBuffer],
) -> Result<(), KernelError> {
    let dtype = message.dtype();
    check_arrival(shape, message, rows, targets, dtype)?;
    match dtype {
        DType::F32 => arrive::<f32>(shape, message, rows, targets, |x, new| *x = new),
        DType::F16 => arrive::<f16>(shape, message, rows, targets, |x, new| *x = new),
        DType::BF16 => arrive::<bf16>(shape, message, rows, targets, |x, new| *x = new),
    }
    Ok(())
}

/// Adds gradients that came home; see [`Kernels::add_rows`](crate::Kernels::add_rows).
pub(super) fn add_rows(
    shape: TensorShape,
    message: &HostBuffer,
    rows: &PackedRows,
    targets: &mut [&mut HostBuffer],
) -> Result<(), KernelError> {
    check_arrival(shape, message, rows, targets, DType::F32)?;
    arrive::<f32>(shape, message, rows, targets, |x, term| *x += term);
    Ok(())
}

fn check_arrival(
    shape: TensorShape,
    message: &HostBuffer,
    rows: &PackedRows,
    targets: &[&mut HostBuffer],
    dtype: DType,
) -> Result<(), KernelError> {
    check::packed_rows(shape, rows, targets.len())?;
    check::dtype("a message", message.dtype(), dtype)?;
    check::size("a message", message.len(), rows.len())?;
    let elements = check::elements(shape)?;
    for target in targets {
        check::dtype("a target of rows", target.dtype(), dtype)?;
        check::size("a target of rows", target.len(), elements)?;
    }
    Ok(())
}

fn arrive<T: Viewed>(
    shape: TensorShape,
    message: &HostBuffer,
    rows: &PackedRows,
    targets: &mut [&mut HostBuffer],
    merge: impl Fn(&mut T, T),
) {
    if rows.is_empty() {
        return;
    }
    let layout = shape.contiguous();
    let parts = T::of(message.view()).chunks(rows.part_len);
    for (part, target) in parts.zip(targets) {
        let target = T::of_mut(target);
        for_each_row(shape, rows, &layout, |row, packed| {
            let targets = &mut target[row..row + shape.head_dim];
            let news = &part[packed..packed + shape.head_dim];
            targets
                .iter_mut()
                .zip(news)
                .for_each(|(x, new)| merge(x, *new));
        });
    }
}

/// Calls `visit(start in a tensor laid out by layout, start in its part of the message)` for every row of a message.
fn for_each_row(
    shape: TensorShape,
    packed: &PackedRows,
    layout: &RowLayout,
    mut visit: impl FnMut(usize, usize),
) {
    for batch in 0..shape.batch {
        for entry in &packed.rows {
            for &head in &entry.heads {
                let local = entry
                    .runs
                    .iter()
                    .flat_map(|run| (0..run.count).map(|i| run.row(i)));
                for (index, row) in local.enumerate() {
                    visit(
                        layout.offset(batch, head, row),
                        packed.layout.offset(batch, head, index),
                    );
                }
            }
        }
    }
}
