//! Which weights are dropped: [`Dropout::keeps`](crate::Dropout::keeps) in words of 32 bits.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;
use crate::dropout::{MULTIPLIERS, ROUNDS, WEYL};

/// A global position in two's complement.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Position {
    pub(crate) low: u32,
    high: u32,
}

/// The position of row `i` of those whose positions a record has at `at`.
#[cube]
pub(crate) fn position(table: &[u32], at: usize, i: usize) -> Position {
    let (first, step) = (table[at], table[at + 2]);
    let way = i as u32 * step;
    let low = first + way;
    // What does not fit into the low words of the product and of the sum.
    let carried = high_half(i as u32, step) + u32::cast_from(low < first);
    Position {
        low,
        high: table[at + 1] + i as u32 * table[at + 3] + carried,
    }
}

/// The low word of [`position`].
#[cube]
pub(crate) fn low_position(table: &[u32], at: usize, i: usize) -> u32 {
    table[at] + i as u32 * table[at + 2]
}

/// What draws depend on beside positions.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Dropping {
    threshold: u32,
    seed: u32,
    seed_high: u32,
    stream: u32,
    branch: u32,
}

/// What the draws of a query head depend on.
#[cube]
pub(crate) fn dropping(table: &[u32], work: &Work, head: usize) -> Dropping {
    Dropping {
        threshold: table[THRESHOLD],
        seed: table[SEED],
        seed_high: table[SEED + 1],
        stream: table[FIRST_STREAM] + work.batch as u32 * table[STREAMS] + head as u32,
        branch: table[work.record + BRANCH],
    }
}

/// Whether the weight of a pair counts.
#[cube]
pub(crate) fn keeps(dropping: &Dropping, query: &Position, key: &Position) -> bool {
    draw_of(&draws(dropping, query, key), key) >= dropping.threshold
}

/// Which of the weights of a query for two keys count: bits 0 and 1. They share draws if both are of one quad.
#[cube]
pub(crate) fn kept_of_two(
    dropping: &Dropping,
    query: &Position,
    first: &Position,
    second: &Position,
) -> u32 {
    let of_first = draws(dropping, query, first);
    let mut draw = draw_of(&of_first, second);
    if first.low / 4 != second.low / 4 || first.high != second.high {
        draw = draw_of(&draws(dropping, query, second), second);
    }
    u32::cast_from(draw_of(&of_first, first) >= dropping.threshold)
        + 2u32 * u32::cast_from(draw >= dropping.threshold)
}

/// Four random words.
#[derive(CubeType, Clone, Copy)]
struct Draws {
    first: u32,
    second: u32,
    third: u32,
    fourth: u32,
}

/// The word of a key among those of its quad.
#[cube]
fn draw_of(draws: &Draws, key: &Position) -> u32 {
    let odd = key.low % 2 == 1;
    let early = one_of(odd, draws.second, draws.first);
    let late = one_of(odd, draws.fourth, draws.third);
    one_of(key.low % 4 < 2, early, late)
}

#[cube]
fn one_of(condition: bool, then: u32, otherwise: u32) -> u32 {
    select(condition, then, otherwise)
}

/// The draws of a query for a key and the others of its quad.
#[cube]
fn draws(dropping: &Dropping, query: &Position, key: &Position) -> Draws {
    let keys_high = key.high / 4 % 64;
    let counter = Draws {
        first: key.low / 4 + key.high % 4 * 0x4000_0000u32,
        second: query.low,
        third: dropping.stream,
        fourth: query.high % 1024 + keys_high * 1024 + dropping.branch * 65_536,
    };
    philox(counter, dropping.seed, dropping.seed_high)
}

/// Philox4x32-10; see [`philox`](crate::philox).
#[cube]
fn philox(counter: Draws, seed: u32, seed_high: u32) -> Draws {
    let (mut first, mut second) = (counter.first, counter.second);
    let (mut third, mut fourth) = (counter.third, counter.fourth);
    let (mut key, mut key_high) = (seed, seed_high);
    for _ in 0..comptime!(ROUNDS as u32) {
        let of_first = high_half(first, MULTIPLIERS[0]);
        let of_third = high_half(third, MULTIPLIERS[1]);
        let low_of_first = first * MULTIPLIERS[0];
        first = of_third ^ second ^ key;
        second = third * MULTIPLIERS[1];
        third = of_first ^ fourth ^ key_high;
        fourth = low_of_first;
        key += WEYL[0];
        key_high += WEYL[1];
    }
    Draws {
        first,
        second,
        third,
        fourth,
    }
}

/// The high half of a product.
#[cube]
fn high_half(a: u32, b: u32) -> u32 {
    a.mul_hi(b)
}
