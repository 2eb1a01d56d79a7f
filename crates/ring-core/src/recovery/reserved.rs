//! Kernels that hand out what was reserved for them: [`Reserved`].

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use ring_comm::buffer::{Buffer, DType};
use ring_kernels::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, Tensor, TensorShape,
};

/// What reserved memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Handed out zeroed, as it is asked for.
    Zeros,
    /// Handed out for rows to be packed into.
    Pack,
    /// Freed right before `delta` allocates as much.
    Delta,
    /// Freed right before a pass allocates for queries that visit.
    Guests,
    /// Freed right before sums are rounded.
    Results,
}

/// A buffer that was reserved.
pub(super) struct Piece<B> {
    pub(super) purpose: Use,
    pub(super) dtype: DType,
    pub(super) len: usize,
    pub(super) buffer: B,
}

/// All that was reserved for a pass, but for what pools keep.
pub(super) struct Stash<B> {
    pub(super) state: Option<ForwardState<B>>,
    pub(super) pieces: Vec<Piece<B>>,
    /// Buffers asked for that were not there.
    #[cfg(test)]
    pub(super) missed: usize,
}

impl<B> Default for Stash<B> {
    fn default() -> Self {
        Self {
            state: None,
            pieces: Vec::new(),
            #[cfg(test)]
            missed: 0,
        }
    }
}

impl<B> Stash<B> {
    /// What was reserved for this; if nothing was, room is made for it.
    fn take(&mut self, purpose: Use, dtype: DType, len: usize) -> Option<B> {
        let is_it =
            |piece: &Piece<B>| (piece.purpose, piece.dtype, piece.len) == (purpose, dtype, len);
        match self.pieces.iter().position(is_it) {
            Some(index) => Some(self.pieces.swap_remove(index).buffer),
            None => {
                #[cfg(test)]
                {
                    self.missed += usize::from(len > 0);
                }
                self.release(Use::Guests);
                None
            }
        }
    }

    fn release(&mut self, purpose: Use) {
        self.pieces.retain(|piece| piece.purpose != purpose);
    }
}

/// Kernels for one pass: those that were given, or the same with less memory, and what was reserved with them. An allocation that
/// was not foreseen is one.
pub(super) struct Reserved<'a, B, K> {
    given: &'a K,
    with_less_memory: OnceLock<K>,
    stash: Mutex<Stash<B>>,
}

impl<'a, B: Buffer, K: Kernels<B>> Reserved<'a, B, K> {
    /// Without anything reserved.
    pub(super) fn new(given: &'a K) -> Self {
        Self {
            given,
            with_less_memory: OnceLock::new(),
            stash: Mutex::default(),
        }
    }

    /// The kernels that were given.
    pub(super) fn given(&self) -> &'a K {
        self.given
    }

    /// Computes with what was reserved; with the kernels that were given unless there are others.
    pub(super) fn fill(&self, with_less_memory: Option<K>, stash: Stash<B>) {
        if let Some(kernels) = with_less_memory {
            self.with_less_memory.get_or_init(|| kernels);
        }
        *self.stash() = stash;
    }

    fn kernels(&self) -> &K {
        self.with_less_memory.get().unwrap_or(self.given)
    }

    /// Sound after a panic too: no change is left half done.
    pub(super) fn stash(&self) -> MutexGuard<'_, Stash<B>> {
        self.stash.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Buffer, K: Kernels<B>> Kernels<B> for Reserved<'_, B, K> {
    fn allocate(&self, dtype: DType, len: usize, reuse: Option<B>) -> Result<B, KernelError> {
        let reserved = || self.stash().take(Use::Zeros, dtype, len);
        let zeros = if reuse.is_none() { reserved() } else { None };
        zeros.map_or_else(|| self.kernels().allocate(dtype, len, reuse), Ok)
    }

    fn dtype(&self, view: B::View<'_>) -> DType {
        self.given.dtype(view)
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, B>],
        rows: &PackedRows,
        reuse: Option<B>,
    ) -> Result<B, KernelError> {
        let reserved = |data| {
            let dtype = self.given.dtype(data);
            self.stash().take(Use::Pack, dtype, rows.len())
        };
        let first = || tensors.first().map(|tensor| tensor.data);
        let reuse = reuse.or_else(|| first().and_then(reserved));
        self.kernels().pack(shape, tensors, rows, reuse)
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &B,
        rows: &PackedRows,
        targets: &mut [&mut B],
    ) -> Result<(), KernelError> {
        self.kernels().place_rows(shape, message, rows, targets)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<B>, KernelError> {
        let reserved = self.stash().state.take();
        reserved.map_or_else(|| self.kernels().start(problem), Ok)
    }

    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, B>,
        key_value: &KeyValue<'_, B>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<B>,
    ) -> Result<(), KernelError> {
        self.kernels()
            .forward(problem, query, key_value, blocks, state)
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<B>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(B, B), KernelError> {
        self.stash().release(Use::Results);
        self.kernels().finish(problem, state, dtype, output_scale)
    }

    fn delta(
        &self,
        problem: &Problem,
        output: B::View<'_>,
        grad_output: Tensor<'_, B>,
        log_sum_exp: B::View<'_>,
        grad_log_sum_exp: Option<B::View<'_>>,
    ) -> Result<B, KernelError> {
        self.stash().release(Use::Delta);
        let kernels = self.kernels();
        kernels.delta(problem, output, grad_output, log_sum_exp, grad_log_sum_exp)
    }

    fn backward(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<'_, B>,
        key_value: &KeyValue<'_, B>,
        blocks: &[HeadBlocks],
        output_scale: f32,
        grad_query: &mut B,
        grad_key_value: KeyValueGradient<'_, B>,
    ) -> Result<(), KernelError> {
        self.kernels().backward(
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
        message: &B,
        rows: &PackedRows,
        targets: &mut [&mut B],
    ) -> Result<(), KernelError> {
        self.kernels().add_rows(shape, message, rows, targets)
    }

    fn round(&self, buffer: B, dtype: DType) -> Result<B, KernelError> {
        self.stash().release(Use::Results);
        self.kernels().round(buffer, dtype)
    }

    fn reserve(&self, problem: &Problem, backward: bool) -> Result<(), KernelError> {
        self.kernels().reserve(problem, backward)
    }

    fn release_memory(&self) -> Result<(), KernelError> {
        self.kernels().release_memory()
    }
}
