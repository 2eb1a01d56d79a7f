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
mod tiles;

#[cfg(all(test, unix))]
mod guard_pages;
#[cfg(test)]
mod levels;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView, PoolStatistics};

pub use self::instruction_set::{INSTRUCTION_SET_VARIABLE, InstructionSet};
use self::scratch::{Cut, Pool};
use self::threads::Threads;
use self::tiles::Tiles;
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
/// [`forward`](Kernels::forward) or [`backward`](Kernels::backward) and kept for later ones, unless there is a
/// [limit](CpuKernels::with_scratch_limit), until it is [released](Kernels::release_memory).
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
        let threads = Threads::new(threads)?;
        let workers = Workers {
            instruction_set: instruction_set.checked()?,
            level: 0,
            tiles: Tiles::FASTEST,
            threads_at_once: threads.count(),
            threads,
            scratch: Arc::default(),
        };
        Ok(Self {
            workers: Arc::new(workers),
        })
    }

    /// Kernels on the same threads, with scratch memory of their own, of which they keep at most `bytes` between calls. With
    /// less than [`scratch_bytes`](Self::scratch_bytes) every call allocates.
    #[must_use]
    pub fn with_scratch_limit(&self, bytes: usize) -> Self {
        let workers = Workers {
            scratch: Arc::new(Pool::with_limit(bytes)),
            ..Workers::clone(&self.workers)
        };
        Self {
            workers: Arc::new(workers),
        }
    }

    /// What the scratch memory has been used for. Clones, and kernels that need
    /// [less memory](Kernels::with_less_memory), share it.
    pub fn scratch_statistics(&self) -> PoolStatistics {
        self.workers.scratch.statistics()
    }

    /// How much is saved: the `level` that [`with_less_memory`](Kernels::with_less_memory) was given, or 0.
    pub fn memory_level(&self) -> u32 {
        self.workers.level
    }

    /// Number of threads that compute.
    pub fn threads(&self) -> usize {
        self.workers.threads.count()
    }

    /// The instructions that compute.
    pub fn instruction_set(&self) -> InstructionSet {
        self.workers.instruction_set
    }

    /// Bytes of scratch memory that `threads` threads hold once they have computed a backward pass. Per thread about 0.6 MiB for
    /// head size 64, 1.1 MiB for 128, 1.4 MiB for 256.
    pub const fn scratch_bytes(head_dim: usize, threads: usize) -> usize {
        threads * scratch::bytes(scratch_words(head_dim, Tiles::FASTEST))
    }

    /// Bytes of scratch memory that `threads` threads hold if they have computed forward passes only: about half of
    /// [`scratch_bytes`](Self::scratch_bytes).
    pub const fn forward_scratch_bytes(head_dim: usize, threads: usize) -> usize {
        threads * scratch::bytes(forward::scratch_words(head_dim, Tiles::FASTEST))
    }

    /// Bytes of scratch memory that these kernels hold once they have computed a backward pass;
    /// [`scratch_bytes`](Self::scratch_bytes) of all threads at level 0, less at [others](Kernels::with_less_memory).
    pub fn scratch_bytes_at_level(&self, head_dim: usize) -> usize {
        let words = scratch_words(head_dim, self.workers.tiles);
        self.workers.threads_at_once * scratch::bytes(words)
    }
}

/// Words that a thread needs for either pass.
const fn scratch_words(head_dim: usize, tiles: Tiles) -> usize {
    let forward = forward::scratch_words(head_dim, tiles);
    let backward = backward::scratch_words(head_dim, tiles);
    if forward > backward {
        forward
    } else {
        backward
    }
}

/// Who computes, how, and where.
#[derive(Clone, Debug)]
struct Workers {
    instruction_set: InstructionSet,
    threads: Threads,
    /// Threads that may hold scratch memory at the same time.
    threads_at_once: usize,
    scratch: Arc<Pool>,
    tiles: Tiles,
    level: u32,
}

impl Workers {
    /// Workers that need less memory. Tiles become smaller first; from there on, every level halves how many threads work at once.
    fn at_level(&self, level: u32) -> Option<Self> {
        let halvings = level.saturating_sub(Tiles::LAST_LEVEL);
        let threads_at_once = self.threads.count().checked_shr(halvings).unwrap_or(0);
        (threads_at_once > 0).then(|| Self {
            level,
            tiles: Tiles::at_level(level),
            threads_at_once,
            ..self.clone()
        })
    }

    /// Has the pool hold scratch memory of `words` words for every thread that may work at the same time.
    fn reserve(&self, words: usize) -> Result<(), KernelError> {
        let borrow = |_| self.scratch.borrow(words);
        let pieces: Result<Vec<_>, _> = (0..self.threads_at_once).map(borrow).collect();
        pieces.map(drop)
    }

    /// Does every task once, with scratch memory of `words` words.
    fn run<T: Send>(
        &self,
        tasks: impl Iterator<Item = T> + Send,
        words: usize,
        work: impl Fn(Cut<'_>, T) + Sync,
    ) -> Result<(), KernelError> {
        let scratch = || self.scratch.borrow(words);
        self.threads
            .run_on(self.threads_at_once, tasks, scratch, |scratch, task| {
                work(scratch.cut(), task)
            })
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

    /// Levels 1 and 2 compute on smaller tiles, in about a half and two fifths of the scratch memory; every further level halves the number of
    /// threads that work at once, down to 1.
    fn with_less_memory(&self, level: u32) -> Option<Self> {
        let workers = Arc::new(self.workers.at_level(level)?);
        Some(Self { workers })
    }

    /// A piece of scratch memory for every thread that computes at the same time; a [limit](Self::with_scratch_limit) may leave less.
    fn reserve(&self, problem: &Problem, backward: bool) -> Result<(), KernelError> {
        let words = if backward {
            backward::scratch_words(problem.head_dim, self.workers.tiles)
        } else {
            forward::scratch_words(problem.head_dim, self.workers.tiles)
        };
        self.workers.reserve(words)
    }

    fn release_memory(&self) -> Result<(), KernelError> {
        self.workers.scratch.release();
        Ok(())
    }
}
