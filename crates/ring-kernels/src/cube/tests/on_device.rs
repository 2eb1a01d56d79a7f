//! Kernels of host memory that compute on the device, so that they can be judged as those of the CPU are.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

#[cfg(not(feature = "emulated-cuda"))]
use super::super::tiling::Room;
use super::super::{CubeBuffer, CubeDevice, CubeKernels};
use crate::*;

static DEVICE: LazyLock<CubeDevice> = LazyLock::new(|| CubeDevice::new(client()));

/// The emulator of a CUDA device.
#[cfg(feature = "emulated-cuda")]
fn client() -> cubecl::client::Client {
    cuda_emulator::client()
}

/// The Vulkan device that is a program on the CPU.
#[cfg(not(feature = "emulated-cuda"))]
fn client() -> cubecl::client::Client {
    cubecl::Device::wgpu(cubecl::device::WgpuDeviceKind::Cpu)
        .expect("an adapter of type CPU, such as Mesa's lavapipe")
        .client()
}

/// The device that is a program on the CPU: a Vulkan device, or with the feature `emulated-cuda` the emulator of a CUDA device.
pub(super) fn device() -> CubeDevice {
    DEVICE.clone()
}

/// Element types that the device has.
#[cfg(feature = "emulated-cuda")]
pub(super) const DTYPES: &[DType] = &[DType::F32, DType::F16, DType::BF16];

/// Element types that the device has: WebGPU's language has no bf16.
#[cfg(not(feature = "emulated-cuda"))]
pub(super) const DTYPES: &[DType] = &[DType::F32, DType::F16];

/// Elements behind the end of every buffer, all NaN: whatever reads there is found out.
const BORDER: usize = 7;

/// Copies arguments to the device and results back.
pub(super) struct OnDevice {
    kernels: CubeKernels,
    /// Kernels that take every other call of forward and backward.
    others: CubeKernels,
    calls: AtomicUsize,
}

impl OnDevice {
    pub(super) fn new() -> Self {
        let kernels = CubeKernels::new(device()).unwrap();
        Self::alternating(kernels.clone(), kernels)
    }

    /// Kernels of another device than [`device`].
    #[cfg(feature = "emulated-cuda")]
    pub(super) fn of(device: CubeDevice) -> Self {
        let kernels = CubeKernels::new(device).unwrap();
        Self::alternating(kernels.clone(), kernels)
    }

    /// Kernels that do not use matrix units.
    #[cfg(feature = "emulated-cuda")]
    pub(super) fn plain() -> Self {
        let kernels = CubeKernels::new(device()).unwrap().with_matrix_units(false);
        Self::alternating(kernels.clone(), kernels)
    }

    /// Matrix units and plain kernels in turn.
    #[cfg(feature = "emulated-cuda")]
    pub(super) fn mixed() -> Self {
        let kernels = CubeKernels::new(device()).unwrap();
        Self::alternating(kernels.clone(), kernels.with_matrix_units(false))
    }

    /// Matrix units of a device that does not take NVIDIA's assembly.
    #[cfg(feature = "emulated-cuda")]
    pub(super) fn without_assembly() -> Self {
        let mut kernels = CubeKernels::new(device()).unwrap();
        kernels.launcher.avoid_assembly();
        Self::alternating(kernels.clone(), kernels)
    }

    fn alternating(kernels: CubeKernels, others: CubeKernels) -> Self {
        Self {
            kernels,
            others,
            calls: AtomicUsize::new(0),
        }
    }

    fn next(&self) -> &CubeKernels {
        match self.calls.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => &self.kernels,
            _ => &self.others,
        }
    }

    /// Kernels that take no more of the device than `room`.
    #[cfg(not(feature = "emulated-cuda"))]
    pub(super) fn with_room(room: Room) -> Self {
        let mut kernels = Self::new();
        kernels.kernels.launcher.limit(room);
        kernels
    }

    /// A copy on the device, with NaN behind its end.
    fn up(&self, host: HostView<'_>) -> CubeBuffer {
        let bordered = match host {
            HostView::F32(values) => HostBuffer::F32([values, &[f32::NAN; BORDER]].concat()),
            HostView::F16(values) => HostBuffer::F16([values, &[half::f16::NAN; BORDER]].concat()),
            HostView::BF16(values) => {
                HostBuffer::BF16([values, &[half::bf16::NAN; BORDER]].concat())
            }
        };
        let device = self.kernels.device();
        let memory = CubeBuffer::from_host(device, &bordered).unwrap();
        CubeBuffer::from_handle(device, memory.handle().clone(), host.dtype(), host.len()).unwrap()
    }

    /// A copy on the host of what [`up`](Self::up) made, checked that its border was not written to.
    fn down(&self, buffer: &CubeBuffer) -> Result<HostBuffer, KernelError> {
        let (dtype, len) = (buffer.dtype(), buffer.len());
        let handle = buffer.handle().clone();
        let bordered = CubeBuffer::from_handle(self.kernels.device(), handle, dtype, len + BORDER)?;
        let untouched = match bordered.to_host()? {
            HostBuffer::F32(values) => values[len..].iter().all(|x| x.is_nan()),
            HostBuffer::F16(values) => values[len..].iter().all(|x| x.is_nan()),
            HostBuffer::BF16(values) => values[len..].iter().all(|x| x.is_nan()),
        };
        assert!(untouched, "written beyond the end");
        buffer.to_host()
    }

    /// Runs what writes to copies of `targets` on the device, and brings them back.
    fn arrive(
        &self,
        targets: &mut [&mut HostBuffer],
        write: impl FnOnce(&mut [&mut CubeBuffer]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let mut copies: Vec<_> = targets.iter().map(|of| self.up(of.view())).collect();
        write(&mut copies.iter_mut().collect::<Vec<_>>())?;
        for (target, copy) in targets.iter_mut().zip(&copies) {
            **target = self.down(copy)?;
        }
        Ok(())
    }

    /// A state on the device.
    fn state_up(&self, state: &ForwardState<HostBuffer>) -> ForwardState<CubeBuffer> {
        ForwardState {
            output: self.up(state.output.view()),
            max: self.up(state.max.view()),
            denominator: self.up(state.denominator.view()),
        }
    }
}

/// A tensor whose memory was copied to the device.
fn tensor<'a>(buffer: &'a CubeBuffer, layout: &'a RowLayout) -> Tensor<'a, CubeBuffer> {
    Tensor {
        data: buffer.view(),
        layout,
    }
}

/// Keys and values on the device.
enum Source {
    Own(CubeBuffer, CubeBuffer),
    Slot(CubeBuffer),
}

impl Source {
    fn up(kernels: &OnDevice, source: &KeyValue<'_, HostBuffer>) -> Self {
        match source {
            KeyValue::Own { key, value } => Self::Own(kernels.up(key.data), kernels.up(value.data)),
            KeyValue::Slot { slot, .. } => Self::Slot(kernels.up(slot.view())),
        }
    }

    fn as_of<'a>(&'a self, source: &'a KeyValue<'_, HostBuffer>) -> KeyValue<'a, CubeBuffer> {
        match (self, source) {
            (Self::Own(keys, values), KeyValue::Own { key, value }) => KeyValue::Own {
                key: tensor(keys, key.layout),
                value: tensor(values, value.layout),
            },
            (Self::Slot(slot), KeyValue::Slot { layout, .. }) => KeyValue::Slot { slot, layout },
            _ => unreachable!("made of the same source"),
        }
    }
}

impl Kernels<HostBuffer> for OnDevice {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        _reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        self.kernels.allocate(dtype, len, None)?.to_host()
    }

    fn dtype(&self, view: HostView<'_>) -> DType {
        view.dtype()
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, HostBuffer>],
        rows: &PackedRows,
        _reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        let buffers: Vec<CubeBuffer> = tensors.iter().map(|of| self.up(of.data)).collect();
        let tensors: Vec<_> = buffers
            .iter()
            .zip(tensors)
            .map(|(buffer, of)| tensor(buffer, of.layout))
            .collect();
        self.kernels.pack(shape, &tensors, rows, None)?.to_host()
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &HostBuffer,
        rows: &PackedRows,
        targets: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        self.arrive(targets, |targets| {
            let message = self.up(message.view());
            self.kernels.place_rows(shape, &message, rows, targets)
        })
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<HostBuffer>, KernelError> {
        let state = self.kernels.start(problem)?;
        Ok(ForwardState {
            output: state.output.to_host()?,
            max: state.max.to_host()?,
            denominator: state.denominator.to_host()?,
        })
    }

    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, HostBuffer>,
        key_value: &KeyValue<'_, HostBuffer>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<HostBuffer>,
    ) -> Result<(), KernelError> {
        let queries = self.up(query.data);
        let source = Source::up(self, key_value);
        let mut there = self.state_up(state);
        let queries = tensor(&queries, query.layout);
        let source = source.as_of(key_value);
        self.next()
            .forward(problem, queries, &source, blocks, &mut there)?;
        state.output = self.down(&there.output)?;
        state.max = self.down(&there.max)?;
        state.denominator = self.down(&there.denominator)?;
        Ok(())
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<HostBuffer>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(HostBuffer, HostBuffer), KernelError> {
        let there = self.state_up(&state);
        let (output, log_sum_exp) = self.kernels.finish(problem, there, dtype, output_scale)?;
        Ok((output.to_host()?, self.down(&log_sum_exp)?))
    }

    fn delta(
        &self,
        problem: &Problem,
        output: HostView<'_>,
        grad_output: Tensor<'_, HostBuffer>,
        log_sum_exp: HostView<'_>,
        grad_log_sum_exp: Option<HostView<'_>>,
    ) -> Result<HostBuffer, KernelError> {
        let (output, grad) = (self.up(output), self.up(grad_output.data));
        let log_sum_exp = self.up(log_sum_exp);
        let of_log_sum_exp = grad_log_sum_exp.map(|view| self.up(view));
        self.kernels
            .delta(
                problem,
                output.view(),
                tensor(&grad, grad_output.layout),
                log_sum_exp.view(),
                of_log_sum_exp.as_ref().map(Buffer::view),
            )?
            .to_host()
    }

    fn backward(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<'_, HostBuffer>,
        key_value: &KeyValue<'_, HostBuffer>,
        blocks: &[HeadBlocks],
        output_scale: f32,
        grad_query: &mut HostBuffer,
        grad_key_value: KeyValueGradient<'_, HostBuffer>,
    ) -> Result<(), KernelError> {
        let (query, grad_output) = (inputs.query, inputs.grad_output);
        let (queries, grads) = (self.up(query.data), self.up(grad_output.data));
        let log_sum_exp = self.up(inputs.log_sum_exp);
        let delta = self.up(inputs.delta.view());
        let source = Source::up(self, key_value);
        let there = BackwardInputs {
            query: tensor(&queries, query.layout),
            grad_output: tensor(&grads, grad_output.layout),
            log_sum_exp: log_sum_exp.view(),
            delta: &delta,
        };
        let source = source.as_of(key_value);
        let mut to_query = self.up(grad_query.view());
        let mut run = |gradient| {
            let to_query = &mut to_query;
            self.next().backward(
                problem,
                &there,
                &source,
                blocks,
                output_scale,
                to_query,
                gradient,
            )
        };
        match grad_key_value {
            KeyValueGradient::Own { key, value } => {
                let (mut to_key, mut to_value) = (self.up(key.view()), self.up(value.view()));
                run(KeyValueGradient::Own {
                    key: &mut to_key,
                    value: &mut to_value,
                })?;
                (*key, *value) = (self.down(&to_key)?, self.down(&to_value)?);
            }
            KeyValueGradient::Slot { slot, layout } => {
                let mut to_slot = self.up(slot.view());
                run(KeyValueGradient::Slot {
                    slot: &mut to_slot,
                    layout,
                })?;
                *slot = self.down(&to_slot)?;
            }
        }
        *grad_query = self.down(&to_query)?;
        Ok(())
    }

    fn add_rows(
        &self,
        shape: TensorShape,
        message: &HostBuffer,
        rows: &PackedRows,
        targets: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        self.arrive(targets, |targets| {
            let message = self.up(message.view());
            self.kernels.add_rows(shape, &message, rows, targets)
        })
    }

    fn round(&self, buffer: HostBuffer, dtype: DType) -> Result<HostBuffer, KernelError> {
        let buffer = self.up(buffer.view());
        self.kernels.round(buffer, dtype)?.to_host()
    }
}
