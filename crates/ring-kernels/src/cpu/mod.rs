//! The kernels on the CPU.

mod backward;
mod carve;
mod check;
mod exp;
mod forward;
mod gradients;
mod memory;
mod microkernel;
mod normalise;
mod pack;
mod rows;
mod softmax;
mod threads;
mod tile;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;

use pulp::Arch;
use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use self::threads::Threads;
use crate::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, Tensor,
};

/// Attention on the CPU: vector instructions chosen at run time, and a thread pool of this rank's own.
///
/// Queries, keys, values and output gradients are f32, f16 or bf16, all of one type; state, log-sum-exp and gradients are
/// f32. Results do not depend on the number of threads, to the last bit. Clones share the pool.
///
/// Key gradients in a [`KeyValueGradient::Slot`] must keep the rows of one head together (as [`PackedRows`] does): heads
/// are divided among threads, and heads that interleave are refused.
///
/// Memory beside the arguments: [`CpuKernels::scratch_bytes`] during [`forward`](Kernels::forward) and
/// [`backward`](Kernels::backward), whatever the number of rows.
#[derive(Clone, Debug)]
pub struct CpuKernels {
    arch: Arch,
    threads: Threads,
}

impl CpuKernels {
    /// Kernels on `threads` threads: 1 computes on the calling thread, more on a pool.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] for 0 threads, [`KernelError::Device`] if threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        Ok(Self {
            arch: Arch::new(),
            threads: Threads::new(threads)?,
        })
    }

    /// Number of threads that compute.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Bytes of tiles that `threads` threads hold during a backward pass (a forward pass holds less): per thread about
    /// `3.25 KiB * head_dim + 64 KiB`.
    pub const fn scratch_bytes(head_dim: usize, threads: usize) -> usize {
        let (forward, backward) = (
            forward::scratch_bytes(head_dim),
            backward::scratch_bytes(head_dim),
        );
        threads
            * if forward > backward {
                forward
            } else {
                backward
            }
    }
}

impl Kernels<HostBuffer> for CpuKernels {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        memory::allocate(dtype, len, reuse)
    }

    fn dtype(&self, view: HostView<'_>) -> DType {
        view.dtype()
    }

    fn pack(
        &self,
        problem: &Problem,
        key: Tensor<'_, HostBuffer>,
        value: Tensor<'_, HostBuffer>,
        rows: &PackedRows,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        pack::pack(problem, key.into(), value.into(), rows, reuse)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<HostBuffer>, KernelError> {
        let sizes = check::problem(problem)?;
        let mut max = memory::zeroed::<f32>(sizes.query_rows, None)?;
        max.fill(f32::NEG_INFINITY);
        Ok(ForwardState {
            output: memory::allocate(DType::F32, sizes.query_elements, None)?,
            max: HostBuffer::F32(max),
            denominator: memory::allocate(DType::F32, sizes.query_rows, None)?,
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
        forward::forward(
            self.arch,
            &self.threads,
            problem,
            query.into(),
            key_value,
            blocks,
            state,
        )
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<HostBuffer>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(HostBuffer, HostBuffer), KernelError> {
        normalise::finish(&self.threads, problem, state, dtype, output_scale)
    }

    fn delta(
        &self,
        problem: &Problem,
        output: HostView<'_>,
        grad_output: Tensor<'_, HostBuffer>,
        log_sum_exp: HostView<'_>,
        grad_log_sum_exp: Option<HostView<'_>>,
    ) -> Result<HostBuffer, KernelError> {
        normalise::delta(
            &self.threads,
            problem,
            output,
            grad_output.into(),
            log_sum_exp,
            grad_log_sum_exp,
        )
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
        backward::backward(
            self.arch,
            &self.threads,
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
        problem: &Problem,
        slot: &HostBuffer,
        rows: &PackedRows,
        grad_key: &mut HostBuffer,
        grad_value: &mut HostBuffer,
    ) -> Result<(), KernelError> {
        pack::add_rows(problem, slot, rows, grad_key, grad_value)
    }

    fn round(&self, buffer: HostBuffer, dtype: DType) -> Result<HostBuffer, KernelError> {
        check::dtype("the buffer to round", buffer.dtype(), DType::F32)?;
        match buffer {
            HostBuffer::F32(values) => memory::round(values, dtype),
            _ => unreachable!("the element type was checked"),
        }
    }
}
