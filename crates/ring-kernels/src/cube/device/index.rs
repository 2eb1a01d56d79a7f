//! Indices that kernels compute from a table.

use cubecl::prelude::*;

use super::super::table::*;
use super::scores::Options;

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
        batch: word(table, record + ENTRY) + CUBE_POS_Z as usize / group,
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
        batch: word(table, record + ENTRY) + CUBE_POS_Z as usize,
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

/// How many keys of its block query `i` reaches by a sight. Positions ascend, so these are the first ones.
#[cube]
fn reached(table: &[u32], record: usize, #[comptime] sight: usize, i: usize) -> usize {
    let sight = record + sight;
    let position = i * word(table, sight + SIGHT_QUERY_STEP) + word(table, sight + SIGHT_LEAD);
    let lag = word(table, sight + SIGHT_LAG);
    let behind = position < lag;
    let steps = (position - either(behind, position, lag)) / word(table, sight + SIGHT_KEY_STEP);
    let count = least(steps + 1, word(table, record + KEY_COUNT));
    either(behind, 0usize, count)
}

/// The first query of its block that reaches key `j` by a sight; their number if none does.
#[cube]
fn first_reaching(table: &[u32], record: usize, #[comptime] sight: usize, j: usize) -> usize {
    let sight = record + sight;
    let position = j * word(table, sight + SIGHT_KEY_STEP) + word(table, sight + SIGHT_LAG);
    let lead = word(table, sight + SIGHT_LEAD);
    let reached_by_all = position <= lead;
    let missing = either(reached_by_all, 0usize, position - lead);
    // Where all reach it the step may be 0.
    let step = either(
        reached_by_all,
        1usize,
        word(table, sight + SIGHT_QUERY_STEP),
    );
    least(missing.div_ceil(step), word(table, record + QUERY_COUNT))
}

/// Behind the last key of its block that query `i` sees.
#[cube]
pub(crate) fn keys_end(table: &[u32], record: usize, i: usize) -> usize {
    reached(table, record, RIGHT, i)
}

/// The first key of its block that query `i` sees, if it sees one; no later than [`keys_end`].
#[cube]
pub(crate) fn keys_begin(
    table: &[u32],
    record: usize,
    i: usize,
    #[comptime] options: Options,
) -> usize {
    if comptime!(options.windowed) {
        reached(table, record, LEFT, i)
    } else {
        0usize.runtime()
    }
}

/// The first query of its block that sees key `j`, if one does.
#[cube]
pub(crate) fn queries_begin(table: &[u32], record: usize, j: usize) -> usize {
    first_reaching(table, record, RIGHT, j)
}

/// Behind the last query of its block that sees key `j`; no earlier than [`queries_begin`].
#[cube]
pub(crate) fn queries_end(
    table: &[u32],
    record: usize,
    j: usize,
    #[comptime] options: Options,
) -> usize {
    if comptime!(options.windowed) {
        first_reaching(table, record, LEFT, j)
    } else {
        word(table, record + QUERY_COUNT)
    }
}

/// Which keys of its block the queries of a cube see. Both ends grow from query to query.
#[derive(CubeType)]
pub(crate) struct SeenKeys {
    /// The first key that the first query sees.
    pub(crate) begin: usize,
    /// The first key that the last query sees.
    pub(crate) last_begin: usize,
    /// Behind the last key that the first query sees.
    pub(crate) first_end: usize,
    /// Behind the last key that the last query sees.
    pub(crate) end: usize,
}

/// Which keys queries `first..=last` see; none if `first` is none of the `count` queries.
#[cube]
pub(crate) fn seen_keys(
    table: &[u32],
    record: usize,
    first: usize,
    last: usize,
    count: usize,
    #[comptime] options: Options,
) -> SeenKeys {
    let active = first < count;
    let of_first = least(first, last);
    let begin = keys_begin(table, record, of_first, options);
    let end = keys_end(table, record, last);
    SeenKeys {
        begin,
        last_begin: keys_begin(table, record, last, options),
        first_end: keys_end(table, record, of_first),
        end: either(active, end, begin),
    }
}

/// Which queries of its block see the keys of a cube. Both ends grow from key to key.
#[derive(CubeType)]
pub(crate) struct SeeingQueries {
    /// The first query that sees the first key.
    pub(crate) begin: usize,
    /// The first query that sees the last key.
    pub(crate) last_begin: usize,
    /// Behind the last query that sees the first key.
    pub(crate) first_end: usize,
    /// Behind the last query that sees the last key.
    pub(crate) end: usize,
}

/// Which queries see keys `first..=last`; none if `first` is none of the `count` keys.
#[cube]
pub(crate) fn seeing_queries(
    table: &[u32],
    record: usize,
    first: usize,
    last: usize,
    count: usize,
    #[comptime] options: Options,
) -> SeeingQueries {
    let active = first < count;
    let of_first = least(first, last);
    let begin = queries_begin(table, record, of_first);
    let end = queries_end(table, record, last, options);
    SeeingQueries {
        begin,
        last_begin: queries_begin(table, record, last),
        first_end: queries_end(table, record, of_first, options),
        end: either(active, end, begin),
    }
}
