//! The backward pass.

use cubecl::prelude::CubeDim;
use ring_comm::buffer::{Buffer, DType};

use super::buffer::{CubeBuffer, CubeView};
use super::device::matrix::key_gradients::Gradients;
use super::device::matrix::work::Tiling as MatrixTiling;
use super::device::{elements, gradients, matrix};
use super::forward::{Work, row_numbers};
use super::launch::Launcher;
use super::path::{Kernel, MOST_OF_BOTH_GRADIENTS};
use super::source::{Placed, f32_view, f32s, key_value, key_value_gradient, query_tensor, width};
use super::table::{
    GRAD_KEY, GRAD_OUTPUT, GRAD_VALUE, KEY, KEY_COUNT, QUERY, QUERY_COUNT, Record, STATE, Table,
    VALUE,
};
use super::tiling::{self, Tiling};
use crate::{
    BackwardInputs, HeadBlocks, KernelError, KeyValue, KeyValueGradient, Problem, RowLayout,
    Tensor, check,
};

/// `Delta = dO . O - dL`; see [`Kernels::delta`](crate::Kernels::delta).
pub(super) fn delta(
    launcher: &Launcher,
    problem: &Problem,
    output: CubeView<'_>,
    grad_output: Tensor<'_, CubeBuffer>,
    log_sum_exp: CubeView<'_>,
    grad_log_sum_exp: Option<CubeView<'_>>,
) -> Result<CubeBuffer, KernelError> {
    let sizes = check::problem(problem)?;
    let dtype = output.buffer.dtype();
    check::size("output", output.buffer.len(), sizes.query_elements)?;
    let grad_output = query_tensor("grad_output", grad_output, dtype, problem)?;
    let log_sum_exp = f32_view("log_sum_exp", log_sum_exp, sizes.query_rows)?;
    let gradient = grad_log_sum_exp
        .map(|view| f32_view("grad_log_sum_exp", view, sizes.query_rows))
        .transpose()?;
    let mut table = Table::new(problem)?;
    table.place(GRAD_OUTPUT, grad_output.layout, grad_output.offset)?;

    let delta = launcher.room(DType::F32, sizes.query_rows, None)?;
    let cubes = launcher.cubes_for_elements(sizes.query_rows);
    if sizes.query_rows > 0 {
        elements::delta::launch(
            launcher.device.client(),
            cubes,
            launcher.cube(),
            launcher.argument("output", output.buffer)?,
            launcher.argument("grad_output", grad_output.buffer)?,
            launcher.argument("log_sum_exp", log_sum_exp)?,
            launcher.argument("grad_log_sum_exp", gradient.unwrap_or(log_sum_exp))?,
            launcher.table(&table)?.argument(),
            launcher.argument("delta", &delta)?,
            f32::NEG_INFINITY,
            sizes.query_rows as u32,
            problem.head_dim,
            gradient.is_some(),
            launcher.device.element(dtype)?,
        );
    }
    launcher.launched([&delta])?;
    Ok(delta)
}

/// Adds the gradients of `blocks`; see [`Kernels::backward`](crate::Kernels::backward).
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    launcher: &Launcher,
    problem: &Problem,
    inputs: &BackwardInputs<'_, CubeBuffer>,
    source: &KeyValue<'_, CubeBuffer>,
    blocks: &[HeadBlocks],
    output_scale: f32,
    grad_query: &mut CubeBuffer,
    grad_key_value: KeyValueGradient<'_, CubeBuffer>,
) -> Result<(), KernelError> {
    let sizes = check::problem(problem)?;
    let dtype = inputs.query.data.buffer.dtype();
    let query = query_tensor("query", inputs.query.shorten(), dtype, problem)?;
    let grad_output = query_tensor("grad_output", inputs.grad_output.shorten(), dtype, problem)?;
    check::blocks(problem, blocks)?;
    let (key, value) = key_value(problem, source, dtype, blocks)?;
    let own = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
    let (grad_key, grad_value) = key_value_gradient(problem, grad_key_value, &own, blocks)?;
    let pass = Backward {
        launcher,
        problem,
        blocks,
        output_scale,
        query,
        key,
        value,
        grad_output,
        log_sum_exp: f32_view("log_sum_exp", inputs.log_sum_exp, sizes.query_rows)?,
        delta: f32s("delta", inputs.delta, sizes.query_rows)?,
        grad_key,
        grad_value,
    };
    let table = pass.table()?;
    let grad_query = f32s("grad_query", grad_query, sizes.query_elements)?;
    match pass.tiling(Kernel::QueryGradients) {
        Some(tiling) => pass.queries_by_matrix_units(&table, grad_query, tiling)?,
        None => pass.queries(&table, grad_query)?,
    }
    match pass.tiling(Kernel::KeyGradients) {
        Some(tiling) => pass.keys_by_matrix_units(&table, tiling)?,
        None => pass.keys(&table)?,
    }
    launcher.launched([grad_query, grad_key.buffer, grad_value.buffer])
}

/// Checked arguments.
struct Backward<'a> {
    launcher: &'a Launcher,
    problem: &'a Problem,
    blocks: &'a [HeadBlocks],
    output_scale: f32,
    query: Placed<'a>,
    key: Placed<'a>,
    value: Placed<'a>,
    grad_output: Placed<'a>,
    log_sum_exp: &'a CubeBuffer,
    delta: &'a CubeBuffer,
    grad_key: Placed<'a>,
    grad_value: Placed<'a>,
}

impl Backward<'_> {
    fn table(&self) -> Result<Table, KernelError> {
        let mut table = Table::new(self.problem)?;
        for (tensor, placed) in [
            (QUERY, self.query),
            (KEY, self.key),
            (VALUE, self.value),
            (GRAD_OUTPUT, self.grad_output),
            (GRAD_KEY, self.grad_key),
            (GRAD_VALUE, self.grad_value),
        ] {
            table.place(tensor, placed.layout, placed.offset)?;
        }
        table.place(STATE, &row_numbers(self.problem), 0)?;
        Ok(table)
    }

    /// How many elements the kernels read at once; `written` is what they add to.
    fn width(&self, written: &[&CubeBuffer]) -> usize {
        let read = [self.query, self.key, self.value, self.grad_output];
        let placed = [&read[..], &[self.grad_key, self.grad_value]].concat();
        width(self.problem.head_dim, &placed, written)
    }

    fn tiling(&self, kernel: Kernel) -> Option<MatrixTiling> {
        let rows = [self.query, self.key, self.value, self.grad_output];
        self.launcher.tiling(self.problem, kernel, &rows)
    }

    /// Adds the gradients of the queries, by matrix units.
    fn queries_by_matrix_units(
        &self,
        table: &Table,
        grad_query: &CubeBuffer,
        tiling: MatrixTiling,
    ) -> Result<(), KernelError> {
        let Self {
            launcher, problem, ..
        } = self;
        let element = launcher.device.element(self.query.buffer.dtype())?;
        let work = Work::new(problem, self.blocks, |block| block.queries)?;
        let depth = work.entries * problem.group_size();
        let cube_rows = tiling.cube_rows();
        for records in &work.waves {
            let rows = |record: &Record| record[QUERY_COUNT];
            for launch in launcher.rows_of_records(table, records, depth, cube_rows, rows)? {
                matrix::query_gradients::query_gradients::launch(
                    launcher.device.client(),
                    launch.cubes,
                    tiling.cube_dim(),
                    tiling.vector_size(),
                    launcher.rows_argument("query", self.query.buffer, &tiling)?,
                    launcher.rows_argument("key", self.key.buffer, &tiling)?,
                    launcher.rows_argument("value", self.value.buffer, &tiling)?,
                    launcher.rows_argument("grad_output", self.grad_output.buffer, &tiling)?,
                    launcher.argument("log_sum_exp", self.log_sum_exp)?,
                    launcher.argument("delta", self.delta)?,
                    launch.table.argument(),
                    launcher.argument("grad_query", grad_query)?,
                    problem.scale,
                    self.output_scale,
                    f32::NEG_INFINITY,
                    tiling,
                    work.options,
                    element,
                );
            }
        }
        Ok(())
    }

    /// Adds the gradients of the keys and of the values, by matrix units.
    fn keys_by_matrix_units(&self, table: &Table, tiling: MatrixTiling) -> Result<(), KernelError> {
        let Self {
            launcher, problem, ..
        } = self;
        let element = launcher.device.element(self.query.buffer.dtype())?;
        let cube_rows = tiling.cube_rows();
        let gradients: &[Gradients] = if problem.head_dim <= MOST_OF_BOTH_GRADIENTS {
            &[Gradients::Both]
        } else {
            &[Gradients::Values, Gradients::Keys]
        };
        let work = Work::new(problem, self.blocks, |block| block.keys)?;
        for records in &work.waves {
            let rows = |record: &Record| record[KEY_COUNT];
            for launch in launcher.rows_of_records(table, records, work.entries, cube_rows, rows)? {
                for &gradients in gradients {
                    matrix::key_gradients::key_gradients::launch(
                        launcher.device.client(),
                        launch.cubes.clone(),
                        tiling.cube_dim(),
                        tiling.vector_size(),
                        launcher.rows_argument("query", self.query.buffer, &tiling)?,
                        launcher.rows_argument("key", self.key.buffer, &tiling)?,
                        launcher.rows_argument("value", self.value.buffer, &tiling)?,
                        launcher.rows_argument("grad_output", self.grad_output.buffer, &tiling)?,
                        launcher.argument("log_sum_exp", self.log_sum_exp)?,
                        launcher.argument("delta", self.delta)?,
                        launch.table.argument(),
                        launcher.argument("grad_key", self.grad_key.buffer)?,
                        launcher.argument("grad_value", self.grad_value.buffer)?,
                        problem.scale,
                        self.output_scale,
                        f32::NEG_INFINITY,
                        tiling,
                        gradients,
                        work.options,
                        element,
                    );
                }
            }
        }
        Ok(())
    }

    /// Adds the gradients of the queries.
    fn queries(&self, table: &Table, grad_query: &CubeBuffer) -> Result<(), KernelError> {
        let Self {
            launcher, problem, ..
        } = self;
        let element = launcher.device.element(self.query.buffer.dtype())?;
        let width = self.width(&[grad_query]);
        let work = Work::new(problem, self.blocks, |block| block.queries)?;
        let needs = tiling::QUERY_GRADIENTS.with_bounds(work.options.bounds());
        let tiling = Tiling::new(needs, problem.head_dim, width, launcher.room_of_cube())?;
        let depth = work.entries * problem.group_size();
        for records in &work.waves {
            let rows = |record: &Record| record[QUERY_COUNT];
            for launch in launcher.rows_of_records(table, records, depth, tiling.rows, rows)? {
                gradients::query_gradients::launch(
                    launcher.device.client(),
                    launch.cubes,
                    CubeDim::new_1d(tiling.units as u32),
                    tiling.width,
                    launcher.argument("query", self.query.buffer)?,
                    launcher.argument("key", self.key.buffer)?,
                    launcher.argument("value", self.value.buffer)?,
                    launcher.argument("grad_output", self.grad_output.buffer)?,
                    launcher.argument("log_sum_exp", self.log_sum_exp)?,
                    launcher.argument("delta", self.delta)?,
                    launch.table.argument(),
                    launcher.argument("grad_query", grad_query)?,
                    problem.scale,
                    self.output_scale,
                    f32::NEG_INFINITY,
                    tiling,
                    work.options,
                    element,
                );
            }
        }
        Ok(())
    }

    /// Adds the gradients of the keys and of the values.
    fn keys(&self, table: &Table) -> Result<(), KernelError> {
        let Self {
            launcher, problem, ..
        } = self;
        let element = launcher.device.element(self.query.buffer.dtype())?;
        let width = self.width(&[self.grad_key.buffer, self.grad_value.buffer]);
        let work = Work::new(problem, self.blocks, |block| block.keys)?;
        let needs = tiling::KEY_GRADIENTS.with_bounds(work.options.bounds());
        let tiling = Tiling::new(needs, problem.head_dim, width, launcher.room_of_cube())?;
        for records in &work.waves {
            let rows = |record: &Record| record[KEY_COUNT];
            for launch in
                launcher.rows_of_records(table, records, work.entries, tiling.rows, rows)?
            {
                gradients::key_gradients::launch(
                    launcher.device.client(),
                    launch.cubes,
                    CubeDim::new_1d(tiling.units as u32),
                    tiling.width,
                    launcher.argument("query", self.query.buffer)?,
                    launcher.argument("key", self.key.buffer)?,
                    launcher.argument("value", self.value.buffer)?,
                    launcher.argument("grad_output", self.grad_output.buffer)?,
                    launcher.argument("log_sum_exp", self.log_sum_exp)?,
                    launcher.argument("delta", self.delta)?,
                    launch.table.argument(),
                    launcher.argument("grad_key", self.grad_key.buffer)?,
                    launcher.argument("grad_value", self.grad_value.buffer)?,
                    problem.scale,
                    self.output_scale,
                    f32::NEG_INFINITY,
                    tiling,
                    work.options,
                    element,
                );
            }
        }
        Ok(())
    }
}
