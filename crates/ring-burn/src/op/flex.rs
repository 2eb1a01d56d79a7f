//! The operation on Burn's CPU backend.

use burn::{
    backend::{
        Flex,
        flex::{FlexDevice, FlexTensor, Layout},
    },
    tensor::{Bytes, DType, Shape},
};
use half::{bf16, f16};
use ring_comm::buffer::{HostBuffer, HostView};
use ring_kernels::{CpuKernels, KernelError};

use super::{
    BackwardTensors, Job, RingAttentionGradient, RingAttentionOps,
    memory::{Memory, Rows, Site, Storage, attention, gradient},
};
use crate::ring::Ring;

impl Storage<HostBuffer> for FlexTensor {
    fn view(&self) -> HostView<'_> {
        match self.dtype() {
            DType::F16 => HostView::F16(self.storage::<f16>()),
            DType::BF16 => HostView::BF16(self.storage::<bf16>()),
            _ => HostView::F32(self.storage::<f32>()),
        }
    }
}

/// All elements in order.
pub(super) struct Flat(FlexTensor);

impl Storage<HostBuffer> for Flat {
    fn view(&self) -> HostView<'_> {
        let (start, end) = self
            .0
            .layout()
            .contiguous_offsets()
            .expect("the tensor is contiguous");
        match self.0.view() {
            HostView::F32(values) => HostView::F32(&values[start..end]),
            HostView::F16(values) => HostView::F16(&values[start..end]),
            HostView::BF16(values) => HostView::BF16(&values[start..end]),
        }
    }
}

impl Memory for Flex {
    type Buffer = HostBuffer;
    type Kernels = CpuKernels;
    type Whole = FlexTensor;
    type Flat = Flat;

    fn site(ring: &Ring, _: &FlexTensor) -> Result<Site<HostBuffer, CpuKernels>, KernelError> {
        Ok(Site {
            kernels: ring.kernels().clone(),
            communicator: ring.communicator().clone(),
        })
    }

    /// Any strides are taken as they are, but for the last dimension.
    fn rows(tensor: FlexTensor) -> Result<Rows<FlexTensor>, KernelError> {
        let layout = tensor.layout();
        let last_is_contiguous = layout.strides()[3] == 1 || layout.shape()[3] == 1;
        let forward = layout.strides().iter().all(|&stride| stride >= 0);
        let tensor = if last_is_contiguous && forward {
            tensor
        } else {
            tensor.to_contiguous()
        };
        let layout = tensor.layout();
        let shape = std::array::from_fn(|dim| layout.shape()[dim]);
        let strides = std::array::from_fn(|dim| layout.strides()[dim].unsigned_abs());
        let offset = layout.start_offset();
        Ok(Rows::new(tensor, shape, strides, offset))
    }

    fn flat(tensor: FlexTensor) -> Result<Flat, KernelError> {
        Ok(Flat(if tensor.is_contiguous() {
            tensor
        } else {
            tensor.to_contiguous()
        }))
    }

    fn tensor(buffer: HostBuffer, shape: Shape, _: &FlexDevice) -> FlexTensor {
        let (bytes, dtype) = match buffer {
            HostBuffer::F32(values) => (Bytes::from_elems(values), DType::F32),
            HostBuffer::F16(values) => (Bytes::from_elems(values), DType::F16),
            HostBuffer::BF16(values) => (Bytes::from_elems(values), DType::BF16),
        };
        FlexTensor::new(bytes, Layout::contiguous(shape), dtype)
    }
}

impl RingAttentionOps for Flex {
    fn ring_attention(
        query: FlexTensor,
        key: FlexTensor,
        value: FlexTensor,
        job: Job,
    ) -> (FlexTensor, FlexTensor) {
        attention::<Self>(query, key, value, &job)
    }
}

impl RingAttentionGradient for Flex {
    fn ring_attention_gradient(
        query: FlexTensor,
        key: FlexTensor,
        value: FlexTensor,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [FlexTensor; 3] {
        gradient::<Self>(query, key, value, saved, job)
    }
}
