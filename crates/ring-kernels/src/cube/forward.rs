//! The forward pass.

use cubecl::prelude::CubeDim;
use ring_comm::buffer::{Buffer, DType};

use super::buffer::CubeBuffer;
use super::device::matrix::work::Tiling as MatrixTiling;
use super::device::scores::Options;
use super::device::{attention, elements, matrix};
use super::elements::{filled, round};
use super::launch::{Launch, Launcher};
use super::path::Kernel;
use super::source::{Placed, f32s, key_value, query_tensor, width};
use super::table::{
    KEY, QUERY, QUERY_COUNT, Record, STATE, Table, VALUE, block_record, has_left_bound, of_entry,
};
use super::tiling::{self, Tiling};
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
    let pass = Forward {
        launcher,
        problem,
        table,
        work: Work::new(problem, blocks, |block| block.queries)?,
        query,
        key,
        value,
        output,
        max,
        denominator,
    };
    match launcher.tiling(problem, Kernel::Forward, &[query, key, value]) {
        Some(tiling) => pass.by_matrix_units(tiling)?,
        None => pass.plainly()?,
    }
    launcher.launched([output, max, denominator])
}

/// Checked arguments.
struct Forward<'a> {
    launcher: &'a Launcher,
    problem: &'a Problem,
    table: Table,
    work: Work,
    query: Placed<'a>,
    key: Placed<'a>,
    value: Placed<'a>,
    output: &'a CubeBuffer,
    max: &'a CubeBuffer,
    denominator: &'a CubeBuffer,
}

impl Forward<'_> {
    /// The launches of a wave, by cubes that own so many rows.
    fn launches(
        &self,
        records: &[Record],
        rows_of_cube: usize,
    ) -> Result<Vec<Launch>, KernelError> {
        let depth = self.work.entries * self.problem.group_size();
        let rows = |record: &Record| record[QUERY_COUNT];
        let launcher = self.launcher;
        launcher.rows_of_records(&self.table, records, depth, rows_of_cube, rows)
    }

    fn by_matrix_units(&self, tiling: MatrixTiling) -> Result<(), KernelError> {
        let launcher = self.launcher;
        for records in &self.work.waves {
            for launch in self.launches(records, tiling.cube_rows())? {
                matrix::attention::forward::launch(
                    launcher.device.client(),
                    launch.cubes,
                    tiling.cube_dim(),
                    tiling.vector_size(),
                    launcher.rows_argument("query", self.query.buffer, &tiling)?,
                    launcher.rows_argument("key", self.key.buffer, &tiling)?,
                    launcher.rows_argument("value", self.value.buffer, &tiling)?,
                    launch.table.argument(),
                    launcher.argument("state.output", self.output)?,
                    launcher.argument("state.max", self.max)?,
                    launcher.argument("state.denominator", self.denominator)?,
                    self.problem.scale,
                    f32::NEG_INFINITY,
                    tiling,
                    self.work.options,
                    launcher.device.element(self.query.buffer.dtype())?,
                );
            }
        }
        Ok(())
    }

    fn plainly(&self) -> Result<(), KernelError> {
        let launcher = self.launcher;
        let head_dim = self.problem.head_dim;
        let read = [self.query, self.key, self.value];
        let width = width(head_dim, &read, &[self.output]);
        let needs = tiling::FORWARD.with_bounds(self.work.options.bounds());
        let tiling = Tiling::new(needs, head_dim, width, launcher.room_of_cube())?;
        for records in &self.work.waves {
            for launch in self.launches(records, tiling.rows)? {
                attention::forward::launch(
                    launcher.device.client(),
                    launch.cubes,
                    CubeDim::new_1d(tiling.units as u32),
                    tiling.width,
                    launcher.argument("query", self.query.buffer)?,
                    launcher.argument("key", self.key.buffer)?,
                    launcher.argument("value", self.value.buffer)?,
                    launch.table.argument(),
                    launcher.argument("state.output", self.output)?,
                    launcher.argument("state.max", self.max)?,
                    launcher.argument("state.denominator", self.denominator)?,
                    self.problem.scale,
                    tiling,
                    self.work.options,
                    launcher.device.element(self.query.buffer.dtype())?,
                );
            }
        }
        Ok(())
    }
}

/// Where the numbers lie that each query row has one of.
pub(super) fn row_numbers(problem: &Problem) -> RowLayout {
    RowLayout::contiguous(problem.query_heads, problem.queries, 1)
}

/// The blocks of a call: records in waves that do not write the same rows, and how often each is done.
pub(super) struct Work {
    pub(super) waves: Vec<Vec<Record>>,
    /// Batch entries for which a launch does each of its records: all of them, or the one that the record names.
    pub(super) entries: usize,
    /// What kernels do with them.
    pub(super) options: Options,
}

impl Work {
    /// The work on all blocks of all heads; `written` tells which rows of a block are written.
    pub(super) fn new(
        problem: &Problem,
        blocks: &[HeadBlocks],
        written: impl Fn(&Block) -> Rows,
    ) -> Result<Self, KernelError> {
        let of_all = |of: &HeadBlocks| (0..problem.batch).all(|entry| of.entries.contains(&entry));
        let (entries, of_launch) = match blocks.iter().all(of_all) {
            true => (1, problem.batch),
            false => (problem.batch, 1),
        };
        let mut records = Vec::new();
        let mut sets = Vec::new();
        for entry in 0..entries {
            for head in 0..problem.kv_heads {
                for block in blocks_of(blocks, entry, head) {
                    if let Some(record) = block_record(problem, head, block)? {
                        records.push(of_entry(record, entry)?);
                        sets.push((entry * problem.kv_heads + head, written(block)));
                    }
                }
            }
        }
        let waves = waves(entries * problem.kv_heads, sets.into_iter());
        let of_wave = |wave: Vec<usize>| wave.into_iter().map(|index| records[index]).collect();
        Ok(Self {
            waves: waves.into_iter().map(of_wave).collect(),
            entries: of_launch,
            options: options(problem, &records),
        })
    }
}

/// What kernels do beside plain attention.
fn options(problem: &Problem, records: &[Record]) -> Options {
    let scores = &problem.scores;
    Options {
        windowed: records.iter().any(has_left_bound),
        softcap: scores.softcap.is_some(),
        slopes: scores.alibi_slopes.is_some(),
        dropout: scores.dropout.is_some_and(|dropout| dropout.threshold > 0),
    }
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
