//! The seam between the algorithm and the devices: [`Kernels`].

use ring_comm::buffer::{Buffer, DType};
use thiserror::Error;

use crate::block::{
    HeadBlocks, KeyValue, KeyValueGradient, PackedRows, Problem, Tensor, TensorShape,
};

/// Running state of a forward pass over a rank's own query rows, f32 whatever the input type.
///
/// For a row with scores `S_m` seen so far: `max = max_m S_m`, `denominator = sum_m exp(S_m - max)`,
/// `output = sum_m exp(S_m - max) V_m`. A row that has seen nothing has `max = -inf` and zeros. Only the kernels that made a
/// state read it: in what unit they keep the maximum is their own matter (those of the CPU multiply it by `log2 e`).
#[derive(Debug)]
pub struct ForwardState<B> {
    /// `[batch, query_heads, queries, head_dim]`
    pub output: B,
    /// `[batch, query_heads, queries]`
    pub max: B,
    /// `[batch, query_heads, queries]`
    pub denominator: B,
}

/// What a backward pass needs of the forward pass and of the incoming gradient.
pub struct BackwardInputs<'a, B: Buffer> {
    /// Queries.
    pub query: Tensor<'a, B>,
    /// Gradient that reaches the output, `[batch, query_heads, queries, head_dim]`.
    pub grad_output: Tensor<'a, B>,
    /// Log-sum-exp over *all* keys of the row, on all ranks: f32, contiguous `[batch, query_heads, queries]`.
    pub log_sum_exp: B::View<'a>,
    /// What [`Kernels::delta`] returned.
    pub delta: &'a B,
}

/// A kernel that could not run.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum KernelError {
    /// A buffer has an element type the kernel does not take there.
    #[error("{what} has element type {got}, expected {expected}")]
    DType {
        /// Which buffer.
        what: &'static str,
        /// Its type.
        got: DType,
        /// The type it must have.
        expected: String,
    },
    /// A buffer is too small for the shape that was announced.
    #[error("{what} has {got} elements, at least {expected} are needed")]
    Size {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it must have.
        expected: usize,
    },
    /// Memory could not be had.
    #[error("could not allocate {bytes} bytes")]
    Allocation {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The arguments contradict one another: a head that does not exist, rows out of range, gradients that overlap.
    #[error("{0}")]
    Invalid(String),
    /// The device failed.
    #[error("{0}")]
    Device(String),
}

/// Block attention on one kind of memory.
///
/// Ranks are unknown here: a kernel sees row sets and positions. Scores, softmax and sums are f32 whatever the inputs are;
/// each result is rounded to the input type once, at the end.
///
/// Equations (`S = scale * Q K^T`, `M` the number of blocks that admit the pair, `L` the log-sum-exp of the row over all keys):
/// forward `O = sum_m M exp(S - L) V`; backward with `Delta = dO . O - dL`, `P = M exp(S - L)`:
/// `dV = P^T dO`, `dS = P * (dO V^T - Delta)`, `dQ = scale dS K`, `dK = scale dS^T Q`.
/// A row with `L = -inf` contributes nothing.
///
/// With [`Scores`](crate::Scores): `S = scale * Q K^T` goes through softcap and ALiBi first, and `dS` is multiplied by the softcap's
/// derivative. With dropout, `P` is 0 where it is multiplied by `V` (and `dO V^T` where it is subtracted from) for weights that are
/// dropped, not in `L`; the factor `1 / (1 - probability)` on the others must be in the `output_scale` that `finish` and `backward` are
/// given.
pub trait Kernels<B: Buffer>: Send + Sync {
    /// A zeroed buffer of `len` elements; takes over the memory of `reuse` where that serves.
    ///
    /// # Errors
    /// [`KernelError::Allocation`] if the memory cannot be had.
    fn allocate(&self, dtype: DType, len: usize, reuse: Option<B>) -> Result<B, KernelError>;

    /// The element type of a view.
    fn dtype(&self, view: B::View<'_>) -> DType;

    /// Copies the rows that travel into a message of the tensors' element type, a part for each tensor; takes over the memory of
    /// `reuse` where that serves. All `tensors` have the shape `shape`.
    ///
    /// # Errors
    /// [`KernelError`] for tensors of the wrong type, size or number.
    fn pack(
        &self,
        shape: TensorShape,
        tensors: &[Tensor<'_, B>],
        rows: &PackedRows,
        reuse: Option<B>,
    ) -> Result<B, KernelError>;

    /// Copies the rows of a message to where they belong in contiguous `targets` of the shape `shape`, one for each part.
    ///
    /// # Errors
    /// [`KernelError`] for buffers of the wrong type, size or number.
    fn place_rows(
        &self,
        shape: TensorShape,
        message: &B,
        rows: &PackedRows,
        targets: &mut [&mut B],
    ) -> Result<(), KernelError>;

    /// State of rows that have seen nothing.
    ///
    /// # Errors
    /// [`KernelError::Allocation`] if the memory cannot be had.
    fn start(&self, problem: &Problem) -> Result<ForwardState<B>, KernelError>;

    /// Adds `blocks` to the state.
    ///
    /// # Errors
    /// [`KernelError`] for buffers of the wrong type or size.
    fn forward(
        &self,
        problem: &Problem,
        query: Tensor<'_, B>,
        key_value: &KeyValue<'_, B>,
        blocks: &[HeadBlocks],
        state: &mut ForwardState<B>,
    ) -> Result<(), KernelError>;

    /// Normalises the state: the output in `dtype`, multiplied by `output_scale`, and the f32 log-sum-exp.
    /// Rows that have seen nothing get output 0 and log-sum-exp `-inf`.
    ///
    /// # Errors
    /// [`KernelError`] if memory cannot be had.
    fn finish(
        &self,
        problem: &Problem,
        state: ForwardState<B>,
        dtype: DType,
        output_scale: f32,
    ) -> Result<(B, B), KernelError>;

    /// `Delta = grad_output . output - grad_log_sum_exp`, f32 `[batch, query_heads, queries]`; 0 where the log-sum-exp is
    /// `-inf`.
    ///
    /// `output` is what [`finish`](Self::finish) returned, contiguous, and `grad_output` what reached it. `output_scale` needs
    /// no correction here: what it takes from the one factor it has given to the other.
    ///
    /// # Errors
    /// [`KernelError`] for buffers of the wrong type or size.
    fn delta(
        &self,
        problem: &Problem,
        output: B::View<'_>,
        grad_output: Tensor<'_, B>,
        log_sum_exp: B::View<'_>,
        grad_log_sum_exp: Option<B::View<'_>>,
    ) -> Result<B, KernelError>;

    /// Adds the gradients of `blocks` to `grad_query` (f32, contiguous) and `grad_key_value` (f32).
    ///
    /// `output_scale` multiplies `grad_output` where it is used (not in `delta`, which already has it).
    ///
    /// # Errors
    /// [`KernelError`] for buffers of the wrong type or size.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<'_, B>,
        key_value: &KeyValue<'_, B>,
        blocks: &[HeadBlocks],
        output_scale: f32,
        grad_query: &mut B,
        grad_key_value: KeyValueGradient<'_, B>,
    ) -> Result<(), KernelError>;

    /// Adds the rows of a message of gradients, f32, to those of contiguous f32 `targets` of the shape `shape`, one for each part.
    ///
    /// # Errors
    /// [`KernelError`] for buffers of the wrong type, size or number.
    fn add_rows(
        &self,
        shape: TensorShape,
        message: &B,
        rows: &PackedRows,
        targets: &mut [&mut B],
    ) -> Result<(), KernelError>;

    /// Rounds an f32 buffer to `dtype`, once; returns it unchanged if it is f32 already.
    ///
    /// # Errors
    /// [`KernelError`] if memory cannot be had.
    fn round(&self, buffer: B, dtype: DType) -> Result<B, KernelError>;

    /// The same kernels with less memory of their own, and less speed: every result is the same to the last bit. These are level 0;
    /// the higher the level, the less memory. `None` if there is no such level; by default there is none at all.
    fn with_less_memory(&self, level: u32) -> Option<Self>
    where
        Self: Sized,
    {
        let _ = level;
        None
    }

    /// Allocates what [`forward`](Self::forward), or [`backward`](Self::backward) if `backward`, will need beside its arguments, and keeps
    /// it for them. By default nothing is needed.
    ///
    /// # Errors
    /// [`KernelError::Allocation`] if the memory cannot be had.
    fn reserve(&self, problem: &Problem, backward: bool) -> Result<(), KernelError> {
        let _ = (problem, backward);
        Ok(())
    }

    /// Gives back to the system what is kept between calls; by default nothing is kept. Later calls allocate anew.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device fails.
    fn release_memory(&self) -> Result<(), KernelError> {
        Ok(())
    }
}
