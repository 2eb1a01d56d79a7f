//! The backward pass: weights recomputed from the global log-sum-exp, five products per tile.
//!
//! As in the forward pass, queries (and output gradients) of a band are packed once and used with all keys, and scores are
//! computed transposed, keys by queries. Gradients of the band's queries and of a tile's keys are summed in scratch memory.
//! With less memory, a group of the band's queries is packed at a time, again for every tile of keys; see [`Tiles`].
//!
//! With enough heads for all threads, one pass computes all gradients. Otherwise two passes are made over smaller tasks
//! ([`Gradients`]), and each computes `S` and `dP` anew: seven products instead of five. Gradients are the same to the last
//! bit in both ways, since each is the same chain of additions.

use std::f32::consts::LOG2_E;

use ring_comm::buffer::{Buffer, DType, HostBuffer};

use super::Workers;
use super::check;
use super::format::{Format, Vectors};
use super::gradients::{Gradients, Task};
use super::instruction_set::Work;
use super::panels::{read_rows, row_panels, transposed_panels};
use super::product::{DepthMajor, Old, Out, Panels, RowMajor, Size, multiply};
use super::rows::{blocks_of, flipped, pieces, reach, tiles, tiles_in, within};
use super::scores::Weighting;
use super::scratch::{Cut, HostTensor, QUERY_TILE, Strides, band, padded};
use super::softmax::{Factors, GradientRows, GradientTile, Sight, softmax_gradient};
use super::tiles::Tiles;
use crate::{
    BackwardInputs, HeadBlocks, KernelError, KeyValue, KeyValueGradient, Problem, RowLayout, Rows,
};

/// Adds the gradients of `blocks`; see [`Kernels::backward`](crate::Kernels::backward).
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    workers: &Workers,
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
    check::blocks(problem, blocks)?;
    let (key, value) = check::key_value(problem, key_value, dtype, blocks)?;
    let pass = Backward {
        problem,
        query,
        grad_output,
        log_sum_exp: check::f32s("log_sum_exp", inputs.log_sum_exp, sizes.query_rows)?,
        delta: check::f32s("delta", inputs.delta.view(), sizes.query_rows)?,
        key,
        value,
        blocks,
        output_scale,
        tiles: workers.tiles,
    };
    let own;
    let layout = match &grad_key_value {
        KeyValueGradient::Slot { layout, .. } => *layout,
        KeyValueGradient::Own { .. } => {
            own = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
            &own
        }
    };
    let gradients = Gradients::new(problem, blocks, grad_query, grad_key_value, layout)?;
    pass.run_all(workers, gradients)
}

/// Words of the matrices of one thread, for every format.
pub(super) const fn scratch_words(head_dim: usize, tiles: Tiles) -> usize {
    let (band, dim) = (band(head_dim), padded(head_dim));
    let (packed, keys) = (tiles.packed_queries(head_dim), tiles.backward_keys());
    (4 * packed + band + QUERY_TILE + 5 * keys) * dim + 2 * band + 4 * keys * QUERY_TILE
}

/// The matrices of one thread.
struct Scratch<'a> {
    /// `Q^T` of the query tiles that are packed, panels.
    query_transposed: &'a mut [f32],
    /// `dO^T` of the query tiles that are packed, panels.
    grad_output_transposed: &'a mut [f32],
    /// `Q` of the query tiles that are packed, panels.
    query: &'a mut [f32],
    /// `dO` of the query tiles that are packed, panels.
    grad_output: &'a mut [f32],
    /// `dQ` of the band.
    grad_query: &'a mut [f32],
    /// Log-sum-exp of the band, to base 2.
    log_sum_exp: &'a mut [f32],
    /// `scale Delta` of the band.
    delta: &'a mut [f32],
    /// Rows of `K`.
    key_rows: &'a mut [f32],
    /// `K`, panels.
    key: &'a mut [f32],
    /// Rows of `V`.
    value_rows: &'a mut [f32],
    /// Rows on their way into panels.
    staged: &'a mut [f32],
    /// `dK` of the key tile.
    grad_key: &'a mut [f32],
    /// `dV / output_scale` of the key tile.
    grad_value: &'a mut [f32],
    /// `K Q^T`, then `P^T`: keys x queries.
    scores: &'a mut [f32],
    /// `V dO^T`, then `scale dS^T`: keys x queries.
    grad_scores: &'a mut [f32],
    /// `scale dS^T`, in words of neighbouring keys.
    grad_scores_by_keys: &'a mut [f32],
    /// With dropout, which weights are kept: keys x queries.
    kept: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(mut cut: Cut<'a>, head_dim: usize, tiles: Tiles) -> Self {
        let (band, dim) = (band(head_dim), padded(head_dim));
        let (packed, keys) = (tiles.packed_queries(head_dim), tiles.backward_keys());
        Self {
            query_transposed: cut.next(packed * dim),
            grad_output_transposed: cut.next(packed * dim),
            query: cut.next(packed * dim),
            grad_output: cut.next(packed * dim),
            grad_query: cut.next(band * dim),
            log_sum_exp: cut.next(band),
            delta: cut.next(band),
            key_rows: cut.next(keys * dim),
            key: cut.next(keys * dim),
            value_rows: cut.next(keys * dim),
            staged: cut.next(QUERY_TILE * dim),
            grad_key: cut.next(keys * dim),
            grad_value: cut.next(keys * dim),
            scores: cut.next(keys * QUERY_TILE),
            grad_scores: cut.next(keys * QUERY_TILE),
            grad_scores_by_keys: cut.next(keys * QUERY_TILE),
            kept: cut.next(keys * QUERY_TILE),
        }
    }
}

/// What all tasks read.
struct Backward<'a> {
    problem: &'a Problem,
    query: HostTensor<'a>,
    grad_output: HostTensor<'a>,
    log_sum_exp: &'a [f32],
    delta: &'a [f32],
    key: HostTensor<'a>,
    value: HostTensor<'a>,
    blocks: &'a [HeadBlocks],
    output_scale: f32,
    tiles: Tiles,
}

impl Backward<'_> {
    fn run_all(&self, workers: &Workers, gradients: Gradients<'_>) -> Result<(), KernelError> {
        let (heads, threads) = (gradients.heads(), workers.threads.count());
        if heads >= threads {
            return self.run(workers, gradients.by_head());
        }
        let (by_query_range, by_key_range) = gradients.by_range(pieces(heads, threads));
        self.run(workers, by_query_range)?;
        self.run(workers, by_key_range)
    }

    fn run<'t>(
        &self,
        workers: &Workers,
        tasks: impl Iterator<Item = Task<'t>> + Send,
    ) -> Result<(), KernelError> {
        let bf16 = self.query.data.dtype() == DType::BF16;
        let words = scratch_words(self.problem.head_dim, self.tiles);
        workers.run(tasks, words, |scratch, task| {
            let task = TaskWork {
                pass: self,
                scratch,
                task,
            };
            workers.instruction_set.run(bf16, task);
        })
    }
}

/// One task, and where to do it.
struct TaskWork<'p, 's, 't> {
    pass: &'p Backward<'p>,
    scratch: Cut<'s>,
    task: Task<'t>,
}

impl Work for TaskWork<'_, '_, '_> {
    #[inline(always)]
    fn run<S: Vectors, F: Format<S>>(self, simd: S, format: F) {
        let Self {
            pass,
            scratch,
            mut task,
        } = self;
        let problem = pass.problem;
        let mut bands = Bands {
            simd,
            format,
            pass,
            strides: Strides::new::<S, F>(problem.head_dim),
            scratch: Scratch::new(scratch, problem.head_dim, pass.tiles),
            packed: None,
        };
        for block in blocks_of(pass.blocks, task.batch, task.kv_head) {
            let keys = within(&block.keys, &task.key_rows);
            let queries = within(&block.queries, &task.query_rows);
            // Bands of queries that see none of the keys are passed over at once.
            let seeing = reach(flipped(problem.mask), &keys, &queries);
            for member in task.members.clone() {
                let head = (task.batch, task.kv_head * problem.group_size() + member);
                let weighting = Weighting::new(problem, head, block.branch);
                for queries in tiles_in(queries, band(problem.head_dim), seeing.clone()) {
                    bands.band(&mut task, member, &weighting, &queries, &keys);
                }
            }
        }
    }
}

/// A task compiled for an instruction set.
struct Bands<'a, S, F> {
    simd: S,
    format: F,
    pass: &'a Backward<'a>,
    strides: Strides,
    scratch: Scratch<'a>,
    /// The group of query tiles of the band that is packed.
    packed: Option<usize>,
}

impl<S: Vectors, F: Format<S>> Bands<'_, S, F> {
    /// Queries of a band with all `keys` they see; `member` counts the query heads of the group.
    #[inline(always)]
    fn band(
        &mut self,
        task: &mut Task<'_>,
        member: usize,
        weighting: &Weighting,
        queries: &Rows,
        keys: &Rows,
    ) {
        let reach = reach(self.pass.problem.mask, queries, keys);
        if reach.is_empty() {
            return;
        }
        let query_head = task.kv_head * self.pass.problem.group_size() + member;
        let head = (task.batch, query_head);
        self.load(head, queries);
        for keys in tiles_in(*keys, self.pass.tiles.backward_keys(), reach) {
            self.key_tile(task, head, weighting, queries, &keys);
        }
        if let Some(gradient) = &mut task.grad_query {
            let sums = self.scratch.grad_query.chunks_exact(self.strides.numbers);
            for (i, sum) in sums.take(queries.count).enumerate() {
                let row = member * self.pass.problem.queries + queries.row(i);
                add_scaled(gradient.row_mut(row, self.pass.problem.head_dim), 1.0, sum);
            }
        }
    }

    /// Loads what the forward pass left of the queries of a band; none of them is packed yet.
    #[inline(always)]
    fn load(&mut self, head: (usize, usize), queries: &Rows) {
        self.packed = None;
        let pass = self.pass;
        let scratch = &mut self.scratch;
        let first = (head.0 * pass.problem.query_heads + head.1) * pass.problem.queries;
        // Lanes beyond the last query are like queries that see nothing.
        scratch.log_sum_exp.fill(f32::INFINITY);
        scratch.delta.fill(0.0);
        for i in 0..queries.count {
            let row = first + queries.row(i);
            if pass.log_sum_exp[row] != f32::NEG_INFINITY {
                scratch.log_sum_exp[i] = pass.log_sum_exp[row] * LOG2_E;
                scratch.delta[i] = pass.delta[row] * pass.problem.scale;
            }
        }
        scratch.grad_query[..queries.count * self.strides.numbers].fill(0.0);
    }

    /// Packs the queries and output gradients of the group of tiles that holds tile `tile` of a band, unless they are packed.
    /// Returns the place of the tile in its group.
    #[inline(always)]
    fn pack_group(
        &mut self,
        tile: usize,
        head: (usize, usize),
        queries: &Rows,
        for_keys: bool,
    ) -> usize {
        let pass = self.pass;
        let size = pass.tiles.packed_queries(pass.problem.head_dim) / QUERY_TILE;
        let group = tile / size;
        if self.packed != Some(group) {
            self.packed = Some(group);
            let tiles = tiles(*queries, QUERY_TILE).enumerate();
            for (tile, queries) in tiles.skip(group * size).take(size) {
                let place = tile % size;
                for (tensor, gradient) in [(pass.query, false), (pass.grad_output, true)] {
                    self.pack_queries((tile, place), tensor, head, &queries, for_keys, gradient);
                }
            }
        }
        tile % size
    }

    /// Packs a tile of queries or output gradients at its place. Rows of queries that see nothing become 0: whatever is in them, NaN
    /// too, contributes nothing.
    #[inline(always)]
    fn pack_queries(
        &mut self,
        (tile, place): (usize, usize),
        tensor: HostTensor<'_>,
        head: (usize, usize),
        queries: &Rows,
        for_keys: bool,
        gradient: bool,
    ) {
        let (simd, format) = (self.simd, self.format);
        let Strides {
            numbers,
            words,
            depth,
        } = self.strides;
        let scratch = &mut self.scratch;
        let staged = &mut *scratch.staged;
        let head_dim = self.pass.problem.head_dim;
        read_rows(format, tensor, head, queries, head_dim, staged, words);
        let log_sum_exp = &scratch.log_sum_exp[tile * QUERY_TILE..];
        for (row, log_sum_exp) in staged
            .chunks_exact_mut(words)
            .zip(&log_sum_exp[..queries.count])
        {
            if *log_sum_exp == f32::INFINITY {
                row.fill(0.0);
            }
        }
        let (transposed, rows) = match gradient {
            false => (&mut *scratch.query_transposed, &mut *scratch.query),
            true => (
                &mut *scratch.grad_output_transposed,
                &mut *scratch.grad_output,
            ),
        };
        let start = place * QUERY_TILE * numbers;
        transposed_panels(
            simd,
            staged,
            words,
            queries.count,
            depth,
            &mut transposed[start..],
        );
        if for_keys {
            let (room, rows) = (QUERY_TILE / F::DEPTH, &mut rows[start..]);
            row_panels(simd, format, staged, words, queries.count, rows, room);
        }
    }

    /// One tile of keys against the queries of the band.
    #[inline(always)]
    fn key_tile(
        &mut self,
        task: &mut Task<'_>,
        head: (usize, usize),
        weighting: &Weighting,
        queries: &Rows,
        keys: &Rows,
    ) {
        self.pack_keys((task.batch, task.kv_head), keys, task.grad_query.is_some());
        let scratch = &mut self.scratch;
        let used = keys.count * self.strides.numbers;
        scratch.grad_key[..used].fill(0.0);
        scratch.grad_value[..used].fill(0.0);
        let for_keys = task.grad_key_value.is_some();
        for (tile, of_tile) in tiles(*queries, QUERY_TILE).enumerate() {
            if let Some(sight) = Sight::new(self.pass.problem.mask, F::DEPTH, &of_tile, keys) {
                let place = self.pack_group(tile, head, queries, for_keys);
                self.weights((tile, place), &sight, weighting);
                if for_keys {
                    self.key_gradients(place, &sight);
                }
                if task.grad_query.is_some() {
                    self.query_gradients(tile, &sight);
                }
            }
        }
        if let Some(gradient) = &mut task.grad_key_value {
            let (numbers, head_dim) = (self.strides.numbers, self.pass.problem.head_dim);
            let grad_key = self.scratch.grad_key.chunks_exact(numbers);
            let grad_value = self.scratch.grad_value.chunks_exact(numbers);
            for (i, (key, value)) in grad_key.zip(grad_value).take(keys.count).enumerate() {
                let row = keys.row(i);
                add_scaled(gradient.key.row_mut(row, head_dim), 1.0, key);
                let scale = self.pass.output_scale;
                add_scaled(gradient.value.row_mut(row, head_dim), scale, value);
            }
        }
    }

    /// Packs a tile of keys and values.
    #[inline(always)]
    fn pack_keys(&mut self, head: (usize, usize), keys: &Rows, for_queries: bool) {
        let (format, words, pass) = (self.format, self.strides.words, self.pass);
        let Scratch {
            key_rows,
            key,
            value_rows,
            ..
        } = &mut self.scratch;
        let head_dim = pass.problem.head_dim;
        read_rows(format, pass.key, head, keys, head_dim, key_rows, words);
        read_rows(format, pass.value, head, keys, head_dim, value_rows, words);
        if for_queries {
            let room = pass.tiles.backward_keys() / F::DEPTH;
            row_panels(self.simd, format, key_rows, words, keys.count, key, room);
        }
    }

    /// `S = K Q^T`, `P = exp(scale S - L)`, `dP = V dO^T`, `dS = P (dP - Delta)`, for the keys that are seen.
    #[inline(always)]
    fn weights(&mut self, (tile, place): (usize, usize), sight: &Sight<'_>, weighting: &Weighting) {
        let Self {
            simd,
            format,
            strides,
            pass,
            ref mut scratch,
            ..
        } = *self;
        let first = tile * QUERY_TILE;
        let start = sight.seen.start;
        let size = Size {
            rows: sight.seen.len(),
            depth: strides.depth,
            columns: sight.queries.count,
        };
        let products = [
            (
                &*scratch.key_rows,
                &*scratch.query_transposed,
                &mut *scratch.scores,
            ),
            (
                &*scratch.value_rows,
                &*scratch.grad_output_transposed,
                &mut *scratch.grad_scores,
            ),
        ];
        for (words, panels, numbers) in products {
            let left = RowMajor {
                words: &words[start * strides.words..],
                stride: strides.words,
            };
            let right = Panels {
                words: &panels[place * QUERY_TILE * strides.numbers..],
                room: strides.depth,
            };
            let out = Out {
                numbers: &mut numbers[start * QUERY_TILE..],
                stride: QUERY_TILE,
            };
            multiply(simd, format, size, left, right, out, Old::Replaced);
        }
        let scale = pass.problem.scale;
        let mut factors = Factors {
            score: scale * LOG2_E,
            gradient: scale * pass.output_scale,
        };
        let mut rows = GradientRows {
            log_sum_exp: &scratch.log_sum_exp[first..first + QUERY_TILE],
            delta: &scratch.delta[first..first + QUERY_TILE],
        };
        let kept = weighting.keep.map(|keep| {
            keep.fill(simd, sight, scratch.kept);
            &*scratch.kept
        });
        if weighting.changes_gradients() {
            let tile = (&mut *scratch.scores, &mut *scratch.grad_scores);
            weighting.gradients(simd, tile, sight, factors, rows.delta, kept);
            (factors, rows.delta) = (Factors::NONE, &[0.0; QUERY_TILE]);
        }
        let tile = GradientTile {
            scores: scratch.scores,
            gradients: scratch.grad_scores,
            by_keys: scratch.grad_scores_by_keys,
        };
        softmax_gradient(simd, format, tile, sight, factors, kept, &rows);
    }

    /// `dV += P^T dO`, `dK += dS^T Q`
    #[inline(always)]
    fn key_gradients(&mut self, place: usize, sight: &Sight<'_>) {
        let Self {
            simd,
            format,
            strides,
            ref mut scratch,
            ..
        } = *self;
        let start = sight.seen.start;
        let size = Size {
            rows: sight.seen.len(),
            depth: sight.queries.count.div_ceil(F::DEPTH),
            columns: self.pass.problem.head_dim,
        };
        let products = [
            (
                &*scratch.scores,
                &*scratch.grad_output,
                &mut *scratch.grad_value,
            ),
            (
                &*scratch.grad_scores,
                &*scratch.query,
                &mut *scratch.grad_key,
            ),
        ];
        for (words, panels, numbers) in products {
            let left = RowMajor {
                words: &words[start * QUERY_TILE..],
                stride: QUERY_TILE,
            };
            let right = Panels {
                words: &panels[place * QUERY_TILE * strides.numbers..],
                room: QUERY_TILE / F::DEPTH,
            };
            let out = Out {
                numbers: &mut numbers[start * strides.numbers..],
                stride: strides.numbers,
            };
            multiply(simd, format, size, left, right, out, Old::Kept);
        }
    }

    /// `dQ += dS K`
    #[inline(always)]
    fn query_gradients(&mut self, tile: usize, sight: &Sight<'_>) {
        let Self {
            simd,
            format,
            strides,
            ref mut scratch,
            ..
        } = *self;
        let first_word = sight.seen.start / F::DEPTH;
        let size = Size {
            rows: sight.queries.count,
            depth: sight.seen.end.div_ceil(F::DEPTH) - first_word,
            columns: self.pass.problem.head_dim,
        };
        let words = match F::DEPTH {
            1 => &*scratch.grad_scores,
            _ => &*scratch.grad_scores_by_keys,
        };
        let left = DepthMajor {
            words: &words[first_word * QUERY_TILE..],
            stride: QUERY_TILE,
        };
        let right = Panels {
            words: scratch.key,
            room: self.pass.tiles.backward_keys() / F::DEPTH,
        };
        let right = right.skip_rows::<S>(first_word);
        let out = Out {
            numbers: &mut scratch.grad_query[tile * QUERY_TILE * strides.numbers..],
            stride: strides.numbers,
        };
        multiply(simd, format, size, left, right, out, Old::Kept);
    }
}

/// `row += factor * term`; `term` may be longer.
#[inline(always)]
fn add_scaled(row: &mut [f32], factor: f32, term: &[f32]) {
    for (x, term) in row.iter_mut().zip(term) {
        *x += factor * term;
    }
}
