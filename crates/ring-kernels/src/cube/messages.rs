//! Rows that travel: copied into a message by their owner, copied or added to where they belong when they arrive.

use ring_comm::buffer::{Buffer, DType};

use super::buffer::CubeBuffer;
use super::device::messages::{self, Arrival};
use super::launch::Launcher;
use super::source::Placed;
use super::table::{KEY, KEY_COUNT, MESSAGE, Record, Table, run_record};
use super::waves::waves;
use crate::{KernelError, PackedRows, Rows, Tensor, TensorShape, check};

/// Copies the rows that travel into a message; see [`Kernels::pack`](crate::Kernels::pack).
pub(super) fn pack(
    launcher: &Launcher,
    shape: TensorShape,
    tensors: &[Tensor<'_, CubeBuffer>],
    rows: &PackedRows,
    reuse: Option<CubeBuffer>,
) -> Result<CubeBuffer, KernelError> {
    check::packed_rows(shape, rows, tensors.len())?;
    let tensors: Vec<Placed<'_>> = tensors.iter().map(|&tensor| tensor.into()).collect();
    let dtype = tensors
        .first()
        .map_or(DType::F32, |tensor| tensor.buffer.dtype());
    for tensor in &tensors {
        check::dtype("a tensor to pack", tensor.buffer.dtype(), dtype)?;
        check::shaped_tensor(
            "a tensor to pack",
            tensor.buffer.len(),
            tensor.layout,
            shape,
        )?;
    }

    let message = launcher.room(dtype, rows.len(), reuse)?;
    let records: Vec<_> = runs(rows)?.into_iter().map(|run| run.record).collect();
    for (part, tensor) in tensors.iter().enumerate() {
        let mut table = Table::of_rows();
        table.place(KEY, tensor.layout, tensor.offset)?;
        table.place(MESSAGE, &rows.layout, part * rows.part_len)?;
        let elements = elements(shape.head_dim);
        for launch in launcher.elements_of_records(&table, &records, shape.batch, elements)? {
            messages::pack::launch(
                launcher.device.client(),
                launch.cubes,
                launcher.cube(),
                launcher.argument("a tensor to pack", tensor.buffer)?,
                launch.table.argument(),
                launcher.argument("the message", &message)?,
                shape.head_dim,
                launcher.device.element(dtype)?,
            );
        }
    }
    launcher.launched([&message])?;
    Ok(message)
}

/// Copies rows to where they belong; see [`Kernels::place_rows`](crate::Kernels::place_rows).
pub(super) fn place_rows(
    launcher: &Launcher,
    shape: TensorShape,
    message: &CubeBuffer,
    rows: &PackedRows,
    targets: &mut [&mut CubeBuffer],
) -> Result<(), KernelError> {
    let dtype = message.dtype();
    arrive(
        launcher,
        shape,
        (message, rows),
        targets,
        dtype,
        Arrival::Copy,
    )
}

/// Adds gradients that came home; see [`Kernels::add_rows`](crate::Kernels::add_rows).
pub(super) fn add_rows(
    launcher: &Launcher,
    shape: TensorShape,
    message: &CubeBuffer,
    rows: &PackedRows,
    targets: &mut [&mut CubeBuffer],
) -> Result<(), KernelError> {
    let message = (message, rows);
    arrive(launcher, shape, message, targets, DType::F32, Arrival::Add)
}

fn arrive(
    launcher: &Launcher,
    shape: TensorShape,
    (message, rows): (&CubeBuffer, &PackedRows),
    targets: &mut [&mut CubeBuffer],
    dtype: DType,
    arrival: Arrival,
) -> Result<(), KernelError> {
    check::packed_rows(shape, rows, targets.len())?;
    check::dtype("a message", message.dtype(), dtype)?;
    check::size("a message", message.len(), rows.len())?;
    let all_elements = check::elements(shape)?;
    for target in targets.iter() {
        check::dtype("a target of rows", target.dtype(), dtype)?;
        check::size("a target of rows", target.len(), all_elements)?;
    }

    let runs = runs(rows)?;
    let sets = runs.iter().map(|run| (run.head, run.rows));
    for wave in waves(shape.heads, sets) {
        let records: Vec<_> = wave.into_iter().map(|index| runs[index].record).collect();
        for (part, target) in targets.iter().enumerate() {
            let mut table = Table::of_rows();
            table.place(KEY, &shape.contiguous(), 0)?;
            table.place(MESSAGE, &rows.layout, part * rows.part_len)?;
            let elements = elements(shape.head_dim);
            for launch in launcher.elements_of_records(&table, &records, shape.batch, elements)? {
                messages::arrive::launch(
                    launcher.device.client(),
                    launch.cubes,
                    launcher.cube(),
                    launcher.argument("a message", message)?,
                    launch.table.argument(),
                    launcher.argument("a target of rows", target)?,
                    arrival,
                    shape.head_dim,
                    launcher.device.element(dtype)?,
                );
            }
        }
    }
    launcher.launched(targets.iter().map(|target| &**target))
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
        for &head in &entry.heads {
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
