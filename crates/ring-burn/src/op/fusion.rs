//! The operation on a backend that fuses operations: what is still to be done for its inputs is done first, then it runs unfused.
//!
//! A fused operation would run on the thread of the device, where nothing may wait for another rank.

use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn_fusion::{Client, Fusion, FusionBackend, FusionTensor, NoOp, stream::StreamId};
use burn_ir::{InitOperationIr, OperationIr};

use super::{BackwardTensors, Job, RingAttentionGradient, RingAttentionOps};

type Fused<B> = FusionTensor<<B as FusionBackend>::FusionRuntime>;

/// The tensor itself, with all that it waits for.
fn resolved<B: FusionBackend>(tensor: Fused<B>) -> FloatTensor<B> {
    tensor.client.clone().resolve_tensor_float::<B>(tensor)
}

/// A tensor for further operations.
fn adopted<B: FusionBackend>(
    client: &Client<B::FusionRuntime>,
    tensor: FloatTensor<B>,
) -> Fused<B> {
    let (shape, dtype) = (tensor.shape(), tensor.dtype());
    let handle = B::float_tensor_handle(tensor);
    let description =
        InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
    client
        .register(
            StreamId::current(),
            OperationIr::Init(description),
            NoOp::<B>::new(),
        )
        .pop()
        .expect("an initialisation has one output")
}

impl<B: FusionBackend + RingAttentionOps> RingAttentionOps for Fusion<B> {
    fn ring_attention(
        query: Fused<B>,
        key: Fused<B>,
        value: Fused<B>,
        job: Job,
    ) -> (Fused<B>, Fused<B>) {
        let client = query.client.clone();
        let [query, key, value] = [query, key, value].map(resolved::<B>);
        let (output, log_sum_exp) = B::ring_attention(query, key, value, job);
        (
            adopted::<B>(&client, output),
            adopted::<B>(&client, log_sum_exp),
        )
    }
}

impl<B: FusionBackend + RingAttentionGradient> RingAttentionGradient for Fusion<B> {
    fn ring_attention_gradient(
        query: Fused<B>,
        key: Fused<B>,
        value: Fused<B>,
        saved: BackwardTensors<Self>,
        job: &Job,
    ) -> [Fused<B>; 3] {
        let client = query.client.clone();
        let [query, key, value] = [query, key, value].map(resolved::<B>);
        let saved = BackwardTensors {
            output: resolved::<B>(saved.output),
            log_sum_exp: resolved::<B>(saved.log_sum_exp),
            grad_output: resolved::<B>(saved.grad_output),
            grad_log_sum_exp: saved.grad_log_sum_exp.map(resolved::<B>),
        };
        B::ring_attention_gradient(query, key, value, saved, job)
            .map(|gradient| adopted::<B>(&client, gradient))
    }
}
