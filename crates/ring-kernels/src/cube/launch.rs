//! Launches within the limits of the device.

use std::cmp::Reverse;

use cubecl::prelude::{BufferArg, CubeCount, CubeDim};
use cubecl::server::Handle;
use ring_comm::buffer::{Buffer, DType};

use super::buffer::{CubeBuffer, CubeDevice, device_error};
use super::device::matrix::work::Tiling;
use super::path::{Kernel, MatrixUnits};
use super::source::Placed;
use super::table::{Record, Table};
use super::tiling::Room;
use crate::{KernelError, Problem};

/// Units of a cube that works on elements, where the device allows so many.
const UNITS: u32 = 64;

/// Buffers of the kernel that has most.
const BINDINGS: u32 = 9;

/// A device and what it can do.
#[derive(Clone, Debug)]
pub(super) struct Launcher {
    pub(super) device: CubeDevice,
    units: u32,
    most_cubes: (u32, u32, u32),
    room: Room,
    matrix_units: Option<MatrixUnits>,
}

/// A launch: the table, its records and the cubes.
pub(super) struct Launch {
    pub(super) table: CubeTable,
    pub(super) cubes: CubeCount,
}

/// A table in the memory of the device.
pub(super) struct CubeTable {
    handle: Handle,
    len: usize,
}

impl CubeTable {
    pub(super) fn argument(&self) -> BufferArg {
        // SAFETY: the memory was made of `len` words.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len) }
    }
}

impl Launcher {
    pub(super) fn new(device: CubeDevice) -> Result<Self, KernelError> {
        let hardware = &device.client().properties().hardware;
        if hardware.max_bindings < BINDINGS {
            return Err(KernelError::Device(format!(
                "the device passes {} buffers to a kernel, {BINDINGS} are needed",
                hardware.max_bindings
            )));
        }
        let units = hardware.max_units_per_cube.min(hardware.max_cube_dim.0);
        Ok(Self {
            units: units.clamp(1, UNITS),
            most_cubes: hardware.max_cube_count,
            room: Room {
                units: units as usize,
                shared_bytes: hardware.max_shared_memory_size,
            },
            matrix_units: MatrixUnits::of(&device),
            device,
        })
    }

    /// Whether to use the matrix units of a device that has them.
    pub(super) fn use_matrix_units(&mut self, use_them: bool) {
        self.matrix_units = use_them.then(|| MatrixUnits::of(&self.device)).flatten();
    }

    /// Has matrix units used as if the device did not take NVIDIA's assembly.
    #[cfg(all(test, feature = "emulated-cuda"))]
    pub(super) fn avoid_assembly(&mut self) {
        self.matrix_units = self.matrix_units.take().map(MatrixUnits::without_assembly);
    }

    /// How a kernel divides its work, if matrix units do it; see [`MatrixUnits::tiling`].
    pub(super) fn tiling(
        &self,
        problem: &Problem,
        kernel: Kernel,
        rows: &[Placed<'_>],
    ) -> Option<Tiling> {
        self.matrix_units.as_ref()?.tiling(problem, kernel, rows)
    }

    /// The dimensions of a cube that works on elements.
    pub(super) fn cube(&self) -> CubeDim {
        CubeDim::new_1d(self.units)
    }

    /// Pretends that the device has no more for a cube than `room`.
    #[cfg(all(test, feature = "wgpu", not(feature = "emulated-cuda")))]
    pub(super) fn limit(&mut self, room: Room) {
        self.room = room;
    }

    /// What the device has for a cube.
    pub(super) fn room_of_cube(&self) -> Room {
        self.room
    }

    /// Cubes for so many elements: all the elements, or as many cubes as a launch may have.
    pub(super) fn cubes_for_elements(&self, elements: usize) -> CubeCount {
        CubeCount::new_1d(self.cubes_along_x(elements))
    }

    fn cubes_along_x(&self, elements: usize) -> u32 {
        let cubes = elements.div_ceil(self.units as usize);
        u32::try_from(cubes).map_or(self.most_cubes.0, |cubes| cubes.min(self.most_cubes.0))
    }

    /// Launches that do `records` for `depth` batch entries (and heads of a group), by cubes that own `rows_of_cube` rows;
    /// `rows` tells how many a record has.
    pub(super) fn rows_of_records(
        &self,
        table: &Table,
        records: &[Record],
        depth: usize,
        rows_of_cube: usize,
        rows: impl Fn(&Record) -> u32,
    ) -> Result<Vec<Launch>, KernelError> {
        let cubes_of = |record: &Record| rows(record).div_ceil(rows_of_cube as u32);
        let mut sorted = records.to_vec();
        sorted.sort_by_key(|record| Reverse(cubes_of(record)));
        let mut launches = Vec::new();
        let mut rest = sorted.as_slice();
        // Every record gets as many cubes as the first one of its launch: much smaller ones have a launch of their own.
        while let Some(cubes) = rest.first().map(cubes_of).filter(|&cubes| cubes > 0) {
            if cubes > self.most_cubes.0 {
                let most = rows(&rest[0]);
                return Err(KernelError::Invalid(format!(
                    "a block of {most} rows takes {cubes} cubes, the device launches at most {}",
                    self.most_cubes.0
                )));
            }
            let alike = rest.partition_point(|record| cubes_of(record) > cubes / 8);
            let (now, later) = rest.split_at(alike);
            launches.extend(self.launches(table, now, cubes, depth)?);
            rest = later;
        }
        Ok(launches)
    }

    /// Launches that do `records` for `depth` batch entries, where units take any number of elements. `elements` tells how many
    /// a record has.
    pub(super) fn elements_of_records(
        &self,
        table: &Table,
        records: &[Record],
        depth: usize,
        elements: impl Fn(&Record) -> usize,
    ) -> Result<Vec<Launch>, KernelError> {
        let most = records.iter().map(elements).max().unwrap_or(0);
        self.launches(table, records, self.cubes_along_x(most), depth)
    }

    fn launches(
        &self,
        table: &Table,
        records: &[Record],
        x: u32,
        depth: usize,
    ) -> Result<Vec<Launch>, KernelError> {
        let (_, most_y, most_z) = self.most_cubes;
        let z = u32::try_from(depth).ok().filter(|&z| z <= most_z);
        let Some(z) = z else {
            return Err(KernelError::Invalid(format!(
                "batch entries times query heads of a group are {depth}, the device launches at most {most_z} cubes along an axis"
            )));
        };
        if x == 0 || z == 0 {
            return Ok(Vec::new());
        }
        let launch = |records: &[Record]| {
            Ok(Launch {
                cubes: CubeCount::new_3d(x, records.len() as u32, z),
                table: self.upload(&table.with(records)?),
            })
        };
        records.chunks(most_y as usize).map(launch).collect()
    }

    /// A table without records, for kernels that work on elements.
    pub(super) fn table(&self, table: &Table) -> Result<CubeTable, KernelError> {
        Ok(self.upload(&table.with(&[])?))
    }

    fn upload(&self, words: &[u32]) -> CubeTable {
        let client = self.device.client();
        CubeTable {
            handle: client.create_from_slice(bytemuck::cast_slice(words)),
            len: words.len(),
        }
    }

    /// A buffer as an argument of a kernel.
    pub(super) fn argument(
        &self,
        what: &'static str,
        buffer: &CubeBuffer,
    ) -> Result<BufferArg, KernelError> {
        self.argument_of(what, buffer, buffer.len())
    }

    fn argument_of(
        &self,
        what: &'static str,
        buffer: &CubeBuffer,
        len: usize,
    ) -> Result<BufferArg, KernelError> {
        if !buffer.is_of(&self.device) {
            return Err(KernelError::Invalid(format!(
                "{what} lies on another device"
            )));
        }
        // SAFETY: a buffer's memory holds at least its length of elements, and so `len` vectors of them.
        Ok(unsafe { BufferArg::from_raw_parts(buffer.handle().clone(), len) })
    }

    /// A buffer as an argument of a kernel that reads rows as `tiling` says.
    pub(super) fn rows_argument(
        &self,
        what: &'static str,
        buffer: &CubeBuffer,
        tiling: &Tiling,
    ) -> Result<BufferArg, KernelError> {
        self.argument_of(what, buffer, buffer.len() / tiling.vector_size())
    }

    /// Whether what was launched could be launched: kernels are compiled by now, not yet done.
    pub(super) fn launched<'a>(
        &self,
        written: impl IntoIterator<Item = &'a CubeBuffer>,
    ) -> Result<(), KernelError> {
        let handles: Vec<&Handle> = written.into_iter().map(CubeBuffer::handle).collect();
        self.device.client().check(handles).map_err(device_error)
    }

    /// `len` elements with arbitrary contents, in the memory of `reuse` where that serves.
    pub(super) fn room(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<CubeBuffer>,
    ) -> Result<CubeBuffer, KernelError> {
        CubeBuffer::room(&self.device, dtype, len, reuse)
    }
}
