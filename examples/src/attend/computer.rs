//! What computes, and the memory it computes in.

use ring_comm::buffer::{Buffer, HostBuffer};
use ring_kernels::{CpuKernels, KernelError, Kernels};
#[cfg(feature = "cube")]
use ring_kernels::{CubeBuffer, CubeKernels};

/// Kernels, and the way to their memory and back.
pub(super) trait Computer {
    type Buffer: Buffer;
    type Kernels: Kernels<Self::Buffer>;

    fn kernels(&self) -> &Self::Kernels;

    fn upload(&self, host: HostBuffer) -> Result<Self::Buffer, KernelError>;

    fn download(&self, buffer: Self::Buffer) -> Result<HostBuffer, KernelError>;

    /// Returns when everything that was begun is done.
    fn finish(&self) -> Result<(), KernelError>;
}

impl Computer for CpuKernels {
    type Buffer = HostBuffer;
    type Kernels = Self;

    fn kernels(&self) -> &Self {
        self
    }

    fn upload(&self, host: HostBuffer) -> Result<HostBuffer, KernelError> {
        Ok(host)
    }

    fn download(&self, buffer: HostBuffer) -> Result<HostBuffer, KernelError> {
        Ok(buffer)
    }

    fn finish(&self) -> Result<(), KernelError> {
        Ok(())
    }
}

#[cfg(feature = "cube")]
impl Computer for CubeKernels {
    type Buffer = CubeBuffer;
    type Kernels = Self;

    fn kernels(&self) -> &Self {
        self
    }

    fn upload(&self, host: HostBuffer) -> Result<CubeBuffer, KernelError> {
        CubeBuffer::from_host(self.device(), &host)
    }

    fn download(&self, buffer: CubeBuffer) -> Result<HostBuffer, KernelError> {
        buffer.to_host()
    }

    fn finish(&self) -> Result<(), KernelError> {
        self.device().synchronise()
    }
}
