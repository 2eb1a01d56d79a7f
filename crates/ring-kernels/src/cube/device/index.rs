//! Indices that kernels compute from a table.

use cubecl::prelude::*;

use super::super::table::*;

/// One of two numbers. (`select` by itself leaves its type open.)
#[cube]
pub(crate) fn either(condition: bool, then: usize, otherwise: usize) -> usize {
    select(condition, then, otherwise)
}

/// The smaller of two numbers.
#[cube]
pub(crate) fn least(a: usize, b: usize) -> usize {
    select(a < b, a, b)
}

/// A word of a table.
#[cube]
pub(crate) fn word(table: &[u32], at: usize) -> usize {
    table[at] as usize
}

/// Start of a row of a tensor.
#[cube]
pub(crate) fn row_offset(
    table: &[u32],
    #[comptime] tensor: usize,
    batch: usize,
    head: usize,
    row: usize,
) -> usize {
    let at = comptime!(TENSORS + tensor * TENSOR);
    let bases = word(table, at + 2);
    batch * word(table, at) + word(table, bases + head) + row * word(table, at + 1)
}

/// Distance of neighbouring rows of a tensor.
#[cube]
pub(crate) fn row_stride(table: &[u32], #[comptime] tensor: usize) -> usize {
    word(table, comptime!(TENSORS + tensor * TENSOR + 1))
}

/// Start of the record of this cube.
#[cube]
pub(crate) fn record(table: &[u32]) -> usize {
    word(table, RECORDS_AT) + CUBE_POS_Y as usize * RECORD
}

/// How many keys of its block query `i` sees. Positions ascend, so these are the first ones.
#[cube]
pub(crate) fn visible(table: &[u32], record: usize, i: usize) -> usize {
    let position = i * word(table, record + QUERY_POSITION_STEP) + word(table, record + LEAD);
    let lag = word(table, record + LAG);
    let behind = position < lag;
    let steps =
        (position - either(behind, position, lag)) / word(table, record + KEY_POSITION_STEP);
    let count = least(steps + 1, word(table, record + KEY_COUNT));
    either(behind, 0usize, count)
}

/// The first query of its block that sees key `j`; their number if none does.
#[cube]
pub(crate) fn first_seeing(table: &[u32], record: usize, j: usize) -> usize {
    let position = j * word(table, record + KEY_POSITION_STEP) + word(table, record + LAG);
    let lead = word(table, record + LEAD);
    let seen_by_all = position <= lead;
    let missing = either(seen_by_all, 0usize, position - lead);
    // Where all see it the step may be 0.
    let step = either(
        seen_by_all,
        1usize,
        word(table, record + QUERY_POSITION_STEP),
    );
    least(missing.div_ceil(step), word(table, record + QUERY_COUNT))
}
