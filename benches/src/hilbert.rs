//! How near in space the cells of a grid lie that stand near in the sequence, by the order of the sequence. Counts, no times.

pub mod picture;

use std::{fmt, ops::Range};

use ring_core::{GridError, HilbertOrder, Sharding};

/// An order of a grid's cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Row by row.
    RowMajor,
    /// Along the curve of [`HilbertOrder`].
    Hilbert,
    /// By chance, the same every time.
    Random,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::RowMajor, Self::Hilbert, Self::Random];
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RowMajor => "row-major",
            Self::Hilbert => "Hilbert",
            Self::Random => "random",
        })
    }
}

/// The cells of a grid in some order.
pub struct Sequence {
    /// Depth, height and width; the depth of an area is 1.
    sides: [usize; 3],
    /// The cell at every position.
    cells: Vec<usize>,
}

/// What the ranks of a group own and need, if a cell needs its neighbours in space.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Halo {
    /// Share of a cell's neighbours that its own rank owns.
    pub own_neighbours: f64,
    /// Cells of other ranks that a rank needs, each counted once: the mean over ranks.
    pub mean_rows: f64,
    /// The most that any rank needs.
    pub most_rows: usize,
}

impl Sequence {
    /// The cells of a grid of `[height, width]` or `[depth, height, width]`.
    ///
    /// # Errors
    /// As [`HilbertOrder::new`].
    pub fn new(sides: &[usize], order: Order) -> Result<Self, GridError> {
        let hilbert = HilbertOrder::new(sides)?;
        let mut all_sides = [1; 3];
        all_sides[3 - sides.len()..].copy_from_slice(sides);
        Ok(Self {
            sides: all_sides,
            cells: match order {
                Order::RowMajor => (0..hilbert.length()).collect(),
                Order::Hilbert => hilbert.order(),
                Order::Random => shuffled(hilbert.length()),
            },
        })
    }

    /// Mean and 90th percentile of the distance of two cells of one segment, over all such pairs, in sides of a cell.
    pub fn distances(&self, segment_length: usize) -> (f64, f64) {
        let farthest: usize = self.sides.iter().map(|side| (side - 1).pow(2)).sum();
        // How many pairs there are of each squared distance.
        let mut pairs = vec![0_u64; farthest + 1];
        for segment in self.cells.chunks(segment_length) {
            let places: Vec<[i32; 3]> = segment.iter().map(|&cell| self.place(cell)).collect();
            for (index, one) in places.iter().enumerate() {
                for other in &places[index + 1..] {
                    let [z, y, x] = [0, 1, 2].map(|axis| one[axis] - other[axis]);
                    pairs[(z * z + y * y + x * x) as usize] += 1;
                }
            }
        }
        spread(&pairs)
    }

    /// What contiguous shards own and need if a cell needs the cells at most `radius` away along every axis.
    pub fn halo(&self, ranks: usize, radius: usize) -> Halo {
        let length = self.cells.len();
        let (mut own_neighbours, mut rows) = (0, Vec::new());
        for rank in 0..ranks {
            let mut owned = vec![0; length];
            for span in Sharding::Contiguous.spans(length, ranks, rank) {
                for &cell in &self.cells[span.start..span.end] {
                    owned[cell] = 1;
                }
            }
            let near = self.sums_around(&owned, radius);
            let mut needed = 0;
            for (own, near) in owned.into_iter().zip(near) {
                own_neighbours += own * (near - own);
                needed += usize::from(own == 0 && near > 0);
            }
            rows.push(needed);
        }
        let near = self.sums_around(&vec![1; length], radius);
        let neighbours: u64 = near.into_iter().map(|near| near - 1).sum();
        Halo {
            own_neighbours: own_neighbours as f64 / neighbours as f64,
            mean_rows: rows.iter().sum::<usize>() as f64 / ranks as f64,
            most_rows: rows.into_iter().max().unwrap_or(0),
        }
    }

    /// Share of a cell's neighbours, at most `radius` away along every axis, that stand at most `reach` positions before or
    /// after it.
    pub fn seen(&self, reach: usize, radius: usize) -> f64 {
        let mut positions = vec![0; self.cells.len()];
        for (position, &cell) in self.cells.iter().enumerate() {
            positions[cell] = position;
        }
        let [_, height, width] = self.sides;
        let (mut seen, mut all) = (0, 0);
        for (cell, &position) in positions.iter().enumerate() {
            let [depths, rows, columns] = self.around(cell, radius);
            for row in depths.flat_map(|z| rows.clone().map(move |y| (z * height + y) * width)) {
                let neighbours = &positions[row + columns.start..row + columns.end];
                let near = |other: &&usize| position.abs_diff(**other) <= reach;
                seen += neighbours.iter().filter(near).count();
                all += neighbours.len();
            }
        }
        // A cell is no neighbour of itself.
        (seen - positions.len()) as f64 / (all - positions.len()) as f64
    }

    /// Coordinates of a cell.
    fn place(&self, cell: usize) -> [i32; 3] {
        let [_, height, width] = self.sides;
        [cell / width / height, cell / width % height, cell % width].map(|at| at as i32)
    }

    /// The box of cells at most `radius` away along every axis.
    fn around(&self, cell: usize, radius: usize) -> [Range<usize>; 3] {
        let place = self.place(cell);
        [0, 1, 2].map(|axis| {
            let at = place[axis] as usize;
            at.saturating_sub(radius)..(at + radius + 1).min(self.sides[axis])
        })
    }

    /// For every cell the sum of `values` over the box around it: along one axis after the other.
    fn sums_around(&self, values: &[u64], radius: usize) -> Vec<u64> {
        let mut sums = values.to_vec();
        let mut stride = 1;
        for axis in [2, 1, 0] {
            let side = self.sides[axis];
            let mut along = vec![0; sums.len()];
            for line in (0..sums.len()).filter(|cell| cell / stride % side == 0) {
                let until: Vec<u64> = std::iter::once(0)
                    .chain((0..side).scan(0, |sum, at| {
                        *sum += sums[line + at * stride];
                        Some(*sum)
                    }))
                    .collect();
                for at in 0..side {
                    let (from, to) = (at.saturating_sub(radius), (at + radius + 1).min(side));
                    along[line + at * stride] = until[to] - until[from];
                }
            }
            sums = along;
            stride *= side;
        }
        sums
    }
}

/// Mean and 90th percentile of distances, given how many there are of each square.
fn spread(counts: &[u64]) -> (f64, f64) {
    let all: u64 = counts.iter().sum();
    let squares = counts.iter().enumerate();
    let sum: f64 = squares
        .map(|(square, &count)| (square as f64).sqrt() * count as f64)
        .sum();
    let mut until = 0;
    let ninetieth = counts.iter().position(|&count| {
        until += count;
        10 * until >= 9 * all
    });
    (
        sum / all as f64,
        ninetieth.map_or(f64::NAN, |square| (square as f64).sqrt()),
    )
}

/// The numbers up to `length`, shuffled (Fisher and Yates) with a fixed seed.
fn shuffled(length: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..length).collect();
    let mut state = 7_u64;
    for last in (1..length).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        numbers.swap(last, (state >> 33) as usize % (last + 1));
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRIDS: [&[usize]; 2] = [&[5, 7], &[3, 4, 5]];

    fn sequence(sides: &[usize], order: Order) -> Sequence {
        Sequence::new(sides, order).unwrap()
    }

    /// Whether two cells are neighbours: two loops over all cells, and no more thought.
    fn near(sequence: &Sequence, one: usize, other: usize, radius: usize) -> bool {
        let (one, other) = (sequence.place(one), sequence.place(other));
        (0..3).all(|axis| one[axis].abs_diff(other[axis]) as usize <= radius) && one != other
    }

    #[test]
    fn halos_are_those_of_all_pairs() {
        for sides in GRIDS {
            for order in Order::ALL {
                let sequence = sequence(sides, order);
                let length = sequence.cells.len();
                for (ranks, radius) in [(1, 1), (3, 1), (4, 2)] {
                    let owner = |position: usize| {
                        (0..ranks)
                            .find(|rank| (rank + 1) * length / ranks > position)
                            .unwrap()
                    };
                    let (mut own, mut all) = (0, 0);
                    let mut needed = vec![vec![false; length]; ranks];
                    for (n, &one) in sequence.cells.iter().enumerate() {
                        for (m, &other) in sequence.cells.iter().enumerate() {
                            if near(&sequence, one, other, radius) {
                                all += 1;
                                own += usize::from(owner(n) == owner(m));
                                needed[owner(n)][other] |= owner(n) != owner(m);
                            }
                        }
                    }
                    let rows = needed
                        .iter()
                        .map(|of| of.iter().filter(|&&cell| cell).count());
                    let expected = Halo {
                        own_neighbours: own as f64 / all as f64,
                        mean_rows: rows.clone().sum::<usize>() as f64 / ranks as f64,
                        most_rows: rows.max().unwrap(),
                    };
                    assert_eq!(sequence.halo(ranks, radius), expected);
                }
            }
        }
    }

    #[test]
    fn what_is_seen_is_that_of_all_pairs() {
        for sides in GRIDS {
            for order in Order::ALL {
                let sequence = sequence(sides, order);
                let (mut seen, mut all) = (0, 0);
                for (n, &one) in sequence.cells.iter().enumerate() {
                    for (m, &other) in sequence.cells.iter().enumerate() {
                        let is_near = near(&sequence, one, other, 2);
                        all += usize::from(is_near);
                        seen += usize::from(is_near && n.abs_diff(m) <= 6);
                    }
                }
                assert_eq!(sequence.seen(6, 2), seen as f64 / all as f64);
            }
        }
    }

    #[test]
    fn distances_of_a_row_are_known() {
        // Pairs in a row of 4: three of distance 1, two of 2, one of 3; in each of two rows.
        let (mean, ninetieth) = sequence(&[2, 4], Order::RowMajor).distances(4);
        assert_eq!((mean, ninetieth), (10.0 / 6.0, 3.0));
    }

    #[test]
    fn a_shuffle_has_every_number_once() {
        let mut numbers = shuffled(1000);
        assert_ne!(numbers, shuffled(1001)[..1000]);
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..1000));
    }
}
