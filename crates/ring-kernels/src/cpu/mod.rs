//! The kernels on the CPU.

mod backward;
#[cfg(target_arch = "x86_64")]
mod bf16_pairs;
mod check;
mod exp2;
mod format;
mod forward;
mod gradients;
mod instruction_set;
mod keep;
mod memory;
mod normalise;
mod pack;
mod panels;
mod product;
mod rows;
mod rows_mut;
mod scores;
mod scratch;
mod softmax;
mod tanh;
mod threads;

#[cfg(all(test, unix))]
mod guard_pages;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

pub use self::instruction_set::{INSTRUCTION_SET_VARIABLE, InstructionSet};
use self::scratch::{Cut, Pool};
use self::threads::Threads;
use crate::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, Tensor, TensorShape,
};

/// Attention on the CPU: vector instructions chosen at run time, and a thread pool of this rank's own.
///
/// Queries, keys, values and output gradients are f32, f16 or bf16, all of one type; state, log-sum-exp and gradients are
/// f32. Results do not depend on the number of threads, to the last bit. Clones share the pool.
///
/// Key gradients in a [`KeyValueGradient::Slot`] must keep the rows of one head together (as [`PackedRows`] does): heads
/// are divided among threads, and heads that interleave are refused.
///
/// Memory beside the arguments: [`CpuKernels::scratch_bytes`], whatever the number of rows. It is allocated by the first
/// [`forward`](Kernels::forward) or [`backward`](Kernels::backward) and kept for later ones.
#[derive(Clone, Debug)]
pub struct CpuKernels {
    workers: Arc<Workers>,
}

impl CpuKernels {
    /// Kernels on `threads` threads: 1 computes on the calling thread, more on a pool. They use the fastest instructions of
    /// this processor, or those that [`INSTRUCTION_SET_VARIABLE`] names.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] for 0 threads or an instruction set that does not exist or that the processor lacks,
    /// [`KernelError::Device`] if threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        Self::with_instruction_set(threads, InstructionSet::from_env()?)
    }

    /// Kernels on `threads` threads that use the given instructions.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_instruction_set(
        threads: usize,
        instruction_set: InstructionSet,
    ) -> Result<Self, KernelError> {
        let workers = Workers {
            instruction_set: instruction_set.checked()?,
            threads: Threads::new(threads)?,
            scratch: Pool::default(),
        };
        Ok(Self {
            workers: Arc::new(workers),
        })
    }

    /// Number of threads that compute.
    pub fn threads(&self) -> usize {
        self.workers.threads.count()
    }

    /// The instructions that compute.
    pub fn instruction_set(&self) -> InstructionSet {
        self.workers.instruction_set
    }

    /// Bytes of scratch memory that `threads` threads hold once they have computed a backward pass; a forward pass needs
    /// less. Per thread about 0.6 MiB for head size 64, 1.1 MiB for 128, 1.5 MiB for 256.
    pub const fn scratch_bytes(head_dim: usize, threads: usize) -> usize {
        let (forward, backward) = (
            forward::scratch_words(head_dim),
            backward::scratch_words(head_dim),
        );
        let words = if forward > backward {
            forward
        } else {
            backward
        };
        threads * scratch::bytes(words)
    }
}

/// Who computes, how, and where.
#[derive(Debug)]
struct Workers {
    instruction_set: InstructionSet,
    threads: Threads,
    scratch: Pool,
}

impl Workers {
    /// Does every task once, with scratch memory of `words` words.
    fn run<T: Send>(
        &self,
        tasks: impl Iterator<Item = T> + Send,
        words: usize,
        work: impl Fn(Cut<'_>, T) + Sync,
    ) -> Result<(), KernelError> {
        let scratch = || self.scratch.borrow(words);
        self.threads
            .run(tasks, scratch, |scratch, task| work(scratch.cut(), task))
    }
}

impl Kernels<HostBuffer> for CpuKernels {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        memory::allocate(&self.workers.threads, dtype, len, reuse)
    }

    fn dtype(&self, view: HostView<'_>) -> DType {
        view.dtype()
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, HostBuffer>],
        rows: &PackedRows,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        let tensors: Vec<_> = tensors.iter().map(|&tensor| tensor.into()).collect();
        pack::pack(&self.workers.threads, shape, &tensors, rows, reuse)
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &HostBuffer,
        rows: &PackedRows,
        targets: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        pack::place_rows(shape, message, rows, targets)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<HostBuffer>, KernelError> {
        let sizes = check::problem(problem)?;
        let threads = &self.workers.threads;
        let mut max = memory::room::<f32>(threads, sizes.query_rows, None)?;
        memory::fill(threads, &mut max, f32::NEG_INFINITY)?;
        Ok(ForwardState {
            output: memory::allocate(threads, DType::F32, sizes.query_elements, None)?,
            max: HostBuffer::F32(max),
            denominator: memory::allocate(threads, DType::F32, sizes.query_rows, None)?,
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
            &self.workers,
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
        normalise::finish(&self.workers.threads, problem, state, dtype, output_scale)
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
            &self.workers.threads,
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
            &self.workers,
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
        message: &HostBuffer,
        rows: &PackedRows,
        targets: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        pack::add_rows(shape, message, rows, targets)
    }

    fn round(&self, buffer: HostBuffer, dtype: DType) -> Result<HostBuffer, KernelError> {
        check::dtype("the buffer to round", buffer.dtype(), DType::F32)?;
        match buffer {
            HostBuffer::F32(values) => memory::round(&self.workers.threads, values, dtype),
            _ => unreachable!("the element type was checked"),
        }
    }
}
