//! What becomes of quads of scores, beside softmax.

use cubecl::prelude::*;

use super::super::table::*;
use super::dropout::*;
use super::scores::*;
use super::tile::Quad;
use crate::cube::tiling::QUAD;

/// What the rows of a tile of scores are; its columns are the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RowsAre {
    Queries,
    Keys,
}

impl RowsAre {
    /// Where a record has the positions of the rows.
    pub(crate) fn rows_at(self) -> usize {
        match self {
            Self::Queries => QUERY_POSITION,
            Self::Keys => KEY_POSITION,
        }
    }

    /// Where a record has the positions of the columns.
    pub(crate) fn columns_at(self) -> usize {
        match self {
            Self::Queries => KEY_POSITION,
            Self::Keys => QUERY_POSITION,
        }
    }
}

/// Which pairs of a record a quad belongs to.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Pairs {
    pub(crate) record: usize,
    pub(crate) row: usize,
    /// The first column.
    pub(crate) column: usize,
}

/// Four scores, and the factors between their gradients and those of the products that they were.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct ScoredQuad {
    pub(crate) values: Quad,
    pub(crate) derivatives: Quad,
}

/// The scores of four products, of a row and of columns that are `apart`.
#[cube]
pub(crate) fn scored(
    products: Quad,
    table: &[u32],
    pairs: &Pairs,
    scoring: &Scoring,
    #[comptime] apart: usize,
    #[comptime] rows: RowsAre,
    #[comptime] options: Options,
) -> ScoredQuad {
    let row = low_position(table, pairs.record + comptime!(rows.rows_at()), pairs.row);
    let columns = pairs.record + comptime!(rows.columns_at());
    let mut values = Quad::new(0.0f32);
    let mut derivatives = Quad::new(1.0f32);
    #[unroll]
    for j in 0..QUAD {
        let column = low_position(table, columns, pairs.column + comptime!(j * apart));
        let score = score(products.extract(j), row, column, scoring, options);
        values.insert(j, score.value);
        derivatives.insert(j, score.derivative);
    }
    ScoredQuad {
        values,
        derivatives,
    }
}

/// 1 for the weights that count, 0 for those that are dropped, of a row and of columns that are `apart`.
#[cube]
pub(crate) fn kept(
    table: &[u32],
    pairs: &Pairs,
    dropping: &Dropping,
    #[comptime] apart: usize,
    #[comptime] rows: RowsAre,
) -> Quad {
    let row = position(table, pairs.record + comptime!(rows.rows_at()), pairs.row);
    let columns = pairs.record + comptime!(rows.columns_at());
    let mut factors = Quad::new(0.0f32);
    #[unroll]
    for j in 0..QUAD {
        let column = position(table, columns, pairs.column + comptime!(j * apart));
        let keeps = if comptime!(rows == RowsAre::Queries) {
            keeps(dropping, &row, &column)
        } else {
            keeps(dropping, &column, &row)
        };
        factors.insert(j, choose(keeps, 1.0f32, 0.0f32));
    }
    factors
}
