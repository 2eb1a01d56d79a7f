//! What is reserved is what a pass asks for.

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use ring_comm::{
    Communicator, Loopback, LoopbackEndpoint,
    buffer::{Buffer, DType, HostBuffer},
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};

use super::{reserved::Stash, *};
use crate::{AttentionSpec, DropoutSeed, backward, forward};

#[path = "../../tests/cases/mod.rs"]
mod cases;

const DEADLINE: Duration = Duration::from_secs(60);

/// Zeros for all tensors of a rank.
struct Tensors {
    queries: (HostBuffer, RowLayout),
    keys: (HostBuffer, RowLayout),
}

impl Tensors {
    fn of(plan: &Plan) -> Self {
        let zeros = |shape: ring_kernels::TensorShape| {
            let buffer = HostBuffer::zeros(plan.spec().dtype, shape.elements());
            (buffer, shape.contiguous())
        };
        let problem = plan.problem();
        Self {
            queries: zeros(problem.query_shape()),
            keys: zeros(problem.key_shape()),
        }
    }

    fn inputs(&self) -> Inputs<'_, HostBuffer> {
        let [query, key, value] =
            [&self.queries, &self.keys, &self.keys].map(|(buffer, layout)| Tensor {
                data: buffer.view(),
                layout,
            });
        Inputs {
            query,
            key,
            value,
            dropout: DropoutSeed::default(),
        }
    }

    fn saved<'a>(&'a self, output: &'a Output<HostBuffer>) -> Saved<'a, HostBuffer> {
        Saved {
            operation: output.operation,
            output: output.output.view(),
            log_sum_exp: output.log_sum_exp.view(),
            grad_output: self.inputs().query,
            grad_log_sum_exp: None,
        }
    }
}

/// Nothing is left over; unless heads are divided or queries travel, nothing was missing either.
fn assert_exact(stash: &Stash<HostBuffer>, spec: &AttentionSpec) {
    assert!(stash.state.is_none(), "the state is used");
    let purposes: Vec<_> = stash.pieces.iter().map(|piece| piece.purpose).collect();
    assert_eq!(purposes, [], "{spec:?}");
    use crate::Strategy::{AllGather, Ring};
    if matches!(spec.strategy, Ring | AllGather) {
        assert_eq!(stash.missed, 0, "{spec:?}");
    }
}

fn passes_are_exact(spec: &AttentionSpec, endpoint: LoopbackEndpoint<HostBuffer>) {
    let communicator = Communicator::new(Arc::new(endpoint));
    let plan = Plan::new(spec, communicator.rank()).unwrap();
    let kernels = CpuKernels::new(1).unwrap();
    let recovery = Recovery::new(RecoveryPolicy::default());
    let tensors = Tensors::of(&plan);

    let reserved = Reserved::new(&kernels);
    let dropout = DropoutSeed::default();
    let run = Run::new(&reserved, &communicator, &plan, dropout, None).unwrap();
    recovery.reserve(&reserved, &run).unwrap();
    let output = run.forward(tensors.inputs()).unwrap();
    assert_exact(&reserved.stash(), spec);

    let reserved = Reserved::new(&kernels);
    let operation = Some(output.operation);
    let run = Run::new(&reserved, &communicator, &plan, dropout, operation).unwrap();
    recovery.reserve(&reserved, &run).unwrap();
    run.backward(tensors.inputs(), tensors.saved(&output))
        .unwrap();
    assert_exact(&reserved.stash(), spec);
}

/// Bytes that a rank's pool keeps after both passes.
fn kept(spec: &AttentionSpec, endpoint: LoopbackEndpoint<HostBuffer>, recover: bool) -> usize {
    let communicator = Communicator::new(Arc::new(endpoint));
    let plan = Plan::new(spec, communicator.rank()).unwrap();
    let kernels = CpuKernels::new(1).unwrap();
    let tensors = Tensors::of(&plan);
    if recover {
        let recovery = Recovery::new(RecoveryPolicy::default());
        let output = recovery.forward(&kernels, &communicator, &plan, tensors.inputs());
        let output = output.unwrap();
        let saved = tensors.saved(&output);
        recovery
            .backward(&kernels, &communicator, &plan, tensors.inputs(), saved)
            .unwrap();
    } else {
        let output = forward(&kernels, &communicator, &plan, tensors.inputs()).unwrap();
        let saved = tensors.saved(&output);
        backward(&kernels, &communicator, &plan, tensors.inputs(), saved).unwrap();
    }
    communicator.buffers().bytes()
}

fn dtyped(spec: AttentionSpec, is_short: bool) -> AttentionSpec {
    spec.with_dtype(if is_short { DType::BF16 } else { DType::F32 })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_pass_asks_for_what_was_reserved(spec in cases::any_divided_spec(60), is_short: bool) {
        let spec = dtyped(spec, is_short);
        let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| passes_are_exact(&spec, endpoint));
        prop_assert!(results.iter().all(Result::is_ok), "{results:?}");
    }

    #[test]
    fn no_more_messages_are_reserved_than_there_are(spec in cases::any_divided_spec(60), is_short: bool) {
        let spec = dtyped(spec, is_short);
        let [plain, recovered] = [false, true].map(|recover| {
            let kept = |endpoint| kept(&spec, endpoint, recover);
            Loopback::run(spec.world_size, DEADLINE, kept)
        });
        prop_assert_eq!(plain, recovered);
    }
}
