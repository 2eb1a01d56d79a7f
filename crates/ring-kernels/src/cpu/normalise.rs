//! The ends of the forward pass (output and log-sum-exp) and the beginning of the backward pass (`Delta`).

use std::f64::consts::LN_2;

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use super::check;
use super::format::widen;
use super::memory::{room, round, zeroed};
use super::rows::{pieces, range_len};
use super::scratch::HostTensor;
use super::threads::Threads;
use crate::{ForwardState, KernelError, Problem};

/// `O = sum / denominator`, `L = max + ln denominator`, in place; see [`Kernels::finish`](crate::Kernels::finish).
pub(super) fn finish(
    threads: &Threads,
    problem: &Problem,
    mut state: ForwardState<HostBuffer>,
    dtype: DType,
    output_scale: f32,
) -> Result<(HostBuffer, HostBuffer), KernelError> {
    let sizes = check::problem(problem)?;
    let head_dim = problem.head_dim;
    let denominator = check::f32s(
        "state.denominator",
        state.denominator.view(),
        sizes.query_rows,
    )?;
    let output = check::f32s_mut("state.output", &mut state.output, sizes.query_elements)?;
    let max = check::f32s_mut("state.max", &mut state.max, sizes.query_rows)?;

    let len = range_len(sizes.query_rows, pieces(1, threads.count()));
    let tasks = output
        .chunks_mut(len * head_dim)
        .zip(max.chunks_mut(len))
        .zip(denominator.chunks(len));
    threads.run(
        tasks,
        || Ok(()),
        |(), ((output, max), denominator)| {
            let rows = denominator.iter().zip(max);
            for ((&denominator, max), output) in rows.zip(output.chunks_exact_mut(head_dim)) {
                normalise_row(output, max, denominator, output_scale);
            }
        },
    )?;
    let ForwardState { output, max, .. } = state;
    let HostBuffer::F32(output) = output else {
        unreachable!("the element type was checked")
    };
    Ok((round(threads, output, dtype)?, max))
}

/// `max` becomes the log-sum-exp.
fn normalise_row(output: &mut [f32], max: &mut f32, denominator: f32, output_scale: f32) {
    if denominator == 0.0 {
        output.fill(0.0);
        *max = f32::NEG_INFINITY;
        return;
    }
    let factor = output_scale / denominator;
    output.iter_mut().for_each(|x| *x *= factor);
    // The maximum is to base 2.
    *max = (f64::from(*max) * LN_2 + f64::from(denominator).ln()) as f32;
}

/// `Delta = dO . O - dL`; see [`Kernels::delta`](crate::Kernels::delta).
pub(super) fn delta(
    threads: &Threads,
    problem: &Problem,
    output: HostView<'_>,
    grad_output: HostTensor<'_>,
    log_sum_exp: HostView<'_>,
    grad_log_sum_exp: Option<HostView<'_>>,
) -> Result<HostBuffer, KernelError> {
    let sizes = check::problem(problem)?;
    check::dtype("grad_output", grad_output.data.dtype(), output.dtype())?;
    check::size("output", output.len(), sizes.query_elements)?;
    check::query_tensor("grad_output", grad_output, problem)?;
    let log_sum_exp = check::f32s("log_sum_exp", log_sum_exp, sizes.query_rows)?;
    let grad_log_sum_exp = grad_log_sum_exp
        .map(|view| check::f32s("grad_log_sum_exp", view, sizes.query_rows))
        .transpose()?;

    let head_dim = problem.head_dim;
    let mut delta = zeroed::<f32>(threads, sizes.query_rows, None)?;
    let len = range_len(sizes.query_rows, pieces(1, threads.count()));
    let tasks = delta.chunks_mut(len).enumerate();
    let scratch = || {
        Ok([
            room::<f32>(&Threads::Caller, head_dim, None)?,
            room::<f32>(&Threads::Caller, head_dim, None)?,
        ])
    };
    threads.run(tasks, scratch, |[output_row, grad_row], (range, delta)| {
        for (row, delta) in (range * len..).zip(delta) {
            if log_sum_exp[row] == f32::NEG_INFINITY {
                continue;
            }
            let (head, query) = (row / problem.queries, row % problem.queries);
            let (batch, head) = (head / problem.query_heads, head % problem.query_heads);
            widen(output, row * head_dim, output_row);
            widen(
                grad_output.data,
                grad_output.layout.offset(batch, head, query),
                grad_row,
            );
            *delta = dot(output_row, grad_row) - grad_log_sum_exp.map_or(0.0, |grad| grad[row]);
        }
    })?;
    Ok(HostBuffer::F32(delta))
}

/// Summed in f64: `dP - Delta` cancels where one key takes almost all the weight.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum::<f64>() as f32
}
