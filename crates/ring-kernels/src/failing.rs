//! For tests: kernels to which memory is refused, [`FailingAllocations`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use ring_comm::buffer::{Buffer, DType};

use crate::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, Tensor, TensorShape,
};

/// What a refused call says it asked for.
pub const REFUSED_BYTES: usize = 0xFA11;

/// Kernels of which some calls fail with [`KernelError::Allocation`] before they do anything.
///
/// Counted are the calls that may allocate: all but [`dtype`](Kernels::dtype) and those that only
/// move rows to where they belong. Clones, and
/// kernels with less memory made of these, count on together.
#[derive(Clone, Debug)]
pub struct FailingAllocations<K> {
    kernels: K,
    first: usize,
    times: usize,
    panics: bool,
    calls: Arc<AtomicUsize>,
}

impl<K> FailingAllocations<K> {
    /// `kernels` whose calls `first..first + times` fail, counted from 0.
    pub fn new(kernels: K, first: usize, times: usize) -> Self {
        Self {
            kernels,
            first,
            times,
            panics: false,
            calls: Arc::default(),
        }
    }

    /// `kernels` that panic in that call, counted from 0.
    pub fn panicking(kernels: K, call: usize) -> Self {
        Self {
            panics: true,
            ..Self::new(kernels, call, 1)
        }
    }

    /// Calls so far, those that failed among them.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// The kernels, if this call may have memory.
    fn admitted(&self) -> Result<&K, KernelError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let refused = call.checked_sub(self.first);
        if refused.is_some_and(|refused| refused < self.times) {
            assert!(!self.panics, "panics as it was told to");
            return Err(KernelError::Allocation {
                bytes: REFUSED_BYTES,
            });
        }
        Ok(&self.kernels)
    }
}

impl<B: Buffer, K: Kernels<B>> Kernels<B> for FailingAllocations<K> {
    fn allocate(&self, dtype: DType, len: usize, reuse: Option<B>) -> Result<B, KernelError> {
        self.admitted()?.allocate(dtype, len, reuse)
    }

    fn dtype(&self, view: B::View<'_>) -> DType {
        self.kernels.dtype(view)
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, B>],
        rows: &PackedRows,
        reuse: Option<B>,
    ) -> Result<B, KernelError> {
        self.admitted()?.pack(shape, tensors, rows, reuse)
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &B,
        rows: &PackedRows,
        targets: &mut [&mut B],
    ) -> Result<(), KernelError> {
        self.kernels.place_rows(shape, message, rows, targets)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<B>, KernelError> {
        self.admitted()?.start(problem)
    }

    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, B>,
        key_value: &KeyValue<'_, B>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<B>,
    ) -> Result<(), KernelError> {
        self.admitted()?
            .forward(problem, query, key_value, blocks, state)
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<B>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(B, B), KernelError> {
        self.admitted()?.finish(problem, state, dtype, output_scale)
    }

    fn delta(
        &self,
        problem: &Problem,
        output: B::View<'_>,
        grad_output: Tensor<'_, B>,
        log_sum_exp: B::View<'_>,
        grad_log_sum_exp: Option<B::View<'_>>,
    ) -> Result<B, KernelError> {
        let kernels = self.admitted()?;
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
        self.admitted()?.backward(
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
        self.kernels.add_rows(shape, message, rows, targets)
    }

    fn round(&self, buffer: B, dtype: DType) -> Result<B, KernelError> {
        self.admitted()?.round(buffer, dtype)
    }

    fn reserve(&self, problem: &Problem, backward: bool) -> Result<(), KernelError> {
        self.admitted()?.reserve(problem, backward)
    }

    fn with_less_memory(&self, level: u32) -> Option<Self> {
        Some(Self {
            kernels: self.kernels.with_less_memory(level)?,
            first: self.first,
            times: self.times,
            panics: self.panics,
            calls: Arc::clone(&self.calls),
        })
    }

    fn release_memory(&self) -> Result<(), KernelError> {
        self.kernels.release_memory()
    }
}
