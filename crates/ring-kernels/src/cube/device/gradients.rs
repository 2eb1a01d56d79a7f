//! The backward pass: once over the keys of every query row, once over the queries of every key row.

use cubecl::prelude::*;

use super::super::table::*;
use super::super::tiling::{QUAD, Tiling};
use super::index::*;
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
    #[define(F)] _element: ElemType,
) {
    let width = comptime!(tiling.width);
    let rows = comptime!(tiling.rows);
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
    let mut seen = Shared::<[u32]>::new_slice(rows);
    let mut log_sum_exps = Shared::<[f32]>::new_slice(rows);
    let mut deltas = Shared::<[f32]>::new_slice(rows);

    if unit < rows {
        seen[unit] = seen_keys(table, &work, first + unit, count) as u32;
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
    // The first query of the cube sees the fewest keys, the last one the most.
    let fewest = seen_keys(table, &work, first, count);
    let last = least(first + rows, count) - 1;
    let most = either(first < count, visible(table, work.record, last), 0usize);
    let score_place = score_place(tiling);
    let computes_scores = score_place.row < comptime!(score_row_step(tiling));
    let sum_place = sum_place(tiling);
    let mut sums = no_sums::<N>(tiling);

    for t in 0..most.div_ceil(comptime!(tiling.columns)) {
        let start = t * comptime!(tiling.columns);
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
            if start + comptime!(tiling.columns) > fewest {
                hide_from(&mut scores, seen.as_slice(), &score_place, start, tiling);
            }
            #[unroll]
            for i in 0..comptime!(tiling.score_rows()) {
                let row = score_place.row + comptime!(i * score_row_step(tiling));
                let weights = (quad_of(&scores, i) - Quad::new(log_sum_exps[row])).exp();
                grad_scores[row * comptime!(tiling.score_stride()) + score_place.quad] =
                    weights * (quad_of(&grad_weights, i) - Quad::new(deltas[row]));
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
    #[define(F)] _element: ElemType,
) {
    let width = comptime!(tiling.width);
    let rows = comptime!(tiling.rows);
    let tile_columns = comptime!(tiling.columns);
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
    let mut seen_from = Shared::<[u32]>::new_slice(rows);
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
    if unit < rows {
        seen_from[unit] = first_seeing(table, work.record, least(first + unit, count - 1)) as u32;
    }

    // The first key of the cube is seen by the most queries, the last one by the fewest.
    let earliest = first_seeing(table, work.record, least(first, count - 1));
    let latest = first_seeing(table, work.record, least(first + rows, count) - 1);
    let tiles = either(
        first < count,
        (query_count - earliest).div_ceil(tile_columns),
        0usize,
    );
    let score_place = score_place(tiling);
    let computes_scores = score_place.row < comptime!(score_row_step(tiling));
    let sum_place = sum_place(tiling);
    let mut key_sums = no_sums::<N>(tiling);
    let mut value_sums = no_sums::<N>(tiling);

    // The tiles of all query heads of the group, one head after the other.
    let all_tiles = tiles * word(table, GROUP);
    for t in 0..all_tiles {
        let head = work.head + t / tiles;
        let start = earliest + t % tiles * tile_columns;
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
            if start < latest {
                hide_before(
                    &mut scores,
                    seen_from.as_slice(),
                    &score_place,
                    start,
                    tiling,
                );
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
                let own_weights = (quad_of(&scores, i) - log_sum_exps).exp();
                weights[at] = own_weights;
                grad_scores[at] = own_weights * (quad_of(&grad_weights, i) - deltas);
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
