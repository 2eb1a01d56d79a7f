//! The order of a Hilbert curve, for sequences whose tokens are the cells of a grid: [`HilbertOrder`].

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::pattern::MAX_LENGTH;

/// A grid that has no [`HilbertOrder`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GridError {
    /// Neither an area nor a volume.
    #[error("the grid has {got} sides, it must have 2 (height, width) or 3 (depth, height, width)")]
    Sides {
        /// How many sides it has.
        got: usize,
    },
    /// A side without cells.
    #[error("side {side} of the grid is 0, it must be at least 1")]
    EmptySide {
        /// Which side, the outermost being 0.
        side: usize,
    },
    /// More cells than a sequence may have positions.
    #[error("the grid {sides:?} has more than {MAX_LENGTH} cells")]
    TooManyCells {
        /// Its sides.
        sides: Vec<usize>,
    },
}

/// The cells of a grid of two or three dimensions in an order that keeps neighbours in space close in the sequence, so that a
/// segment, or the shard of a rank, is a compact region.
///
/// The order is a matter of which token stands at which position, decided before attention: patterns, shardings and masks apply
/// to positions as ever. Cells have numbers, row by row (the last side varies fastest); positions are numbers along the curve.
/// The curve starts at cell 0.
///
/// Sides may have any length. The curve is the generalised one of J. Červený (<https://github.com/jakubcerveny/gilbert>), which
/// halves boxes of any size: Hilbert's where all sides are the same power of two. With even sides every step goes to a neighbour
/// along one axis. Odd sides may force a diagonal step, in an area one at most, in a volume more.
///
/// Only the sides are kept; cells and positions are computed when asked for.
///
/// ```
/// use ring_core::HilbertOrder;
/// let order = HilbertOrder::new(&[2, 4])?;
/// assert_eq!(order.order(), [0, 4, 5, 1, 2, 6, 7, 3]);
/// assert_eq!(order.cells(2..4), [5, 1]); // those of a rank that owns positions 2 and 3
/// assert_eq!(order.coordinates(5), [1, 1]);
/// # Ok::<(), ring_core::GridError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<usize>", into = "Vec<usize>")]
pub struct HilbertOrder {
    sides: Vec<usize>,
}

impl HilbertOrder {
    /// The order of a grid of `[height, width]` or `[depth, height, width]` cells (time, of a video, counts as depth).
    ///
    /// # Errors
    /// [`GridError`] for another number of sides, a side of 0, more than [`MAX_LENGTH`] cells.
    pub fn new(sides: &[usize]) -> Result<Self, GridError> {
        if !(2..=3).contains(&sides.len()) {
            return Err(GridError::Sides { got: sides.len() });
        }
        if let Some(side) = sides.iter().position(|&side| side == 0) {
            return Err(GridError::EmptySide { side });
        }
        sides
            .iter()
            .try_fold(1_usize, |cells, &side| cells.checked_mul(side))
            .filter(|&cells| cells <= MAX_LENGTH)
            .map(|_| Self {
                sides: sides.to_vec(),
            })
            .ok_or_else(|| GridError::TooManyCells {
                sides: sides.to_vec(),
            })
    }

    /// The sides of the grid, the outermost first.
    pub fn sides(&self) -> &[usize] {
        &self.sides
    }

    /// Number of cells, which is that of positions.
    pub fn length(&self) -> usize {
        self.sides.iter().product()
    }

    /// The cell at every position.
    pub fn order(&self) -> Vec<usize> {
        self.cells(0..self.length())
    }

    /// The position of every cell.
    pub fn inverse(&self) -> Vec<usize> {
        let mut inverse = vec![0; self.length()];
        for (position, cell) in self.order().into_iter().enumerate() {
            inverse[cell] = position;
        }
        inverse
    }

    /// The cells at some of the positions, in their order; positions beyond the last have none. Time and memory are those of the
    /// cells asked for, so that a rank can find its own in a grid of any size.
    pub fn cells(&self, positions: Range<usize>) -> Vec<usize> {
        let wanted = positions.start..positions.end.min(self.length());
        let mut cells = Vec::with_capacity(wanted.len());
        self.whole().visit(0, &wanted, &mut |corner| {
            cells.push(self.number(corner));
        });
        cells
    }

    /// Where a cell lies, one coordinate for each side; a cell beyond the last lies outside of the grid.
    pub fn coordinates(&self, cell: usize) -> Vec<usize> {
        let mut rest = cell;
        let mut coordinates: Vec<usize> = self.sides[1..]
            .iter()
            .rev()
            .map(|side| {
                let coordinate = rest % side;
                rest /= side;
                coordinate
            })
            .collect();
        coordinates.push(rest);
        coordinates.reverse();
        coordinates
    }

    /// The grid as a block, its longest side first; an area is a volume one cell deep.
    fn whole(&self) -> Block {
        let mut sides = [0, 1, 2].map(|axis| Side {
            axis,
            length: self.sides.get(axis).map_or(1, |&side| side as i64),
        });
        sides.sort_by_key(|side| std::cmp::Reverse(side.length));
        Block {
            corner: [0; 3],
            sides,
        }
    }

    /// The number of the cell at these coordinates.
    fn number(&self, corner: [i64; 3]) -> usize {
        let coordinates = self.sides.iter().zip(corner);
        coordinates.fold(0, |number, (side, at)| number * side + at as usize)
    }
}

impl TryFrom<Vec<usize>> for HilbertOrder {
    type Error = GridError;

    fn try_from(sides: Vec<usize>) -> Result<Self, GridError> {
        Self::new(&sides)
    }
}

impl From<HilbertOrder> for Vec<usize> {
    fn from(order: HilbertOrder) -> Self {
        order.sides
    }
}

/// A side of a block: so many cells along an axis, towards smaller coordinates if negative.
#[derive(Clone, Copy)]
struct Side {
    axis: usize,
    length: i64,
}

impl Side {
    fn with_length(self, length: i64) -> Self {
        Self { length, ..self }
    }

    fn cells(self) -> i64 {
        self.length.abs()
    }

    /// The side walked the other way.
    fn back(self) -> Self {
        self.with_length(-self.length)
    }

    /// The way from the first cell to the last.
    fn to_last(self) -> Self {
        self.with_length(self.length - self.length.signum())
    }

    /// Two parts, the first of an even number of cells if there are more than two.
    fn halves(self) -> [Self; 2] {
        let half = self.cells() / 2;
        let half = half + i64::from(half % 2 == 1 && self.cells() > 2);
        let first = half * self.length.signum();
        [
            self.with_length(first),
            self.with_length(self.length - first),
        ]
    }
}

/// A box that the curve enters at `corner` and leaves at the other end of the first side.
#[derive(Clone, Copy)]
struct Block {
    corner: [i64; 3],
    sides: [Side; 3],
}

impl Block {
    fn cells(&self) -> usize {
        self.sides
            .iter()
            .map(|side| side.cells() as usize)
            .product()
    }

    /// The corner after a way along some sides.
    fn corner_after(&self, ways: &[Side]) -> [i64; 3] {
        let mut corner = self.corner;
        for way in ways {
            corner[way.axis] += way.length;
        }
        corner
    }

    /// Visits those cells, in order, whose positions are wanted; that of the block's first cell is `first`.
    fn visit(&self, first: usize, wanted: &Range<usize>, visit: &mut impl FnMut([i64; 3])) {
        let own = first.max(wanted.start)..(first + self.cells()).min(wanted.end);
        if own.is_empty() {
            return;
        }
        if let Some(line) = self.line() {
            for step in own {
                let way = (step - first) as i64 * line.length.signum();
                visit(self.corner_after(&[line.with_length(way)]));
            }
            return;
        }
        let mut first = first;
        for part in self.parts() {
            part.visit(first, wanted, visit);
            first += part.cells();
        }
    }

    /// The only side of more than one cell, if there is no other.
    fn line(&self) -> Option<Side> {
        let longest = self.sides.into_iter().max_by_key(|side| side.cells())?;
        (self.cells() == longest.cells() as usize).then_some(longest)
    }

    /// The smaller boxes that the curve goes through, each entered next to where the one before is left.
    fn parts(&self) -> Vec<Block> {
        let [a, b, c] = self.sides;
        let [(a1, a2), (b1, b2), (c1, c2)] = [a, b, c].map(|side| side.halves().into());
        let part = |ways: &[Side], sides: [Side; 3]| Block {
            corner: self.corner_after(ways),
            sides,
        };
        let (width, height, depth) = (a.cells(), b.cells(), c.cells());
        if 2 * width > 3 * height.max(depth) {
            vec![part(&[], [a1, b, c]), part(&[a1], [a2, b, c])]
        } else if 3 * height > 4 * depth {
            vec![
                part(&[], [b1, c, a1]),
                part(&[b1], [a, b2, c]),
                part(&[a.to_last(), b1.to_last()], [b1.back(), c, a2.back()]),
            ]
        } else if 3 * depth > 4 * height {
            vec![
                part(&[], [c1, a1, b]),
                part(&[c1], [a, b, c2]),
                part(&[a.to_last(), c1.to_last()], [c1.back(), a2.back(), b]),
            ]
        } else {
            let (a_last, b_last, c_last) = (a.to_last(), b1.to_last(), c.to_last());
            vec![
                part(&[], [b1, c1, a1]),
                part(&[b1], [c, a1, b2]),
                part(&[b_last, c_last], [a, b1.back(), c2.back()]),
                part(&[a_last, b1, c_last], [c.back(), a2.back(), b2]),
                part(&[a_last, b_last], [b1.back(), c1, a2.back()]),
            ]
        }
    }
}

#[cfg(test)]
mod tests;
