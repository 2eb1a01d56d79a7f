//! The forward pass: online softmax over tiles of keys.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// Adds the blocks of a table to the state. A unit owns a query row: it is in one block of the launch at most.
#[cube(launch)]
pub(crate) fn forward<F: Float>(
    query: &[F],
    key: &[F],
    value: &[F],
    table: &[u32],
    output: &mut [f32],
    max: &mut [f32],
    denominator: &mut [f32],
    scale: f32,
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
    let state_at = row_offset(table, STATE, batch, head, row);
    let output_at = state_at * head_dim;

    let mut own_query = Array::<f32>::new(head_dim);
    let mut own_output = Array::<f32>::new(head_dim);
    for d in 0..head_dim {
        own_query[d] = f32::cast_from(query[query_at + d]) * scale;
        own_output[d] = output[output_at + d];
    }
    let mut own_max = max[state_at];
    let mut own_denominator = denominator[state_at];

    let key_first = word(table, record + KEY_FIRST);
    let key_step = word(table, record + KEY_STEP);
    let key_count = word(table, record + KEY_COUNT);
    let key_at = row_offset(table, KEY, batch, kv_head, key_first);
    let key_stride = key_step * row_stride(table, KEY);
    let value_at = row_offset(table, VALUE, batch, kv_head, key_first);
    let value_stride = key_step * row_stride(table, VALUE);

    let seen = either(active, visible(table, record, own), 0usize);
    // The last query of the cube sees the most keys.
    let last = least(first + units, count) - 1;
    let most = either(first < count, visible(table, record, last), 0usize);

    let mut keys = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    let mut values = Shared::<[f32]>::new_slice(comptime!(tile * head_dim));
    let mut scores = Array::<f32>::new(tile);
    let mut tile_output = Array::<f32>::new(head_dim);
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
        let mut new_max = own_max;
        for j in 0..end {
            let at = j * head_dim;
            let mut score = 0.0f32;
            for d in 0..head_dim {
                score += own_query[d] * keys[at + d];
            }
            scores[j] = score;
            if score > new_max {
                new_max = score;
            }
        }
        // Sums of tiles are added, not single terms: errors grow with the number of tiles.
        let mut tile_denominator = 0.0f32;
        for d in 0..head_dim {
            tile_output[d] = 0.0f32;
        }
        for j in 0..end {
            let at = j * head_dim;
            let weight = (scores[j] - new_max).exp();
            tile_denominator += weight;
            for d in 0..head_dim {
                tile_output[d] += weight * values[at + d];
            }
        }
        let correction = (own_max - new_max).exp();
        own_denominator = own_denominator * correction + tile_denominator;
        for d in 0..head_dim {
            own_output[d] = own_output[d] * correction + tile_output[d];
        }
        own_max = new_max;
    }

    if active {
        for d in 0..head_dim {
            output[output_at + d] = own_output[d];
        }
        max[state_at] = own_max;
        denominator[state_at] = own_denominator;
    }
}
