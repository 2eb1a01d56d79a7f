//! The forward pass: online softmax over tiles of keys.

use cubecl::prelude::*;

use super::super::table::*;
use super::super::tiling::{QUAD, Tiling};
use super::dropout::*;
use super::index::*;
use super::quads::*;
use super::scores::*;
use super::tile::*;

/// Adds the blocks of a table to the state. A cube owns `tiling.rows` query rows: they are in one block of the launch at most.
///
/// Units compute scores by quads, and the greatest of each quad; then `tiling.parts()` units for each row turn them into
/// weights; then units add the products with values to the sums that they keep.
#[cube(launch)]
pub(crate) fn forward<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    table: &[u32],
    output: &mut [Vector<f32, N>],
    max: &mut [f32],
    denominator: &mut [f32],
    scale: f32,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
    #[define(F)] _element: ElemType,
) {
    let width = comptime!(tiling.width);
    let rows = comptime!(tiling.rows);
    let quads = comptime!(tiling.quads());
    let parts = comptime!(tiling.parts());
    let unit = UNIT_POS as usize;
    let work = work_of_query_head(table);
    let count = word(table, work.record + QUERY_COUNT);
    // The last queries see most keys: cubes that take longest begin first.
    let first = from_the_end(CUBE_POS_X, CUBE_COUNT_X) * rows;
    let state_at = queries_at(table, STATE, &work, work.head, 1usize);

    let mut queries = room_for_rows::<N>(rows, tiling);
    let mut columns = room_for_rows::<N>(comptime!(tiling.columns), tiling);
    let mut scores = room_for_scores(tiling);
    let mut greatest = Shared::<[f32]>::new_slice(comptime!(rows * quads));
    // Behind the last key that each query sees; then the first one, where that is not the first of all.
    let mut bounds = Shared::<[u32]>::new_slice(comptime!(options.bounds() * rows));
    let mut corrections = Shared::<[f32]>::new_slice(rows);

    let query_rows = queries_at(table, QUERY, &work, work.head, width);
    load::<F, N>(
        query,
        &query_rows,
        first,
        count,
        scale,
        queries.as_mut_slice(),
        rows,
        tiling,
    );
    let last = least(first + rows, count) - 1;
    if unit < rows {
        let query = least(first + unit, last);
        bounds[unit] = keys_end(table, work.record, query) as u32;
        if comptime!(options.windowed) {
            bounds[rows + unit] = keys_begin(table, work.record, query, options) as u32;
        }
    }

    let row = unit / parts;
    let part = unit % parts;
    let active = first + row < count;
    let own_state = state_at.start + either(active, first + row, 0usize) * state_at.stride;
    let mut own_max = max[own_state];
    let mut own_denominator = 0.0f32;
    if part == 0 {
        own_denominator = denominator[own_state];
    }

    let sum_place = sum_place(tiling);
    let mut sums = no_sums::<N>(tiling);
    #[unroll]
    for i in 0..comptime!(tiling.sum_rows()) {
        let row = first + sum_place.row + i;
        #[unroll]
        for j in 0..comptime!(tiling.sum_vectors()) {
            let vector = sum_vector(&sum_place, j, tiling);
            if row < count && vector < comptime!(tiling.vectors()) {
                let at = state_at.start + row * state_at.stride;
                sums[comptime!(i * tiling.sum_vectors() + j)] =
                    output[at * comptime!(tiling.vectors()) + vector];
            }
        }
    }

    let key_count = word(table, work.record + KEY_COUNT);
    let key_rows = keys_at(table, KEY, &work, width);
    let value_rows = keys_at(table, VALUE, &work, width);
    let seen = seen_keys(table, work.record, first, last, count, options);
    let score_place = score_place(tiling);

    for t in 0..(seen.end - seen.begin).div_ceil(comptime!(tiling.columns)) {
        let start = seen.begin + t * comptime!(tiling.columns);
        sync_cube();
        load::<F, N>(
            key,
            &key_rows,
            start,
            key_count,
            1.0f32,
            columns.as_mut_slice(),
            comptime!(tiling.columns),
            tiling,
        );
        sync_cube();
        if score_place.row < comptime!(score_row_step(tiling)) {
            let mut own_scores = no_scores(tiling);
            add_score_products::<N>(
                queries.as_slice(),
                columns.as_slice(),
                &score_place,
                &mut own_scores,
                tiling,
            );
            if start + comptime!(tiling.columns) > seen.first_end {
                hide_from(
                    &mut own_scores,
                    &bounds[0..rows],
                    &score_place,
                    start,
                    tiling,
                );
            }
            if comptime!(options.windowed) {
                if start < seen.last_begin {
                    hide_before(
                        &mut own_scores,
                        &bounds[rows..2 * rows],
                        &score_place,
                        start,
                        tiling,
                    );
                }
            }
            #[unroll]
            for i in 0..comptime!(tiling.score_rows()) {
                let row = score_place.row + comptime!(i * score_row_step(tiling));
                let mut quad = quad_of(&own_scores, i);
                if comptime!(options.scored()) {
                    let pairs = Pairs {
                        record: work.record,
                        row: first + row,
                        column: start + score_place.quad,
                    };
                    let scoring = scoring(table, work.head, HIDDEN, options);
                    quad = scored(
                        quad,
                        table,
                        &pairs,
                        &scoring,
                        quads,
                        comptime!(RowsAre::Queries),
                        options,
                    )
                    .values;
                }
                scores[row * comptime!(tiling.score_stride()) + score_place.quad] = quad;
                greatest[row * quads + score_place.quad] = greatest_of(quad);
            }
        }
        sync_cube();
        let mut new_max = own_max;
        for quad in 0..quads {
            new_max = greater(new_max, greatest[row * quads + quad]);
        }
        // Hidden scores are no weights, also if there is nothing else.
        let reference = select(new_max == HIDDEN, 0.0f32, new_max);
        let mut tile_denominator = 0.0f32;
        for step in 0..comptime!(quads.div_ceil(parts)) {
            let quad = part + step * parts;
            if quad < quads {
                let at = row * comptime!(tiling.score_stride()) + quad;
                let weights = (scores[at] - Vector::new(reference)).exp();
                scores[at] = weights;
                #[unroll]
                for e in 0..QUAD {
                    tile_denominator += weights.extract(e);
                }
                if comptime!(options.dropout) {
                    let pairs = Pairs {
                        record: work.record,
                        row: first + row,
                        column: start + quad,
                    };
                    let dropping = dropping(table, &work, work.head);
                    scores[at] = weights
                        * kept(table, &pairs, &dropping, quads, comptime!(RowsAre::Queries));
                }
            }
        }
        let correction = (own_max - new_max).exp();
        own_denominator = own_denominator * correction + tile_denominator;
        own_max = new_max;
        if part == 0 {
            corrections[row] = correction;
        }
        load::<F, N>(
            value,
            &value_rows,
            start,
            key_count,
            1.0f32,
            columns.as_mut_slice(),
            comptime!(tiling.columns),
            tiling,
        );
        sync_cube();
        #[unroll]
        for i in 0..comptime!(tiling.sum_rows()) {
            let correction = Vector::new(corrections[sum_place.row + i]);
            #[unroll]
            for j in 0..comptime!(tiling.sum_vectors()) {
                sums[comptime!(i * tiling.sum_vectors() + j)] *= correction;
            }
        }
        add_products::<N>(
            scores.as_slice(),
            columns.as_slice(),
            &sum_place,
            &mut sums,
            tiling,
        );
    }

    // What the units of a row have summed; those beyond the quads of a row have nothing.
    sync_cube();
    if part < quads {
        greatest[row * quads + part] = own_denominator;
    }
    sync_cube();
    if active && part == 0 {
        let mut sum = 0.0f32;
        for other in 0..comptime!(parts.min(quads)) {
            sum += greatest[row * quads + other];
        }
        max[own_state] = own_max;
        denominator[own_state] = sum;
    }
    #[unroll]
    for i in 0..comptime!(tiling.sum_rows()) {
        let row = first + sum_place.row + i;
        #[unroll]
        for j in 0..comptime!(tiling.sum_vectors()) {
            let vector = sum_vector(&sum_place, j, tiling);
            if row < count && vector < comptime!(tiling.vectors()) {
                let at = state_at.start + row * state_at.stride;
                output[at * comptime!(tiling.vectors()) + vector] =
                    sums[comptime!(i * tiling.sum_vectors() + j)];
            }
        }
    }
}
