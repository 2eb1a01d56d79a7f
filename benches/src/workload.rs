//! Random shards of one attention, and the drivers that compute it over loopback ranks.

use std::{sync::Arc, time::Duration};

use half::{bf16, f16};
use ring_comm::{
    Communicator, Loopback, LoopbackEndpoint, Transport,
    buffer::{Buffer, DType, HostBuffer},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Error, Gradients, Inputs, Output, Plan, Saved, backward, forward,
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};

/// Longest wait of a rank for another.
const DEADLINE: Duration = Duration::from_secs(600);

/// `len` numbers in (-1, 1) from a seed.
pub fn numbers(dtype: DType, len: usize, seed: u64) -> HostBuffer {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    match dtype {
        DType::F32 => HostBuffer::F32((0..len).map(|_| next()).collect()),
        DType::F16 => HostBuffer::F16((0..len).map(|_| f16::from_f32(next())).collect()),
        DType::BF16 => HostBuffer::BF16((0..len).map(|_| bf16::from_f32(next())).collect()),
    }
}

/// One rank's part of an attention: its plan, its tensors, its kernels.
pub struct Rank {
    /// What the rank does.
    pub plan: Plan,
    communicator: Communicator<HostBuffer>,
    kernels: CpuKernels,
    query: HostBuffer,
    key: HostBuffer,
    value: HostBuffer,
    grad_output: HostBuffer,
    query_layout: RowLayout,
    key_layout: RowLayout,
}

impl Rank {
    /// The rank of `transport`, with random tensors and `threads` kernel threads.
    ///
    /// # Panics
    /// If the computation is not possible.
    pub fn new(
        spec: &AttentionSpec,
        transport: impl Transport<HostBuffer> + 'static,
        threads: usize,
    ) -> Self {
        Self::of(spec, Communicator::new(Arc::new(transport)), threads)
    }

    /// As [`new`](Self::new), the rank of `communicator`.
    ///
    /// # Panics
    /// If the computation is not possible.
    pub fn of(
        spec: &AttentionSpec,
        communicator: Communicator<HostBuffer>,
        threads: usize,
    ) -> Self {
        let rank = communicator.rank();
        let plan = Plan::new(spec, rank).expect("the specification is sound");
        let problem = plan.problem();
        let dim = problem.head_dim;
        let query_len = problem.batch * problem.query_heads * problem.queries * dim;
        let key_len = problem.batch * problem.kv_heads * problem.keys * dim;
        let tensor = |len, which| numbers(spec.dtype, len, (4 * rank + which + 1) as u64);
        Self {
            communicator,
            kernels: CpuKernels::new(threads).expect("threads can be started"),
            query: tensor(query_len, 0),
            key: tensor(key_len, 1),
            value: tensor(key_len, 2),
            grad_output: tensor(query_len, 3),
            query_layout: RowLayout::contiguous(problem.query_heads, problem.queries, dim),
            key_layout: RowLayout::contiguous(problem.kv_heads, problem.keys, dim),
            plan,
        }
    }

    /// Queries, keys, values, and the gradient that reaches the output: own rows, `[batch, heads, rows, head_dim]`.
    pub fn tensors(&self) -> [&HostBuffer; 4] {
        [&self.query, &self.key, &self.value, &self.grad_output]
    }

    /// The kernels that compute.
    pub fn kernels(&self) -> &CpuKernels {
        &self.kernels
    }

    fn inputs(&self) -> Inputs<'_, HostBuffer> {
        Inputs {
            query: Tensor {
                data: self.query.view(),
                layout: &self.query_layout,
            },
            key: Tensor {
                data: self.key.view(),
                layout: &self.key_layout,
            },
            value: Tensor {
                data: self.value.view(),
                layout: &self.key_layout,
            },
            dropout: DropoutSeed::default(),
        }
    }

    /// The forward pass; every rank of the group calls it.
    ///
    /// # Errors
    /// [`Error`], as the driver's.
    pub fn forward(&self) -> Result<Output<HostBuffer>, Error> {
        forward(&self.kernels, &self.communicator, &self.plan, self.inputs())
    }

    /// The backward pass of a random gradient; every rank of the group calls it.
    ///
    /// # Errors
    /// [`Error`], as the driver's.
    pub fn backward(&self, result: &Output<HostBuffer>) -> Result<Gradients<HostBuffer>, Error> {
        let saved = Saved {
            operation: result.operation,
            output: result.output.view(),
            log_sum_exp: result.log_sum_exp.view(),
            grad_output: Tensor {
                data: self.grad_output.view(),
                layout: &self.query_layout,
            },
            grad_log_sum_exp: None,
        };
        backward(
            &self.kernels,
            &self.communicator,
            &self.plan,
            self.inputs(),
            saved,
        )
    }
}

/// Runs `work` on every rank of a loopback group, each a thread of its own.
///
/// # Panics
/// If a rank does.
pub fn on_all_ranks<R: Send>(
    world_size: usize,
    work: impl Fn(LoopbackEndpoint<HostBuffer>) -> R + Sync,
) -> Vec<R> {
    Loopback::run(world_size, DEADLINE, work)
        .into_iter()
        .map(|result| result.expect("no rank panics"))
        .collect()
}
