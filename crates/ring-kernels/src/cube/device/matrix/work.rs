//! What a cube works on.

use cubecl::prelude::*;

use super::super::super::table::*;
use super::super::index::*;
use super::super::scores::Options;

/// How a cube divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tiling {
    /// Elements of a row; a multiple of 16.
    pub(crate) head_dim: usize,
    /// Planes of a cube.
    pub(crate) planes: usize,
    /// Sixteens of rows that a plane owns.
    pub(crate) row_tiles: usize,
    /// Rows of a tile in shared memory; a multiple of 16.
    pub(crate) tile_rows: usize,
    /// Whether planes keep their own rows in registers, or read them from shared memory for each tile.
    pub(crate) rows_in_registers: bool,
    /// Whether rows are read in vectors of 8 elements.
    pub(crate) vectors: bool,
    /// Whether the device takes NVIDIA's assembly, and copies to shared memory while it computes.
    pub(crate) assembly: bool,
}

impl Tiling {
    /// Units of a cube.
    pub(crate) const fn units(&self) -> usize {
        32 * self.planes
    }

    /// The dimensions of a cube: units of a plane, planes.
    pub(crate) fn cube_dim(&self) -> CubeDim {
        CubeDim::new_2d(32, self.planes as u32)
    }

    /// Elements of the vectors in which rows are read.
    pub(crate) const fn vector_size(&self) -> usize {
        if self.vectors { 8 } else { 1 }
    }

    /// Rows that a plane owns.
    pub(crate) const fn plane_rows(&self) -> usize {
        16 * self.row_tiles
    }

    /// Rows that a cube owns.
    pub(crate) const fn cube_rows(&self) -> usize {
        self.planes * self.plane_rows()
    }

    /// Distance of rows in shared memory, in vectors of 8 elements. Odd, so that no two of 8 neighbouring rows share a bank.
    pub(crate) const fn pitch(&self) -> usize {
        self.head_dim / 8 + 1
    }

    /// Size of a tile in shared memory, in vectors of 8 elements.
    pub(crate) const fn tile_vectors(&self) -> usize {
        self.tile_rows * self.pitch()
    }

    /// Size of the rows of a cube in shared memory, in vectors of 8 elements.
    pub(crate) const fn cube_vectors(&self) -> usize {
        self.cube_rows() * self.pitch()
    }
}

/// The queries that a cube owns, and the keys they see.
#[derive(CubeType)]
pub(crate) struct OwnQueries {
    /// Queries of the record.
    pub(crate) count: usize,
    /// The first of the cube; `count` or more if it has none.
    pub(crate) first: usize,
    /// The last of the cube.
    pub(crate) last: usize,
    /// The first of the plane, counted from the first of the cube.
    pub(crate) plane_first: usize,
    /// The first key that the first one sees; others begin there or later.
    pub(crate) begin: usize,
    /// The first key that the last one of the plane sees; others of the plane begin there or earlier.
    pub(crate) last_begin: usize,
    /// Behind the last key that the first one of the plane sees; others of the plane end there or later.
    pub(crate) first_end: usize,
    /// Behind the last key that the last one sees; others end there or earlier.
    pub(crate) end: usize,
}

/// The queries of this cube. Later ones may see more: they begin first.
#[cube]
pub(crate) fn own_queries(
    table: &[u32],
    work: &Work,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
) -> OwnQueries {
    let rows = comptime!(tiling.cube_rows());
    let count = word(table, work.record + QUERY_COUNT);
    let first = distance(CUBE_POS_X + 1, CUBE_COUNT_X) * rows;
    let last = least(first + rows, count) - 1;
    let plane_first = UNIT_POS_Y as usize * comptime!(tiling.plane_rows());
    let of_plane = least(first + plane_first, last);
    let plane_last = least(of_plane + comptime!(tiling.plane_rows() - 1), last);
    let of_cube = seen_keys(table, work.record, first, last, count, options);
    OwnQueries {
        count,
        first,
        last,
        plane_first,
        begin: of_cube.begin,
        last_begin: keys_begin(table, work.record, plane_last, options),
        first_end: keys_end(table, work.record, of_plane),
        end: of_cube.end,
    }
}

/// Behind the last key that the queries of each half of a unit see.
#[cube]
pub(crate) fn ends_of_halves(
    table: &[u32],
    work: &Work,
    own: &OwnQueries,
    #[comptime] tiling: Tiling,
) -> Array<u32> {
    let halves = comptime!(2 * tiling.row_tiles);
    let mut ends = Array::<u32>::new(halves);
    #[unroll]
    for h in 0..halves {
        let row = own.first + own.plane_first + row_of_half(h);
        ends[h] = keys_end(table, work.record, least(row, own.last)) as u32;
    }
    ends
}

/// The first key that the queries of each half of a unit see.
#[cube]
pub(crate) fn begins_of_halves(
    table: &[u32],
    work: &Work,
    own: &OwnQueries,
    #[comptime] tiling: Tiling,
    #[comptime] options: Options,
) -> Array<u32> {
    let halves = comptime!(2 * tiling.row_tiles);
    let mut begins = Array::<u32>::new(halves);
    #[unroll]
    for h in 0..halves {
        let row = own.first + own.plane_first + row_of_half(h);
        begins[h] = keys_begin(table, work.record, least(row, own.last), options) as u32;
    }
    begins
}

/// `to - from`.
#[cube]
fn distance(from: u32, to: u32) -> usize {
    (to - from) as usize
}

/// Which row of its plane half `h` of a unit is: halves `2 r` and `2 r + 1` are rows `group` and `group + 8` of sixteen rows `r`.
#[cube]
pub(crate) fn row_of_half(#[comptime] h: usize) -> usize {
    UNIT_POS_X as usize / 4 + comptime!(16 * (h / 2) + 8 * (h % 2))
}
