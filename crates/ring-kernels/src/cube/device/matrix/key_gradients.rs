//! The backward pass over the queries of every key row.

use cubecl::prelude::*;

use super::super::super::table::*;
use super::super::index::*;
use super::super::scores::*;
use super::fragments::*;
use super::scores::*;
use super::tiles::{arrive, fetch, fetch_both, fetch_numbers, rows_in_shared_memory};
use super::work::*;

/// Which gradients a launch of [`key_gradients`] computes. Of long rows both at once take more registers than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Gradients {
    Keys,
    Values,
    Both,
}

impl Gradients {
    fn keys(self) -> bool {
        self != Self::Values
    }

    fn values(self) -> bool {
        self != Self::Keys
    }

    /// Values are not held where only their gradients are computed.
    fn values_tiling(self, tiling: Tiling) -> Tiling {
        Tiling {
            rows_in_registers: tiling.rows_in_registers && self.keys(),
            ..tiling
        }
    }
}

/// Adds the key and value gradients of the blocks of a table. A plane owns key rows: a row is in one block of the launch at most.
///
/// Scores are computed with a row for each key, so that weights are left matrices of the products with queries.
#[cube(launch)]
pub(crate) fn key_gradients<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    grad_output: &[Vector<F, N>],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_key: &mut [f32],
    grad_value: &mut [f32],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
    #[comptime] gradients: Gradients,
    #[comptime] options: Options,
    #[define(F)] _element: ElemType,
) {
    let work = work_of_group(table);
    let group = word(table, GROUP);
    let lane = lane(tiling);

    let (cube_rows, tile_rows) = comptime!((tiling.cube_rows(), tiling.tile_rows));
    let key_count = word(table, work.record + KEY_COUNT);
    let first = CUBE_POS_X as usize * cube_rows;
    let last = least(first + cube_rows, key_count) - 1;
    let plane_first = UNIT_POS_Y as usize * comptime!(tiling.plane_rows());
    let plane_last = least(
        first + plane_first + comptime!(tiling.plane_rows()) - 1,
        last,
    );
    let seeing = seeing_queries(table, work.record, first, last, key_count, options);
    // From where on queries see all keys of the plane, and up to where.
    let last_begin = queries_begin(table, work.record, plane_last);
    let first_end = queries_end(
        table,
        work.record,
        least(first + plane_first, last),
        options,
    );

    let tile = comptime!(tiling.tile_vectors());
    let mut keys = rows_in_shared_memory::<F>(comptime!(tiling.cube_vectors()));
    let mut values = rows_in_shared_memory::<F>(comptime!(if gradients.keys() {
        tiling.cube_vectors()
    } else {
        1
    }));
    let mut queries = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let mut grads = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let mut log_sum_exps = Shared::<[f32]>::new_slice(comptime!(2 * tile_rows));
    let mut deltas = Shared::<[f32]>::new_slice(comptime!(2 * tile_rows));

    let keys_from = keys_at(table, KEY, &work, 1usize);
    let values_from = keys_at(table, VALUE, &work, 1usize);
    fetch::<F, N>(
        key, &keys_from, first, key_count, &mut keys, 0usize, cube_rows, tiling,
    );
    if comptime!(gradients.keys()) {
        fetch::<F, N>(
            value,
            &values_from,
            first,
            key_count,
            &mut values,
            0usize,
            cube_rows,
            tiling,
        );
    }
    let tiles = (seeing.end - seeing.begin).div_ceil(tile_rows);
    let all_tiles = group * tiles;
    if all_tiles > 0 {
        let heads = heads_of_member(table, &work, 0usize);
        fetch_both::<F, N>(
            (query, grad_output),
            (&heads.queries, &heads.grads),
            seeing.begin,
            seeing.end,
            (&mut queries, &mut grads),
            0usize,
            tile_rows,
            tiling,
        );
        fetch_numbers(
            log_sum_exp,
            &heads.state,
            seeing.begin,
            seeing.end,
            &mut log_sum_exps,
            0usize,
            minus_infinity,
            tiling,
        );
        fetch_numbers(
            delta,
            &heads.state,
            seeing.begin,
            seeing.end,
            &mut deltas,
            0usize,
            0.0f32,
            tiling,
        );
    }
    arrive(tiling);
    let rows_at = plane_first * comptime!(tiling.pitch());
    let held_keys = hold::<F>(&keys, rows_at, &lane, tiling);
    let held_values = hold::<F>(
        &values,
        rows_at,
        &lane,
        comptime!(gradients.values_tiling(tiling)),
    );

    let halves = comptime!(2 * tiling.row_tiles);
    let mut begins = Array::<u32>::new(halves);
    #[unroll]
    for h in 0..halves {
        let row = least(first + plane_first + row_of_half(h), last);
        begins[h] = queries_begin(table, work.record, row) as u32;
    }

    let sums = comptime!(tiling.row_tiles * tiling.head_dim / 8);
    let mut key_sums = zeros(comptime!(if gradients.keys() { sums } else { 0 }));
    let mut value_sums = zeros(comptime!(if gradients.values() { sums } else { 0 }));
    // What is left of the scale once products are scores.
    let unit = if comptime!(options.scored()) {
        1.0f32.runtime()
    } else {
        scale
    };
    let exponent = unit * core::f32::consts::LOG2_E;
    for u in 0..all_tiles {
        let start = seeing.begin + u % tiles * tile_rows;
        let here = u % 2;
        let rows_here = here * tile;
        let numbers_here = here * tile_rows;
        if u > 0 {
            arrive(tiling);
        }
        if u + 1 < all_tiles {
            let next = seeing.begin + (u + 1) % tiles * tile_rows;
            let rows_there = tile - rows_here;
            let numbers_there = tile_rows - numbers_here;
            let heads = heads_of_member(table, &work, (u + 1) / tiles);
            fetch_both::<F, N>(
                (query, grad_output),
                (&heads.queries, &heads.grads),
                next,
                seeing.end,
                (&mut queries, &mut grads),
                rows_there,
                tile_rows,
                tiling,
            );
            fetch_numbers(
                log_sum_exp,
                &heads.state,
                next,
                seeing.end,
                &mut log_sum_exps,
                numbers_there,
                minus_infinity,
                tiling,
            );
            fetch_numbers(
                delta,
                &heads.state,
                next,
                seeing.end,
                &mut deltas,
                numbers_there,
                0.0f32,
                tiling,
            );
        }
        let head = work.head + u / tiles;
        let kept = kept_of_keys(
            table,
            &work,
            head,
            first + plane_first,
            last,
            start,
            tiling,
            options,
        );
        let scoring = scoring(table, head, minus_infinity, options);
        let mut scores = row_products::<F>(
            &held_keys, &keys, rows_at, &queries, rows_here, &lane, tiling,
        );
        if start < last_begin {
            hide(&mut scores, &begins, start, minus_infinity, true, tiling);
        }
        if comptime!(options.windowed) {
            if start + tile_rows > first_end {
                let mut ends = Array::<u32>::new(halves);
                #[unroll]
                for h in 0..halves {
                    let row = least(first + plane_first + row_of_half(h), last);
                    ends[h] = queries_end(table, work.record, row, options) as u32;
                }
                hide(&mut scores, &ends, start, minus_infinity, false, tiling);
            }
        }
        // Factors between the gradients of scores and those of products.
        let mut factors = zeros(comptime!(
            options.derivatives(tiling.row_tiles * tile_rows / 8)
        ));
        let column = numbers_here + UNIT_POS_X as usize % 4 * 2;
        #[unroll]
        for n in 0..comptime!(tile_rows / 8) {
            #[unroll]
            for i in 0..2usize {
                let shift =
                    exponent_of(log_sum_exps[column + comptime!(8 * n + i)], minus_infinity);
                let query = first_column(start) + comptime!(8 * n + i);
                let query_place = place(table, work.record + QUERY_POSITION, query, options);
                #[unroll]
                for h in 0..halves {
                    let at = comptime!(h / 2 * (tile_rows / 8) + n);
                    let fragment = scores.index_mut(at);
                    let mut pair = fragment[comptime!(h % 2)];
                    let mut of_pair = pair.extract(i);
                    if comptime!(options.scored()) {
                        let key = clamped(first + plane_first + row_of_half(h), last);
                        let key_place = place(table, work.record + KEY_POSITION, key, options);
                        let scored =
                            score(of_pair * scale, query_place, key_place, &scoring, options);
                        of_pair = scored.value;
                        if comptime!(options.softcap) {
                            let of_fragment = factors.index_mut(at);
                            let mut of_pair = of_fragment[comptime!(h % 2)];
                            of_pair.insert(i, scored.derivative);
                            of_fragment[comptime!(h % 2)] = of_pair;
                        }
                    }
                    pair.insert(i, power_of_two(of_pair * exponent - shift, tiling));
                    fragment[comptime!(h % 2)] = pair;
                }
            }
        }
        if comptime!(gradients.values()) {
            add_weighted_rows::<F>(
                &scores,
                &kept,
                &grads,
                rows_here,
                &mut value_sums,
                &lane,
                tiling,
            );
        }
        if comptime!(gradients.keys()) {
            let products = row_products::<F>(
                &held_values,
                &values,
                rows_at,
                &grads,
                rows_here,
                &lane,
                tiling,
            );
            #[unroll]
            for n in 0..comptime!(tile_rows / 8) {
                #[unroll]
                for i in 0..2usize {
                    let of_row = deltas[column + comptime!(8 * n + i)];
                    #[unroll]
                    for h in 0..halves {
                        let at = comptime!(h / 2 * (tile_rows / 8) + n);
                        let product = products.index(at)[comptime!(h % 2)].extract(i);
                        let fragment = scores.index_mut(at);
                        let mut pair = fragment[comptime!(h % 2)];
                        let of_weight =
                            if_kept(&kept, h, comptime!(2 * n + i), product * output_scale);
                        let mut of_score = pair.extract(i) * (of_weight - of_row);
                        if comptime!(options.softcap) {
                            of_score *= factors.index(at)[comptime!(h % 2)].extract(i);
                        }
                        pair.insert(i, of_score);
                        fragment[comptime!(h % 2)] = pair;
                    }
                }
            }
            add_weighted_rows::<F>(
                &scores,
                &all_kept(),
                &queries,
                rows_here,
                &mut key_sums,
                &lane,
                tiling,
            );
        }
    }

    let keys_to = keys_at(table, GRAD_KEY, &work, 1usize);
    let values_to = keys_at(table, GRAD_VALUE, &work, 1usize);
    #[unroll]
    for h in 0..halves {
        let row = first + plane_first + row_of_half(h);
        if row < key_count {
            if comptime!(gradients.keys()) {
                add_to_row(
                    &key_sums,
                    h,
                    scale,
                    grad_key,
                    keys_to.start + row * keys_to.stride,
                    tiling,
                );
            }
            if comptime!(gradients.values()) {
                add_to_row(
                    &value_sums,
                    h,
                    output_scale,
                    grad_value,
                    values_to.start + row * values_to.stride,
                    tiling,
                );
            }
        }
    }
}

/// Where the queries of one head of a group lie.
#[derive(CubeType)]
struct Heads {
    queries: RowsAt,
    grads: RowsAt,
    state: RowsAt,
}

#[cube]
fn heads_of_member(table: &[u32], work: &Work, member: usize) -> Heads {
    let of_member = Work {
        record: work.record,
        batch: work.batch,
        kv_head: work.kv_head,
        head: work.head + member,
    };
    Heads {
        queries: queries_at(table, QUERY, &of_member, of_member.head, 1usize),
        grads: queries_at(table, GRAD_OUTPUT, &of_member, of_member.head, 1usize),
        state: queries_at(table, STATE, &of_member, of_member.head, 1usize),
    }
}
