//! Tensors of grids in the order of a Hilbert curve, and back; the cells that a rank owns.

use burn::tensor::{Device, Int, Tensor, kind::Basic};
use ring_core::HilbertOrder;

use crate::{error::RingError, ring::Ring};

/// The whole tensor with the cells along `dim`, row by row, brought into the order of the curve: before it is sharded. Of any
/// element type; gradients flow.
///
/// What stands at every position is all that changes. Attention to everything gives each cell what it gave before; segments,
/// dilation, windows and causality count positions, so they now select by the curve.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use ring_burn::{HilbertOrder, from_hilbert_order, to_hilbert_order};
///
/// let order = HilbertOrder::new(&[2, 2])?;
/// let cells = Tensor::<1>::from_floats([0.0, 1.0, 2.0, 3.0], &Device::flex());
/// let along = to_hilbert_order(cells.clone(), 0, &order)?;
/// assert_eq!(along.to_data().to_vec::<f32>()?, [0.0, 1.0, 3.0, 2.0]);
/// assert_eq!(from_hilbert_order(along, 0, &order)?.to_data(), cells.to_data());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`RingError::Shape`] if that dimension has another number of rows than the grid has cells.
pub fn to_hilbert_order<const D: usize, K: Basic>(
    tensor: Tensor<D, K>,
    dim: usize,
    order: &HilbertOrder,
) -> Result<Tensor<D, K>, RingError> {
    check(&tensor, dim, order)?;
    Ok(select(tensor, dim, &order.order()))
}

/// The whole tensor with the positions along `dim` brought back into rows of cells: what [`to_hilbert_order`] changed, undone.
///
/// # Errors
/// [`RingError::Shape`] if that dimension has another number of rows than the grid has cells.
pub fn from_hilbert_order<const D: usize, K: Basic>(
    tensor: Tensor<D, K>,
    dim: usize,
    order: &HilbertOrder,
) -> Result<Tensor<D, K>, RingError> {
    check(&tensor, dim, order)?;
    Ok(select(tensor, dim, &order.inverse()))
}

/// The cell that each of this rank's rows is, if the sequence is the grid in the order of the curve: what to load, without anyone
/// holding the whole, and where results belong. Time and memory are those of the rank's own rows.
///
/// # Errors
/// [`RingError::Shape`] if the sequence has another length than the grid has cells.
pub fn shard_cells(order: &HilbertOrder, ring: &Ring) -> Result<Vec<usize>, RingError> {
    if order.length() != ring.sequence_length() {
        return Err(RingError::Shape {
            what: "the grid",
            got: order.sides().to_vec(),
            expected: format!("{} cells, one for each position", ring.sequence_length()),
        });
    }
    let spans = ring.spans();
    let cells = spans.iter().map(|span| order.cells(span.start..span.end));
    Ok(cells.flatten().collect())
}

fn check<const D: usize, K: Basic>(
    tensor: &Tensor<D, K>,
    dim: usize,
    order: &HilbertOrder,
) -> Result<(), RingError> {
    let dims = tensor.dims();
    if dim < D && dims[dim] == order.length() {
        return Ok(());
    }
    Err(RingError::Shape {
        what: "the tensor to reorder",
        got: dims.to_vec(),
        expected: format!(
            "{} rows in dimension {dim}, the cells of a grid of {:?}",
            order.length(),
            order.sides()
        ),
    })
}

fn select<const D: usize, K: Basic>(
    tensor: Tensor<D, K>,
    dim: usize,
    rows: &[usize],
) -> Tensor<D, K> {
    let device: Device = tensor.device();
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    tensor.select(dim, Tensor::<1, Int>::from_ints(rows.as_slice(), &device))
}
