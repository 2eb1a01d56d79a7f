//! How large the tiles of a kernel are, and how the units of a cube share their work.

use crate::KernelError;

/// Columns of scores that a unit computes at once, and writes as one vector.
pub(super) const QUAD: usize = 4;

/// The most rows of scores that a unit computes at once: 8 x 4 products for 12 reads of shared memory.
const MOST_SCORE_ROWS: usize = 8;

/// The most rows of a product that a unit computes at once: 8 vectors of sums for 8 reads of weights and 4 of rows.
const MOST_PRODUCT_ROWS: usize = 8;

/// Sums that a unit keeps in registers from tile to tile, where a cube can have enough units. A unit has up to 255 registers,
/// and needs about 100 for what a tile takes.
const MOST_SUMS: usize = 64;

/// The most units of a cube.
const MOST_UNITS: usize = 256;

/// Shared memory that a cube may take in any case, if the device has it.
const ENOUGH_BYTES: usize = 32 << 10;

/// Cubes that should find room on a processor at once: some compute while others load.
const RESIDENT_CUBES: usize = 3;

/// Shared memory that a system may take of a processor for every cube.
const RESERVED_BYTES: usize = 1 << 10;

/// Rows and columns of a tile of scores, and the units that compute it; the best first.
const SHAPES: [(usize, usize, usize); 11] = [
    (64, 64, 128),
    (64, 32, 128),
    (32, 32, 64),
    (32, 16, 64),
    (16, 16, 64),
    (16, 8, 64),
    (8, 8, 64),
    (8, 4, 64),
    (4, 4, 64),
    (2, 4, 64),
    (1, 4, 64),
];

/// What a cube of a kernel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// Tiles of as many rows as a tile of scores has.
    pub(super) row_tiles: usize,
    /// Tiles of as many rows as a tile of scores has columns.
    pub(super) column_tiles: usize,
    /// Tiles of scores.
    pub(super) score_tiles: usize,
    /// Tiles of sums, each of as many rows as a tile of scores has, in registers.
    pub(super) sums: usize,
    /// Other numbers for each row.
    pub(super) row_numbers: usize,
    /// Other numbers for each column.
    pub(super) column_numbers: usize,
    /// Other numbers for each quad of scores.
    pub(super) quad_numbers: usize,
    /// The most vectors that may lie between the rows of a tile of scores, where the units that share a row go through it.
    pub(super) score_gap: usize,
}

impl Needs {
    /// The needs of a kernel that keeps so many bounds for each row of scores.
    pub(super) const fn with_bounds(self, bounds: usize) -> Self {
        Self {
            row_numbers: self.row_numbers + bounds,
            ..self
        }
    }
}

/// Queries; keys, and then values in the same place; scores, whose greatest ones are written by quads; how much the sum of
/// each query shrinks; and bounds.
pub(super) const FORWARD: Needs = Needs {
    row_tiles: 1,
    column_tiles: 1,
    score_tiles: 1,
    sums: 1,
    row_numbers: 1,
    column_numbers: 0,
    quad_numbers: 1,
    score_gap: 2,
};

/// Queries and output gradients; values, and then keys in the same place; score gradients; log-sum-exp and delta of each
/// query; and bounds.
pub(super) const QUERY_GRADIENTS: Needs = Needs {
    row_tiles: 2,
    column_tiles: 1,
    score_tiles: 1,
    sums: 1,
    row_numbers: 2,
    column_numbers: 0,
    quad_numbers: 0,
    score_gap: 0,
};

/// Keys and values; queries and output gradients; weights and score gradients; log-sum-exp and delta of queries; and
/// bounds.
pub(super) const KEY_GRADIENTS: Needs = Needs {
    row_tiles: 2,
    column_tiles: 2,
    score_tiles: 2,
    sums: 2,
    row_numbers: 0,
    column_numbers: 2,
    quad_numbers: 0,
    score_gap: 0,
};

/// What a device has for a cube.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Units.
    pub(super) units: usize,
    /// Bytes of shared memory.
    pub(super) shared_bytes: usize,
}

/// Sizes of tiles. A kernel is compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tiling {
    /// Elements of a row.
    pub(crate) head_dim: usize,
    /// Elements that are read at once: 4 or 1.
    pub(crate) width: usize,
    /// Rows of a tile of scores: those that a cube owns.
    pub(crate) rows: usize,
    /// Columns of a tile of scores.
    pub(crate) columns: usize,
    /// Units of a cube, no fewer than `rows`.
    pub(crate) units: usize,
    /// Vectors between the rows of a tile of scores, so that units in neighbouring rows read different banks.
    pub(crate) score_gap: usize,
}

impl Tiling {
    /// The best tiles for which there is room.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] if there is room for none.
    pub(super) fn new(
        needs: Needs,
        head_dim: usize,
        width: usize,
        room: Room,
    ) -> Result<Self, KernelError> {
        let shapes = SHAPES.into_iter().filter_map(|(rows, columns, units)| {
            Self::of_shape(needs, head_dim, width, (rows, columns, units), room)
        });
        let tilings: Vec<_> = shapes.collect();
        let fits = |bytes: usize| {
            let fits = |tiling: &&Self| tiling.shared_bytes(needs) <= bytes;
            tilings.iter().find(fits).copied()
        };
        let shared = (room.shared_bytes / RESIDENT_CUBES).saturating_sub(RESERVED_BYTES);
        let shared = shared.max(ENOUGH_BYTES).min(room.shared_bytes);
        fits(shared)
            .or_else(|| fits(room.shared_bytes))
            .ok_or_else(|| {
                let least = tilings.iter().map(|tiling| tiling.shared_bytes(needs)).min();
                KernelError::Invalid(format!(
                    "the smallest tile takes {} bytes of shared memory, the device has {}; the head size must be smaller",
                    least.unwrap_or(usize::MAX),
                    room.shared_bytes
                ))
            })
    }

    /// Tiles of a shape, with more units where they would keep too many sums; `None` if the device has not enough units.
    fn of_shape(
        needs: Needs,
        head_dim: usize,
        width: usize,
        (rows, columns, units): (usize, usize, usize),
        room: Room,
    ) -> Option<Self> {
        // Powers of two, as the tiles are.
        let most = 1 << room.units.clamp(1, MOST_UNITS).ilog2();
        let mut tiling = Self {
            head_dim,
            width,
            rows,
            columns,
            units: units.min(most),
            score_gap: 0,
        };
        while tiling.units < most && needs.sums * tiling.sums() > MOST_SUMS {
            tiling.units *= 2;
        }
        tiling.score_gap = tiling.parts().min(needs.score_gap);
        let scores = rows * tiling.quads();
        let enough = tiling.units >= rows && MOST_SCORE_ROWS * tiling.units >= scores;
        enough.then_some(tiling)
    }

    /// Bytes of shared memory that a cube takes.
    ///
    /// With 64 elements in vectors of 4, rows take 17 vectors: 272 bytes. Tiles of 64 x 64 scores then take in the forward pass
    /// 2 * 64 * 272 bytes for rows, 64 * 18 * 16 for scores and 64 * (16 + 2) * 4 for numbers: 57,856 bytes.
    pub(super) fn shared_bytes(&self, needs: Needs) -> usize {
        let rows = needs.row_tiles * self.rows + needs.column_tiles * self.columns;
        let scores = needs.score_tiles * self.rows * self.score_stride() * QUAD;
        let numbers = needs.row_numbers * self.rows
            + needs.column_numbers * self.columns
            + needs.quad_numbers * self.rows * self.quads();
        let row = self.row_stride().saturating_mul(self.width);
        let all = rows.saturating_mul(row).saturating_add(scores + numbers);
        all.saturating_mul(size_of::<f32>())
    }

    /// Vectors of a row.
    pub(crate) fn vectors(&self) -> usize {
        self.head_dim / self.width
    }

    /// Vectors from row to row of a tile: an odd number, so that neighbouring rows lie in different banks.
    pub(crate) fn row_stride(&self) -> usize {
        self.vectors() | 1
    }

    /// Vectors of a row of scores. Vector `q` holds columns `q`, `q + quads`, `q + 2 quads` and `q + 3 quads`, so that
    /// units that compute neighbouring vectors read neighbouring rows.
    pub(crate) fn quads(&self) -> usize {
        self.columns / QUAD
    }

    /// Vectors from row to row of a tile of scores.
    pub(crate) fn score_stride(&self) -> usize {
        self.quads() + self.score_gap
    }

    /// Rows of scores that a unit computes.
    pub(crate) fn score_rows(&self) -> usize {
        (self.rows * self.quads() / self.units).max(1)
    }

    /// Units that share a row of scores.
    pub(crate) fn parts(&self) -> usize {
        self.units / self.rows
    }

    /// Units that share a row of sums.
    pub(crate) fn across(&self) -> usize {
        let widest = (MOST_PRODUCT_ROWS * self.parts()).min(self.units);
        widest
            .min(self.vectors().next_power_of_two())
            .max(self.parts())
    }

    /// Rows of sums that a unit keeps.
    pub(crate) fn sum_rows(&self) -> usize {
        self.across() / self.parts()
    }

    /// Vectors of a row of sums that a unit keeps; the last may lie beyond the row.
    pub(crate) fn sum_vectors(&self) -> usize {
        self.vectors().div_ceil(self.across())
    }

    /// Vectors of a row of sums that a unit computes at once.
    pub(crate) fn vectors_at_once(&self) -> usize {
        QUAD / self.width
    }

    /// Numbers of a tile of sums that a unit keeps.
    fn sums(&self) -> usize {
        self.sum_rows() * self.sum_vectors() * self.width
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Needs; 6] = [
        FORWARD.with_bounds(1),
        QUERY_GRADIENTS.with_bounds(1),
        KEY_GRADIENTS.with_bounds(1),
        FORWARD.with_bounds(2),
        QUERY_GRADIENTS.with_bounds(2),
        KEY_GRADIENTS.with_bounds(2),
    ];

    fn room(units: usize, kibibytes: usize) -> Room {
        Room {
            units,
            shared_bytes: kibibytes << 10,
        }
    }

    #[test]
    fn every_head_size_has_tiles_that_fit() {
        for room in [
            room(64, 16),
            room(256, 16),
            room(256, 32),
            room(1024, 48),
            room(1024, 64),
            room(1024, 227),
        ] {
            for head_dim in 1..=256 {
                for needs in ALL {
                    let widths: &[usize] = if head_dim % 4 == 0 { &[1, 4] } else { &[1] };
                    for &width in widths {
                        let tiling = Tiling::new(needs, head_dim, width, room).unwrap();
                        assert!(tiling.shared_bytes(needs) <= room.shared_bytes);
                        assert!(tiling.units <= room.units);
                        check(&tiling);
                    }
                }
            }
        }
    }

    /// Checks that units compute every score and keep every sum exactly once.
    fn check(tiling: &Tiling) {
        let score_rows = tiling.score_rows();
        assert!(score_rows <= MOST_SCORE_ROWS, "{tiling:?}");
        assert_eq!(tiling.rows % score_rows, 0, "{tiling:?}");
        assert!(
            tiling.rows / score_rows * tiling.quads() <= tiling.units,
            "{tiling:?}"
        );
        assert_eq!(tiling.units, tiling.rows * tiling.parts(), "{tiling:?}");
        assert_eq!(tiling.units % tiling.across(), 0, "{tiling:?}");
        let rows = tiling.units / tiling.across() * tiling.sum_rows();
        assert_eq!(rows, tiling.rows, "{tiling:?}");
        assert!(
            tiling.across() * tiling.sum_vectors() >= tiling.vectors(),
            "{tiling:?}"
        );
    }

    #[test]
    fn sums_of_usual_heads_stay_in_registers() {
        for head_dim in [32, 64, 80, 96, 128, 192, 256] {
            for (needs, shared) in ALL
                .into_iter()
                .flat_map(|needs| [(needs, 32), (needs, 227)])
            {
                let tiling = Tiling::new(needs, head_dim, 4, room(1024, shared)).unwrap();
                assert!(needs.sums * tiling.sums() <= MOST_SUMS, "{tiling:?}");
            }
        }
    }

    #[test]
    fn the_example_of_shared_bytes_is_true() {
        let tiling = Tiling::new(FORWARD.with_bounds(1), 64, 4, room(1024, 227)).unwrap();
        assert_eq!((tiling.rows, tiling.columns), (64, 64));
        assert_eq!(tiling.shared_bytes(FORWARD.with_bounds(1)), 57_856);
    }

    #[test]
    fn heads_that_are_too_large_are_refused() {
        let refused = Tiling::new(FORWARD, 1 << 14, 4, room(256, 32));
        assert!(matches!(refused, Err(KernelError::Invalid(_))));
        let refused = Tiling::new(FORWARD, usize::MAX - 3, 4, room(256, 32));
        assert!(matches!(refused, Err(KernelError::Invalid(_))));
    }

    #[test]
    fn devices_of_few_units_are_served() {
        for units in [1, 2, 7, 16, 33] {
            for needs in ALL {
                check(&Tiling::new(needs, 64, 4, room(units, 32)).unwrap());
            }
        }
    }
}
