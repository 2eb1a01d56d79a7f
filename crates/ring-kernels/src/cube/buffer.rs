//! Memory of a device that CubeCL drives: [`CubeBuffer`].

use std::fmt;

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::features::TypeUsage;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::server::Handle;
use ring_comm::Staging;
use ring_comm::buffer::{Buffer, DType, HostBuffer};

use crate::KernelError;

/// Transfers and allocations are whole words: a rule of WebGPU.
const WORD: usize = 4;

/// Elements of the largest buffer: kernels count them in 32 bits, and go beyond the end by at most as much again and a cube.
const MOST_ELEMENTS: usize = (1 << 31) - 64;

/// A device that CubeCL drives. Clones are the same device.
#[derive(Clone)]
pub struct CubeDevice {
    client: Client,
}

impl CubeDevice {
    /// The device of a CubeCL client, on whatever runtime that is.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The CubeCL client of the device.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns when the device has done what it was told on this thread.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device failed.
    pub fn synchronise(&self) -> Result<(), KernelError> {
        cubecl::future::block_on(self.client.sync()).map_err(device_error)
    }

    /// CubeCL's name of an element type.
    ///
    /// # Errors
    /// [`KernelError::DType`] if the device cannot keep such elements in memory.
    pub(super) fn element(&self, dtype: DType) -> Result<ElemType, KernelError> {
        if !self.has(dtype) {
            let all = [DType::F32, DType::F16, DType::BF16].into_iter();
            let names: Vec<_> = all
                .filter(|&dtype| self.has(dtype))
                .map(|dtype| dtype.to_string())
                .collect();
            return Err(KernelError::DType {
                what: "a buffer of this device",
                got: dtype,
                expected: names.join(" or "),
            });
        }
        Ok(element(dtype))
    }

    fn has(&self, dtype: DType) -> bool {
        let usage = self.client.properties().type_usage(element(dtype));
        usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion)
    }

    /// Memory with arbitrary contents.
    fn memory(&self, dtype: DType, len: usize) -> Result<Handle, KernelError> {
        let bytes = self.allocated_bytes(dtype, len)?;
        Ok(self.client.empty(bytes))
    }

    /// Bytes that are allocated for `len` elements: whole words, and never none.
    fn allocated_bytes(&self, dtype: DType, len: usize) -> Result<usize, KernelError> {
        self.element(dtype)?;
        let bytes = len.saturating_mul(dtype.size());
        let largest = self.client.properties().memory.max_page_size;
        if bytes as u64 > largest || len > MOST_ELEMENTS {
            return Err(KernelError::Allocation { bytes });
        }
        Ok(words(bytes).max(WORD))
    }
}

impl fmt::Debug for CubeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CubeDevice")
            .field(&self.client.properties().identity.name)
            .finish()
    }
}

pub(super) fn element(dtype: DType) -> ElemType {
    ElemType::Float(match dtype {
        DType::F32 => FloatKind::F32,
        DType::F16 => FloatKind::F16,
        DType::BF16 => FloatKind::BF16,
    })
}

fn words(bytes: usize) -> usize {
    bytes.next_multiple_of(WORD)
}

/// Memory of a [`CubeDevice`], typed by its elements.
///
/// The device works off what it is told in order and in its own time; copies to the host wait for it, nothing else does. If
/// it fails, that is told by the next copy, or by the next kernel that would use the memory.
pub struct CubeBuffer {
    device: CubeDevice,
    handle: Handle,
    dtype: DType,
    len: usize,
}

impl CubeBuffer {
    /// The first `len` elements of memory that CubeCL manages.
    ///
    /// # Errors
    /// [`KernelError::Size`] if the memory is smaller, [`KernelError::DType`] if the device has no such elements,
    /// [`KernelError::Invalid`] if the memory belongs to another device.
    pub fn from_handle(
        device: &CubeDevice,
        handle: Handle,
        dtype: DType,
        len: usize,
    ) -> Result<Self, KernelError> {
        device.element(dtype)?;
        let got = handle.size_in_used() as usize / dtype.size();
        if got < len {
            return Err(KernelError::Size {
                what: "the memory of a buffer",
                got,
                expected: len,
            });
        }
        if len > MOST_ELEMENTS {
            return Err(KernelError::Invalid(format!(
                "a buffer of {len} elements is too large for these kernels, which take {MOST_ELEMENTS}"
            )));
        }
        if handle.service != device.client.service_id() {
            return Err(KernelError::Invalid(
                "the memory belongs to another device".into(),
            ));
        }
        Ok(Self {
            device: device.clone(),
            handle,
            dtype,
            len,
        })
    }

    /// A copy of host memory on the device.
    ///
    /// # Errors
    /// [`KernelError::DType`] if the device has no such elements, [`KernelError::Allocation`] if it takes no buffer so large.
    pub fn from_host(device: &CubeDevice, host: &HostBuffer) -> Result<Self, KernelError> {
        let bytes = device.allocated_bytes(host.dtype(), host.len())?;
        Ok(Self {
            device: device.clone(),
            handle: device.client.create(padded(host, bytes)),
            dtype: host.dtype(),
            len: host.len(),
        })
    }

    /// A copy of the contents in host memory; waits until the device has computed them.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device failed, now or when it computed them.
    pub fn to_host(&self) -> Result<HostBuffer, KernelError> {
        let mut host = HostBuffer::zeros(self.dtype, self.len);
        self.copy_to_host(&mut host)?;
        Ok(host)
    }

    /// The device.
    pub fn device(&self) -> &CubeDevice {
        &self.device
    }

    /// The memory, as CubeCL knows it.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// `len` elements with arbitrary contents, in the memory of `reuse` if that is of this type and large enough.
    pub(super) fn room(
        device: &CubeDevice,
        dtype: DType,
        len: usize,
        reuse: Option<Self>,
    ) -> Result<Self, KernelError> {
        let fits = |memory: &Self| {
            memory.dtype == dtype && memory.capacity() >= len && memory.is_of(device)
        };
        let handle = match reuse.filter(fits) {
            Some(memory) => memory.handle,
            None => device.memory(dtype, len)?,
        };
        Ok(Self {
            device: device.clone(),
            handle,
            dtype,
            len,
        })
    }

    /// Whether the memory belongs to `device`.
    pub(super) fn is_of(&self, device: &CubeDevice) -> bool {
        self.handle.service == device.client.service_id()
    }
}

/// The bytes of `host`, lengthened to `len` bytes.
fn padded(host: &HostBuffer, len: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(host.as_bytes());
    bytes.resize(len, 0);
    Bytes::from_bytes_vec(bytes)
}

impl fmt::Debug for CubeBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CubeBuffer")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A borrowed [`CubeBuffer`].
#[derive(Clone, Copy, Debug)]
pub struct CubeView<'a> {
    pub(super) buffer: &'a CubeBuffer,
}

impl Buffer for CubeBuffer {
    type View<'a> = CubeView<'a>;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }

    fn capacity(&self) -> usize {
        self.handle.size_in_used() as usize / self.dtype.size()
    }

    fn view(&self) -> CubeView<'_> {
        CubeView { buffer: self }
    }

    fn shorten<'short, 'long: 'short>(view: CubeView<'long>) -> CubeView<'short> {
        view
    }
}

impl Staging for CubeBuffer {
    type Device = CubeDevice;
    type Error = KernelError;

    fn copy_to_host(&self, host: &mut HostBuffer) -> Result<(), KernelError> {
        if (host.dtype(), host.len()) != (self.dtype, self.len) {
            return Err(KernelError::Invalid(format!(
                "{} elements of {} cannot be copied to {} of {}",
                self.len,
                self.dtype,
                host.len(),
                host.dtype()
            )));
        }
        let bytes = self.byte_len();
        if bytes == 0 {
            return Ok(());
        }
        let beyond = self.handle.size_in_used() - words(bytes) as u64;
        let contents = self
            .device
            .client
            .read_one(self.handle.clone().offset_end(beyond))
            .map_err(device_error)?;
        host.as_bytes_mut().copy_from_slice(&contents[..bytes]);
        Ok(())
    }

    fn copy_from_host(
        device: &CubeDevice,
        host: &HostBuffer,
        memory: Option<Self>,
    ) -> Result<Self, KernelError> {
        let buffer = Self::room(device, host.dtype(), host.len(), memory)?;
        if !host.is_empty() {
            let bytes = padded(host, words(host.byte_len()));
            device.client.write(&buffer.handle, bytes);
        }
        Ok(buffer)
    }
}

/// What CubeCL says of a device that failed.
pub(super) fn device_error(error: cubecl::server::ServerError) -> KernelError {
    KernelError::Device(error.to_string())
}
