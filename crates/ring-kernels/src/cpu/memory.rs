//! Memory that can be refused: every large allocation of this crate goes through [`zeroed`].

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ring_comm::buffer::{DType, HostBuffer};

use crate::KernelError;

/// An element type of host buffers.
pub(super) trait Element: Copy + Default {
    /// The vector inside a buffer of this type, `None` for another type.
    fn take(buffer: HostBuffer) -> Option<Vec<Self>>;

    /// The buffer around a vector.
    fn wrap(values: Vec<Self>) -> HostBuffer;
}

macro_rules! element {
    ($type:ty, $variant:ident) => {
        impl Element for $type {
            fn take(buffer: HostBuffer) -> Option<Vec<Self>> {
                match buffer {
                    HostBuffer::$variant(values) => Some(values),
                    _ => None,
                }
            }

            fn wrap(values: Vec<Self>) -> HostBuffer {
                HostBuffer::$variant(values)
            }
        }
    };
}

element!(f32, F32);
element!(f16, F16);
element!(bf16, BF16);

/// `len` zeros, in the memory of `reuse` if that is of this type and large enough.
pub(super) fn zeroed<T: Element>(
    len: usize,
    reuse: Option<HostBuffer>,
) -> Result<Vec<T>, KernelError> {
    // Too small memory would be copied to grow, and both held for a while. How much may be left over is for who offers it to say.
    let mut values = reuse
        .and_then(T::take)
        .filter(|values| values.capacity() >= len)
        .unwrap_or_default();
    values.clear();
    values
        .try_reserve_exact(len)
        .map_err(|_| KernelError::Allocation {
            bytes: len.saturating_mul(size_of::<T>()),
        })?;
    values.resize(len, T::default());
    Ok(values)
}

/// A zeroed buffer; see [`Kernels::allocate`](crate::Kernels::allocate).
pub(super) fn allocate(
    dtype: DType,
    len: usize,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    Ok(match dtype {
        DType::F32 => f32::wrap(zeroed(len, reuse)?),
        DType::F16 => f16::wrap(zeroed(len, reuse)?),
        DType::BF16 => bf16::wrap(zeroed(len, reuse)?),
    })
}

/// Rounds f32 values to `dtype`; f32 itself passes through untouched.
pub(super) fn round(values: Vec<f32>, dtype: DType) -> Result<HostBuffer, KernelError> {
    let mut rounded = match dtype {
        DType::F32 => return Ok(HostBuffer::F32(values)),
        _ => allocate(dtype, values.len(), None)?,
    };
    match &mut rounded {
        HostBuffer::F32(_) => unreachable!("returned above"),
        HostBuffer::F16(target) => target.convert_from_f32_slice(&values),
        HostBuffer::BF16(target) => target.convert_from_f32_slice(&values),
    }
    Ok(rounded)
}
