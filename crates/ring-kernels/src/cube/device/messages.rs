//! Rows that travel. The records of a table are runs of rows, whose elements the cubes of their y position share.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// Copies rows into a message, keys into its first half and values into its second, which begins at `half`.
#[cube(launch)]
pub(crate) fn pack<F: Float>(
    key: &[F],
    value: &[F],
    table: &[u32],
    message: &mut [F],
    half: u32,
    #[comptime] head_dim: usize,
    #[define(F)] _element: ElemType,
) {
    let batch = CUBE_POS_Z as usize;
    let record = record(table);
    let head = word(table, record + KV_HEAD);
    let step = word(table, record + KEY_STEP);
    let key_at = row_offset(table, KEY, batch, head, word(table, record + KEY_FIRST));
    let value_at = row_offset(table, VALUE, batch, head, word(table, record + KEY_FIRST));
    let message_at = row_offset(
        table,
        MESSAGE,
        batch,
        head,
        word(table, record + PACKED_FIRST),
    );
    let elements = word(table, record + KEY_COUNT) * head_dim;
    let mut element = ABSOLUTE_POS_X as usize;
    while element < elements {
        let row = element / head_dim;
        let d = element % head_dim;
        let to = message_at + row * row_stride(table, MESSAGE) + d;
        message[to] = key[key_at + row * step * row_stride(table, KEY) + d];
        message[to + half as usize] = value[value_at + row * step * row_stride(table, VALUE) + d];
        element += CUBE_COUNT_X as usize * CUBE_DIM_X as usize;
    }
}

/// Adds the gradients of a message to those of the rows it was made of.
#[cube(launch)]
pub(crate) fn add_rows(
    message: &[f32],
    table: &[u32],
    grad_key: &mut [f32],
    grad_value: &mut [f32],
    half: u32,
    #[comptime] head_dim: usize,
) {
    let batch = CUBE_POS_Z as usize;
    let record = record(table);
    let head = word(table, record + KV_HEAD);
    let step = word(table, record + KEY_STEP);
    let key_at = row_offset(
        table,
        GRAD_KEY,
        batch,
        head,
        word(table, record + KEY_FIRST),
    );
    let value_at = row_offset(
        table,
        GRAD_VALUE,
        batch,
        head,
        word(table, record + KEY_FIRST),
    );
    let message_at = row_offset(
        table,
        MESSAGE,
        batch,
        head,
        word(table, record + PACKED_FIRST),
    );
    let elements = word(table, record + KEY_COUNT) * head_dim;
    let mut element = ABSOLUTE_POS_X as usize;
    while element < elements {
        let row = element / head_dim;
        let d = element % head_dim;
        let from = message_at + row * row_stride(table, MESSAGE) + d;
        grad_key[key_at + row * step * row_stride(table, GRAD_KEY) + d] += message[from];
        grad_value[value_at + row * step * row_stride(table, GRAD_VALUE) + d] +=
            message[from + half as usize];
        element += CUBE_COUNT_X as usize * CUBE_DIM_X as usize;
    }
}
