//! The kernels on devices that CubeCL drives.

mod backward;
mod buffer;
mod device;
mod elements;
mod forward;
mod launch;
mod messages;
#[cfg(feature = "nccl")]
mod nccl;
mod path;
mod source;
mod table;
mod tiling;
mod waves;

#[cfg(all(test, any(feature = "wgpu", feature = "emulated-cuda")))]
mod tests;

use ring_comm::buffer::{Buffer, DType};

pub use self::buffer::{CubeBuffer, CubeDevice, CubeView};
use self::launch::Launcher;
use crate::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, Tensor, TensorShape,
};

/// Attention on a GPU, or whatever else CubeCL drives.
///
/// Queries, keys, values and output gradients are f32 or f16, or bf16 where the device keeps it in memory, all of one type;
/// state, log-sum-exp and gradients are f32. Results are the same bits every time: each element is written by one unit of the
/// device, nothing is added atomically.
///
/// Attention of f16 or bf16 inputs with heads of 16, 32, 48 up to 256 elements and a positive scale goes to matrix units where the
/// device has NVIDIA's (compute capability 8.0 and later): weights, and the gradients of scores, are then rounded to the type of the
/// inputs before they are multiplied. Tiles are copied while others are worked on if CubeCL offers that, which its C++ compiler for
/// CUDA does. Everything else is done by plain kernels. Rows that begin at multiples of 4 elements, of heads whose size is such a
/// multiple, are read four elements at a time by these, others singly. Both keep the same state: calls may mix them.
///
/// A cube of units owns a tile of rows, against which it holds tiles of the other rows in shared memory; sizes follow from what
/// the device has. Calls return when the device has been told what to do; the first call with a head size and an element type compiles.
/// Rows, and how far positions of a block lie apart where its mask has a bound, are counted in 32 bits, elements of a buffer and
/// distances under ALiBi in 31; what needs more is refused. Tiles that the mask hides from all rows of a cube are skipped. Kernels
/// are compiled for the options that a call uses, of windows, softcap, ALiBi and dropout; dropout drops what
/// [`Dropout::keeps`](crate::Dropout::keeps) says, to the bit.
///
/// Key gradients in a [`KeyValueGradient::Slot`] must keep the rows of one head together, as [`PackedRows`] does.
#[derive(Clone, Debug)]
pub struct CubeKernels {
    launcher: Launcher,
}

impl CubeKernels {
    /// Kernels on a device.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device cannot pass enough buffers to a kernel.
    pub fn new(device: CubeDevice) -> Result<Self, KernelError> {
        Ok(Self {
            launcher: Launcher::new(device)?,
        })
    }

    /// Whether to use the matrix units of a device that has them; by default they are used. The plain kernels are exact to the
    /// rounding of f32 sums, those for matrix units round weights to the type of the inputs.
    #[must_use]
    pub fn with_matrix_units(mut self, use_them: bool) -> Self {
        self.launcher.use_matrix_units(use_them);
        self
    }

    /// The device.
    pub fn device(&self) -> &CubeDevice {
        &self.launcher.device
    }
}

impl Kernels<CubeBuffer> for CubeKernels {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<CubeBuffer>,
    ) -> Result<CubeBuffer, KernelError> {
        elements::filled(&self.launcher, dtype, len, 0.0, reuse)
    }

    fn dtype(&self, view: CubeView<'_>) -> DType {
        view.buffer.dtype()
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, CubeBuffer>],
        rows: &PackedRows,
        reuse: Option<CubeBuffer>,
    ) -> Result<CubeBuffer, KernelError> {
        messages::pack(&self.launcher, shape, tensors, rows, reuse)
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &CubeBuffer,
        rows: &PackedRows,
        targets: &mut [&mut CubeBuffer],
    ) -> Result<(), KernelError> {
        messages::place_rows(&self.launcher, shape, message, rows, targets)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<CubeBuffer>, KernelError> {
        forward::start(&self.launcher, problem)
    }

    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, CubeBuffer>,
        key_value: &KeyValue<'_, CubeBuffer>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<CubeBuffer>,
    ) -> Result<(), KernelError> {
        forward::forward(&self.launcher, problem, query, key_value, blocks, state)
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<CubeBuffer>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(CubeBuffer, CubeBuffer), KernelError> {
        forward::finish(&self.launcher, problem, state, dtype, output_scale)
    }

    fn delta(
        &self,
        problem: &Problem,
        output: CubeView<'_>,
        grad_output: Tensor<'_, CubeBuffer>,
        log_sum_exp: CubeView<'_>,
        grad_log_sum_exp: Option<CubeView<'_>>,
    ) -> Result<CubeBuffer, KernelError> {
        backward::delta(
            &self.launcher,
            problem,
            output,
            grad_output,
            log_sum_exp,
            grad_log_sum_exp,
        )
    }

    fn backward(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<'_, CubeBuffer>,
        key_value: &KeyValue<'_, CubeBuffer>,
        blocks: &[HeadBlocks],
        output_scale: f32,
        grad_query: &mut CubeBuffer,
        grad_key_value: KeyValueGradient<'_, CubeBuffer>,
    ) -> Result<(), KernelError> {
        backward::backward(
            &self.launcher,
            problem,
            inputs,
            key_value,
            blocks,
            output_scale,
            grad_query,
            grad_key_value,
        )
    }

    fn add_rows(
        &self,
        shape: TensorShape,
        message: &CubeBuffer,
        rows: &PackedRows,
        targets: &mut [&mut CubeBuffer],
    ) -> Result<(), KernelError> {
        messages::add_rows(&self.launcher, shape, message, rows, targets)
    }

    fn round(&self, buffer: CubeBuffer, dtype: DType) -> Result<CubeBuffer, KernelError> {
        elements::round(&self.launcher, buffer, dtype)
    }

    /// Has the device's memory pools give back what nobody uses, as far as they do: also that of others who compute there.
    fn release_memory(&self) -> Result<(), KernelError> {
        let client = self.launcher.device.client();
        client.memory_cleanup().map_err(buffer::device_error)
    }
}
