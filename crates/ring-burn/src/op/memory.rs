//! The operation on any backend whose tensors kernels can use where they lie: [`Memory`].

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{DType, Shape},
};
use ring_comm::{Communicator, buffer::Buffer};
use ring_core::{Error, Inputs, Saved, backward, forward};
use ring_kernels::{KernelError, Kernels, RowLayout, Tensor};

use super::{BackwardTensors, Job};
use crate::ring::Ring;

/// Memory of a tensor, readable by kernels.
pub(super) trait Storage<B: Buffer> {
    fn view(&self) -> B::View<'_>;
}

/// A `[batch, heads, rows, head_dim]` tensor: its memory, and where its rows lie there.
pub(super) struct Rows<S> {
    pub(super) memory: S,
    pub(super) layout: RowLayout,
}

impl<S> Rows<S> {
    /// Rows of a tensor of that shape and those strides, whose first element is number `offset` of its memory. The elements of
    /// a row are neighbours.
    pub(super) fn new(memory: S, shape: [usize; 4], strides: [usize; 4], offset: usize) -> Self {
        let layout = RowLayout {
            batch_stride: strides[0],
            head_base: (0..shape[1])
                .map(|head| offset + head * strides[1])
                .collect(),
            row_stride: strides[2],
        };
        Self { memory, layout }
    }

    fn borrow<B: Buffer>(&self) -> Tensor<'_, B>
    where
        S: Storage<B>,
    {
        Tensor {
            data: self.memory.view(),
            layout: &self.layout,
        }
    }
}

/// A rank's kernels and its place among the others, for one kind of memory.
#[derive(Debug)]
pub(crate) struct Site<B: Buffer, K> {
    pub(crate) kernels: K,
    pub(crate) communicator: Communicator<B>,
}

// Buffers cannot be cloned, handles on a group can.
impl<B: Buffer, K: Clone> Clone for Site<B, K> {
    fn clone(&self) -> Self {
        Self {
            kernels: self.kernels.clone(),
            communicator: self.communicator.clone(),
        }
    }
}

/// A backend whose tensors' memory is buffers, no copy in or out.
pub(super) trait Memory: Backend {
    type Buffer: Buffer;
    type Kernels: Kernels<Self::Buffer>;
    /// The whole memory in which a tensor lies.
    type Whole: Storage<Self::Buffer>;
    /// All elements of a tensor in order.
    type Flat: Storage<Self::Buffer>;

    /// Where the computation of a tensor happens.
    fn site(
        ring: &Ring,
        tensor: &FloatTensor<Self>,
    ) -> Result<Site<Self::Buffer, Self::Kernels>, KernelError>;

    /// The rows of a tensor, which may have any strides.
    fn rows(tensor: FloatTensor<Self>) -> Result<Rows<Self::Whole>, KernelError>;

    /// The elements of a tensor, which may have any strides.
    fn flat(tensor: FloatTensor<Self>) -> Result<Self::Flat, KernelError>;

    /// A contiguous tensor.
    fn tensor(buffer: Self::Buffer, shape: Shape, device: &Self::Device) -> FloatTensor<Self>;
}

/// Output and log-sum-exp, or zeros and a failed job.
pub(super) fn attention<M: Memory>(
    query: FloatTensor<M>,
    key: FloatTensor<M>,
    value: FloatTensor<M>,
    job: &Job,
) -> (FloatTensor<M>, FloatTensor<M>) {
    let (shape, dtype, device) = (query.shape(), query.dtype(), query.device());
    let rows = Shape::new([shape[0], shape[1], shape[2]]);
    match try_attention::<M>(query, key, value, job) {
        Ok(result) => {
            job.outcome().operation = result.operation;
            (
                M::tensor(result.output, shape, &device),
                M::tensor(result.log_sum_exp, rows, &device),
            )
        }
        Err(error) => {
            // The caller looks for the failure before it hands these out.
            job.fail(error);
            (
                M::float_zeros(shape, &device, dtype.into()),
                M::float_zeros(rows, &device, DType::F32.into()),
            )
        }
    }
}

fn try_attention<M: Memory>(
    query: FloatTensor<M>,
    key: FloatTensor<M>,
    value: FloatTensor<M>,
    job: &Job,
) -> Result<ring_core::Output<M::Buffer>, Error> {
    let refused = |error| refused(job, error);
    let site = M::site(&job.ring, &query).map_err(refused)?;
    let [query, key, value] = [query, key, value].map(M::rows);
    let (query, key, value) = (
        query.map_err(refused)?,
        key.map_err(refused)?,
        value.map_err(refused)?,
    );
    let inputs = Inputs {
        query: query.borrow(),
        key: key.borrow(),
        value: value.borrow(),
        dropout: job.dropout,
    };
    let Site {
        kernels,
        communicator,
    } = &site;
    match job.ring.recovery() {
        Some(recovery) => recovery.forward(kernels, communicator, &job.plan, inputs),
        None => forward(kernels, communicator, &job.plan, inputs),
    }
}

/// Gradients of query, key and value.
///
/// # Panics
/// If the exchange fails.
pub(super) fn gradient<M: Memory>(
    query: FloatTensor<M>,
    key: FloatTensor<M>,
    value: FloatTensor<M>,
    saved: BackwardTensors<M>,
    job: &Job,
) -> [FloatTensor<M>; 3] {
    let device = query.device();
    let [of_query, of_key, of_value] = [query.shape(), key.shape(), value.shape()];
    let gradients = try_gradient::<M>(query, key, value, saved, job)
        .unwrap_or_else(|error| panic!("backward of ring attention failed: {error}"));
    [
        M::tensor(gradients.query, of_query, &device),
        M::tensor(gradients.key, of_key, &device),
        M::tensor(gradients.value, of_value, &device),
    ]
}

fn try_gradient<M: Memory>(
    query: FloatTensor<M>,
    key: FloatTensor<M>,
    value: FloatTensor<M>,
    saved: BackwardTensors<M>,
    job: &Job,
) -> Result<ring_core::Gradients<M::Buffer>, Error> {
    let refused = |error| refused(job, error);
    let site = M::site(&job.ring, &query).map_err(refused)?;
    let [query, key, value] = [query, key, value].map(M::rows);
    let (query, key, value) = (
        query.map_err(refused)?,
        key.map_err(refused)?,
        value.map_err(refused)?,
    );
    let inputs = Inputs {
        query: query.borrow(),
        key: key.borrow(),
        value: value.borrow(),
        dropout: job.dropout,
    };
    let output = M::flat(saved.output).map_err(refused)?;
    let log_sum_exp = M::flat(saved.log_sum_exp).map_err(refused)?;
    let grad_output = M::rows(saved.grad_output).map_err(refused)?;
    let grad_log_sum_exp = saved.grad_log_sum_exp.map(M::flat).transpose();
    let grad_log_sum_exp = grad_log_sum_exp.map_err(refused)?;
    let saved = Saved {
        operation: job.outcome().operation,
        output: output.view(),
        log_sum_exp: log_sum_exp.view(),
        grad_output: grad_output.borrow(),
        grad_log_sum_exp: grad_log_sum_exp.as_ref().map(Storage::view),
    };
    let Site {
        kernels,
        communicator,
    } = &site;
    match job.ring.recovery() {
        Some(recovery) => recovery.backward(kernels, communicator, &job.plan, inputs, saved),
        None => backward(kernels, communicator, &job.plan, inputs, saved),
    }
}

/// A tensor that kernels cannot take. The others must not wait for this rank.
fn refused(job: &Job, source: KernelError) -> Error {
    let rank = job.ring.rank();
    let error = Error::Kernel { rank, source };
    if job.ring.world_size() > 1 {
        job.ring.communicator().abort(&error.to_string());
    }
    error
}
