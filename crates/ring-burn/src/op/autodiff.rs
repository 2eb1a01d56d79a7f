//! The operation on an autodiff backend.
//!
//! An autodiff node has one output, and attention has two, so a hidden node carries the operation, and two children hand its
//! outputs out: the output itself, and the log-sum-exp, whose gradient waits in a stash until the hidden node's turn.

use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    backend::{
        Autodiff, AutodiffBackend, Backend, TensorMetadata,
        autodiff::{
            NodeId,
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        tensor::FloatTensor,
    },
    tensor::{DType, Shape},
};

use super::{BackwardTensors, Job, RingAttentionGradient, RingAttentionOps};

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
