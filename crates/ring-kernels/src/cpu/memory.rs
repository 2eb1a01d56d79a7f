//! Memory that can be refused: every large allocation of this crate goes through [`zeroed`] or [`room`].

use std::hint::black_box;

use bytemuck::Zeroable;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ring_comm::buffer::{DType, HostBuffer};

use super::threads::Threads;
use crate::KernelError;

/// An element type of host buffers.
pub(super) trait Element: Zeroable + Copy + Send + Sync {
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

/// Elements between two of which at most a page of memory lies, on every machine this crate is for.
const PAGE: usize = 1024;

/// `len` zeros, in the memory of `reuse` if that is of this type and large enough.
pub(super) fn zeroed<T: Element>(
    threads: &Threads,
    len: usize,
    reuse: Option<HostBuffer>,
) -> Result<Vec<T>, KernelError> {
    match reusable(len, reuse) {
        Some(mut values) => {
            values.truncate(len);
            fill(threads, &mut values, T::zeroed())?;
            values.resize(len, T::zeroed());
            Ok(values)
        }
        None => fresh(threads, len),
    }
}

/// Room for `len` elements, whatever they are, in the memory of `reuse` if that is of this type and large enough.
pub(super) fn room<T: Element>(
    threads: &Threads,
    len: usize,
    reuse: Option<HostBuffer>,
) -> Result<Vec<T>, KernelError> {
    match reusable(len, reuse) {
        Some(mut values) => {
            values.truncate(len);
            values.resize(len, T::zeroed());
            Ok(values)
        }
        None => fresh(threads, len),
    }
}

/// The memory of `reuse`. Too small memory would be copied to grow, and both held for a while; how much may be left over is for
/// who offers it to say.
fn reusable<T: Element>(len: usize, reuse: Option<HostBuffer>) -> Option<Vec<T>> {
    reuse
        .and_then(T::take)
        .filter(|values| values.capacity() >= len)
}

/// New memory. The system hands it out, and clears it, page by page when it is written to for the first time: for a long
/// sequence that takes as long as a good part of the attention, so all threads write to it.
fn fresh<T: Element>(threads: &Threads, len: usize) -> Result<Vec<T>, KernelError> {
    let mut values =
        bytemuck::allocation::try_zeroed_vec::<T>(len).map_err(|()| KernelError::Allocation {
            bytes: len.saturating_mul(size_of::<T>()),
        })?;
    ask_for_large_pages(&mut values);
    for_each_chunk(threads, &mut values, |chunk| {
        for page in chunk.chunks_mut(PAGE) {
            // A page that is read before it is written to costs twice.
            *black_box(&mut page[0]) = T::zeroed();
        }
    })?;
    Ok(values)
}

/// Asks the system for large pages, where it gives them for the asking: a hundred times fewer of them need to be handed out, and
/// rows far apart are found faster.
#[cfg(target_os = "linux")]
fn ask_for_large_pages<T: Element>(values: &mut [T]) {
    /// A large page; the same on all processors this crate knows.
    const LARGE: usize = 2 << 20;
    let range = values.as_mut_ptr_range();
    let start = (range.start as usize).next_multiple_of(LARGE);
    let end = range.end as usize / LARGE * LARGE;
    if start < end {
        // SAFETY: the range lies within `values`. The advice changes how it is backed, never what is in it; if it is refused,
        // nothing happens, so the result does not matter.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T: Element>(_values: &mut [T]) {}

/// Sets all `values` to `value`.
pub(super) fn fill<T: Element>(
    threads: &Threads,
    values: &mut [T],
    value: T,
) -> Result<(), KernelError> {
    for_each_chunk(threads, values, |chunk| chunk.fill(value))
}

fn for_each_chunk<T: Element>(
    threads: &Threads,
    values: &mut [T],
    work: impl Fn(&mut [T]) + Sync,
) -> Result<(), KernelError> {
    let chunks = values.chunks_mut(CHUNK);
    match chunks.len() {
        0 | 1 => {
            chunks.for_each(work);
            Ok(())
        }
        _ => threads.run(chunks, || Ok(()), |(), chunk| work(chunk)),
    }
}

/// What one thread clears or converts at a time: long enough that handing it out costs nothing beside.
const CHUNK: usize = 256 * PAGE;

/// A zeroed buffer; see [`Kernels::allocate`](crate::Kernels::allocate).
pub(super) fn allocate(
    threads: &Threads,
    dtype: DType,
    len: usize,
    reuse: Option<HostBuffer>,
) -> Result<HostBuffer, KernelError> {
    Ok(match dtype {
        DType::F32 => f32::wrap(zeroed(threads, len, reuse)?),
        DType::F16 => f16::wrap(zeroed(threads, len, reuse)?),
        DType::BF16 => bf16::wrap(zeroed(threads, len, reuse)?),
    })
}

/// Rounds f32 values to `dtype`; f32 itself passes through untouched.
pub(super) fn round(
    threads: &Threads,
    values: Vec<f32>,
    dtype: DType,
) -> Result<HostBuffer, KernelError> {
    match dtype {
        DType::F32 => Ok(HostBuffer::F32(values)),
        DType::F16 => rounded::<f16>(threads, &values),
        DType::BF16 => rounded::<bf16>(threads, &values),
    }
}

fn rounded<T: Element>(threads: &Threads, values: &[f32]) -> Result<HostBuffer, KernelError>
where
    [T]: HalfFloatSliceExt,
{
    let mut target = room::<T>(threads, values.len(), None)?;
    let chunks = target.chunks_mut(CHUNK).zip(values.chunks(CHUNK));
    threads.run(
        chunks,
        || Ok(()),
        |(), (target, values)| target.convert_from_f32_slice(values),
    )?;
    Ok(T::wrap(target))
}
