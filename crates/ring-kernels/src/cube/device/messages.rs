//! Rows that travel. The records of a table are runs of rows, whose elements the cubes of their y position share; the table
//! places the tensor they belong to as keys.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// What happens to rows that arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Arrival {
    /// They are written over what was there.
    Copy,
    /// They are added to what was there.
    Add,
}

/// Where a record's rows lie.
#[derive(CubeType, Clone, Copy)]
struct Run {
    /// The first one in the tensor.
    tensor_at: usize,
    /// From one to the next in the tensor.
    tensor_step: usize,
    /// The first one in the message.
    message_at: usize,
    /// From one to the next in the message.
    message_step: usize,
    /// Elements of all rows.
    elements: usize,
}

#[cube]
fn run_of_cube(table: &[u32], #[comptime] head_dim: usize) -> Run {
    let batch = CUBE_POS_Z as usize;
    let record = record(table);
    let head = word(table, record + KV_HEAD);
    let first = word(table, record + KEY_FIRST);
    let packed_first = word(table, record + PACKED_FIRST);
    Run {
        tensor_at: row_offset(table, KEY, batch, head, first),
        tensor_step: word(table, record + KEY_STEP) * row_stride(table, KEY),
        message_at: row_offset(table, MESSAGE, batch, head, packed_first),
        message_step: row_stride(table, MESSAGE),
        elements: word(table, record + KEY_COUNT) * head_dim,
    }
}

/// Copies rows of a tensor into its part of a message.
#[cube(launch)]
pub(crate) fn pack<F: Float>(
    tensor: &[F],
    table: &[u32],
    message: &mut [F],
    #[comptime] head_dim: usize,
    #[define(F)] _element: ElemType,
) {
    let run = run_of_cube(table, head_dim);
    let mut element = ABSOLUTE_POS_X as usize;
    while element < run.elements {
        let row = element / head_dim;
        let d = element % head_dim;
        message[run.message_at + row * run.message_step + d] =
            tensor[run.tensor_at + row * run.tensor_step + d];
        element += CUBE_COUNT_X as usize * CUBE_DIM_X as usize;
    }
}

/// Copies or adds a part of a message to the rows it was made of.
#[cube(launch)]
pub(crate) fn arrive<F: Float>(
    message: &[F],
    table: &[u32],
    target: &mut [F],
    #[comptime] arrival: Arrival,
    #[comptime] head_dim: usize,
    #[define(F)] _element: ElemType,
) {
    let run = run_of_cube(table, head_dim);
    let mut element = ABSOLUTE_POS_X as usize;
    while element < run.elements {
        let row = element / head_dim;
        let d = element % head_dim;
        let at = run.tensor_at + row * run.tensor_step + d;
        let new = message[run.message_at + row * run.message_step + d];
        if comptime!(arrival == Arrival::Add) {
            target[at] += new;
        } else {
            target[at] = new;
        }
        element += CUBE_COUNT_X as usize * CUBE_DIM_X as usize;
    }
}
