//! Rows that travel: copied into a message by their owner, and gradients added when they come home.

use ring_comm::buffer::Buffer;

use super::buffer::CubeBuffer;
use super::device::messages;
use super::launch::Launcher;
use super::source::{Placed, f32s};
use super::table::{
    GRAD_KEY, GRAD_VALUE, KEY, KEY_COUNT, MESSAGE, Record, Table, VALUE, run_record,
};
use super::waves::waves;
use crate::{KernelError, PackedRows, Problem, RowLayout, Rows, check};

/// Copies the rows that travel into a message; see [`Kernels::pack`](crate::Kernels::pack).
pub(super) fn pack(
    launcher: &Launcher,
    problem: &Problem,
    key: Placed<'_>,
    value: Placed<'_>,
    rows: &PackedRows,
    reuse: Option<CubeBuffer>,
) -> Result<CubeBuffer, KernelError> {
    check::problem(problem)?;
    check::key_tensor("key", key.buffer.len(), key.layout, problem)?;
    check::key_tensor("value", value.buffer.len(), value.layout, problem)?;
    let dtype = key.buffer.dtype();
    check::dtype("value", value.buffer.dtype(), dtype)?;
    check::packed_rows(problem, rows)?;

    let mut table = Table::new(problem)?;
    table.place(KEY, key.layout, key.offset)?;
    table.place(VALUE, value.layout, value.offset)?;
    table.place(MESSAGE, &rows.layout, 0)?;
    let message = launcher.room(dtype, rows.len, reuse)?;
    let records: Vec<_> = runs(rows)?.into_iter().map(|run| run.record).collect();
    for launch in
        launcher.elements_of_records(&table, &records, problem.batch, elements(problem.head_dim))?
    {
        messages::pack::launch(
            launcher.device.client(),
            launch.cubes,
            launcher.cube(),
            launcher.argument("key", key.buffer)?,
            launcher.argument("value", value.buffer)?,
            launch.table.argument(),
            launcher.argument("the message", &message)?,
            (rows.len / 2) as u32,
            problem.head_dim,
            launcher.device.element(dtype)?,
        );
    }
    launcher.launched([&message])?;
    Ok(message)
}

/// Adds gradients that came home; see [`Kernels::add_rows`](crate::Kernels::add_rows).
pub(super) fn add_rows(
    launcher: &Launcher,
    problem: &Problem,
    slot: &CubeBuffer,
    rows: &PackedRows,
    grad_key: &mut CubeBuffer,
    grad_value: &mut CubeBuffer,
) -> Result<(), KernelError> {
    let sizes = check::problem(problem)?;
    check::packed_rows(problem, rows)?;
    f32s("gradient slot", slot, rows.len)?;
    let grad_key = f32s("grad_key", grad_key, sizes.key_elements)?;
    let grad_value = f32s("grad_value", grad_value, sizes.key_elements)?;

    let own = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
    let mut table = Table::new(problem)?;
    table.place(GRAD_KEY, &own, 0)?;
    table.place(GRAD_VALUE, &own, 0)?;
    table.place(MESSAGE, &rows.layout, 0)?;
    let runs = runs(rows)?;
    let sets = runs.iter().map(|run| (run.head, run.rows));
    for wave in waves(problem.kv_heads, sets) {
        let records: Vec<_> = wave.into_iter().map(|index| runs[index].record).collect();
        for launch in launcher.elements_of_records(
            &table,
            &records,
            problem.batch,
            elements(problem.head_dim),
        )? {
            messages::add_rows::launch(
                launcher.device.client(),
                launch.cubes,
                launcher.cube(),
                launcher.argument("gradient slot", slot)?,
                launch.table.argument(),
                launcher.argument("grad_key", grad_key)?,
                launcher.argument("grad_value", grad_value)?,
                (rows.len / 2) as u32,
                problem.head_dim,
            );
        }
    }
    launcher.launched([grad_key, grad_value])
}

/// A run of rows of one head.
struct Run {
    record: Record,
    head: usize,
    rows: Rows,
}

/// The runs of all heads.
fn runs(packed: &PackedRows) -> Result<Vec<Run>, KernelError> {
    let mut runs = Vec::new();
    for entry in &packed.rows {
        for &head in &entry.kv_heads {
            let mut first = 0;
            for &rows in &entry.runs {
                runs.push(Run {
                    record: run_record(head, &rows, first)?,
                    head,
                    rows,
                });
                first += rows.count;
            }
        }
    }
    Ok(runs)
}

/// How many elements the rows of a record have.
fn elements(head_dim: usize) -> impl Fn(&Record) -> usize {
    move |record| record[KEY_COUNT] as usize * head_dim
}
