//! The forward pass: online softmax over tiles of keys.
//!
//! A task owns a range of query rows of one head: their output, maximum and denominator. It walks all blocks of the head,
//! restricted to its rows. Keys and values of a tile are packed once and used for all query tiles of the range.

use std::ops::Range;

use pulp::Arch;
use ring_comm::buffer::HostBuffer;

use super::carve::{RowsMut, carve};
use super::check;
use super::microkernel::{Old, Shape, multiply};
use super::rows::{blocks_of, most_visible, pieces, ranges, tiles, visible, within};
use super::softmax::{RowState, online_softmax, scale_and_add};
use super::threads::Threads;
use super::tile::{HostTensor, KEY_TILE, QUERY_TILE, Tile, padded};
use crate::{ForwardState, HeadBlocks, KernelError, KeyValue, Problem, Rows};

/// Adds `blocks` to `state`; see [`Kernels::forward`](crate::Kernels::forward).
pub(super) fn forward(
    arch: Arch,
    threads: &Threads,
    problem: &Problem,
    query: HostTensor<'_>,
    key_value: &KeyValue<'_, HostBuffer>,
    blocks: &[HeadBlocks],
    state: &mut ForwardState<HostBuffer>,
) -> Result<(), KernelError> {
    check::query_tensor("query", query, problem)?;
    let key_rows = check::blocks(problem, blocks)?;
    let (key, value) = check::key_value(problem, key_value, query.data.dtype(), &key_rows)?;
    let tasks = tasks(problem, state, threads.count())?;
    let pass = Forward {
        arch,
        problem,
        query,
        key,
        value,
        blocks,
    };
    threads.run(
        tasks,
        || Scratch::new(problem.head_dim),
        |scratch, task| pass.run(scratch, task),
    )
}

/// A range of query rows of one head, and their state.
struct Task<'a> {
    batch: usize,
    query_head: usize,
    rows: Range<usize>,
    output: RowsMut<'a>,
    max: &'a mut [f32],
    denominator: &'a mut [f32],
}

fn tasks<'a>(
    problem: &Problem,
    state: &'a mut ForwardState<HostBuffer>,
    threads: usize,
) -> Result<Vec<Task<'a>>, KernelError> {
    let sizes = check::problem(problem)?;
    let output = check::f32s_mut("state.output", &mut state.output, sizes.query_elements)?;
    let max = check::f32s_mut("state.max", &mut state.max, sizes.query_rows)?;
    let denominator = check::f32s_mut(
        "state.denominator",
        &mut state.denominator,
        sizes.query_rows,
    )?;

    let heads = problem.batch * problem.query_heads;
    let ranges = ranges(problem.queries, pieces(heads, threads));
    let owned: Vec<_> = (0..heads)
        .flat_map(|head| ranges.iter().map(move |rows| (head, rows)))
        .collect();
    let spans = |unit: usize| {
        owned.iter().map(move |(head, rows)| {
            let first = head * problem.queries;
            (first + rows.start) * unit..(first + rows.end) * unit
        })
    };
    let stride = problem.head_dim;
    let outputs = carve("state.output", output, spans(stride))?;
    let maxima = carve("state.max", max, spans(1))?;
    let denominators = carve("state.denominator", denominator, spans(1))?;
    let state = outputs.into_iter().zip(maxima).zip(denominators);
    let task = |(&(head, rows), ((data, max), denominator)): (&(usize, &Range<usize>), _)| Task {
        batch: head / problem.query_heads,
        query_head: head % problem.query_heads,
        rows: rows.clone(),
        output: RowsMut {
            data,
            first_row: rows.start,
            stride,
        },
        max,
        denominator,
    };
    Ok(owned.iter().zip(state).map(task).collect())
}

/// The tiles of one thread.
pub(super) struct Scratch {
    /// `Q`, queries x head size.
    query: Tile,
    /// `scale K^T`, head size x keys.
    key_transposed: Tile,
    /// `V`, keys x head size.
    value: Tile,
    /// `S`, then `P`: queries x keys.
    scores: Tile,
    /// `P V`, queries x head size.
    product: Tile,
}

impl Scratch {
    pub(super) fn new(head_dim: usize) -> Result<Self, KernelError> {
        Ok(Self {
            query: Tile::new(QUERY_TILE, head_dim)?,
            key_transposed: Tile::new(head_dim, KEY_TILE)?,
            value: Tile::new(KEY_TILE, head_dim)?,
            scores: Tile::new(QUERY_TILE, KEY_TILE)?,
            product: Tile::new(QUERY_TILE, head_dim)?,
        })
    }
}

#[cfg(test)]
impl Scratch {
    /// Bytes that were really allocated.
    pub(super) fn bytes(&self) -> usize {
        let tiles = [
            &self.query,
            &self.key_transposed,
            &self.value,
            &self.scores,
            &self.product,
        ];
        tiles.into_iter().map(Tile::allocated).sum()
    }
}

/// Bytes of the tiles of one thread.
pub(super) const fn scratch_bytes(head_dim: usize) -> usize {
    2 * Tile::bytes(QUERY_TILE, head_dim)
        + Tile::bytes(head_dim, KEY_TILE)
        + Tile::bytes(KEY_TILE, head_dim)
        + Tile::bytes(QUERY_TILE, KEY_TILE)
}

/// What all tasks read.
struct Forward<'a> {
    arch: Arch,
    problem: &'a Problem,
    query: HostTensor<'a>,
    key: HostTensor<'a>,
    value: HostTensor<'a>,
    blocks: &'a [HeadBlocks],
}

impl Forward<'_> {
    fn run(&self, scratch: &mut Scratch, mut task: Task<'_>) {
        let kv_head = task.query_head / self.problem.group_size();
        for block in blocks_of(self.blocks, kv_head) {
            let queries = within(&block.queries, &task.rows);
            for keys in tiles(block.keys, KEY_TILE) {
                // Later key tiles are further in the future still.
                if most_visible(self.problem.mask, &queries, &keys) == 0 {
                    break;
                }
                self.pack(scratch, (task.batch, kv_head), &keys);
                for queries in tiles(queries, QUERY_TILE) {
                    self.tile(scratch, &mut task, &queries, &keys);
                }
            }
        }
    }

    /// Packs a tile of keys and values. The scale goes into the keys, which are packed less often than the queries.
    fn pack(&self, scratch: &mut Scratch, head: (usize, usize), keys: &Rows) {
        let head_dim = self.problem.head_dim;
        scratch
            .value
            .read(self.key, head, keys, head_dim, self.problem.scale);
        scratch
            .key_transposed
            .transpose(&scratch.value, keys.count, head_dim);
        scratch.value.read(self.value, head, keys, head_dim, 1.0);
    }

    /// `S = scale Q K^T`, `P = exp(S - m)`, `O = O exp(m_old - m) + P V` for one tile.
    fn tile(&self, scratch: &mut Scratch, task: &mut Task<'_>, queries: &Rows, keys: &Rows) {
        let Problem { head_dim, mask, .. } = *self.problem;
        let seen = most_visible(mask, queries, keys);
        if seen == 0 {
            return;
        }
        let rows = queries.count;
        let head = (task.batch, task.query_head);
        scratch.query.read(self.query, head, queries, head_dim, 1.0);
        let shape = Shape {
            rows,
            depth: head_dim,
            width: padded(seen),
        };
        let (query, key) = (scratch.query.matrix(), scratch.key_transposed.matrix());
        multiply(
            self.arch,
            shape,
            query,
            key,
            scratch.scores.matrix_mut(),
            Old::Replaced,
        );

        let correction = self.softmax(&mut scratch.scores, task, queries, keys, padded(seen));

        let shape = Shape {
            rows,
            depth: seen,
            width: padded(head_dim),
        };
        let (weights, value) = (scratch.scores.matrix(), scratch.value.matrix());
        multiply(
            self.arch,
            shape,
            weights,
            value,
            scratch.product.matrix_mut(),
            Old::Replaced,
        );
        for (i, product) in scratch.product.rows().take(rows).enumerate() {
            let output = task.output.row_mut(queries.row(i), head_dim);
            scale_and_add(self.arch, output, correction[i], product);
        }
    }

    /// One step of the online softmax; returns the factors that correct the output so far.
    fn softmax(
        &self,
        scores: &mut Tile,
        task: &mut Task<'_>,
        queries: &Rows,
        keys: &Rows,
        width: usize,
    ) -> [f32; QUERY_TILE] {
        let mut state = RowState::new();
        let mut seen = [0; QUERY_TILE];
        let seen = &mut seen[..queries.count];
        for (i, seen) in seen.iter_mut().enumerate() {
            let row = queries.row(i) - task.rows.start;
            state.max[i] = task.max[row];
            state.denominator[i] = task.denominator[row];
            *seen = visible(self.problem.mask, queries.position(i), keys);
        }
        online_softmax(self.arch, scores, seen, width, &mut state);
        for i in 0..queries.count {
            let row = queries.row(i) - task.rows.start;
            task.max[row] = state.max[i];
            task.denominator[row] = state.denominator[i];
        }
        state.correction
    }
}
