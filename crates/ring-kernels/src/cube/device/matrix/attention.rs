//! The forward pass.

use cubecl::prelude::*;

use super::super::super::table::*;
use super::super::index::*;
use super::super::scores::*;
use super::fragments::*;
use super::scores::*;
use super::tiles::{arrive, fetch, fetch_both, rows_in_shared_memory};
use super::work::*;

/// Adds the blocks of a table to the state. A plane owns query rows: a row is in one block of the launch at most.
///
/// A unit has parts of rows `group` and `group + 8` of each sixteen; the four units of a group have all of it together. Maxima
/// are those of unscaled products, since the scale is positive, until they are merged into the state; but those of scores where
/// scores are more than scaled products.
#[cube(launch)]
pub(crate) fn forward<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    table: &[u32],
    output: &mut [f32],
    max: &mut [f32],
    denominator: &mut [f32],
    scale: f32,
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
    let mut keys = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let mut values = rows_in_shared_memory::<F>(comptime!(2 * tile));
    let queries_from = queries_at(table, QUERY, &work, work.head, 1usize);
    fetch::<F, N>(
        query,
        &queries_from,
        own.first,
        own.count,
        &mut queries,
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
    arrive(tiling);
    let held_at = own.plane_first * comptime!(tiling.pitch());
    let held = hold::<F>(&queries, held_at, &lane, tiling);

    let halves = comptime!(2 * tiling.row_tiles);
    let ends = ends_of_halves(table, &work, &own, tiling);
    let mut sums = zeros(comptime!(tiling.row_tiles * tiling.head_dim / 8));
    let mut own_max = Array::<f32>::new(halves);
    let mut own_denominator = Array::<f32>::new(halves);
    #[unroll]
    for h in 0..halves {
        own_max[h] = minus_infinity;
        own_denominator[h] = 0.0f32;
    }

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
        let mut scores = row_products::<F>(&held, &queries, held_at, &keys, here, &lane, tiling);
        if start + tile_rows > own.first_end {
            hide(&mut scores, &ends, start, minus_infinity, false, tiling);
        }
        if comptime!(options.windowed) {
            if start < own.last_begin {
                let begins = begins_of_halves(table, &work, &own, tiling, options);
                hide(&mut scores, &begins, start, minus_infinity, true, tiling);
            }
        }
        if comptime!(options.scored()) {
            score_products(
                &mut scores,
                table,
                &work,
                plane_first,
                own.last,
                start,
                scale,
                minus_infinity,
                tiling,
                options,
            );
        }
        soften(
            &mut scores,
            &mut own_max,
            &mut own_denominator,
            &mut sums,
            exponent,
            minus_infinity,
            tiling,
        );
        add_weighted_rows::<F>(&scores, &kept, &values, here, &mut sums, &lane, tiling);
    }

    let state = queries_at(table, STATE, &work, work.head, 1usize);
    let mut before = Array::<f32>::new(halves);
    #[unroll]
    for h in 0..halves {
        let row = least(own.first + own.plane_first + row_of_half(h), own.last);
        before[h] = max[state.start + row * state.stride];
        own_denominator[h] = sum_of_group(own_denominator[h]);
    }
    // One unit of a group writes what all four have read.
    sync_cube();
    #[unroll]
    for h in 0..halves {
        let row = own.first + own.plane_first + row_of_half(h);
        if row < own.count && own_max[h] != minus_infinity {
            let at = state.start + row * state.stride;
            let of_cube = own_max[h] * unit;
            let after = larger(before[h], of_cube);
            let of_before = (before[h] - after).exp();
            let of_own = (of_cube - after).exp();
            let pair = at * comptime!(tiling.head_dim) + UNIT_POS_X as usize % 4 * 2;
            #[unroll]
            for n in 0..comptime!(tiling.head_dim / 8) {
                let sum =
                    sums.index(comptime!(h / 2 * (tiling.head_dim / 8) + n))[comptime!(h % 2)];
                let to = pair + comptime!(8 * n);
                output[to] = output[to] * of_before + sum.extract(0usize) * of_own;
                output[to + 1] = output[to + 1] * of_before + sum.extract(1usize) * of_own;
            }
            let member = UNIT_POS_X % 4;
            if member == 0 {
                max[at] = after;
                denominator[at] = denominator[at] * of_before + own_denominator[h] * of_own;
            }
        }
    }
}

/// Turns the scores of a tile into weights relative to the maxima so far, and what was summed before with them.
#[cube]
fn soften(
    scores: &mut Fragments<f32>,
    own_max: &mut Array<f32>,
    own_denominator: &mut Array<f32>,
    sums: &mut Fragments<f32>,
    exponent: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
) {
    let eights = comptime!(tiling.tile_rows / 8);
    let columns = comptime!(tiling.head_dim / 8);
    #[unroll]
    for h in 0..comptime!(2 * tiling.row_tiles) {
        let mut new_max = own_max[h];
        #[unroll]
        for n in 0..eights {
            let pair = scores.index(comptime!(h / 2 * eights + n))[comptime!(h % 2)];
            new_max = larger(new_max, larger(pair.extract(0usize), pair.extract(1usize)));
        }
        new_max = larger(new_max, plane_shuffle_xor(new_max, 1u32));
        new_max = larger(new_max, plane_shuffle_xor(new_max, 2u32));
        // A row that has seen nothing yet: its weights are 0, not the power of a difference of infinities.
        let nothing = new_max == minus_infinity;
        let shift = choose(nothing, 0.0f32, new_max * exponent);
        let correction = power_of_two(own_max[h] * exponent - shift, tiling);
        let mut tile_denominator = 0.0f32;
        #[unroll]
        for n in 0..eights {
            let fragment = scores.index_mut(comptime!(h / 2 * eights + n));
            let pair = fragment[comptime!(h % 2)];
            let mut weights = Vector::<f32, Pair>::empty();
            #[unroll]
            for i in 0..2usize {
                let weight = power_of_two(pair.extract(i) * exponent - shift, tiling);
                tile_denominator += weight;
                weights.insert(i, weight);
            }
            fragment[comptime!(h % 2)] = weights;
        }
        own_max[h] = new_max;
        own_denominator[h] = own_denominator[h] * correction + tile_denominator;
        #[unroll]
        for n in 0..columns {
            let fragment = sums.index_mut(comptime!(h / 2 * columns + n));
            let sum = fragment[comptime!(h % 2)];
            fragment[comptime!(h % 2)] = sum * Vector::new(correction);
        }
    }
}
