//! The Burn operation: forward on the backend's tensors, hand-written backward on the autodiff backend.
//!
//! Saved for the backward: query, key, value, output and log-sum-exp; nothing of size N, no score. An autodiff node has one
//! output, and attention has two, so a hidden node carries the operation, and two children hand its outputs out: the output
//! itself, and the log-sum-exp, whose gradient waits in a stash until the hidden node's turn.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{
    backend::{
        Autodiff, AutodiffBackend, Backend, Flex, TensorMetadata,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::{FlexTensor, Layout},
        tensor::FloatTensor,
    },
    tensor::{Bytes, DType, Shape},
};
use half::{bf16, f16};
use ring_comm::buffer::{HostBuffer, HostView};
use ring_core::{Inputs, Plan, Saved, backward, forward};
use ring_kernels::{RowLayout, Tensor};

use crate::ring::Ring;

/// One attention of one rank, and what it leaves behind: an operation returns tensors, not results.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) ring: Ring,
    pub(crate) plan: Arc<Plan>,
    outcome: Arc<Mutex<Outcome>>,
}

/// What a forward leaves behind, beside its tensors.
#[derive(Clone, Debug, Default)]
struct Outcome {
    failure: Option<ring_core::Error>,
    /// Number of the operation in its group, for the backward.
    operation: u64,
}

impl Job {
    pub(crate) fn new(ring: Ring, plan: Arc<Plan>) -> Self {
        Self {
            ring,
            plan,
            outcome: Arc::default(),
        }
    }

    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn failure(&self) -> Option<ring_core::Error> {
        self.outcome().failure.clone()
    }
}

/// What the backward needs beside the inputs.
#[derive(Clone, Debug)]
pub(crate) struct BackwardTensors<B: Backend> {
    output: FloatTensor<B>,
    log_sum_exp: FloatTensor<B>,
    grad_output: FloatTensor<B>,
    grad_log_sum_exp: Option<FloatTensor<B>>,
}

/// Ring attention on a Burn backend. Reached through the modules of this crate.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait RingAttentionOps: Backend {
    /// Output and log-sum-exp of this rank's queries; blocks until the group has exchanged what it needs.
    fn ring_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        job: Job,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// The backward of [`RingAttentionOps`], for backends that are differentiated, not for `Autodiff` itself.
pub(crate) trait RingAttentionGradient: RingAttentionOps {
    /// Gradients of query, key and value.
    ///
    /// # Panics
    /// If the exchange fails: a backward cannot return an error. The group is poisoned then, so that every rank ends.
    fn ring_attention_gradient(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [FloatTensor<Self>; 3];
}

// ---- Flex: the tensors' own memory, no copy in or out ----

/// A `[batch, heads, rows, head_dim]` tensor whose last dimension is contiguous, and where its rows lie.
struct Rows4 {
    tensor: FlexTensor,
    layout: RowLayout,
}

impl Rows4 {
    /// Any strides are taken as they are, but for the last dimension.
    fn new(tensor: FlexTensor) -> Self {
        let layout = tensor.layout();
        let last_is_contiguous = layout.strides()[3] == 1 || layout.shape()[3] == 1;
        let forward = layout.strides().iter().all(|&stride| stride >= 0);
        let tensor = if last_is_contiguous && forward {
            tensor
        } else {
            tensor.to_contiguous()
        };
        let layout = tensor.layout();
        let stride = |dim: usize| layout.strides()[dim].unsigned_abs();
        let layout = RowLayout {
            batch_stride: stride(0),
            head_base: (0..layout.shape()[1])
                .map(|head| layout.start_offset() + head * stride(1))
                .collect(),
            row_stride: stride(2),
        };
        Self { tensor, layout }
    }

    fn borrow(&self) -> Tensor<'_, HostBuffer> {
        Tensor {
            data: storage(&self.tensor),
            layout: &self.layout,
        }
    }
}

fn storage(tensor: &FlexTensor) -> HostView<'_> {
    match tensor.dtype() {
        DType::F16 => HostView::F16(tensor.storage::<f16>()),
        DType::BF16 => HostView::BF16(tensor.storage::<bf16>()),
        _ => HostView::F32(tensor.storage::<f32>()),
    }
}

/// All elements in order, of a tensor that need not be contiguous.
struct Flat(FlexTensor);

impl Flat {
    fn new(tensor: FlexTensor) -> Self {
        Self(if tensor.is_contiguous() {
            tensor
        } else {
            tensor.to_contiguous()
        })
    }

    fn view(&self) -> HostView<'_> {
        let (start, end) = self
            .0
            .layout()
            .contiguous_offsets()
            .expect("the tensor is contiguous");
        match storage(&self.0) {
            HostView::F32(values) => HostView::F32(&values[start..end]),
            HostView::F16(values) => HostView::F16(&values[start..end]),
            HostView::BF16(values) => HostView::BF16(&values[start..end]),
        }
    }
}

fn flex_tensor(buffer: HostBuffer, shape: Shape) -> FlexTensor {
    let (bytes, dtype) = match buffer {
        HostBuffer::F32(values) => (Bytes::from_elems(values), DType::F32),
        HostBuffer::F16(values) => (Bytes::from_elems(values), DType::F16),
        HostBuffer::BF16(values) => (Bytes::from_elems(values), DType::BF16),
    };
    FlexTensor::new(bytes, Layout::contiguous(shape), dtype)
}

impl RingAttentionOps for Flex {
    fn ring_attention(
        query: FlexTensor,
        key: FlexTensor,
        value: FlexTensor,
        job: Job,
    ) -> (FlexTensor, FlexTensor) {
        let shape = query.shape();
        let rows = Shape::new([shape[0], shape[1], shape[2]]);
        let dtype = query.dtype();
        let [query, key, value] = [query, key, value].map(Rows4::new);
        let inputs = Inputs {
            query: query.borrow(),
            key: key.borrow(),
            value: value.borrow(),
        };
        let ring = &job.ring;
        match forward(ring.kernels(), ring.communicator(), &job.plan, inputs) {
            Ok(result) => {
                job.outcome().operation = result.operation;
                (
                    flex_tensor(result.output, shape),
                    flex_tensor(result.log_sum_exp, rows),
                )
            }
            Err(error) => {
                // The caller looks for the failure before it hands these out.
                job.outcome().failure = Some(error);
                (
                    FlexTensor::zeros(shape, dtype),
                    FlexTensor::zeros(rows, DType::F32),
                )
            }
        }
    }
}

impl RingAttentionGradient for Flex {
    fn ring_attention_gradient(
        query: FlexTensor,
        key: FlexTensor,
        value: FlexTensor,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [FlexTensor; 3] {
        let shapes = [query.shape(), key.shape(), value.shape()];
        let [query, key, value] = [query, key, value].map(Rows4::new);
        let inputs = Inputs {
            query: query.borrow(),
            key: key.borrow(),
            value: value.borrow(),
        };
        let (output, log_sum_exp) = (Flat::new(saved.output), Flat::new(saved.log_sum_exp));
        let grad_output = Rows4::new(saved.grad_output);
        let grad_log_sum_exp = saved.grad_log_sum_exp.map(Flat::new);
        let saved = Saved {
            operation: job.outcome().operation,
            output: output.view(),
            log_sum_exp: log_sum_exp.view(),
            grad_output: grad_output.borrow(),
            grad_log_sum_exp: grad_log_sum_exp.as_ref().map(Flat::view),
        };
        let ring = &job.ring;
        match backward(
            ring.kernels(),
            ring.communicator(),
            &job.plan,
            inputs,
            saved,
        ) {
            Ok(gradients) => {
                let [query, key, value] = shapes;
                [
                    flex_tensor(gradients.query, query),
                    flex_tensor(gradients.key, key),
                    flex_tensor(gradients.value, value),
                ]
            }
            Err(error) => panic!("backward of ring attention failed: {error}"),
        }
    }
}

// ---- Autodiff ----

/// The gradient of the log-sum-exp, from its node to the hidden one.
type Stash<B> = Arc<Mutex<Option<FloatTensor<B>>>>;

/// State of the hidden node.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    query: NodeId,
    key: NodeId,
    value: NodeId,
    output: FloatTensor<B>,
    log_sum_exp: FloatTensor<B>,
    grad_log_sum_exp: Stash<B>,
    job: Job,
}

/// The hidden node: parents are query, key and value, its gradient is that of the output.
#[derive(Debug)]
struct AttentionNode;

impl<B: RingAttentionGradient> Backward<B, 3> for AttentionNode {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad_output = grads.consume::<B>(&ops.node);
        let state = ops.state;
        let [query, key, value] = [state.query, state.key, state.value]
            .map(|node| checkpointer.retrieve_node_output::<FloatTensor<B>>(node));
        let saved = BackwardTensors {
            output: state.output,
            log_sum_exp: state.log_sum_exp,
            grad_output,
            grad_log_sum_exp: state
                .grad_log_sum_exp
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        };
        let gradients = B::ring_attention_gradient(query, key, value, saved, &state.job);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// The output: child of the hidden node, passes its gradient on.
#[derive(Debug)]
struct OutputNode;

impl<B: Backend> Backward<B, 1> for OutputNode {
    type State = ();

    fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, gradient);
        }
    }
}

/// The log-sum-exp: child of the hidden node, leaves its gradient in the stash, and a zero with the hidden node, which must
/// have a gradient to consume when the log-sum-exp alone is used.
#[derive(Debug)]
struct LogSumExpNode;

impl<B: Backend> Backward<B, 1> for LogSumExpNode {
    type State = (Stash<B>, Shape, DType);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let (stash, shape, dtype) = ops.state;
        if let [Some(parent)] = ops.parents {
            let zeros = B::float_zeros(shape, &gradient.device(), dtype.into());
            *stash.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
            grads.register::<B>(parent.id, zeros);
        }
    }
}

impl<B: RingAttentionGradient, C: CheckpointStrategy> RingAttentionOps for Autodiff<B, C> {
    fn ring_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        job: Job,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // Compute-bound: checkpointing must not run the exchange a second time.
        let nodes = [query.node(), key.node(), value.node()];
        match AttentionNode.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::UnTracked(prepared) => {
                let (output, log_sum_exp) = B::ring_attention(
                    query.into_primitive(),
                    key.into_primitive(),
                    value.into_primitive(),
                    job,
                );
                (
                    prepared.finish(output),
                    <Self as AutodiffBackend>::from_inner(log_sum_exp),
                )
            }
            OpsKind::Tracked(mut prepared) => {
                let [query_node, key_node, value_node] =
                    [&query, &key, &value].map(|tensor| prepared.checkpoint(tensor));
                let (output, log_sum_exp) = B::ring_attention(
                    query.into_primitive(),
                    key.into_primitive(),
                    value.into_primitive(),
                    job.clone(),
                );
                let (shape, dtype) = (output.shape(), output.dtype());
                let stash: Stash<B> = Arc::default();
                let state = State {
                    query: query_node,
                    key: key_node,
                    value: value_node,
                    output: output.clone(),
                    log_sum_exp: log_sum_exp.clone(),
                    grad_log_sum_exp: Arc::clone(&stash),
                    job,
                };
                let hidden = prepared.finish(state, output.clone());
                let output = OutputNode
                    .prepare::<C>([hidden.node()])
                    .compute_bound()
                    .stateless(output);
                let log_sum_exp = match LogSumExpNode
                    .prepare::<C>([hidden.node()])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prepared) => {
                        prepared.finish((stash, shape, dtype), log_sum_exp)
                    }
                    OpsKind::UnTracked(prepared) => prepared.finish(log_sum_exp),
                };
                (output, log_sum_exp)
            }
        }
    }
}
