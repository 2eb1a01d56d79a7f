//! The operation on Burn's GPU backends, all of which are CubeCL's. What waits for other ranks waits on the thread that calls,
//! never on the one of the device.

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeBackend, CubeDevice, kernel::into_contiguous, tensor::CubeTensor};
use ring_comm::buffer::{self, Buffer};
use ring_kernels::{CubeBuffer, CubeKernels, CubeView, KernelError};

use super::{
    BackwardTensors, Job, RingAttentionGradient, RingAttentionOps,
    memory::{Memory, Rows, Site, Storage, attention, gradient},
};
use crate::ring::Ring;

impl Storage<CubeBuffer> for CubeBuffer {
    fn view(&self) -> CubeView<'_> {
        Buffer::view(self)
    }
}

/// All of the memory that a tensor may use, of which it may leave out elements.
fn whole(tensor: &CubeTensor) -> Result<CubeBuffer, KernelError> {
    let dtype = match tensor.dtype {
        DType::F16 => buffer::DType::F16,
        DType::BF16 => buffer::DType::BF16,
        _ => buffer::DType::F32,
    };
    let furthest: usize = (tensor.meta.shape().iter().zip(tensor.meta.strides().iter()))
        .map(|(&count, &stride)| count.saturating_sub(1) * stride)
        .sum();
    let is_empty = tensor.meta.shape().iter().any(|&count| count == 0);
    let len = if is_empty { 0 } else { furthest + 1 };
    let device = ring_kernels::CubeDevice::new(tensor.client.clone());
    CubeBuffer::from_handle(&device, tensor.handle.clone(), dtype, len)
}

impl Memory for CubeBackend {
    type Buffer = CubeBuffer;
    type Kernels = CubeKernels;
    type Whole = CubeBuffer;
    type Flat = CubeBuffer;

    fn site(
        ring: &Ring,
        tensor: &CubeTensor,
    ) -> Result<Site<CubeBuffer, CubeKernels>, KernelError> {
        ring.on_device(&tensor.client)
    }

    /// Any strides are taken as they are, but for the last dimension.
    fn rows(tensor: CubeTensor) -> Result<Rows<CubeBuffer>, KernelError> {
        let last_is_contiguous = tensor.meta.strides()[3] == 1 || tensor.meta.shape()[3] == 1;
        let tensor = if last_is_contiguous {
            tensor
        } else {
            into_contiguous(tensor)
        };
        let shape = std::array::from_fn(|dim| tensor.meta.shape()[dim]);
        let strides = std::array::from_fn(|dim| tensor.meta.strides()[dim]);
        Ok(Rows::new(whole(&tensor)?, shape, strides, 0))
    }

    fn flat(tensor: CubeTensor) -> Result<CubeBuffer, KernelError> {
        whole(&into_contiguous(tensor))
    }

    fn tensor(buffer: CubeBuffer, shape: Shape, device: &CubeDevice) -> CubeTensor {
        let dtype = match buffer.dtype() {
            buffer::DType::F16 => DType::F16,
            buffer::DType::BF16 => DType::BF16,
            buffer::DType::F32 => DType::F32,
        };
        let client = buffer.device().client().clone();
        let handle = buffer.handle().clone();
        CubeTensor::new_contiguous(client, device.clone(), shape, handle, dtype)
    }
}

impl RingAttentionOps for CubeBackend {
    fn ring_attention(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        job: Job,
    ) -> (CubeTensor, CubeTensor) {
        attention::<Self>(query, key, value, &job)
    }
}

impl RingAttentionGradient for CubeBackend {
    fn ring_attention_gradient(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [CubeTensor; 3] {
        gradient::<Self>(query, key, value, saved, job)
    }
}
