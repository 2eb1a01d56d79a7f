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

/// Which of `count` is number `at` from the end.
#[cube]
pub(crate) fn from_the_end(at: u32, count: u32) -> usize {
    (count - 1 - at) as usize
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

/// What a cube works on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Work {
    /// Start of the record.
    pub(crate) record: usize,
    pub(crate) batch: usize,
    pub(crate) kv_head: usize,
    /// The query head; the first one of the group where a cube takes all of them.
    pub(crate) head: usize,
}

/// What this cube works on, if it takes one query head.
#[cube]
pub(crate) fn work_of_query_head(table: &[u32]) -> Work {
    let group = word(table, GROUP);
    let record = record(table);
    let kv_head = word(table, record + KV_HEAD);
    Work {
        record,
        batch: CUBE_POS_Z as usize / group,
        kv_head,
        head: kv_head * group + CUBE_POS_Z as usize % group,
    }
}

/// What this cube works on, if it takes all query heads of a group.
#[cube]
pub(crate) fn work_of_group(table: &[u32]) -> Work {
    let record = record(table);
    let kv_head = word(table, record + KV_HEAD);
    Work {
        record,
        batch: CUBE_POS_Z as usize,
        kv_head,
        head: kv_head * word(table, GROUP),
    }
}

/// Where rows of a record lie in a tensor, in vectors: row `i` at `start + i * stride`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct RowsAt {
    pub(crate) start: usize,
    pub(crate) stride: usize,
}

/// Where the queries of a record lie in a tensor of vectors of `width` elements.
#[cube]
pub(crate) fn queries_at(
    table: &[u32],
    #[comptime] tensor: usize,
    work: &Work,
    head: usize,
    #[comptime] width: usize,
) -> RowsAt {
    let first = word(table, work.record + QUERY_FIRST);
    let step = word(table, work.record + QUERY_STEP);
    RowsAt {
        start: row_offset(table, tensor, work.batch, head, first) / width,
        stride: step * row_stride(table, tensor) / width,
    }
}

/// Where the keys of a record lie in a tensor of vectors of `width` elements.
#[cube]
pub(crate) fn keys_at(
    table: &[u32],
    #[comptime] tensor: usize,
    work: &Work,
    #[comptime] width: usize,
) -> RowsAt {
    let first = word(table, work.record + KEY_FIRST);
    let step = word(table, work.record + KEY_STEP);
    RowsAt {
        start: row_offset(table, tensor, work.batch, work.kv_head, first) / width,
        stride: step * row_stride(table, tensor) / width,
    }
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

/// How many keys of its block query `i` sees; none if there is no such query.
#[cube]
pub(crate) fn seen_keys(table: &[u32], work: &Work, i: usize, count: usize) -> usize {
    let active = i < count;
    let seen = visible(table, work.record, either(active, i, 0usize));
    either(active, seen, 0usize)
}
