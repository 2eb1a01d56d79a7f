//! The backward pass: once over the keys of every query row, once over the queries of every key row.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// Adds the query gradients of the blocks of a table. A unit owns a query row: it is in one block of the launch at most.
#[cube(launch)]
pub(crate) fn query_gradients<F: Float>(
    query: &[F],
    key: &[F],
    value: &[F],
    grad_output: &[F],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_query: &mut [f32],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] head_dim: usize,
    #[comptime] units: usize,
    #[comptime] tile: usize,
    #[define(F)] _element: ElemType,
) {
    let unit = UNIT_POS as usize;
    let record = record(table);
    let group = word(table, GROUP);
    let batch = CUBE_POS_Z as usize / group;
    let kv_head = word(table, record + KV_HEAD);
    let head = kv_head * group + CUBE_POS_Z as usize % group;

    let count = word(table, record + QUERY_COUNT);
    let first = CUBE_POS_X as usize * units;
    let active = first + unit < count;
    let own = either(active, first + unit, 0usize);
    let row = word(table, record + QUERY_FIRST) + own * word(table, record + QUERY_STEP);
    let query_at = row_offset(table, QUERY, batch, head, row);
    let grad_at = row_offset(table, GRAD_OUTPUT, batch, head, row);
    let state_at = row_offset(table, STATE, batch, head, row);

    let mut own_query = Array::<f32>::new(head_dim);
    let mut own_grad = Array::<f32>::new(head_dim);
    let mut sum = Array::<f32>::new(head_dim);
    for d in 0..head_dim {
        own_query[d] = f32::cast_from(query[query_at + d]) * scale;
        own_grad[d] = f32::cast_from(grad_output[grad_at + d]) * output_scale;
        sum[d] = 0.0f32;
    }
    let own_log_sum_exp = log_sum_exp[state_at];
    let own_delta = delta[state_at];

    let key_first = word(table, record + KEY_FIRST);
    let key_step = word(table, record + KEY_STEP);
    let key_count = word(table, record + KEY_COUNT);
    let key_at = row_offset(table, KEY, batch, kv_head, key_first);
    let key_stride = key_step * row_stride(table, KEY);
    let value_at = row_offset(table, VALUE, batch, kv_head, key_first);
    let value_stride = key_step * row_stride(table, VALUE);

    let contributes = active && own_log_sum_exp != minus_infinity;
    let seen = either(contributes, visible(table, record, own), 0usize);
    // The last query of the cube sees the most keys.
    let last = least(first + units, count) - 1;
    let most = either(first < count, visible(table, record, last), 0usize);

    let mut keys = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    let mut values = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    for t in 0..most.div_ceil(tile) {
        let start = t * tile;
        sync_cube();
        let mut element = unit;
        while element < tile * head_dim {
            let j = start + element / head_dim;
            let d = element % head_dim;
            if j < key_count {
                keys[element] = f32::cast_from(key[key_at + j * key_stride + d]);
                values[element] = f32::cast_from(value[value_at + j * value_stride + d]);
            }
            element += units;
        }
        sync_cube();
        let end = either(seen > start, least(seen - least(start, seen), tile), 0usize);
        for j in 0..end {
            let at = j * head_dim;
            let mut score = 0.0f32;
            let mut grad_weight = 0.0f32;
            for d in 0..head_dim {
                score += own_query[d] * keys[at + d];
                grad_weight += own_grad[d] * values[at + d];
            }
            let weight = (score - own_log_sum_exp).exp();
            let grad_score = weight * (grad_weight - own_delta);
            for d in 0..head_dim {
                sum[d] += grad_score * keys[at + d];
            }
        }
    }

    if contributes {
        for d in 0..head_dim {
            grad_query[state_at * head_dim + d] += scale * sum[d];
        }
    }
}

/// Adds the key and value gradients of the blocks of a table. A unit owns a key row: it is in one block of the launch at most.
#[cube(launch)]
pub(crate) fn key_gradients<F: Float>(
    query: &[F],
    key: &[F],
    value: &[F],
    grad_output: &[F],
    log_sum_exp: &[f32],
    delta: &[f32],
    table: &[u32],
    grad_key: &mut [f32],
    grad_value: &mut [f32],
    scale: f32,
    output_scale: f32,
    minus_infinity: f32,
    #[comptime] head_dim: usize,
    #[comptime] units: usize,
    #[comptime] tile: usize,
    #[define(F)] _element: ElemType,
) {
    let unit = UNIT_POS as usize;
    let record = record(table);
    let group = word(table, GROUP);
    let batch = CUBE_POS_Z as usize;
    let kv_head = word(table, record + KV_HEAD);

    let count = word(table, record + KEY_COUNT);
    let first = CUBE_POS_X as usize * units;
    let active = first + unit < count;
    let own = either(active, first + unit, 0usize);
    let row = word(table, record + KEY_FIRST) + own * word(table, record + KEY_STEP);
    let key_at = row_offset(table, KEY, batch, kv_head, row);
    let value_at = row_offset(table, VALUE, batch, kv_head, row);

    let mut own_key = Array::<f32>::new(head_dim);
    let mut own_value = Array::<f32>::new(head_dim);
    let mut key_sum = Array::<f32>::new(head_dim);
    let mut value_sum = Array::<f32>::new(head_dim);
    for d in 0..head_dim {
        own_key[d] = f32::cast_from(key[key_at + d]) * scale;
        own_value[d] = f32::cast_from(value[value_at + d]) * output_scale;
        key_sum[d] = 0.0f32;
        value_sum[d] = 0.0f32;
    }

    let query_first = word(table, record + QUERY_FIRST);
    let query_step = word(table, record + QUERY_STEP);
    let query_count = word(table, record + QUERY_COUNT);
    let query_stride = query_step * row_stride(table, QUERY);
    let grad_stride = query_step * row_stride(table, GRAD_OUTPUT);
    let state_stride = query_step * row_stride(table, STATE);

    let seen_from = either(active, first_seeing(table, record, own), query_count);
    // The first key of the cube is seen by the most queries.
    let earliest = either(
        first < count,
        first_seeing(table, record, least(first, count - 1)),
        query_count,
    );

    let mut queries = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    let mut grads = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    let mut log_sum_exps = Shared::<[f32]>::new_slice(tile);
    let mut deltas = Shared::<[f32]>::new_slice(tile);
    for member in 0..group {
        let head = kv_head * group + member;
        let query_at = row_offset(table, QUERY, batch, head, query_first);
        let grad_at = row_offset(table, GRAD_OUTPUT, batch, head, query_first);
        let state_at = row_offset(table, STATE, batch, head, query_first);
        for t in 0..(query_count - earliest).div_ceil(tile) {
            let start = earliest + t * tile;
            sync_cube();
            let mut element = unit;
            while element < tile * head_dim {
                let i = start + element / head_dim;
                let d = element % head_dim;
                if i < query_count {
                    queries[element] = f32::cast_from(query[query_at + i * query_stride + d]);
                    grads[element] = f32::cast_from(grad_output[grad_at + i * grad_stride + d]);
                    if d == 0 {
                        log_sum_exps[element / head_dim] = log_sum_exp[state_at + i * state_stride];
                        deltas[element / head_dim] = delta[state_at + i * state_stride];
                    }
                }
                element += units;
            }
            sync_cube();
            let end = least(query_count - start, tile);
            let begin = least(seen_from - least(start, seen_from), end);
            for i in begin..end {
                let at = i * head_dim;
                let of_row = log_sum_exps[i];
                if of_row != minus_infinity {
                    let mut score = 0.0f32;
                    let mut grad_weight = 0.0f32;
                    for d in 0..head_dim {
                        score += own_key[d] * queries[at + d];
                        grad_weight += own_value[d] * grads[at + d];
                    }
                    let weight = (score - of_row).exp();
                    let grad_score = weight * (grad_weight - deltas[i]);
                    for d in 0..head_dim {
                        key_sum[d] += grad_score * queries[at + d];
                        value_sum[d] += weight * grads[at + d];
                    }
                }
            }
        }
    }

    if active {
        let grad_key_at = row_offset(table, GRAD_KEY, batch, kv_head, row);
        let grad_value_at = row_offset(table, GRAD_VALUE, batch, kv_head, row);
        for d in 0..head_dim {
            grad_key[grad_key_at + d] += scale * key_sum[d];
            grad_value[grad_value_at + d] += output_scale * value_sum[d];
        }
    }
}
