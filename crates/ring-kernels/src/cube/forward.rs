//! The forward pass.

use ring_comm::buffer::{Buffer, DType};

use super::buffer::CubeBuffer;
use super::device::{attention, elements, matrix};
use super::elements::{filled, round};
use super::launch::Launcher;
use super::path::Kernel;
use super::source::{f32s, key_value, query_tensor};
use super::table::{KEY, QUERY, QUERY_COUNT, Record, STATE, Table, VALUE, block_record};
use super::waves::waves;
use crate::block::blocks_of;
use crate::{
    Block, ForwardState, HeadBlocks, KernelError, KeyValue, Problem, RowLayout, Rows, Tensor, check,
};

/// State of rows that have seen nothing; see [`Kernels::start`](crate::Kernels::start).
pub(super) fn start(
    launcher: &Launcher,
    problem: &Problem,
) -> Result<ForwardState<CubeBuffer>, KernelError> {
    let sizes = check::problem(problem)?;
    let rows = |value| filled(launcher, DType::F32, sizes.query_rows, value, None);
    Ok(ForwardState {
        output: filled(launcher, DType::F32, sizes.query_elements, 0.0, None)?,
        max: rows(f32::MIN)?,
        denominator: rows(0.0)?,
    })
}

/// Adds `blocks` to `state`; see [`Kernels::forward`](crate::Kernels::forward).
pub(super) fn forward(
    launcher: &Launcher,
    problem: &Problem,
    query: Tensor<'_, CubeBuffer>,
    source: &KeyValue<'_, CubeBuffer>,
    blocks: &[HeadBlocks],
    state: &mut ForwardState<CubeBuffer>,
) -> Result<(), KernelError> {
    let sizes = check::problem(problem)?;
    let dtype = query.data.buffer.dtype();
    let query = query_tensor("query", query, dtype, problem)?;
    check::blocks(problem, blocks)?;
    let (key, value) = key_value(problem, source, dtype, blocks)?;
    let output = f32s("state.output", &state.output, sizes.query_elements)?;
    let max = f32s("state.max", &state.max, sizes.query_rows)?;
    let denominator = f32s("state.denominator", &state.denominator, sizes.query_rows)?;

    let mut table = Table::new(problem)?;
    for (tensor, placed) in [(QUERY, query), (KEY, key), (VALUE, value)] {
        table.place(tensor, placed.layout, placed.offset)?;
    }
    table.place(STATE, &row_numbers(problem), 0)?;
    let element = launcher.device.element(dtype)?;
    let depth = problem.batch * problem.group_size();
    let rows = |record: &Record| record[QUERY_COUNT];
    let waves = records(problem, blocks, |block| block.queries)?;
    if let Some(tiling) = launcher.tiling(problem, Kernel::Forward, &[query, key, value]) {
        let cube_rows = tiling.cube_rows() as u32;
        for records in waves {
            for launch in
                launcher.tiled_rows_of_records(&table, &records, depth, rows, cube_rows)?
            {
                matrix::attention::forward::launch(
                    launcher.device.client(),
                    launch.cubes,
                    tiling.cube_dim(),
                    tiling.vector_size(),
                    launcher.rows_argument("query", query.buffer, &tiling)?,
                    launcher.rows_argument("key", key.buffer, &tiling)?,
                    launcher.rows_argument("value", value.buffer, &tiling)?,
                    launch.table.argument(),
                    launcher.argument("state.output", output)?,
                    launcher.argument("state.max", max)?,
                    launcher.argument("state.denominator", denominator)?,
                    problem.scale,
                    f32::NEG_INFINITY,
                    tiling,
                    element,
                );
            }
        }
        return launcher.launched([output, max, denominator]);
    }
    let tile = launcher.tile(2 * problem.head_dim)?;
    for records in waves {
        for launch in launcher.rows_of_records(&table, &records, depth, rows)? {
            attention::forward::launch(
                launcher.device.client(),
                launch.cubes,
                launcher.cube(),
                launcher.argument("query", query.buffer)?,
                launcher.argument("key", key.buffer)?,
                launcher.argument("value", value.buffer)?,
                launch.table.argument(),
                launcher.argument("state.output", output)?,
                launcher.argument("state.max", max)?,
                launcher.argument("state.denominator", denominator)?,
                problem.scale,
                problem.head_dim,
                launcher.units(),
                tile,
                element,
            );
        }
    }
    launcher.launched([output, max, denominator])
}

/// Where the numbers lie that each query row has one of.
pub(super) fn row_numbers(problem: &Problem) -> RowLayout {
    RowLayout::contiguous(problem.query_heads, problem.queries, 1)
}

/// The records of all blocks of all heads, in waves that do not write the same rows.
pub(super) fn records(
    problem: &Problem,
    blocks: &[HeadBlocks],
    written: impl Fn(&Block) -> Rows,
) -> Result<Vec<Vec<Record>>, KernelError> {
    let mut records = Vec::new();
    let mut sets = Vec::new();
    for head in 0..problem.kv_heads {
        for block in blocks_of(blocks, head) {
            if let Some(record) = block_record(problem.mask, head, block)? {
                records.push(record);
                sets.push((head, written(block)));
            }
        }
    }
    let waves = waves(problem.kv_heads, sets.into_iter());
    let of_wave = |wave: Vec<usize>| wave.into_iter().map(|index| records[index]).collect();
    Ok(waves.into_iter().map(of_wave).collect())
}

/// `O = sum / denominator`, `L = max + ln denominator`; see [`Kernels::finish`](crate::Kernels::finish).
pub(super) fn finish(
    launcher: &Launcher,
    problem: &Problem,
    state: ForwardState<CubeBuffer>,
    dtype: DType,
    output_scale: f32,
) -> Result<(CubeBuffer, CubeBuffer), KernelError> {
    let sizes = check::problem(problem)?;
    f32s("state.output", &state.output, sizes.query_elements)?;
    f32s("state.max", &state.max, sizes.query_rows)?;
    f32s("state.denominator", &state.denominator, sizes.query_rows)?;
    if sizes.query_rows > 0 {
        elements::normalise::launch(
            launcher.device.client(),
            launcher.cubes_for_elements(sizes.query_rows),
            launcher.cube(),
            launcher.argument("state.output", &state.output)?,
            launcher.argument("state.max", &state.max)?,
            launcher.argument("state.denominator", &state.denominator)?,
            output_scale,
            f32::NEG_INFINITY,
            sizes.query_rows as u32,
            problem.head_dim,
        );
    }
    launcher.launched([&state.output, &state.max])?;
    let output = round(launcher, state.output, dtype)?;
    Ok((output, state.max))
}
