//! Two orders of a grid, side by side, in the colours of the ranks that own the cells.

use plotters::{
    backend::SVGBackend,
    coord::Shift,
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::{PathElement, Rectangle},
    style::{BLACK, Color, IntoFont, Palette, Palette99, WHITE},
};
use ring_core::GridError;
use thiserror::Error;

use super::{Order, Sequence};

/// Sides of a cell, in pixels.
const CELL: i32 = 12;
const MARGIN: i32 = 16;
const TITLE: i32 = 34;

/// Why there is no picture.
#[derive(Debug, Error)]
pub enum PictureError {
    /// The grid has no order.
    #[error(transparent)]
    Grid(#[from] GridError),
    /// It cannot be drawn.
    #[error("cannot draw: {0}")]
    Draw(String),
}

impl<E: std::error::Error + Send + Sync> From<DrawingAreaErrorKind<E>> for PictureError {
    fn from(error: DrawingAreaErrorKind<E>) -> Self {
        Self::Draw(error.to_string())
    }
}

/// An area of `height` and `width` cells in row-major order and along the curve, in contiguous shards of `ranks`, as SVG.
///
/// # Errors
/// [`PictureError`] for a grid without an order, or if it cannot be drawn.
pub fn draw(height: usize, width: usize, ranks: usize) -> Result<String, PictureError> {
    let panel = (width as i32 * CELL, height as i32 * CELL);
    let size = (2 * panel.0 + 3 * MARGIN, panel.1 + TITLE + MARGIN);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (size.0 as u32, size.1 as u32));
        let area = area.into_drawing_area();
        area.fill(&WHITE)?;
        for (index, order) in [Order::RowMajor, Order::Hilbert].into_iter().enumerate() {
            let sequence = Sequence::new(&[height, width], order)?;
            let left = MARGIN + index as i32 * (panel.0 + MARGIN);
            let title = format!("{order}, {height} x {width} cells, {ranks} ranks");
            area.draw_text(
                &title,
                &("sans-serif", 15).into_font().color(&BLACK),
                (left, TITLE / 3),
            )?;
            paint(&area, &sequence, ranks, (left, TITLE))?;
        }
        area.present()?;
    }
    Ok(svg)
}

/// The cells in the colours of their ranks, and the way through them.
fn paint(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    sequence: &Sequence,
    ranks: usize,
    (left, top): (i32, i32),
) -> Result<(), PictureError> {
    let mut owners = vec![0; sequence.cells.len()];
    for (position, &cell) in sequence.cells.iter().enumerate() {
        owners[cell] = position * ranks / owners.len();
    }
    for (row, owners) in owners.chunks(sequence.sides[2]).enumerate() {
        let y = top + row as i32 * CELL;
        let mut x = left;
        for run in owners.chunk_by(|one, next| one == next) {
            let right = x + run.len() as i32 * CELL;
            let colour = Palette99::pick(run[0]).mix(0.55);
            area.draw(&Rectangle::new(
                [(x, y), (right, y + CELL)],
                colour.filled(),
            ))?;
            x = right;
        }
    }
    let middle = |&cell: &usize| {
        let [_, row, column] = sequence.place(cell);
        (left + column * CELL + CELL / 2, top + row * CELL + CELL / 2)
    };
    let way: Vec<(i32, i32)> = sequence.cells.iter().map(middle).collect();
    area.draw(&PathElement::new(way, BLACK.mix(0.75)))?;
    Ok(())
}
