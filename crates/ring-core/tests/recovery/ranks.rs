//! What a rank computes with, and both passes on it.

use std::time::Duration;

use half::bf16;
use ring_comm::{
    Communicator,
    buffer::{Buffer, DType, HostBuffer},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Error, Gradients, Inputs, Output, Pattern, Plan, Recovery, Saved,
    Shape, Sharding, Strategy, backward, forward,
};
use ring_kernels::{Kernels, RowLayout, Tensor, TensorShape};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Full causal attention of `ranks` times 16 positions.
pub(crate) fn spec(ranks: usize, dtype: DType, strategy: Strategy) -> AttentionSpec {
    let shape = Shape {
        batch: 1,
        query_heads: 6,
        kv_heads: 3,
        head_dim: 4,
    };
    AttentionSpec::new(Pattern::full().causal(), shape, 16 * ranks)
        .and_then(|spec| spec.sharded(Sharding::Zigzag, ranks))
        .and_then(|spec| spec.with_strategy(strategy))
        .unwrap()
        .with_dtype(dtype)
}

/// A rank alone, rings, and divided heads; in both widths.
pub(crate) fn specs() -> Vec<AttentionSpec> {
    let divided = [
        (1, Strategy::Ring),
        (3, Strategy::Ring),
        (3, Strategy::RingQuery),
        (3, Strategy::HeadParallel),
    ];
    let of_type = |dtype| divided.map(|(ranks, strategy)| spec(ranks, dtype, strategy));
    [DType::F32, DType::BF16].map(of_type).concat()
}

/// A rank's tensors.
pub(crate) struct Tensors {
    query: (HostBuffer, RowLayout),
    key: (HostBuffer, RowLayout),
    value: (HostBuffer, RowLayout),
    grad_output: (HostBuffer, RowLayout),
}

impl Tensors {
    pub(crate) fn of(plan: &Plan) -> Self {
        let (dtype, problem) = (plan.spec().dtype, plan.problem());
        let rows = |shape: TensorShape, seed: usize| {
            let value = |i: usize| ((i * 37 + seed * 11 + plan.rank()) % 101) as f32 / 50.0 - 1.0;
            let values = (0..shape.elements()).map(value);
            let buffer = match dtype {
                DType::BF16 => HostBuffer::BF16(values.map(bf16::from_f32).collect()),
                _ => HostBuffer::F32(values.collect()),
            };
            (buffer, shape.contiguous())
        };
        Self {
            query: rows(problem.query_shape(), 1),
            key: rows(problem.key_shape(), 2),
            value: rows(problem.key_shape(), 3),
            grad_output: rows(problem.query_shape(), 4),
        }
    }

    fn inputs(&self) -> Inputs<'_, HostBuffer> {
        Inputs {
            query: tensor(&self.query),
            key: tensor(&self.key),
            value: tensor(&self.value),
            dropout: DropoutSeed::default(),
        }
    }

    fn saved<'a>(&'a self, output: &'a Output<HostBuffer>) -> Saved<'a, HostBuffer> {
        Saved {
            operation: output.operation,
            output: output.output.view(),
            log_sum_exp: output.log_sum_exp.view(),
            grad_output: tensor(&self.grad_output),
            grad_log_sum_exp: None,
        }
    }
}

fn tensor((buffer, layout): &(HostBuffer, RowLayout)) -> Tensor<'_, HostBuffer> {
    let data = buffer.view();
    Tensor { data, layout }
}

/// Output, log-sum-exp, gradients of query, key and value.
pub(crate) type Results = [HostBuffer; 5];

fn results(output: Output<HostBuffer>, gradients: Gradients<HostBuffer>) -> Results {
    [
        output.output,
        output.log_sum_exp,
        gradients.query,
        gradients.key,
        gradients.value,
    ]
}

/// Both passes without a recovery.
pub(crate) fn plain(
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    plan: &Plan,
) -> Result<Results, Error> {
    let tensors = Tensors::of(plan);
    let output = forward(kernels, communicator, plan, tensors.inputs())?;
    let saved = tensors.saved(&output);
    let gradients = backward(kernels, communicator, plan, tensors.inputs(), saved)?;
    Ok(results(output, gradients))
}

/// Both passes with one.
pub(crate) fn recovered(
    recovery: &Recovery,
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    plan: &Plan,
) -> Result<Results, Error> {
    let tensors = Tensors::of(plan);
    let output = recovery.forward(kernels, communicator, plan, tensors.inputs())?;
    let saved = tensors.saved(&output);
    let gradients = recovery.backward(kernels, communicator, plan, tensors.inputs(), saved)?;
    Ok(results(output, gradients))
}
