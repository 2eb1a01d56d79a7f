//! Matrices in the registers of a plane.
//!
//! A product is `m16n8k16`: 16 rows of the left matrix times 8 columns of the right one, over 16 elements. With `group = lane / 4`
//! and `pair = lane % 4`, a unit holds pairs of neighbouring elements:
//!
//! - of the left matrix, 16 x 16: rows `group` and `group + 8` of columns `2 pair..`, then both rows of columns `2 pair + 8..`;
//! - of the right matrix, 16 x 8: rows `2 pair..` of column `group`, then rows `2 pair + 8..`;
//! - of the sums, 16 x 8: columns `2 pair..` of rows `group` and `group + 8`.
//!
//! So the sums of two neighbouring products, rounded, are a left matrix. NVIDIA documents these layouts with `mma.sync`.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::super::scores::choose;
use super::scores::{Kept, if_kept};
use super::work::Tiling;

/// Elements of a register.
pub(crate) type Pair = Const<2>;
/// Elements of 16 bytes: a row of the 8 x 8 matrices that are loaded from shared memory.
pub(crate) type Eight = Const<8>;
/// Rows in shared memory.
pub(crate) type SharedRows<F> = Shared<[Vector<F, Eight>]>;
/// Matrices in registers, 16 x 16 left ones or 16 x 8 sums.
pub(crate) type Fragments<E> = Sequence<Array<Vector<E, Pair>>>;

/// Where a unit finds its rows of 8 x 8 matrices, in vectors of 8 elements beyond the first of a 16 x 16 matrix.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lane {
    /// Quarters in the order: rows 0 to 7, rows 8 to 15, then the other 8 columns.
    down: usize,
    /// Quarters in the order: columns 0 to 7, columns 8 to 15, then the other 8 rows.
    across: usize,
}

#[cube]
pub(crate) fn lane(#[comptime] tiling: Tiling) -> Lane {
    let unit = UNIT_POS_X as usize;
    let pitch = comptime!(tiling.pitch());
    Lane {
        down: unit % 16 * pitch + unit / 16,
        across: (unit / 16 * 8 + unit % 8) * pitch + unit / 8 % 2,
    }
}

/// Sums that are zero.
#[cube]
pub(crate) fn zeros(#[comptime] count: usize) -> Fragments<f32> {
    let mut all = Sequence::new();
    #[unroll]
    for _ in 0..count {
        let mut one = Array::<Vector<f32, Pair>>::new(2usize);
        one[0] = Vector::new(0.0f32);
        one[1] = Vector::new(0.0f32);
        all.push(one);
    }
    all
}

/// Loads four 8 x 8 matrices.
#[cube]
fn load<F: Float>(
    shared: &SharedRows<F>,
    at: usize,
    #[comptime] transpose: bool,
) -> Array<Vector<F, Pair>> {
    let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    definition.load_matrix::<Vector<F, Eight>, Pair>(
        &shared[at..at + 1],
        MatrixIdent::A,
        4usize,
        transpose,
    )
}

/// Adds two neighbouring products to their sums. `right` are four registers, two for each product.
#[cube]
fn multiply<F: Float>(
    left: &Array<Vector<F, Pair>>,
    right: &Array<Vector<F, Pair>>,
    sums: &mut Fragments<f32>,
    #[comptime] first: usize,
) {
    let definition = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for n in 0..2usize {
        let mut half = Array::<Vector<F, Pair>>::new(2usize);
        half[0] = right[comptime!(2 * n)];
        half[1] = right[comptime!(2 * n + 1)];
        definition.execute_inplace(left, &half, sums.index_mut(comptime!(first + n)));
    }
}

/// The rows of a plane as left matrices, if they are to stay in registers; else none.
#[cube]
pub(crate) fn hold<F: Float>(
    rows: &SharedRows<F>,
    rows_at: usize,
    lane: &Lane,
    #[comptime] tiling: Tiling,
) -> Fragments<F> {
    let mut held = Sequence::new();
    if comptime!(tiling.rows_in_registers) {
        #[unroll]
        for k in 0..comptime!(tiling.head_dim / 16) {
            #[unroll]
            for r in 0..comptime!(tiling.row_tiles) {
                held.push(left::<F>(rows, rows_at, lane, k, r, tiling));
            }
        }
    }
    held
}

/// The left matrix of sixteen rows `r` and sixteen columns `k`.
#[cube]
fn left<F: Float>(
    rows: &SharedRows<F>,
    rows_at: usize,
    lane: &Lane,
    #[comptime] k: usize,
    #[comptime] r: usize,
    #[comptime] tiling: Tiling,
) -> Array<Vector<F, Pair>> {
    let offset = comptime!(16 * r * tiling.pitch() + 2 * k);
    load::<F>(rows, rows_at + lane.down + offset, false)
}

/// The products of the rows of a plane with the rows of a tile: sums `r * tile_rows / 8 + n` are those of sixteen rows `r` with
/// eight rows `n` of the tile.
#[cube]
pub(crate) fn row_products<F: Float>(
    held: &Fragments<F>,
    rows: &SharedRows<F>,
    rows_at: usize,
    tile: &SharedRows<F>,
    tile_at: usize,
    lane: &Lane,
    #[comptime] tiling: Tiling,
) -> Fragments<f32> {
    let row_tiles = comptime!(tiling.row_tiles);
    let eights = comptime!(tiling.tile_rows / 8);
    let mut sums = zeros(comptime!(row_tiles * eights));
    #[unroll]
    for k in 0..comptime!(tiling.head_dim / 16) {
        let mut loaded = Fragments::<F>::new();
        if comptime!(!tiling.rows_in_registers) {
            #[unroll]
            for r in 0..row_tiles {
                loaded.push(left::<F>(rows, rows_at, lane, k, r, tiling));
            }
        }
        #[unroll]
        for n in 0..comptime!(eights / 2) {
            let offset = comptime!(16 * n * tiling.pitch() + 2 * k);
            let right = load::<F>(tile, tile_at + lane.across + offset, false);
            #[unroll]
            for r in 0..row_tiles {
                let first = comptime!(r * eights + 2 * n);
                if comptime!(tiling.rows_in_registers) {
                    multiply::<F>(
                        held.index(comptime!(k * row_tiles + r)),
                        &right,
                        &mut sums,
                        first,
                    );
                } else {
                    multiply::<F>(loaded.index(r), &right, &mut sums, first);
                }
            }
        }
    }
    sums
}

/// Adds the rows of a tile, weighted: `sums += weights * tile`. Weights are laid out as [`row_products`] leaves its sums; those
/// that are kept are rounded, others are 0. Sums `r * head_dim / 8 + n` are eight columns `n` of sixteen rows `r`.
#[cube]
pub(crate) fn add_weighted_rows<F: Float>(
    weights: &Fragments<f32>,
    kept: &Kept,
    tile: &SharedRows<F>,
    tile_at: usize,
    sums: &mut Fragments<f32>,
    lane: &Lane,
    #[comptime] tiling: Tiling,
) {
    let row_tiles = comptime!(tiling.row_tiles);
    let eights = comptime!(tiling.tile_rows / 8);
    #[unroll]
    for k in 0..comptime!(eights / 2) {
        let mut lefts = Fragments::<F>::new();
        #[unroll]
        for r in 0..row_tiles {
            let mut rounded = Array::<Vector<F, Pair>>::new(4usize);
            #[unroll]
            for half in 0..2usize {
                let pairs = weights.index(comptime!(r * eights + 2 * k + half));
                #[unroll]
                for h in 0..2usize {
                    let (of_unit, column) = comptime!((2 * r + h, 4 * k + 2 * half));
                    let pair = pair_if_kept(pairs[h], kept, of_unit, column);
                    rounded[comptime!(2 * half + h)] = Vector::cast_from(pair);
                }
            }
            lefts.push(rounded);
        }
        #[unroll]
        for n in 0..comptime!(tiling.head_dim / 16) {
            let offset = comptime!(16 * k * tiling.pitch() + 2 * n);
            let right = load::<F>(tile, tile_at + lane.down + offset, true);
            #[unroll]
            for r in 0..row_tiles {
                let first = comptime!(r * (tiling.head_dim / 8) + 2 * n);
                multiply::<F>(lefts.index(r), &right, sums, first);
            }
        }
    }
}

/// Columns `column` and `column + 1` of those of a unit for half `h`, each 0 if it is dropped.
#[cube]
fn pair_if_kept(
    pair: Vector<f32, Pair>,
    kept: &Kept,
    #[comptime] h: usize,
    #[comptime] column: usize,
) -> Vector<f32, Pair> {
    if comptime!(kept.len() == 1) {
        let mut both = Vector::<f32, Pair>::empty();
        #[unroll]
        for i in 0..2usize {
            both.insert(i, if_kept(kept, h, comptime!(column + i), pair.extract(i)));
        }
        both
    } else {
        pair
    }
}

/// Two to the power of `x`; 0 for minus infinity.
#[cube]
pub(crate) fn power_of_two(x: f32, #[comptime] tiling: Tiling) -> f32 {
    if comptime!(tiling.assembly) {
        let result: f32;
        gpu_asm!("ex2.approx.ftz.f32 {y}, {x};", y = out(_) result, x = in(_) x, options(nomem));
        result
    } else {
        (x * core::f32::consts::LN_2).exp()
    }
}

/// The larger of two numbers.
#[cube]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    max(a, b)
}

/// The sum over the four units that share rows.
#[cube]
pub(crate) fn sum_of_group(own: f32) -> f32 {
    let two = own + plane_shuffle_xor(own, 1u32);
    two + plane_shuffle_xor(two, 2u32)
}

/// Puts `hidden` in the place of products with rows of a tile, which begins at row `start`, that a half does not see: those
/// at `border` and after it, or if `before` those before it.
#[cube]
pub(crate) fn hide(
    products: &mut Fragments<f32>,
    border: &Array<u32>,
    start: usize,
    hidden: f32,
    #[comptime] before: bool,
    #[comptime] tiling: Tiling,
) {
    let eights = comptime!(tiling.tile_rows / 8);
    let column = start as u32 + UNIT_POS_X % 4 * 2;
    #[unroll]
    for h in 0..comptime!(2 * tiling.row_tiles) {
        #[unroll]
        for n in 0..eights {
            let fragment = products.index_mut(comptime!(h / 2 * eights + n));
            let mut pair = fragment[comptime!(h % 2)];
            #[unroll]
            for i in 0..2usize {
                let is_before = column + comptime!((8 * n + i) as u32) < border[h];
                if comptime!(before) {
                    pair.insert(i, choose(is_before, hidden, pair.extract(i)));
                } else {
                    pair.insert(i, choose(is_before, pair.extract(i), hidden));
                }
            }
            fragment[comptime!(h % 2)] = pair;
        }
    }
}

/// What is subtracted from exponents of two for a log-sum-exp. A row without one has weights 0.
#[cube]
pub(crate) fn exponent_of(log_sum_exp: f32, minus_infinity: f32) -> f32 {
    let nothing = log_sum_exp == minus_infinity;
    choose(
        nothing,
        -minus_infinity,
        log_sum_exp * core::f32::consts::LOG2_E,
    )
}

/// Adds the sums of half `h` of a unit, times `factor`, to the row that begins at `at`.
#[cube]
pub(crate) fn add_to_row(
    sums: &Fragments<f32>,
    #[comptime] h: usize,
    factor: f32,
    target: &mut [f32],
    at: usize,
    #[comptime] tiling: Tiling,
) {
    let columns = comptime!(tiling.head_dim / 8);
    let pair = at + UNIT_POS_X as usize % 4 * 2;
    #[unroll]
    for n in 0..columns {
        let sum = sums.index(comptime!(h / 2 * columns + n))[comptime!(h % 2)];
        let to = pair + comptime!(8 * n);
        target[to] += sum.extract(0usize) * factor;
        target[to + 1] += sum.extract(1usize) * factor;
    }
}
