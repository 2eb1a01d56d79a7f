//! Which kernels compute: those for matrix units, or the plain ones.
//!
//! A device is taken to have matrix units if it tells that it multiplies 16 x 8 x 16 matrices of the element type into f32 with
//! registers in our hands, and loads such matrices from shared memory (`ldmatrix`); of what CubeCL drives these are NVIDIA's from
//! compute capability 8.0 on, whose layout of registers the kernels rely on.
//!
//! # Tiles
//! A unit has 255 registers. In one of its planes' 16 x `n` f32 matrices it holds `n / 2` of them, of 16-bit ones `n / 4`. With
//! `d` the head size, `t` the rows of a tile and `r` sixteens of rows per plane:
//!
//! | kernel | sums | scores | rows in registers | d = 64 | d = 128 | d = 256 |
//! |---|---|---|---|---|---|---|
//! | forward | r d/2 | r t/2 | r d/4 | r 2, t 64: 64 + 64 + 32 | r 2, t 32: 128 + 32 | r 1, t 32: 128 + 16 |
//! | query gradients | r d/2 | 2 r t/2 | r 2 d/4 | r 2, t 32: 64 + 64 | r 1, t 64: 64 + 64 | r 1, t 16: 128 + 16 |
//! | key gradients | 2 r d/2 | 2 r t/2 | r 2 d/4 | r 2, t 32: 128 + 64 | r 1, t 32: 128 + 32 | r 1, t 16: 2 launches of 128 + 16 |
//!
//! Rows that would not fit are read from shared memory for each tile instead. Two sixteens of rows per plane halve what is read of
//! the tiles. Shared memory holds the rows of the cube and two of each tile, of 2 (d + 8) bytes a row; where a device has too
//! little of it, tiles are halved, then planes. Softcap, slopes and dropout take registers too: with any of them, heads of up to 64
//! have t 32 in the forward pass, and r 1 for key gradients. With these tiles an H100 has two cubes on each multiprocessor.

use cubecl::features::Plane;
use cubecl::ir::{ElemType, FloatKind};
use ring_comm::buffer::{Buffer, DType};

use super::buffer::{CubeDevice, element};
use super::device::matrix::work::Tiling;
use super::source::Placed;
use crate::{Problem, Scores};

/// Planes of a cube, where shared memory allows.
const PLANES: usize = 4;

/// Units of a plane.
const PLANE: u32 = 32;

/// Elements of the vectors in which rows are read.
const VECTOR: usize = 8;

/// The longest rows of which the gradients of keys and of values are computed by one launch.
pub(super) const MOST_OF_BOTH_GRADIENTS: usize = 128;

/// A kernel for matrix units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    Forward,
    QueryGradients,
    KeyGradients,
}

/// The matrix units of a device.
#[derive(Clone, Debug)]
pub(super) struct MatrixUnits {
    dtypes: Vec<DType>,
    shared_bytes: usize,
    assembly: bool,
}

impl MatrixUnits {
    /// The matrix units of a device that has those which the kernels are written for.
    pub(super) fn of(device: &CubeDevice) -> Option<Self> {
        let properties = device.client().properties();
        let (hardware, features) = (&properties.hardware, &properties.features);
        let planes = hardware.plane_size_min == PLANE && hardware.plane_size_max == PLANE;
        let units = hardware.max_units_per_cube.min(hardware.max_cube_dim.0);
        if !planes || units < PLANE * PLANES as u32 || !features.plane.contains(Plane::Ops) {
            return None;
        }
        let multiplies = |element: ElemType| {
            features.matmul.mma.iter().any(|config| {
                (config.m, config.n, config.k) == (16, 8, 16)
                    && config.a_type == element
                    && config.b_type == element
                    && config.cd_type == ElemType::Float(FloatKind::F32)
            })
        };
        let serves = |&dtype: &DType| {
            let element = element(dtype);
            device.element(dtype).is_ok()
                && multiplies(element)
                && features.matmul.ldmatrix.contains(&element)
        };
        let dtypes: Vec<DType> = [DType::F16, DType::BF16]
            .into_iter()
            .filter(serves)
            .collect();
        (!dtypes.is_empty()).then_some(Self {
            dtypes,
            shared_bytes: hardware.max_shared_memory_size,
            // What loads matrices and copies while it computes is compiled from CUDA C++.
            assembly: features.copy_async,
        })
    }

    /// The same, as if the device did not take NVIDIA's assembly.
    #[cfg(all(test, feature = "emulated-cuda"))]
    pub(super) fn without_assembly(mut self) -> Self {
        self.assembly = false;
        self
    }

    /// How a kernel divides its work, if matrix units can do it: rows of 16-bit elements, their number a multiple of 16 up to 256,
    /// and a positive scale, since maxima are taken before it is applied.
    pub(super) fn tiling(
        &self,
        problem: &Problem,
        kernel: Kernel,
        rows: &[Placed<'_>],
    ) -> Option<Tiling> {
        let head_dim = problem.head_dim;
        let sizes = head_dim.is_multiple_of(16) && (16..=256).contains(&head_dim);
        let scaled = problem.scale.is_normal() && problem.scale > 0.0 && problem.scale < 1e30;
        let typed = rows
            .iter()
            .all(|rows| self.dtypes.contains(&rows.buffer.dtype()));
        if !(sizes && scaled && typed) {
            return None;
        }
        let plain = problem.scores == Scores::default();
        let (row_tiles, tile_rows, rows_in_registers) = match (kernel, head_dim) {
            (Kernel::Forward, ..=64) if plain => (2, 64, true),
            (Kernel::Forward, ..=64) => (2, 32, true),
            (Kernel::Forward, ..=128) => (2, 32, false),
            (Kernel::QueryGradients, ..=64) => (2, 32, false),
            (Kernel::QueryGradients, ..=128) => (1, 64, false),
            (Kernel::KeyGradients, ..=64) if plain => (2, 32, false),
            (Kernel::KeyGradients, ..=128) | (Kernel::Forward, _) => (1, 32, false),
            _ => (1, 16, false),
        };
        self.fitted(
            Tiling {
                head_dim,
                planes: PLANES,
                row_tiles,
                tile_rows,
                rows_in_registers,
                vectors: rows.iter().all(in_vectors),
                assembly: self.assembly,
            },
            kernel,
        )
    }

    /// The tiling with smaller tiles and fewer planes, as shared memory demands.
    fn fitted(&self, mut tiling: Tiling, kernel: Kernel) -> Option<Tiling> {
        while shared_bytes(&tiling, kernel) > self.shared_bytes {
            if tiling.tile_rows > 16 {
                tiling.tile_rows /= 2;
            } else if tiling.planes > 1 {
                tiling.planes /= 2;
            } else {
                return None;
            }
        }
        Some(tiling)
    }
}

/// Shared memory that a kernel takes.
fn shared_bytes(tiling: &Tiling, kernel: Kernel) -> usize {
    let (own, numbers) = match kernel {
        Kernel::Forward => (1, 0),
        Kernel::QueryGradients => (2, 0),
        Kernel::KeyGradients => (2, 2),
    };
    let vectors = own * tiling.cube_vectors() + 4 * tiling.tile_vectors();
    16 * vectors + size_of::<f32>() * 2 * numbers * tiling.tile_rows
}

/// Whether all rows lie where vectors may.
fn in_vectors(rows: &Placed<'_>) -> bool {
    let Placed {
        buffer,
        layout,
        offset,
    } = rows;
    let first_byte = buffer.handle().offset_start.unwrap_or(0);
    let starts = layout.head_base.iter().map(|base| base + offset);
    first_byte.is_multiple_of((VECTOR * buffer.dtype().size()) as u64)
        && layout.batch_stride.is_multiple_of(VECTOR)
        && layout.row_stride.is_multiple_of(VECTOR)
        && starts.into_iter().all(|start| start.is_multiple_of(VECTOR))
}
