//! Rows on their way from global to shared memory.

// One of the branches may be chosen by constants.
#![allow(clippy::if_same_then_else)]

use cubecl::prelude::barrier::copy_async;
use cubecl::prelude::*;

use super::super::index::RowsAt;
use super::fragments::{Eight, SharedRows};
use super::work::Tiling;

/// A tensor in global memory, in vectors or single elements.
type Source<F, N> = [Vector<F, N>];

/// Shared memory for rows.
#[cube]
pub(crate) fn rows_in_shared_memory<F: Float>(#[comptime] vectors: usize) -> SharedRows<F> {
    Shared::<[Vector<F, Eight>]>::new_aligned_slice(vectors, 16usize)
}

/// Begins to copy rows `first..first + rows` of `count` into shared memory at `to`; rows beyond `count` become zeros.
///
/// All units of the cube take part. The rows are there when all have come out of [`arrive`].
#[cube]
pub(crate) fn fetch<F: Float, N: Size>(
    source: &[Vector<F, N>],
    from: &RowsAt,
    first: usize,
    count: usize,
    shared: &mut SharedRows<F>,
    to: usize,
    #[comptime] rows: usize,
    #[comptime] tiling: Tiling,
) {
    let width = comptime!(tiling.head_dim / 8);
    let vectors = comptime!(rows * width);
    let units = comptime!(tiling.units());
    let unit = UNIT_POS as usize;
    let unit_row = unit / width;
    let unit_column = unit % width;
    #[unroll]
    for pass in 0..comptime!(vectors.div_ceil(units)) {
        // Where a pass takes whole rows, units stay in their columns, and compilers see it.
        let vector = unit + comptime!(pass * units);
        let mut row = vector / width;
        let mut column = vector % width;
        if comptime!(units % width == 0) {
            row = unit_row + comptime!(pass * units / width);
            column = unit_column;
        }
        if comptime!((pass + 1) * units <= vectors) {
            fetch_vector::<F, N>(
                source,
                from,
                first + row,
                count,
                column,
                shared,
                to + row * comptime!(tiling.pitch()) + column,
                tiling,
            );
        } else if vector < vectors {
            fetch_vector::<F, N>(
                source,
                from,
                first + row,
                count,
                column,
                shared,
                to + row * comptime!(tiling.pitch()) + column,
                tiling,
            );
        }
    }
}

/// Begins to copy the same rows of two tensors, to the same place of each one's shared memory; see [`fetch`].
#[cube]
pub(crate) fn fetch_both<F: Float, N: Size>(
    sources: (&Source<F, N>, &Source<F, N>),
    from: (&RowsAt, &RowsAt),
    first: usize,
    count: usize,
    shared: (&mut SharedRows<F>, &mut SharedRows<F>),
    to: usize,
    #[comptime] rows: usize,
    #[comptime] tiling: Tiling,
) {
    fetch::<F, N>(sources.0, from.0, first, count, shared.0, to, rows, tiling);
    fetch::<F, N>(sources.1, from.1, first, count, shared.1, to, rows, tiling);
}

#[cube]
fn fetch_vector<F: Float, N: Size>(
    source: &[Vector<F, N>],
    from: &RowsAt,
    row: usize,
    count: usize,
    column: usize,
    shared: &mut SharedRows<F>,
    place: usize,
    #[comptime] tiling: Tiling,
) {
    if row < count {
        let element = from.start + row * from.stride + column * 8;
        if comptime!(tiling.vectors) {
            let at = element / 8;
            if comptime!(tiling.assembly) {
                let whole = source[at..at + 1].with_vector_size::<Eight>();
                copy_async(whole, &mut shared[place..place + 1], 8u32);
            } else {
                shared[place] = Vector::cast_from(source[at]);
            }
        } else {
            let mut whole = Vector::<F, Eight>::empty();
            #[unroll]
            for i in 0..8usize {
                whole.insert(i, F::cast_from(source[element + i]));
            }
            shared[place] = whole;
        }
    } else {
        shared[place] = Vector::new(F::from_int(0));
    }
}

/// Begins to copy the numbers of rows `first..first + rows` of `count`, one each, into shared memory at `to`; `beyond` for rows
/// beyond `count`.
#[cube]
pub(crate) fn fetch_numbers(
    source: &[f32],
    from: &RowsAt,
    first: usize,
    count: usize,
    shared: &mut Shared<[f32]>,
    to: usize,
    beyond: f32,
    #[comptime] tiling: Tiling,
) {
    let unit = UNIT_POS as usize;
    if unit < comptime!(tiling.tile_rows) {
        let place = to + unit;
        if first + unit < count {
            let at = from.start + (first + unit) * from.stride;
            if comptime!(tiling.assembly) {
                copy_async(&source[at..at + 1], &mut shared[place..place + 1], 1u32);
            } else {
                shared[place] = source[at];
            }
        } else {
            shared[place] = beyond;
        }
    }
}

/// Waits until what this cube has begun to fetch is there. Then nothing that was read before is still needed by anyone.
#[cube]
pub(crate) fn arrive(#[comptime] tiling: Tiling) {
    if comptime!(tiling.assembly) {
        gpu_asm!("cp.async.wait_all;");
    }
    sync_cube();
}
