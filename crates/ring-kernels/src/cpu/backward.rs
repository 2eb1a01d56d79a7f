//! The backward pass: weights recomputed from the global log-sum-exp, five products per tile.
//!
//! With enough heads for all threads, one pass computes all gradients. Otherwise two passes are made over smaller tasks
//! ([`Gradients`]), and each computes `S` and `dP` anew: seven products instead of five. Gradients are the same to the last
//! bit in both ways, since each is the same chain of additions.

use std::array;

use pulp::Arch;
use ring_comm::buffer::{Buffer, HostBuffer};

use super::carve::RowsMut;
use super::check;
use super::gradients::{Gradients, Task};
use super::microkernel::{Old, Shape, multiply};
use super::rows::{blocks_of, most_visible, pieces, tiles, visible, within};
use super::softmax::{GradientRow, scale_and_add, softmax_gradient};
use super::threads::Threads;
use super::tile::{HostTensor, KEY_TILE, QUERY_TILE, Tile, padded};
use crate::{BackwardInputs, HeadBlocks, KernelError, KeyValue, KeyValueGradient, Problem, Rows};

/// Adds the gradients of `blocks`; see [`Kernels::backward`](crate::Kernels::backward).
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    arch: Arch,
    threads: &Threads,
    problem: &Problem,
    inputs: &BackwardInputs<'_, HostBuffer>,
    key_value: &KeyValue<'_, HostBuffer>,
    blocks: &[HeadBlocks],
    output_scale: f32,
    grad_query: &mut HostBuffer,
    grad_key_value: KeyValueGradient<'_, HostBuffer>,
) -> Result<(), KernelError> {
    let sizes = check::problem(problem)?;
    let dtype = inputs.query.data.dtype();
    let (query, grad_output) = (inputs.query.into(), inputs.grad_output.into());
    check::query_tensor("query", query, problem)?;
    check::dtype("grad_output", inputs.grad_output.data.dtype(), dtype)?;
    check::query_tensor("grad_output", grad_output, problem)?;
    let key_rows = check::blocks(problem, blocks)?;
    let (key, value) = check::key_value(problem, key_value, dtype, &key_rows)?;
    let pass = Backward {
        arch,
        problem,
        query,
        grad_output,
        log_sum_exp: check::f32s("log_sum_exp", inputs.log_sum_exp, sizes.query_rows)?,
        delta: check::f32s("delta", inputs.delta.view(), sizes.query_rows)?,
        key,
        value,
        blocks,
        output_scale,
    };
    pass.run_all(
        threads,
        Gradients::new(problem, grad_query, grad_key_value, &key_rows)?,
    )
}

/// The tiles of one thread.
pub(super) struct Scratch {
    /// `Q`, queries x head size.
    query: Tile,
    /// `dO`, queries x head size.
    grad_output: Tile,
    /// `scale K`, keys x head size.
    key: Tile,
    /// `scale K^T`, head size x keys.
    key_transposed: Tile,
    /// `output_scale V^T`, head size x keys.
    value_transposed: Tile,
    /// `S`, then `P`: queries x keys.
    scores: Tile,
    /// `dP`, then `dS`: queries x keys.
    grad_scores: Tile,
    /// `dQ` of this tile, queries x head size.
    grad_query: Tile,
    /// `dK / scale` of this key tile, keys x head size.
    grad_key: Tile,
    /// `dV / output_scale` of this key tile, keys x head size.
    grad_value: Tile,
}

impl Scratch {
    pub(super) fn new(head_dim: usize) -> Result<Self, KernelError> {
        Ok(Self {
            query: Tile::new(QUERY_TILE, head_dim)?,
            grad_output: Tile::new(QUERY_TILE, head_dim)?,
            key: Tile::new(KEY_TILE, head_dim)?,
            key_transposed: Tile::new(head_dim, KEY_TILE)?,
            value_transposed: Tile::new(head_dim, KEY_TILE)?,
            scores: Tile::new(QUERY_TILE, KEY_TILE)?,
            grad_scores: Tile::new(QUERY_TILE, KEY_TILE)?,
            grad_query: Tile::new(QUERY_TILE, head_dim)?,
            grad_key: Tile::new(KEY_TILE, head_dim)?,
            grad_value: Tile::new(KEY_TILE, head_dim)?,
        })
    }
}

#[cfg(test)]
impl Scratch {
    /// Bytes that were really allocated.
    pub(super) fn bytes(&self) -> usize {
        let tiles = [
            &self.query,
            &self.grad_output,
            &self.key,
            &self.key_transposed,
            &self.value_transposed,
            &self.scores,
            &self.grad_scores,
            &self.grad_query,
            &self.grad_key,
            &self.grad_value,
        ];
        tiles.into_iter().map(Tile::allocated).sum()
    }
}

/// Bytes of the tiles of one thread.
pub(super) const fn scratch_bytes(head_dim: usize) -> usize {
    3 * Tile::bytes(QUERY_TILE, head_dim)
        + 3 * Tile::bytes(KEY_TILE, head_dim)
        + 2 * Tile::bytes(head_dim, KEY_TILE)
        + 2 * Tile::bytes(QUERY_TILE, KEY_TILE)
}

/// What all tasks read.
struct Backward<'a> {
    arch: Arch,
    problem: &'a Problem,
    query: HostTensor<'a>,
    grad_output: HostTensor<'a>,
    log_sum_exp: &'a [f32],
    delta: &'a [f32],
    key: HostTensor<'a>,
    value: HostTensor<'a>,
    blocks: &'a [HeadBlocks],
    output_scale: f32,
}

impl Backward<'_> {
    fn run_all(&self, threads: &Threads, gradients: Gradients<'_>) -> Result<(), KernelError> {
        let run = |tasks| {
            let scratch = || Scratch::new(self.problem.head_dim);
            threads.run(tasks, scratch, |scratch, task| self.run(scratch, task))
        };
        let heads = gradients.heads();
        if heads >= threads.count() {
            return run(gradients.by_head());
        }
        let pieces = pieces(heads, threads.count());
        let (by_query_range, by_key_range) = gradients.by_range(pieces);
        run(by_query_range)?;
        run(by_key_range)
    }

    fn run(&self, scratch: &mut Scratch, mut task: Task<'_>) {
        for block in blocks_of(self.blocks, task.kv_head) {
            let queries = within(&block.queries, &task.query_rows);
            for keys in tiles(within(&block.keys, &task.key_rows), KEY_TILE) {
                // Later key tiles are further in the future still.
                if most_visible(self.problem.mask, &queries, &keys) == 0 {
                    break;
                }
                self.key_tile(scratch, &mut task, queries, &keys);
            }
        }
    }

    /// One tile of keys against all queries of the group.
    fn key_tile(&self, scratch: &mut Scratch, task: &mut Task<'_>, queries: Rows, keys: &Rows) {
        self.pack(scratch, (task.batch, task.kv_head), keys);
        scratch.grad_key.data_mut().fill(0.0);
        scratch.grad_value.data_mut().fill(0.0);
        for member in 0..self.problem.group_size() {
            for queries in tiles(queries, QUERY_TILE) {
                self.tile(scratch, task, member, &queries, keys);
            }
        }
        if let Some(gradient) = &mut task.grad_key_value {
            let head_dim = self.problem.head_dim;
            let sums = scratch.grad_key.rows().zip(scratch.grad_value.rows());
            for (i, (grad_key, grad_value)) in sums.take(keys.count).enumerate() {
                let row = keys.row(i);
                add_scaled(
                    gradient.key.row_mut(row, head_dim),
                    self.problem.scale,
                    grad_key,
                );
                add_scaled(
                    gradient.value.row_mut(row, head_dim),
                    self.output_scale,
                    grad_value,
                );
            }
        }
    }

    /// Packs a tile of keys and values. The factors of `S` and `dP` go into them, because they are packed less often than
    /// queries and output gradients are.
    fn pack(&self, scratch: &mut Scratch, head: (usize, usize), keys: &Rows) {
        let head_dim = self.problem.head_dim;
        scratch
            .key
            .read(self.value, head, keys, head_dim, self.output_scale);
        scratch
            .value_transposed
            .transpose(&scratch.key, keys.count, head_dim);
        scratch
            .key
            .read(self.key, head, keys, head_dim, self.problem.scale);
        scratch
            .key_transposed
            .transpose(&scratch.key, keys.count, head_dim);
    }

    /// The gradients of one tile; `member` counts the query heads of the group.
    fn tile(
        &self,
        scratch: &mut Scratch,
        task: &mut Task<'_>,
        member: usize,
        queries: &Rows,
        keys: &Rows,
    ) {
        let Problem { head_dim, mask, .. } = *self.problem;
        let seen = most_visible(mask, queries, keys);
        if seen == 0 {
            return;
        }
        let query_head = task.kv_head * self.problem.group_size() + member;
        self.weights(scratch, (task.batch, query_head), queries, keys, seen);

        let multiply = |shape, left, right: &Tile, out: &mut Tile| {
            multiply(
                self.arch,
                shape,
                left,
                right.matrix(),
                out.matrix_mut(),
                Old::Kept,
            );
        };
        if task.grad_key_value.is_some() {
            let shape = Shape {
                rows: seen,
                depth: queries.count,
                width: padded(head_dim),
            };
            let (weights, grad_scores) = (
                scratch.scores.transposed(),
                scratch.grad_scores.transposed(),
            );
            multiply(
                shape,
                weights,
                &scratch.grad_output,
                &mut scratch.grad_value,
            );
            multiply(shape, grad_scores, &scratch.query, &mut scratch.grad_key);
        }
        if let Some(grad_query) = &mut task.grad_query {
            self.query_gradient(scratch, &mut grad_query[member], queries, seen);
        }
    }

    /// `S = scale Q K^T`, `P = exp(S - L)`, `dP = dO V^T`, `dS = P (dP - Delta)`, for the first `seen` keys.
    fn weights(
        &self,
        scratch: &mut Scratch,
        (batch, query_head): (usize, usize),
        queries: &Rows,
        keys: &Rows,
        seen: usize,
    ) {
        let Problem { head_dim, mask, .. } = *self.problem;
        let head = (batch, query_head);
        scratch.query.read(self.query, head, queries, head_dim, 1.0);
        scratch
            .grad_output
            .read(self.grad_output, head, queries, head_dim, 1.0);

        let shape = Shape {
            rows: queries.count,
            depth: head_dim,
            width: padded(seen),
        };
        let multiply = |left: &Tile, right: &Tile, out: &mut Tile| {
            let (left, right) = (left.matrix(), right.matrix());
            multiply(
                self.arch,
                shape,
                left,
                right,
                out.matrix_mut(),
                Old::Replaced,
            );
        };
        multiply(&scratch.query, &scratch.key_transposed, &mut scratch.scores);
        multiply(
            &scratch.grad_output,
            &scratch.value_transposed,
            &mut scratch.grad_scores,
        );

        let first = (batch * self.problem.query_heads + query_head) * self.problem.queries;
        let rows: [GradientRow; QUERY_TILE] = array::from_fn(|i| {
            // Beyond the last row of a short tile: any row will do, nobody looks.
            let i = i.min(queries.count - 1);
            GradientRow {
                visible: visible(mask, queries.position(i), keys),
                log_sum_exp: self.log_sum_exp[first + queries.row(i)],
                delta: self.delta[first + queries.row(i)],
            }
        });
        let rows = &rows[..queries.count];
        let (scores, grad_scores) = (&mut scratch.scores, &mut scratch.grad_scores);
        softmax_gradient(self.arch, scores, grad_scores, padded(seen), rows);
    }

    /// `dQ += dS (scale K)`
    fn query_gradient(
        &self,
        scratch: &mut Scratch,
        gradient: &mut RowsMut<'_>,
        queries: &Rows,
        seen: usize,
    ) {
        let head_dim = self.problem.head_dim;
        let shape = Shape {
            rows: queries.count,
            depth: seen,
            width: padded(head_dim),
        };
        let (grad_scores, key) = (scratch.grad_scores.matrix(), scratch.key.matrix());
        let out = scratch.grad_query.matrix_mut();
        multiply(self.arch, shape, grad_scores, key, out, Old::Replaced);
        for (i, term) in scratch.grad_query.rows().take(queries.count).enumerate() {
            scale_and_add(
                self.arch,
                gradient.row_mut(queries.row(i), head_dim),
                1.0,
                term,
            );
        }
    }
}

/// `row += factor * term`
fn add_scaled(row: &mut [f32], factor: f32, term: &[f32]) {
    for (x, term) in row.iter_mut().zip(term) {
        *x += factor * term;
    }
}
