//! The forward pass: online softmax over tiles of keys.
//!
//! A task owns a range of query rows of one head: their output, maximum and denominator. It walks all blocks of the head,
//! restricted to its rows, band by band: the queries of a band are packed once and used with all keys; keys and values of a
//! tile are packed once for all query tiles of the band.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use ring_comm::buffer::{DType, HostBuffer};

use super::Workers;
use super::check;
use super::format::{Format, Vectors, copy};
use super::instruction_set::Work;
use super::panels::{read_rows, row_panels, transposed_panels};
use super::product::{DepthMajor, Old, Out, Panels, RowMajor, Size, multiply};
use super::rows::{blocks_of, pieces, range_len, reach, tiles, tiles_in, within};
use super::rows_mut::RowsMut;
use super::scores::Weighting;
use super::scratch::{Cut, HostTensor, KEY_TILE, QUERY_TILE, Strides, padded};
use super::softmax::{RowState, Sight, online_softmax};
use super::tiles::Tiles;
use crate::{ForwardState, HeadBlocks, KernelError, KeyValue, Problem, Rows};

/// Adds `blocks` to `state`; see [`Kernels::forward`](crate::Kernels::forward).
pub(super) fn forward(
    workers: &Workers,
    problem: &Problem,
    query: HostTensor<'_>,
    key_value: &KeyValue<'_, HostBuffer>,
    blocks: &[HeadBlocks],
    state: &mut ForwardState<HostBuffer>,
) -> Result<(), KernelError> {
    check::query_tensor("query", query, problem)?;
    check::blocks(problem, blocks)?;
    let (key, value) = check::key_value(problem, key_value, query.data.dtype(), blocks)?;
    let tasks = Tasks::new(problem, state, workers.threads.count())?;
    let pass = Forward {
        problem,
        query,
        key,
        value,
        blocks,
        tiles: workers.tiles,
    };
    let bf16 = query.data.dtype() == DType::BF16;
    let words = scratch_words(problem.head_dim, workers.tiles);
    workers.run(tasks, words, |scratch, task| {
        let task = TaskWork {
            pass: &pass,
            scratch,
            task,
        };
        workers.instruction_set.run(bf16, task);
    })
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

/// All tasks, cut from the state as they are asked for: no lists.
struct Tasks<'a> {
    problem: &'a Problem,
    range_len: usize,
    /// Of all heads and batch entries; the next one.
    head: usize,
    /// Its first row that is in no task yet.
    row: usize,
    output: &'a mut [f32],
    max: &'a mut [f32],
    denominator: &'a mut [f32],
}

impl<'a> Tasks<'a> {
    fn new(
        problem: &'a Problem,
        state: &'a mut ForwardState<HostBuffer>,
        threads: usize,
    ) -> Result<Self, KernelError> {
        let sizes = check::problem(problem)?;
        let rows = sizes.query_rows;
        let pieces = pieces(problem.batch * problem.query_heads, threads);
        Ok(Self {
            problem,
            range_len: range_len(problem.queries, pieces),
            head: 0,
            row: 0,
            output: check::f32s_mut("state.output", &mut state.output, sizes.query_elements)?,
            max: check::f32s_mut("state.max", &mut state.max, rows)?,
            denominator: check::f32s_mut("state.denominator", &mut state.denominator, rows)?,
        })
    }
}

impl<'a> Iterator for Tasks<'a> {
    type Item = Task<'a>;

    fn next(&mut self) -> Option<Task<'a>> {
        let Problem {
            query_heads,
            head_dim,
            queries,
            ..
        } = *self.problem;
        let (head, rows) = (self.head, self.row..queries.min(self.row + self.range_len));
        self.row = rows.end;
        if rows.end == queries {
            (self.head, self.row) = (head + 1, 0);
        }
        // The state ends with the last row of the last head.
        let output = self.output.split_off_mut(..rows.len() * head_dim)?;
        if output.is_empty() {
            return None;
        }
        Some(Task {
            batch: head / query_heads,
            query_head: head % query_heads,
            output: RowsMut {
                data: output,
                first_row: rows.start,
                stride: head_dim,
            },
            max: self.max.split_off_mut(..rows.len())?,
            denominator: self.denominator.split_off_mut(..rows.len())?,
            rows,
        })
    }
}

/// Words of the matrices of one thread, for every format.
pub(super) const fn scratch_words(head_dim: usize, tiles: Tiles) -> usize {
    let (band, dim) = (tiles.forward_band(head_dim), padded(head_dim));
    2 * band * dim
        + 2 * KEY_TILE * dim
        + KEY_TILE * dim
        + 2 * KEY_TILE * QUERY_TILE
        + 2 * band
        + QUERY_TILE
}

/// The matrices of one thread.
struct Scratch<'a> {
    /// `Q^T` of every query tile of the band, panels.
    query: &'a mut [f32],
    /// `O` of the band, unnormalised.
    output: &'a mut [f32],
    /// Maxima of the band, to base 2.
    max: &'a mut [f32],
    /// Denominators of the band.
    denominator: &'a mut [f32],
    /// Rows of `K`.
    key: &'a mut [f32],
    /// `V`, panels.
    value: &'a mut [f32],
    /// Rows on their way into panels.
    staged: &'a mut [f32],
    /// `K Q^T`, then `P^T`: keys x queries.
    scores: &'a mut [f32],
    /// With dropout, which weights are kept: keys x queries.
    kept: &'a mut [f32],
    /// What the output so far is multiplied by.
    correction: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(mut cut: Cut<'a>, head_dim: usize, tiles: Tiles) -> Self {
        let (band, dim) = (tiles.forward_band(head_dim), padded(head_dim));
        Self {
            query: cut.next(band * dim),
            output: cut.next(band * dim),
            max: cut.next(band),
            denominator: cut.next(band),
            key: cut.next(KEY_TILE * dim),
            value: cut.next(KEY_TILE * dim),
            staged: cut.next(KEY_TILE * dim),
            scores: cut.next(KEY_TILE * QUERY_TILE),
            kept: cut.next(KEY_TILE * QUERY_TILE),
            correction: cut.next(QUERY_TILE),
        }
    }
}

/// What all tasks read.
struct Forward<'a> {
    problem: &'a Problem,
    query: HostTensor<'a>,
    key: HostTensor<'a>,
    value: HostTensor<'a>,
    blocks: &'a [HeadBlocks],
    tiles: Tiles,
}

/// One task, and where to do it.
struct TaskWork<'p, 's, 't> {
    pass: &'p Forward<'p>,
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
        };
        let kv_head = task.query_head / problem.group_size();
        let head = (task.batch, task.query_head);
        let band = pass.tiles.forward_band(problem.head_dim);
        for block in blocks_of(pass.blocks, task.batch, kv_head) {
            let weighting = Weighting::new(problem, head, block.branch);
            for queries in tiles(within(&block.queries, &task.rows), band) {
                bands.band(&mut task, &weighting, &queries, &block.keys);
            }
        }
    }
}

/// A task compiled for an instruction set.
struct Bands<'a, S, F> {
    simd: S,
    format: F,
    pass: &'a Forward<'a>,
    strides: Strides,
    scratch: Scratch<'a>,
}

impl<S: Vectors, F: Format<S>> Bands<'_, S, F> {
    /// Queries of a band with all `keys` they see.
    #[inline(always)]
    fn band(&mut self, task: &mut Task<'_>, weighting: &Weighting, queries: &Rows, keys: &Rows) {
        let mask = self.pass.problem.mask;
        let reach = reach(mask, queries, keys);
        if reach.is_empty() {
            return;
        }
        let kv_head = task.query_head / self.pass.problem.group_size();
        self.load(task, queries);
        for keys in tiles_in(*keys, KEY_TILE, reach) {
            self.pack_keys((task.batch, kv_head), &keys);
            for (tile, queries) in tiles(*queries, QUERY_TILE).enumerate() {
                if let Some(sight) = Sight::new(mask, F::DEPTH, &queries, &keys) {
                    self.tile(tile, &sight, weighting);
                }
            }
        }
        self.store(task, queries);
    }

    /// Packs the queries of a band and loads their state.
    #[inline(always)]
    fn load(&mut self, task: &Task<'_>, queries: &Rows) {
        let Strides {
            numbers,
            words,
            depth,
        } = self.strides;
        let Scratch {
            query,
            output,
            max,
            denominator,
            staged,
            ..
        } = &mut self.scratch;
        let head = (task.batch, task.query_head);
        let head_dim = self.pass.problem.head_dim;
        for (tile, queries) in tiles(*queries, QUERY_TILE).enumerate() {
            read_rows(
                self.format,
                self.pass.query,
                head,
                &queries,
                head_dim,
                staged,
                words,
            );
            if self.pass.problem.scale < 0.0 {
                self.format.negate(&mut staged[..queries.count * words]);
            }
            let panels = &mut query[tile * QUERY_TILE * numbers..];
            transposed_panels(self.simd, staged, words, queries.count, depth, panels);
        }
        // Lanes beyond the last query are like queries that have seen nothing.
        max.fill(f32::NEG_INFINITY);
        denominator.fill(0.0);
        for (i, output) in output
            .chunks_exact_mut(numbers)
            .take(queries.count)
            .enumerate()
        {
            let row = queries.row(i) - task.rows.start;
            max[i] = task.max[row];
            denominator[i] = task.denominator[row];
            let (sums, padding) = output.split_at_mut(head_dim);
            copy(task.output.row(queries.row(i), head_dim), sums);
            padding.fill(0.0);
        }
    }

    /// Stores the state of a band.
    #[inline(always)]
    fn store(&mut self, task: &mut Task<'_>, queries: &Rows) {
        let head_dim = self.pass.problem.head_dim;
        let output = self.scratch.output.chunks_exact(self.strides.numbers);
        for (i, output) in output.take(queries.count).enumerate() {
            let row = queries.row(i) - task.rows.start;
            task.max[row] = self.scratch.max[i];
            task.denominator[row] = self.scratch.denominator[i];
            let row = task.output.row_mut(queries.row(i), head_dim);
            copy(&output[..head_dim], row);
        }
    }

    /// Packs a tile of keys and values.
    #[inline(always)]
    fn pack_keys(&mut self, head: (usize, usize), keys: &Rows) {
        let Scratch {
            key, value, staged, ..
        } = &mut self.scratch;
        let (format, words) = (self.format, self.strides.words);
        let head_dim = self.pass.problem.head_dim;
        read_rows(format, self.pass.key, head, keys, head_dim, key, words);
        read_rows(format, self.pass.value, head, keys, head_dim, staged, words);
        let room = KEY_TILE / F::DEPTH;
        row_panels(self.simd, format, staged, words, keys.count, value, room);
    }

    /// `S = K Q^T`, `P = exp(scale S - m)`, `O = exp(m_old - m) O + P V` for one tile.
    #[inline(always)]
    fn tile(&mut self, tile: usize, sight: &Sight<'_>, weighting: &Weighting) {
        let Self {
            simd,
            format,
            strides,
            ref mut scratch,
            ..
        } = *self;
        let (first, queries) = (tile * QUERY_TILE, sight.queries.count);
        let seen = &sight.seen;
        let size = Size {
            rows: seen.len(),
            depth: strides.depth,
            columns: queries,
        };
        let key = RowMajor {
            words: &scratch.key[seen.start * strides.words..],
            stride: strides.words,
        };
        let query = Panels {
            words: &scratch.query[first * strides.numbers..],
            room: strides.depth,
        };
        let scores = Out {
            numbers: &mut scratch.scores[seen.start * QUERY_TILE..],
            stride: QUERY_TILE,
        };
        multiply(simd, format, size, key, query, scores, Old::Replaced);

        // Not 0, which would make NaN of the -inf of a pair that is not seen; times any score this is 0 as well.
        let scale = match self.pass.problem.scale {
            0.0 => f32::MIN_POSITIVE,
            scale => scale.abs(),
        };
        let mut factor = scale * LOG2_E;
        if weighting.changes_scores() {
            weighting.scores(simd, scratch.scores, sight, factor);
            factor = 1.0;
        }
        let kept = weighting.keep.map(|keep| {
            keep.fill(simd, sight, scratch.kept);
            &*scratch.kept
        });
        let mut state = RowState {
            max: &mut scratch.max[first..first + QUERY_TILE],
            denominator: &mut scratch.denominator[first..first + QUERY_TILE],
            correction: scratch.correction,
        };
        online_softmax(
            simd,
            format,
            scratch.scores,
            sight,
            factor,
            kept,
            &mut state,
        );

        let first_word = seen.start / F::DEPTH;
        let size = Size {
            rows: queries,
            depth: seen.end.div_ceil(F::DEPTH) - first_word,
            columns: self.pass.problem.head_dim,
        };
        let weights = DepthMajor {
            words: &scratch.scores[first_word * QUERY_TILE..],
            stride: QUERY_TILE,
        };
        let value = Panels {
            words: scratch.value,
            room: KEY_TILE / F::DEPTH,
        };
        let value = value.skip_rows::<S>(first_word);
        let output = Out {
            numbers: &mut scratch.output[first * strides.numbers..],
            stride: strides.numbers,
        };
        let old = Old::Scaled(scratch.correction);
        multiply(simd, format, size, weights, value, output, old);
    }
}
