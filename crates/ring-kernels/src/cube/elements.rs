//! Buffers filled and rounded.

use ring_comm::buffer::{Buffer, DType};

use super::buffer::CubeBuffer;
use super::device::elements;
use super::launch::Launcher;
use crate::{KernelError, check};

/// `len` elements of one value; see [`Kernels::allocate`](crate::Kernels::allocate).
pub(super) fn filled(
    launcher: &Launcher,
    dtype: DType,
    len: usize,
    value: f32,
    reuse: Option<CubeBuffer>,
) -> Result<CubeBuffer, KernelError> {
    let buffer = launcher.room(dtype, len, reuse)?;
    if len > 0 {
        elements::fill::launch(
            launcher.device.client(),
            launcher.cubes_for_elements(len),
            launcher.cube(),
            launcher.argument("the buffer", &buffer)?,
            value,
            len as u32,
            launcher.device.element(dtype)?,
        );
    }
    launcher.launched([&buffer])?;
    Ok(buffer)
}

/// Rounds an f32 buffer; see [`Kernels::round`](crate::Kernels::round).
pub(super) fn round(
    launcher: &Launcher,
    buffer: CubeBuffer,
    dtype: DType,
) -> Result<CubeBuffer, KernelError> {
    check::dtype("the buffer to round", buffer.dtype(), DType::F32)?;
    if dtype == DType::F32 {
        return Ok(buffer);
    }
    let len = buffer.len();
    let rounded = launcher.room(dtype, len, None)?;
    if len > 0 {
        elements::round::launch(
            launcher.device.client(),
            launcher.cubes_for_elements(len),
            launcher.cube(),
            launcher.argument("the buffer to round", &buffer)?,
            launcher.argument("the rounded buffer", &rounded)?,
            len as u32,
            launcher.device.element(dtype)?,
        );
    }
    launcher.launched([&rounded])?;
    Ok(rounded)
}
