//! What becomes of products in registers, beside softmax.

use cubecl::prelude::*;

use super::super::super::table::*;
use super::super::dropout::*;
use super::super::index::Work;
use super::super::scores::*;
use super::fragments::Fragments;
use super::work::{Tiling, row_of_half};

/// Which weights of a tile count: for each half of a unit a word, whose bit `2 n + i` is that of its column `8 n + i`. Empty if
/// all do.
pub(crate) type Kept = Sequence<Array<u32>>;

/// The first column of a tile that a unit has products with.
#[cube]
pub(crate) fn first_column(start: usize) -> usize {
    start + UNIT_POS_X as usize % 4 * 2
}

/// All weights count.
#[cube]
pub(crate) fn all_kept() -> Kept {
    Sequence::new()
}

/// Which weights of queries dropout keeps. Halves are queries from `first` on, up to `last`; columns keys from `start` on.
#[cube]
pub(crate) fn kept_of_queries(
    table: &[u32],
    work: &Work,
    first: usize,
    last: usize,
    start: usize,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
) -> Kept {
    let mut kept = Sequence::new();
    if comptime!(options.dropout) {
        let halves = comptime!(2 * tiling.row_tiles);
        let mut words = Array::<u32>::new(halves);
        let dropping = dropping(table, work, work.head);
        let keys = work.record + KEY_POSITION;
        #[unroll]
        for h in 0..halves {
            let row = clamped(first + row_of_half(h), last);
            let query = position(table, work.record + QUERY_POSITION, row);
            let mut word = 0u32;
            for n in 0..comptime!(tiling.tile_rows / 8) {
                let column = first_column(start) + 8 * n;
                let key = position(table, keys, column);
                let next = position(table, keys, column + 1);
                let bits = kept_of_two(&dropping, &query, &key, &next);
                word += bits << (2 * n as u32);
            }
            words[h] = word;
        }
        kept.push(words);
    }
    kept
}

/// Which weights of keys dropout keeps, for query head `head`. Halves are keys from `first` on, up to `last`; columns queries from
/// `start` on.
#[cube]
pub(crate) fn kept_of_keys(
    table: &[u32],
    work: &Work,
    head: usize,
    first: usize,
    last: usize,
    start: usize,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
) -> Kept {
    let mut kept = Sequence::new();
    if comptime!(options.dropout) {
        let halves = comptime!(2 * tiling.row_tiles);
        let mut words = Array::<u32>::new(halves);
        let dropping = dropping(table, work, head);
        let queries = work.record + QUERY_POSITION;
        #[unroll]
        for h in 0..halves {
            let row = clamped(first + row_of_half(h), last);
            let key = position(table, work.record + KEY_POSITION, row);
            let mut word = 0u32;
            for column in 0..comptime!(tiling.tile_rows / 4) {
                let of_unit = first_column(start) + column / 2 * 8 + column % 2;
                let query = position(table, queries, of_unit);
                word += u32::cast_from(keeps(&dropping, &query, &key)) << column as u32;
            }
            words[h] = word;
        }
        kept.push(words);
    }
    kept
}

/// Row `row`, or the last one for rows beyond it.
#[cube]
pub(crate) fn clamped(row: usize, last: usize) -> usize {
    select(row < last, row, last)
}

/// Column `column` of those of a unit for half `h`: the number, or 0 if it is dropped.
#[cube]
pub(crate) fn if_kept(
    kept: &Kept,
    #[comptime] h: usize,
    #[comptime] column: usize,
    number: f32,
) -> f32 {
    if comptime!(kept.len() == 1) {
        choose(
            kept.index(0usize)[h] & comptime!(1u32 << column) != 0,
            number,
            0.0f32,
        )
    } else {
        number
    }
}

/// The low word of the position of row `i` of those whose positions a record has at `at`, where scores depend on it.
#[cube]
pub(crate) fn place(table: &[u32], at: usize, i: usize, #[comptime] options: Options) -> u32 {
    if comptime!(options.slopes) {
        low_position(table, at, i)
    } else {
        0u32.runtime()
    }
}

/// Turns the products of a tile into scores. Halves are queries from `first` on, up to `last`; columns keys from `start` on.
#[cube]
pub(crate) fn score_products(
    products: &mut Fragments<f32>,
    table: &[u32],
    work: &Work,
    first: usize,
    last: usize,
    start: usize,
    scale: f32,
    minus_infinity: f32,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
) {
    let eights = comptime!(tiling.tile_rows / 8);
    let scoring = scoring(table, work.head, minus_infinity, options);
    let keys = work.record + KEY_POSITION;
    #[unroll]
    for h in 0..comptime!(2 * tiling.row_tiles) {
        let row = clamped(first + row_of_half(h), last);
        let query = place(table, work.record + QUERY_POSITION, row, options);
        #[unroll]
        for n in 0..eights {
            let fragment = products.index_mut(comptime!(h / 2 * eights + n));
            let mut pair = fragment[comptime!(h % 2)];
            #[unroll]
            for i in 0..2usize {
                let column = first_column(start) + comptime!(8 * n + i);
                let key = place(table, keys, column, options);
                let score = score(pair.extract(i) * scale, query, key, &scoring, options);
                pair.insert(i, score.value);
            }
            fragment[comptime!(h % 2)] = pair;
        }
    }
}
