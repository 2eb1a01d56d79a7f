//! Device memory that NCCL moves: any that says where it lies ([`DeviceMemory`]), and [`CudaBuffer`] for whoever has none.

use std::{ffi::c_void, fmt, marker::PhantomData, thread};

use cudarc::driver::{result, sys};

use super::{
    cuda::{CudaDevice, Event, failed},
    error::NcclError,
};
use crate::{
    buffer::{Buffer, DType, HostBuffer},
    staged::Staging,
    transport::Expected,
};

/// A buffer in the memory of a GPU, used in the order of a stream.
///
/// # Safety
/// [`device_pointer`](Self::device_pointer) points to [`capacity`](Buffer::capacity) elements in memory of the GPU of the transport that
/// carries the buffer. They stay there until the buffer is dropped, wherever the value is moved, and nobody else uses them while a transport
/// has the buffer but what is on [`stream`](Self::stream) already. That stream belongs to the primary context of
/// the same GPU and is there for as long as the buffer. Dropping the buffer on any thread is sound once the GPU has done what a transport has put on streams.
pub unsafe trait DeviceMemory: Buffer {
    /// Where memory comes from for a message whose receive has brought none.
    type Allocator: fmt::Debug + Send + 'static;

    /// Address of the first element, a `CUdeviceptr`.
    fn device_pointer(&self) -> u64;

    /// The stream, a `CUstream`, on which the contents become ready, or the memory free for new contents; null is the default
    /// stream. A send waits for what is on it when the transport gets the buffer, and a receive does not write before. What a received
    /// buffer is used for may be on any stream: its contents are there when the receive has been waited for.
    fn stream(&self) -> *mut c_void;

    /// A buffer of exactly what is expected, with arbitrary contents: `memory` if it will do, otherwise a new one. Called on a thread of
    /// the transport, on which the GPU is current. It must not wait for the GPU to be idle, as `cuMemAlloc` may.
    ///
    /// # Errors
    /// If there is no memory.
    fn with_room(
        allocator: &Self::Allocator,
        expected: Expected,
        memory: Option<Self>,
    ) -> Result<Self, NcclError>;
}

/// Memory of a GPU, allocated in the order of a stream of its [`CudaDevice`].
pub struct CudaBuffer {
    device: CudaDevice,
    /// Null if there is no room for any element.
    pointer: sys::CUdeviceptr,
    room_bytes: usize,
    dtype: DType,
    len: usize,
}

/// A borrowed [`CudaBuffer`].
#[derive(Clone, Copy, Debug)]
pub struct CudaView<'a> {
    /// Address of the first element, a `CUdeviceptr`.
    pub pointer: u64,
    /// Element type.
    pub dtype: DType,
    /// Number of elements.
    pub len: usize,
    borrowed: PhantomData<&'a CudaBuffer>,
}

impl CudaBuffer {
    /// `len` elements with arbitrary contents.
    ///
    /// # Errors
    /// [`NcclError::Driver`] if there is no memory.
    pub fn new(device: &CudaDevice, dtype: DType, len: usize) -> Result<Self, NcclError> {
        let room_bytes = len.saturating_mul(dtype.size());
        let mut buffer = Self {
            device: device.clone(),
            pointer: 0,
            room_bytes: 0,
            dtype,
            len,
        };
        if room_bytes > 0 {
            let _current = device.make_current()?;
            // SAFETY: the stream is there for as long as the device, which the buffer keeps.
            let pointer = unsafe { result::malloc_async(device.stream(), room_bytes) };
            buffer.pointer = pointer.map_err(failed("cuMemAllocAsync"))?;
            buffer.room_bytes = room_bytes;
        }
        Ok(buffer)
    }

    /// `memory` with the length of what is expected, if it will do, or new memory.
    fn with_len(
        device: &CudaDevice,
        expected: Expected,
        memory: Option<Self>,
    ) -> Result<Self, NcclError> {
        let will_do =
            |memory: &Self| memory.dtype == expected.dtype && memory.capacity() >= expected.len;
        match memory.filter(will_do) {
            Some(mut memory) => {
                memory.len = expected.len;
                Ok(memory)
            }
            None => Self::new(device, expected.dtype, expected.len),
        }
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        if self.pointer == 0 {
            return;
        }
        // If CUDA fails the memory is lost.
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: it was allocated on this stream and is freed once.
            let _ = unsafe { result::free_async(self.pointer, self.device.stream()) };
        }
    }
}

impl fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBuffer")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Buffer for CudaBuffer {
    type View<'a> = CudaView<'a>;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }

    fn capacity(&self) -> usize {
        self.room_bytes / self.dtype.size()
    }

    fn view(&self) -> CudaView<'_> {
        CudaView {
            pointer: self.pointer,
            dtype: self.dtype,
            len: self.len,
            borrowed: PhantomData,
        }
    }

    fn shorten<'short, 'long: 'short>(view: CudaView<'long>) -> CudaView<'short> {
        view
    }
}

// SAFETY: the memory lies on the buffer's device, which a transport compares with its own by construction, and is freed when the
// buffer is dropped, in the order of its stream, which lives as long as the device that the buffer keeps.
unsafe impl DeviceMemory for CudaBuffer {
    type Allocator = CudaDevice;

    fn device_pointer(&self) -> u64 {
        self.pointer
    }

    fn stream(&self) -> *mut c_void {
        self.device.stream().cast()
    }

    fn with_room(
        allocator: &CudaDevice,
        expected: Expected,
        memory: Option<Self>,
    ) -> Result<Self, NcclError> {
        Self::with_len(allocator, expected, memory)
    }
}

impl Staging for CudaBuffer {
    type Device = CudaDevice;
    type Error = NcclError;

    fn copy_to_host(&self, host: &mut HostBuffer) -> Result<(), NcclError> {
        let bytes = host.as_bytes_mut();
        let len = bytes.len().min(self.byte_len());
        if len == 0 {
            return Ok(());
        }
        let _current = self.device.make_current()?;
        let stream = self.device.stream();
        // SAFETY: the memory has that many bytes, and the host's are borrowed until the copy is over.
        let copying = unsafe { result::memcpy_dtoh_async(&mut bytes[..len], self.pointer, stream) };
        copying.map_err(failed("cuMemcpyDtoHAsync"))?;
        finish(&self.device)
    }

    fn copy_from_host(
        device: &CudaDevice,
        host: &HostBuffer,
        memory: Option<Self>,
    ) -> Result<Self, NcclError> {
        let expected = Expected {
            dtype: host.dtype(),
            len: host.len(),
        };
        let buffer = Self::with_len(device, expected, memory)?;
        let bytes = host.as_bytes();
        if bytes.is_empty() {
            return Ok(buffer);
        }
        let _current = device.make_current()?;
        // SAFETY: the memory has that many bytes, and the host's are borrowed until the copy is over.
        let copying = unsafe { result::memcpy_htod_async(buffer.pointer, bytes, device.stream()) };
        copying.map_err(failed("cuMemcpyHtoDAsync"))?;
        finish(device)?;
        Ok(buffer)
    }
}

/// Waits for what is on the device's stream, which never waits for a peer.
fn finish(device: &CudaDevice) -> Result<(), NcclError> {
    // SAFETY: the stream is there.
    let event = unsafe { Event::record(device.stream()) }?;
    while !event.is_reached()? {
        thread::yield_now();
    }
    Ok(())
}
