//! The buffers that travel between ranks.
//!
//! This module is the one thing the attention kernels and the transports have in common: a kernel fills a [`Buffer`],
//! a transport moves it, a kernel reads it. Everything above is generic in the buffer type, so that the same driver runs
//! on host memory ([`HostBuffer`]) and, with other transports and kernels, on device memory.

mod pool_statistics;

use std::fmt;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

pub use self::pool_statistics::PoolStatistics;

/// Element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit IEEE 754 float.
    F32,
    /// 16-bit IEEE 754 float.
    F16,
    /// 16-bit brain float: the upper half of an f32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

/// Owned memory that a transport can move from one rank to another.
pub trait Buffer: Send + Sized + fmt::Debug + 'static {
    /// Borrowed, read-only access to memory of the same kind; also how inputs that nobody may move are passed.
    type View<'a>: Copy + Send + Sync;

    /// Element type.
    fn dtype(&self) -> DType;

    /// Number of elements.
    fn len(&self) -> usize;

    /// Whether the buffer holds no element.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of elements that fit without further memory; at least [`len`](Self::len), which is also the default.
    fn capacity(&self) -> usize {
        self.len()
    }

    /// Size in bytes.
    fn byte_len(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// Borrows the contents.
    fn view(&self) -> Self::View<'_>;

    /// The same view with a shorter lifetime; the compiler cannot see by itself that an associated type allows it.
    fn shorten<'short, 'long: 'short>(view: Self::View<'long>) -> Self::View<'short>;
}

/// Memory of this process, typed by its elements.
#[derive(Clone, Debug, PartialEq)]
pub enum HostBuffer {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 16-bit IEEE 754 floats.
    F16(Vec<f16>),
    /// 16-bit brain floats.
    BF16(Vec<bf16>),
}

/// A borrowed [`HostBuffer`], or any slice of host memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HostView<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit IEEE 754 floats.
    F16(&'a [f16]),
    /// 16-bit brain floats.
    BF16(&'a [bf16]),
}

impl HostBuffer {
    /// `len` zeros of type `dtype`.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => HostBuffer::F32(vec![0.0; len]),
            DType::F16 => HostBuffer::F16(vec![f16::ZERO; len]),
            DType::BF16 => HostBuffer::BF16(vec![bf16::ZERO; len]),
        }
    }

    /// As [`zeros`](Self::zeros); `None` if the memory is refused.
    pub fn try_zeros(dtype: DType, len: usize) -> Option<Self> {
        use bytemuck::allocation::try_zeroed_vec;
        match dtype {
            DType::F32 => try_zeroed_vec(len).map(HostBuffer::F32).ok(),
            DType::F16 => try_zeroed_vec(len).map(HostBuffer::F16).ok(),
            DType::BF16 => try_zeroed_vec(len).map(HostBuffer::BF16).ok(),
        }
    }

    /// The f32 elements, or `None` for another type.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self {
            HostBuffer::F32(values) => Some(values),
            _ => None,
        }
    }

    /// The f32 elements for writing, or `None` for another type.
    pub fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        match self {
            HostBuffer::F32(values) => Some(values),
            _ => None,
        }
    }

    /// The contents as raw bytes in this machine's byte order, for transports that carry bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            HostBuffer::F32(values) => bytemuck::cast_slice(values),
            HostBuffer::F16(values) => bytemuck::cast_slice(values),
            HostBuffer::BF16(values) => bytemuck::cast_slice(values),
        }
    }

    /// The contents as raw bytes, for transports that receive into them.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            HostBuffer::F32(values) => bytemuck::cast_slice_mut(values),
            HostBuffer::F16(values) => bytemuck::cast_slice_mut(values),
            HostBuffer::BF16(values) => bytemuck::cast_slice_mut(values),
        }
    }
}

impl Buffer for HostBuffer {
    type View<'a> = HostView<'a>;

    fn dtype(&self) -> DType {
        match self {
            HostBuffer::F32(_) => DType::F32,
            HostBuffer::F16(_) => DType::F16,
            HostBuffer::BF16(_) => DType::BF16,
        }
    }

    fn len(&self) -> usize {
        match self {
            HostBuffer::F32(values) => values.len(),
            HostBuffer::F16(values) => values.len(),
            HostBuffer::BF16(values) => values.len(),
        }
    }

    fn capacity(&self) -> usize {
        match self {
            HostBuffer::F32(values) => values.capacity(),
            HostBuffer::F16(values) => values.capacity(),
            HostBuffer::BF16(values) => values.capacity(),
        }
    }

    fn view(&self) -> HostView<'_> {
        match self {
            HostBuffer::F32(values) => HostView::F32(values),
            HostBuffer::F16(values) => HostView::F16(values),
            HostBuffer::BF16(values) => HostView::BF16(values),
        }
    }

    fn shorten<'short, 'long: 'short>(view: HostView<'long>) -> HostView<'short> {
        view
    }
}

impl HostView<'_> {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            HostView::F32(_) => DType::F32,
            HostView::F16(_) => DType::F16,
            HostView::BF16(_) => DType::BF16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            HostView::F32(values) => values.len(),
            HostView::F16(values) => values.len(),
            HostView::BF16(values) => values.len(),
        }
    }

    /// Whether the view holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
