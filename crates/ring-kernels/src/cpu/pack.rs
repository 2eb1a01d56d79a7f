//! Rows that travel: copied into a message by their owner, and gradients added when they come home.

use half::{bf16, f16};
use ring_comm::buffer::{Buffer, HostBuffer, HostView};

use super::check;
use super::memory::{Element, room};
use super::scratch::HostTensor;
use super::threads::Threads;
use crate::{KernelError, PackedRows, Problem, RowLayout};

/// Copies the rows that travel into a message; see [`Kernels::pack`](crate::Kernels::pack).
pub(super) fn pack(
    threads: &Threads,
    problem: &Problem,
    key: HostTensor<'_>,
    value: HostTensor<'_>,
    rows: &PackedRows,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    check::problem(problem)?;
    check::key_tensor("key", key, problem)?;
    check::key_tensor("value", value, problem)?;
    check::dtype("value", value.data.dtype(), key.data.dtype())?;
    check::packed_rows(problem, rows)?;
    match (key.data, value.data) {
        (HostView::F32(keys), HostView::F32(values)) => copy::<f32>(
            threads,
            problem,
            [(keys, key.layout), (values, value.layout)],
            rows,
            reuse,
        ),
        (HostView::F16(keys), HostView::F16(values)) => copy::<f16>(
            threads,
            problem,
            [(keys, key.layout), (values, value.layout)],
            rows,
            reuse,
        ),
        (HostView::BF16(keys), HostView::BF16(values)) => copy::<bf16>(
            threads,
            problem,
            [(keys, key.layout), (values, value.layout)],
            rows,
            reuse,
        ),
        _ => unreachable!("the element types were found to be equal"),
    }
}

fn copy<T: Element>(
    threads: &Threads,
    problem: &Problem,
    sources: [(&[T], &RowLayout); 2],
    rows: &PackedRows,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    let mut message = room::<T>(threads, rows.len, reuse)?;
    let (keys, values) = message.split_at_mut(rows.len / 2);
    for (half, (source, layout)) in [keys, values].into_iter().zip(sources) {
        for_each_row(problem, rows, |batch, head, row, packed| {
            let from = layout.offset(batch, head, row);
            half[packed..packed + problem.head_dim]
                .copy_from_slice(&source[from..from + problem.head_dim]);
        });
    }
    Ok(T::wrap(message))
}

/// Adds gradients that came home; see [`Kernels::add_rows`](crate::Kernels::add_rows).
pub(super) fn add_rows(
    problem: &Problem,
    slot: &HostBuffer,
    rows: &PackedRows,
    grad_key: &mut HostBuffer,
    grad_value: &mut HostBuffer,
) -> Result<(), KernelError> {
    let sizes = check::problem(problem)?;
    check::packed_rows(problem, rows)?;
    let message = check::f32s("gradient slot", slot.view(), rows.len)?;
    let (keys, values) = message.split_at(rows.len / 2);
    let own = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
    for (what, half, gradient) in [
        ("grad_key", keys, grad_key),
        ("grad_value", values, grad_value),
    ] {
        let gradient = check::f32s_mut(what, gradient, sizes.key_elements)?;
        for_each_row(problem, rows, |batch, head, row, packed| {
            let to = own.offset(batch, head, row);
            let target = &mut gradient[to..to + problem.head_dim];
            let terms = &half[packed..packed + problem.head_dim];
            target
                .iter_mut()
                .zip(terms)
                .for_each(|(x, term)| *x += term);
        });
    }
    Ok(())
}

/// Calls `visit(batch, kv_head, local row, start in its half of the message)` for every row of a message.
fn for_each_row(
    problem: &Problem,
    packed: &PackedRows,
    mut visit: impl FnMut(usize, usize, usize, usize),
) {
    for batch in 0..problem.batch {
        for entry in &packed.rows {
            for &head in &entry.kv_heads {
                let local = entry
                    .runs
                    .iter()
                    .flat_map(|run| (0..run.count).map(|i| run.row(i)));
                for (index, row) in local.enumerate() {
                    visit(batch, head, row, packed.layout.offset(batch, head, index));
                }
            }
        }
    }
}
