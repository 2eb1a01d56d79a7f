//! Tiles: rows in shared memory, and products of them that the units of a cube compute together.
//!
//! Rows lie [`Tiling::row_stride`] vectors apart, as f32 whatever they were. Scores lie in vectors of four columns, see
//! [`Tiling::quads`].

use cubecl::prelude::*;

use super::super::tiling::{QUAD, Tiling};
use super::index::*;

/// Four numbers.
pub(crate) type Quad = Vector<f32, Const<4>>;

/// Room for a tile of rows.
#[cube]
pub(crate) fn room_for_rows<N: Size>(
    #[comptime] rows: usize,
    #[comptime] tiling: Tiling,
) -> Shared<[Vector<f32, N>]> {
    Shared::<[Vector<f32, N>]>::new_slice(comptime!(rows * tiling.row_stride()))
}

/// Room for a tile of scores.
#[cube]
pub(crate) fn room_for_scores(#[comptime] tiling: Tiling) -> Shared<[Quad]> {
    Shared::<[Quad]>::new_slice(comptime!(tiling.rows * tiling.score_stride()))
}

/// Copies rows `first` and following into a tile of `count`, times `factor`. Rows from `end` on are zero.
#[cube]
pub(crate) fn load<F: Float, N: Size>(
    source: &[Vector<F, N>],
    rows: &RowsAt,
    first: usize,
    end: usize,
    factor: f32,
    tile: &mut [Vector<f32, N>],
    #[comptime] count: usize,
    #[comptime] tiling: Tiling,
) {
    let vectors = comptime!(tiling.vectors());
    let all = comptime!(count * vectors);
    for step in 0..comptime!(all.div_ceil(tiling.units)) {
        let at = UNIT_POS as usize + step * comptime!(tiling.units);
        if at < all {
            let row = at / vectors;
            let from = rows.start + (first + row) * rows.stride + at % vectors;
            tile[row * comptime!(tiling.row_stride()) + at % vectors] =
                scaled_or_zero(source, from, factor, first + row < end);
        }
    }
}

/// Vector `at` times `factor`, or zero, without a look at the vector.
#[cube]
fn scaled_or_zero<F: Float, N: Size>(
    source: &[Vector<F, N>],
    at: usize,
    factor: f32,
    counts: bool,
) -> Vector<f32, N> {
    let mut vector = Vector::<f32, N>::new(0.0f32);
    if counts {
        vector = Vector::<f32, N>::cast_from(source[at]) * Vector::new(factor);
    }
    vector
}

/// [`load`] of queries. Those that do not contribute are zero, whatever they hold; so is what they would be multiplied by.
#[cube]
pub(crate) fn load_contributing<F: Float, N: Size>(
    source: &[Vector<F, N>],
    rows: &RowsAt,
    first: usize,
    log_sum_exps: &[f32],
    factor: f32,
    tile: &mut [Vector<f32, N>],
    #[comptime] count: usize,
    #[comptime] tiling: Tiling,
) {
    let vectors = comptime!(tiling.vectors());
    let all = comptime!(count * vectors);
    for step in 0..comptime!(all.div_ceil(tiling.units)) {
        let at = UNIT_POS as usize + step * comptime!(tiling.units);
        if at < all {
            let row = at / vectors;
            let from = rows.start + (first + row) * rows.stride + at % vectors;
            tile[row * comptime!(tiling.row_stride()) + at % vectors] =
                scaled_or_zero(source, from, factor, log_sum_exps[row] < NOTHING_SEEN);
        }
    }
}

/// Log-sum-exp, in shared memory, of a query that does not contribute: all its weights are 0.
pub(crate) const NOTHING_SEEN: f32 = 1e30;

/// The score of a pair that does not count.
pub(crate) const HIDDEN: f32 = f32::MIN;

/// Which scores a unit computes: rows `row + score_rows * i`, columns `quad + quads * j`.
#[derive(CubeType)]
pub(crate) struct ScorePlace {
    /// The first row; beyond the tile if the unit has none.
    pub(crate) row: usize,
    /// The first column.
    pub(crate) quad: usize,
}

/// Which scores this unit computes.
#[cube]
pub(crate) fn score_place(#[comptime] tiling: Tiling) -> ScorePlace {
    let quads = comptime!(tiling.quads());
    ScorePlace {
        row: UNIT_POS as usize / quads,
        quad: UNIT_POS as usize % quads,
    }
}

/// Distance of the rows of a unit's scores.
pub(crate) fn score_row_step(tiling: Tiling) -> usize {
    tiling.rows / tiling.score_rows()
}

/// Scores of nothing, of those that a unit computes: quads of its rows.
#[cube]
pub(crate) fn no_scores(#[comptime] tiling: Tiling) -> Array<f32> {
    let len = comptime!(tiling.score_rows() * QUAD);
    let mut scores = Array::<f32>::new(len);
    #[unroll]
    for at in 0..len {
        scores[at] = 0.0f32;
    }
    scores
}

/// Adds the products of rows of one tile and rows of another to the scores that a unit computes.
#[cube]
pub(crate) fn add_score_products<N: Size>(
    rows: &[Vector<f32, N>],
    columns: &[Vector<f32, N>],
    place: &ScorePlace,
    scores: &mut Array<f32>,
    #[comptime] tiling: Tiling,
) {
    let stride = comptime!(tiling.row_stride());
    let mut quad = Array::<Vector<f32, N>>::new(QUAD);
    for vector in 0..comptime!(tiling.vectors()) {
        #[unroll]
        for j in 0..QUAD {
            quad[j] = columns[(place.quad + comptime!(j * tiling.quads())) * stride + vector];
        }
        #[unroll]
        for i in 0..comptime!(tiling.score_rows()) {
            let row = rows[(place.row + comptime!(i * score_row_step(tiling))) * stride + vector];
            #[unroll]
            for j in 0..QUAD {
                #[unroll]
                for element in 0..comptime!(tiling.width) {
                    scores[comptime!(i * QUAD + j)] +=
                        row.extract(element) * quad[j].extract(element);
                }
            }
        }
    }
}

/// Which sums a unit keeps: rows `row + i`, vectors `vector + across * j`.
#[derive(CubeType)]
pub(crate) struct SumPlace {
    /// The first row.
    pub(crate) row: usize,
    /// The first vector; beyond the row if the unit has none.
    pub(crate) vector: usize,
}

/// Which sums this unit keeps.
#[cube]
pub(crate) fn sum_place(#[comptime] tiling: Tiling) -> SumPlace {
    let across = comptime!(tiling.across());
    SumPlace {
        row: UNIT_POS as usize / across * comptime!(tiling.sum_rows()),
        vector: UNIT_POS as usize % across,
    }
}

/// Sums of nothing.
#[cube]
pub(crate) fn no_sums<N: Size>(#[comptime] tiling: Tiling) -> Array<Vector<f32, N>> {
    let len = comptime!(tiling.sum_rows() * tiling.sum_vectors());
    let mut sums = Array::<Vector<f32, N>>::new(len);
    #[unroll]
    for at in 0..len {
        sums[at] = Vector::new(0.0f32);
    }
    sums
}

/// Adds `scores * columns` to the sums that a unit keeps. The products of a tile are summed before they are added: errors grow
/// with the number of tiles, not with that of columns.
#[cube]
pub(crate) fn add_products<N: Size>(
    scores: &[Quad],
    columns: &[Vector<f32, N>],
    place: &SumPlace,
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] tiling: Tiling,
) {
    let at_once = comptime!(tiling.vectors_at_once());
    #[unroll]
    for pass in 0..comptime!(tiling.sum_vectors().div_ceil(at_once)) {
        add_some_products::<N>(
            scores,
            columns,
            place,
            sums,
            comptime!(pass * at_once),
            comptime!(at_once.min(tiling.sum_vectors() - pass * at_once)),
            tiling,
        );
    }
}

/// [`add_products`] for `count` vectors of the sums, from `first` on.
#[cube]
fn add_some_products<N: Size>(
    scores: &[Quad],
    columns: &[Vector<f32, N>],
    place: &SumPlace,
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] first: usize,
    #[comptime] count: usize,
    #[comptime] tiling: Tiling,
) {
    let sum_rows = comptime!(tiling.sum_rows());
    let mut products = Array::<Vector<f32, N>>::new(comptime!(sum_rows * count));
    #[unroll]
    for at in 0..comptime!(sum_rows * count) {
        products[at] = Vector::new(0.0f32);
    }
    let mut factors = Array::<Vector<f32, N>>::new(comptime!(QUAD * count));
    for quad in 0..comptime!(tiling.quads()) {
        #[unroll]
        for e in 0..QUAD {
            let column = (quad + comptime!(e * tiling.quads())) * comptime!(tiling.row_stride());
            #[unroll]
            for j in 0..count {
                let vector = sum_vector(place, comptime!(first + j), tiling);
                factors[comptime!(e * count + j)] =
                    columns[column + least(vector, comptime!(tiling.vectors() - 1))];
            }
        }
        #[unroll]
        for i in 0..sum_rows {
            let weights = scores[(place.row + i) * comptime!(tiling.score_stride()) + quad];
            #[unroll]
            for e in 0..QUAD {
                #[unroll]
                for j in 0..count {
                    products[comptime!(i * count + j)] +=
                        Vector::new(weights.extract(e)) * factors[comptime!(e * count + j)];
                }
            }
        }
    }
    #[unroll]
    for i in 0..sum_rows {
        #[unroll]
        for j in 0..count {
            sums[comptime!(i * tiling.sum_vectors() + first + j)] +=
                products[comptime!(i * count + j)];
        }
    }
}

/// Vector `j` of those of a row that a unit sums.
#[cube]
pub(crate) fn sum_vector(
    place: &SumPlace,
    #[comptime] j: usize,
    #[comptime] tiling: Tiling,
) -> usize {
    place.vector + comptime!(j * tiling.across())
}

/// Row `i` of the scores of a unit.
#[cube]
pub(crate) fn quad_of(scores: &Array<f32>, #[comptime] i: usize) -> Quad {
    let mut quad = Quad::new(0.0f32);
    #[unroll]
    for j in 0..QUAD {
        quad.insert(j, scores[comptime!(i * QUAD + j)]);
    }
    quad
}

/// Hides the scores of columns that are not before those that `ends` has for their rows. Column 0 of the tile is column `start`.
#[cube]
pub(crate) fn hide_from(
    scores: &mut Array<f32>,
    ends: &[u32],
    place: &ScorePlace,
    start: usize,
    #[comptime] tiling: Tiling,
) {
    #[unroll]
    for i in 0..comptime!(tiling.score_rows()) {
        let end = ends[place.row + comptime!(i * score_row_step(tiling))] as usize;
        #[unroll]
        for j in 0..QUAD {
            let column = start + place.quad + comptime!(j * tiling.quads());
            let at = comptime!(i * QUAD + j);
            scores[at] = select(column < end, scores[at], HIDDEN);
        }
    }
}

/// Hides the scores of columns before those that `begins` has for their rows. Column 0 of the tile is column `start`.
#[cube]
pub(crate) fn hide_before(
    scores: &mut Array<f32>,
    begins: &[u32],
    place: &ScorePlace,
    start: usize,
    #[comptime] tiling: Tiling,
) {
    #[unroll]
    for i in 0..comptime!(tiling.score_rows()) {
        let begin = begins[place.row + comptime!(i * score_row_step(tiling))] as usize;
        #[unroll]
        for j in 0..QUAD {
            let column = start + place.quad + comptime!(j * tiling.quads());
            let at = comptime!(i * QUAD + j);
            scores[at] = select(column < begin, HIDDEN, scores[at]);
        }
    }
}

/// The greater of two numbers.
#[cube]
pub(crate) fn greater(a: f32, b: f32) -> f32 {
    select(a < b, b, a)
}

/// The greatest of four numbers.
#[cube]
pub(crate) fn greatest_of(quad: Quad) -> f32 {
    let first = greater(quad.extract(0usize), quad.extract(1usize));
    greater(first, greater(quad.extract(2usize), quad.extract(3usize)))
}
