//! The backward pass: once over the keys of every query row, once over the queries of every key row.

use cubecl::prelude::*;

use super::super::table::*;
use super::super::tiling::{QUAD, Tiling};
use super::dropout::*;
use super::index::*;
use super::quads::*;
use super::scores::*;
use super::tile::*;

/// Adds the query gradients of the blocks of a table. A cube owns `tiling.rows` query rows: they are in one block of the launch
/// at most.
#[cube(launch)]
pub(crate) fn query_gradients<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    grad_output: &[Vector<F, N>],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_query: &mut [Vector<f32, N>],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
    #[define(F)] _element: ElemType,
) {
    let width = comptime!(tiling.width);
    let rows = comptime!(tiling.rows);
    let (apart, rows_are) = comptime!((tiling.quads(), RowsAre::Queries));
    let unit = UNIT_POS as usize;
    let work = work_of_query_head(table);
    let count = word(table, work.record + QUERY_COUNT);
    // The last queries see most keys: cubes that take longest begin first.
    let first = from_the_end(CUBE_POS_X, CUBE_COUNT_X) * rows;
    let state_at = queries_at(table, STATE, &work, work.head, 1usize);

    let mut queries = room_for_rows::<N>(rows, tiling);
    let mut grads = room_for_rows::<N>(rows, tiling);
    let mut columns = room_for_rows::<N>(comptime!(tiling.columns), tiling);
    let mut grad_scores = room_for_scores(tiling);
    // Behind the last key that each query sees; then the first one, where that is not the first of all.
    let mut bounds = Shared::<[u32]>::new_slice(comptime!(options.bounds() * rows));
    let mut log_sum_exps = Shared::<[f32]>::new_slice(rows);
    let mut deltas = Shared::<[f32]>::new_slice(rows);

    let last = least(first + rows, count) - 1;
    if unit < rows {
        let query = least(first + unit, last);
        bounds[unit] = keys_end(table, work.record, query) as u32;
        if comptime!(options.windowed) {
            bounds[rows + unit] = keys_begin(table, work.record, query, options) as u32;
        }
        load_row_numbers(
            log_sum_exp,
            delta,
            &state_at,
            first + unit,
            count,
            minus_infinity,
            unit,
            log_sum_exps.as_mut_slice(),
            deltas.as_mut_slice(),
        );
    }
    sync_cube();
    let query_rows = queries_at(table, QUERY, &work, work.head, width);
    load_contributing::<F, N>(
        query,
        &query_rows,
        first,
        log_sum_exps.as_slice(),
        scale,
        queries.as_mut_slice(),
        rows,
        tiling,
    );
    let grad_rows = queries_at(table, GRAD_OUTPUT, &work, work.head, width);
    load_contributing::<F, N>(
        grad_output,
        &grad_rows,
        first,
        log_sum_exps.as_slice(),
        output_scale,
        grads.as_mut_slice(),
        rows,
        tiling,
    );

    let key_count = word(table, work.record + KEY_COUNT);
    let key_rows = keys_at(table, KEY, &work, width);
    let value_rows = keys_at(table, VALUE, &work, width);
    let seen = seen_keys(table, work.record, first, last, count, options);
    let score_place = score_place(tiling);
    let computes_scores = score_place.row < comptime!(score_row_step(tiling));
    let sum_place = sum_place(tiling);
    let mut sums = no_sums::<N>(tiling);

    for t in 0..(seen.end - seen.begin).div_ceil(comptime!(tiling.columns)) {
        let start = seen.begin + t * comptime!(tiling.columns);
        sync_cube();
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
        let mut grad_weights = no_scores(tiling);
        if computes_scores {
            add_score_products::<N>(
                grads.as_slice(),
                columns.as_slice(),
                &score_place,
                &mut grad_weights,
                tiling,
            );
        }
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
        if computes_scores {
            let mut scores = no_scores(tiling);
            add_score_products::<N>(
                queries.as_slice(),
                columns.as_slice(),
                &score_place,
                &mut scores,
                tiling,
            );
            if start + comptime!(tiling.columns) > seen.first_end {
                hide_from(&mut scores, &bounds[0..rows], &score_place, start, tiling);
            }
            if comptime!(options.windowed) {
                if start < seen.last_begin {
                    hide_before(
                        &mut scores,
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
                let mut quad = quad_of(&scores, i);
                let mut factors = Quad::new(1.0f32);
                let pairs = Pairs {
                    record: work.record,
                    row: first + row,
                    column: start + score_place.quad,
                };
                if comptime!(options.scored()) {
                    let scoring = scoring(table, work.head, HIDDEN, options);
                    let scored = scored(quad, table, &pairs, &scoring, apart, rows_are, options);
                    quad = scored.values;
                    factors = scored.derivatives;
                }
                let weights = (quad - Quad::new(log_sum_exps[row])).exp();
                let mut grads = quad_of(&grad_weights, i);
                if comptime!(options.dropout) {
                    let dropping = dropping(table, &work, work.head);
                    grads *= kept(table, &pairs, &dropping, apart, rows_are);
                }
                let mut gradient = weights * (grads - Quad::new(deltas[row]));
                if comptime!(options.softcap) {
                    gradient *= factors;
                }
                grad_scores[row * comptime!(tiling.score_stride()) + score_place.quad] = gradient;
            }
        }
        sync_cube();
        add_products::<N>(
            grad_scores.as_slice(),
            columns.as_slice(),
            &sum_place,
            &mut sums,
            tiling,
        );
    }

    #[unroll]
    for i in 0..comptime!(tiling.sum_rows()) {
        let row = sum_place.row + i;
        #[unroll]
        for j in 0..comptime!(tiling.sum_vectors()) {
            let vector = sum_vector(&sum_place, j, tiling);
            if log_sum_exps[row] < NOTHING_SEEN && vector < comptime!(tiling.vectors()) {
                let at = state_at.start + (first + row) * state_at.stride;
                grad_query[at * comptime!(tiling.vectors()) + vector] +=
                    Vector::new(scale) * sums[comptime!(i * tiling.sum_vectors() + j)];
            }
        }
    }
}

/// Log-sum-exp and delta of query `i`, to `place` in shared memory: no weight and 0 if the query is beyond `count` or
/// has seen nothing.
#[cube]
fn load_row_numbers(
    log_sum_exp: &[f32],
    delta: &[f32],
    state_at: &RowsAt,
    i: usize,
    count: usize,
    minus_infinity: f32,
    place: usize,
    log_sum_exps: &mut [f32],
    deltas: &mut [f32],
) {
    let mut of_row = NOTHING_SEEN.runtime();
    let mut delta_of_row = 0.0f32;
    if i < count {
        let at = state_at.start + i * state_at.stride;
        if log_sum_exp[at] != minus_infinity {
            of_row = log_sum_exp[at];
            delta_of_row = delta[at];
        }
    }
    log_sum_exps[place] = of_row;
    deltas[place] = delta_of_row;
}

/// Adds the key and value gradients of the blocks of a table. A cube owns `tiling.rows` key rows: they are in one block of the
/// launch at most.
#[cube(launch)]
pub(crate) fn key_gradients<F: Float, N: Size>(
    query: &[Vector<F, N>],
    key: &[Vector<F, N>],
    value: &[Vector<F, N>],
    grad_output: &[Vector<F, N>],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_key: &mut [Vector<f32, N>],
    grad_value: &mut [Vector<f32, N>],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
    #[define(F)] _element: ElemType,
) {
    let width = comptime!(tiling.width);
    let rows = comptime!(tiling.rows);
    let tile_columns = comptime!(tiling.columns);
    let (apart, rows_are) = comptime!((tiling.quads(), RowsAre::Keys));
    let unit = UNIT_POS as usize;
    let work = work_of_group(table);
    let count = word(table, work.record + KEY_COUNT);
    let query_count = word(table, work.record + QUERY_COUNT);
    let first = CUBE_POS_X as usize * rows;

    let mut keys = room_for_rows::<N>(rows, tiling);
    let mut values = room_for_rows::<N>(rows, tiling);
    let mut queries = room_for_rows::<N>(tile_columns, tiling);
    let mut grads = room_for_rows::<N>(tile_columns, tiling);
    let mut weights = room_for_scores(tiling);
    let mut grad_scores = room_for_scores(tiling);
    // The first query that sees each key; then behind the last one, where that is not the last of all.
    let mut bounds = Shared::<[u32]>::new_slice(comptime!(options.bounds() * rows));
    let mut log_sum_exps = Shared::<[f32]>::new_slice(tile_columns);
    let mut deltas = Shared::<[f32]>::new_slice(tile_columns);

    let key_rows = keys_at(table, KEY, &work, width);
    load::<F, N>(
        key,
        &key_rows,
        first,
        count,
        1.0f32,
        keys.as_mut_slice(),
        rows,
        tiling,
    );
    let value_rows = keys_at(table, VALUE, &work, width);
    load::<F, N>(
        value,
        &value_rows,
        first,
        count,
        1.0f32,
        values.as_mut_slice(),
        rows,
        tiling,
    );
    let last = least(first + rows, count) - 1;
    if unit < rows {
        let key = least(first + unit, last);
        bounds[unit] = queries_begin(table, work.record, key) as u32;
        if comptime!(options.windowed) {
            bounds[rows + unit] = queries_end(table, work.record, key, options) as u32;
        }
    }

    let seeing = seeing_queries(table, work.record, first, last, count, options);
    let tiles = (seeing.end - seeing.begin).div_ceil(tile_columns);
    let score_place = score_place(tiling);
    let computes_scores = score_place.row < comptime!(score_row_step(tiling));
    let sum_place = sum_place(tiling);
    let mut key_sums = no_sums::<N>(tiling);
    let mut value_sums = no_sums::<N>(tiling);

    // The tiles of all query heads of the group, one head after the other.
    let all_tiles = tiles * word(table, GROUP);
    for t in 0..all_tiles {
        let head = work.head + t / tiles;
        let start = seeing.begin + t % tiles * tile_columns;
        let state_at = queries_at(table, STATE, &work, head, 1usize);
        let query_rows = queries_at(table, QUERY, &work, head, width);
        let grad_rows = queries_at(table, GRAD_OUTPUT, &work, head, width);
        sync_cube();
        let mut column = unit;
        while column < tile_columns {
            load_row_numbers(
                log_sum_exp,
                delta,
                &state_at,
                start + column,
                query_count,
                minus_infinity,
                column,
                log_sum_exps.as_mut_slice(),
                deltas.as_mut_slice(),
            );
            column += comptime!(tiling.units);
        }
        sync_cube();
        load_contributing::<F, N>(
            query,
            &query_rows,
            start,
            log_sum_exps.as_slice(),
            scale,
            queries.as_mut_slice(),
            tile_columns,
            tiling,
        );
        load_contributing::<F, N>(
            grad_output,
            &grad_rows,
            start,
            log_sum_exps.as_slice(),
            output_scale,
            grads.as_mut_slice(),
            tile_columns,
            tiling,
        );
        sync_cube();
        if computes_scores {
            let mut scores = no_scores(tiling);
            add_score_products::<N>(
                keys.as_slice(),
                queries.as_slice(),
                &score_place,
                &mut scores,
                tiling,
            );
            if start < seeing.last_begin {
                hide_before(&mut scores, &bounds[0..rows], &score_place, start, tiling);
            }
            if comptime!(options.windowed) {
                if start + tile_columns > seeing.first_end {
                    hide_from(
                        &mut scores,
                        &bounds[rows..2 * rows],
                        &score_place,
                        start,
                        tiling,
                    );
                }
            }
            let mut grad_weights = no_scores(tiling);
            add_score_products::<N>(
                values.as_slice(),
                grads.as_slice(),
                &score_place,
                &mut grad_weights,
                tiling,
            );
            let log_sum_exps = quad_of_columns(log_sum_exps.as_slice(), &score_place, tiling);
            let deltas = quad_of_columns(deltas.as_slice(), &score_place, tiling);
            #[unroll]
            for i in 0..comptime!(tiling.score_rows()) {
                let row = score_place.row + comptime!(i * score_row_step(tiling));
                let at = row * comptime!(tiling.score_stride()) + score_place.quad;
                let mut quad = quad_of(&scores, i);
                let mut factors = Quad::new(1.0f32);
                let pairs = Pairs {
                    record: work.record,
                    row: first + row,
                    column: start + score_place.quad,
                };
                if comptime!(options.scored()) {
                    let scoring = scoring(table, head, HIDDEN, options);
                    let scored = scored(quad, table, &pairs, &scoring, apart, rows_are, options);
                    quad = scored.values;
                    factors = scored.derivatives;
                }
                let own_weights = (quad - log_sum_exps).exp();
                weights[at] = own_weights;
                let mut grads = quad_of(&grad_weights, i);
                if comptime!(options.dropout) {
                    let dropping = dropping(table, &work, head);
                    let kept = kept(table, &pairs, &dropping, apart, rows_are);
                    weights[at] = own_weights * kept;
                    grads *= kept;
                }
                let mut gradient = own_weights * (grads - deltas);
                if comptime!(options.softcap) {
                    gradient *= factors;
                }
                grad_scores[at] = gradient;
            }
        }
        sync_cube();
        add_products::<N>(
            weights.as_slice(),
            grads.as_slice(),
            &sum_place,
            &mut value_sums,
            tiling,
        );
        add_products::<N>(
            grad_scores.as_slice(),
            queries.as_slice(),
            &sum_place,
            &mut key_sums,
            tiling,
        );
    }

    let grad_key_rows = keys_at(table, GRAD_KEY, &work, width);
    let grad_value_rows = keys_at(table, GRAD_VALUE, &work, width);
    #[unroll]
    for i in 0..comptime!(tiling.sum_rows()) {
        let row = first + sum_place.row + i;
        #[unroll]
        for j in 0..comptime!(tiling.sum_vectors()) {
            let vector = sum_vector(&sum_place, j, tiling);
            if row < count && vector < comptime!(tiling.vectors()) {
                let at = comptime!(i * tiling.sum_vectors() + j);
                grad_key[grad_key_rows.start + row * grad_key_rows.stride + vector] += key_sums[at];
                grad_value[grad_value_rows.start + row * grad_value_rows.stride + vector] +=
                    value_sums[at];
            }
        }
    }
}

/// The numbers of the columns of a unit's scores.
#[cube]
fn quad_of_columns(numbers: &[f32], place: &ScorePlace, #[comptime] tiling: Tiling) -> Quad {
    let mut quad = Quad::new(0.0f32);
    #[unroll]
    for j in 0..QUAD {
        quad.insert(j, numbers[place.quad + comptime!(j * tiling.quads())]);
    }
    quad
}
