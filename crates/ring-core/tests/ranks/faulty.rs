//! Kernels that fail on purpose: [`Faulty`].

use std::sync::atomic::{AtomicUsize, Ordering};

use ring_comm::buffer::{DType, HostBuffer, HostView};
use ring_kernels::{
    BackwardInputs, CpuKernels, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue,
    KeyValueGradient, PackedRows, Problem, Tensor, TensorShape,
};

/// What becomes of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A kernel returns an error.
    Error,
    /// A kernel panics.
    Panic,
}

/// Kernels of which one kind fails when it is called for the so many-th time.
pub(crate) struct Faulty {
    kernels: CpuKernels,
    fault: Option<(&'static str, usize, Fault)>,
    calls: AtomicUsize,
}

impl Faulty {
    /// Kernels whose call `number` (from 0) of `name` fails.
    pub(crate) fn at(name: &'static str, number: usize, fault: Fault) -> Self {
        Self {
            fault: Some((name, number, fault)),
            ..Self::never()
        }
    }

    /// What becomes of the rank.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault.map(|(_, _, fault)| fault)
    }

    /// Whether the call that fails was made.
    pub(crate) fn has_failed(&self) -> bool {
        let calls = self.calls.load(Ordering::Relaxed);
        self.fault.is_some_and(|(_, number, _)| calls > number)
    }

    /// Kernels that work.
    pub(crate) fn never() -> Self {
        Self {
            kernels: CpuKernels::new(1).unwrap(),
            fault: None,
            calls: AtomicUsize::new(0),
        }
    }

    fn call(&self, name: &str) -> Result<(), KernelError> {
        let Some((failing, number, fault)) = self.fault else {
            return Ok(());
        };
        if failing != name || self.calls.fetch_add(1, Ordering::Relaxed) != number {
            return Ok(());
        }
        match fault {
            Fault::Panic => panic!("out of order"),
            Fault::Error => Err(KernelError::Device("out of order".into())),
        }
    }
}

impl Kernels<HostBuffer> for Faulty {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        self.kernels.allocate(dtype, len, reuse)
    }

    fn dtype(&self, view: HostView<'_>) -> DType {
        self.kernels.dtype(view)
    }

    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, HostBuffer>],
        rows: &PackedRows,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        self.call("pack")?;
        self.kernels.pack(shape, tensors, rows, reuse)
    }

    fn place_rows(
        &self,
        shape: TensorShape,
        message: &HostBuffer,
        rows: &PackedRows,
        targets: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        self.call("place_rows")?;
        self.kernels.place_rows(shape, message, rows, targets)
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<HostBuffer>, KernelError> {
        self.kernels.start(problem)
    }

    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, HostBuffer>,
        key_value: &KeyValue<'_, HostBuffer>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<HostBuffer>,
    ) -> Result<(), KernelError> {
        self.call("forward")?;
        self.kernels
            .forward(problem, query, key_value, blocks, state)
    }

    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<HostBuffer>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(HostBuffer, HostBuffer), KernelError> {
        self.call("finish")?;
        self.kernels.finish(problem, state, dtype, output_scale)
    }

    fn delta(
        &self,
        problem: &Problem,
        output: HostView<'_>,
        grad_output: Tensor<'_, HostBuffer>,
        log_sum_exp: HostView<'_>,
        grad_log_sum_exp: Option<HostView<'_>>,
    ) -> Result<HostBuffer, KernelError> {
        self.kernels
            .delta(problem, output, grad_output, log_sum_exp, grad_log_sum_exp)
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
        self.call("backward")?;
        self.kernels.backward(
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
        self.call("add_rows")?;
        self.kernels.add_rows(shape, message, rows, targets)
    }

    fn round(&self, buffer: HostBuffer, dtype: DType) -> Result<HostBuffer, KernelError> {
        self.kernels.round(buffer, dtype)
    }
}
