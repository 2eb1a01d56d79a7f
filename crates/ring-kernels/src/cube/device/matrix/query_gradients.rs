//! The backward pass over the keys of every query row.

use cubecl::prelude::*;

use super::super::super::table::*;
use super::super::index::*;
use super::super::scores::*;
use super::fragments::*;
use super::scores::*;
use super::tiles::{arrive, fetch_both, rows_in_shared_memory};
use super::work::*;

/// Adds the query gradients of the blocks of a table. A plane owns query rows: a row is in one block of the launch at most.
#[cube(launch)]
pub(crate) fn query_gradients<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    grad_output: &[Vector<F, N>],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_query: &mut [f32],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
    #[define(F)] _element: ElemType,
) {
    let work = work_of_query_head(table);
    let own = own_queries(table, &work, tiling, options);
    let lane = lane(tiling);
    let keys_from = keys_at(table, KEY, &work, 1usize);
    let values_from = keys_at(table, VALUE, &work, 1usize);
    let key_count = word(table, work.record + KEY_COUNT);

    let (cube_rows, tile_rows) = comptime!((tiling.cube_rows(), tiling.tile_rows));
    let tile = comptime!(tiling.tile_vectors());
    let mut queries = rows_in_shared_memory::<F>(comptime!(tiling.cube_vectors()));
    let mut grads = rows_in_shared_memory::<F>(comptime!(tiling.cube_vectors()));
    let mut keys = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let mut values = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let queries_from = queries_at(table, QUERY, &work, work.head, 1usize);
    let grads_from = queries_at(table, GRAD_OUTPUT, &work, work.head, 1usize);
    fetch_both::<F, N>(
        (query, grad_output),
        (&queries_from, &grads_from),
        own.first,
        own.count,
        (&mut queries, &mut grads),
        0usize,
        cube_rows,
        tiling,
    );
    fetch_both::<F, N>(
        (key, value),
        (&keys_from, &values_from),
        own.begin,
        key_count,
        (&mut keys, &mut values),
        0usize,
        tile_rows,
        tiling,
    );

    // The last row of the cube stands in for rows beyond it.
    let halves = comptime!(2 * tiling.row_tiles);
    let ends = ends_of_halves(table, &work, &own, tiling);
    let state = queries_at(table, STATE, &work, work.head, 1usize);
    let mut own_log_sum_exp = Array::<f32>::new(halves);
    let mut own_delta = Array::<f32>::new(halves);
    #[unroll]
    for h in 0..halves {
        let row = least(own.first + own.plane_first + row_of_half(h), own.last);
        let at = state.start + row * state.stride;
        own_log_sum_exp[h] = log_sum_exp[at];
        own_delta[h] = delta[at];
    }
    arrive(tiling);
    let rows_at = own.plane_first * comptime!(tiling.pitch());
    let held_queries = hold::<F>(&queries, rows_at, &lane, tiling);
    let held_grads = hold::<F>(&grads, rows_at, &lane, tiling);

    let scoring = scoring(table, work.head, minus_infinity, options);
    let mut sums = zeros(comptime!(tiling.row_tiles * tiling.head_dim / 8));
    // What is left of the scale once products are scores.
    let unit = if comptime!(options.scored()) {
        1.0f32.runtime()
    } else {
        scale
    };
    let exponent = unit * core::f32::consts::LOG2_E;
    let plane_first = own.first + own.plane_first;
    let tiles = (own.end - own.begin).div_ceil(tile_rows);
    for t in 0..tiles {
        let start = own.begin + t * tile_rows;
        let here = t % 2 * tile;
        if t > 0 {
            arrive(tiling);
        }
        if t + 1 < tiles {
            let next = start + tile_rows;
            let there = tile - here;
            fetch_both::<F, N>(
                (key, value),
                (&keys_from, &values_from),
                next,
                key_count,
                (&mut keys, &mut values),
                there,
                tile_rows,
                tiling,
            );
        }
        let kept = kept_of_queries(table, &work, plane_first, own.last, start, tiling, options);
        let mut scores =
            row_products::<F>(&held_queries, &queries, rows_at, &keys, here, &lane, tiling);
        if start + tile_rows > own.first_end {
            hide(&mut scores, &ends, start, minus_infinity, false, tiling);
        }
        if comptime!(options.windowed) {
            if start < own.last_begin {
                let begins = begins_of_halves(table, &work, &own, tiling, options);
                hide(&mut scores, &begins, start, minus_infinity, true, tiling);
            }
        }
        let products =
            row_products::<F>(&held_grads, &grads, rows_at, &values, here, &lane, tiling);
        #[unroll]
        for h in 0..halves {
            let shift = exponent_of(own_log_sum_exp[h], minus_infinity);
            let row = clamped(plane_first + row_of_half(h), own.last);
            let query_place = place(table, work.record + QUERY_POSITION, row, options);
            #[unroll]
            for n in 0..comptime!(tile_rows / 8) {
                let fragment = comptime!(h / 2 * (tile_rows / 8) + n);
                let score = scores.index(fragment)[comptime!(h % 2)];
                let product = products.index(fragment)[comptime!(h % 2)];
                let mut gradient = Vector::<f32, Pair>::empty();
                #[unroll]
                for i in 0..2usize {
                    let column = comptime!(8 * n + i);
                    let mut of_pair = score.extract(i);
                    let mut factor = 1.0f32;
                    if comptime!(options.scored()) {
                        let key = first_column(start) + column;
                        let key_place = place(table, work.record + KEY_POSITION, key, options);
                        let scored =
                            self::score(of_pair * scale, query_place, key_place, &scoring, options);
                        of_pair = scored.value;
                        factor = scored.derivative;
                    }
                    let weight = power_of_two(of_pair * exponent - shift, tiling);
                    let of_weight = if_kept(
                        &kept,
                        h,
                        comptime!(2 * n + i),
                        product.extract(i) * output_scale,
                    );
                    let mut of_score = weight * (of_weight - own_delta[h]);
                    if comptime!(options.softcap) {
                        of_score *= factor;
                    }
                    gradient.insert(i, of_score);
                }
                scores.index_mut(fragment)[comptime!(h % 2)] = gradient;
            }
        }
        add_weighted_rows::<F>(&scores, &all_kept(), &keys, here, &mut sums, &lane, tiling);
    }

    #[unroll]
    for h in 0..halves {
        let row = own.first + own.plane_first + row_of_half(h);
        if row < own.count && own_log_sum_exp[h] != minus_infinity {
            let at = (state.start + row * state.stride) * comptime!(tiling.head_dim);
            add_to_row(&sums, h, scale, grad_query, at, tiling);
        }
    }
}
