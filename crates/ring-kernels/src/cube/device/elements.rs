//! What is done element by element. Units take every so many elements, since there may be more of them than a launch has units.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// Units of the launch.
#[cube]
fn all_units() -> usize {
    CUBE_COUNT_X as usize * CUBE_DIM_X as usize
}

/// Sets all elements to `value`.
#[cube(launch)]
pub(crate) fn fill<F: Float>(
    target: &mut [F],
    value: f32,
    len: u32,
    #[define(F)] _element: ElemType,
) {
    let mut element = ABSOLUTE_POS_X as usize;
    while element < len as usize {
        target[element] = F::cast_from(value);
        element += all_units();
    }
}

/// Rounds f32 elements.
#[cube(launch)]
pub(crate) fn round<F: Float>(
    source: &[f32],
    target: &mut [F],
    len: u32,
    #[define(F)] _element: ElemType,
) {
    let mut element = ABSOLUTE_POS_X as usize;
    while element < len as usize {
        target[element] = F::cast_from(source[element]);
        element += all_units();
    }
}

/// `O = sum / denominator`, and `L = max + ln denominator` in place of the maximum. A unit owns a query row.
#[cube(launch)]
pub(crate) fn normalise(
    output: &mut [f32],
    max: &mut [f32],
    denominator: &[f32],
    output_scale: f32,
    minus_infinity: f32,
    rows: u32,
    #[comptime] head_dim: usize,
) {
    let mut row = ABSOLUTE_POS_X as usize;
    while row < rows as usize {
        let sum = denominator[row];
        if sum == 0.0f32 {
            max[row] = minus_infinity;
            for d in 0..head_dim {
                output[row * head_dim + d] = 0.0f32;
            }
        } else {
            max[row] += sum.ln();
            for d in 0..head_dim {
                output[row * head_dim + d] = output[row * head_dim + d] * output_scale / sum;
            }
        }
        row += all_units();
    }
}

/// `Delta = dO . O - dL`, 0 where `L` is minus infinity. A unit owns a query row.
#[cube(launch)]
pub(crate) fn delta<F: Float>(
    output: &[F],
    grad_output: &[F],
    log_sum_exp: &[f32],
    grad_log_sum_exp: &[f32],
    table: &[u32],
    delta: &mut [f32],
    minus_infinity: f32,
    rows: u32,
    #[comptime] head_dim: usize,
    #[comptime] has_grad_log_sum_exp: bool,
    #[define(F)] _element: ElemType,
) {
    let mut row = ABSOLUTE_POS_X as usize;
    while row < rows as usize {
        let mut sum = 0.0f32;
        if log_sum_exp[row] != minus_infinity {
            let of_head = row / word(table, QUERIES);
            let batch = of_head / word(table, QUERY_HEADS);
            let head = of_head % word(table, QUERY_HEADS);
            let query = row % word(table, QUERIES);
            let at = row_offset(table, GRAD_OUTPUT, batch, head, query);
            for d in 0..head_dim {
                sum += f32::cast_from(output[row * head_dim + d])
                    * f32::cast_from(grad_output[at + d]);
            }
            if comptime!(has_grad_log_sum_exp) {
                sum -= grad_log_sum_exp[row];
            }
        }
        delta[row] = sum;
        row += all_units();
    }
}
