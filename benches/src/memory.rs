//! Memory of one rank: measured by [`heap`](crate::heap), and as [`MemoryEstimate`] foretells it.

use ring_comm::buffer::Buffer;
use ring_core::{AttentionSpec, MemoryEstimate, Plan};
use ring_kernels::CpuKernels;

use crate::{
    heap::{Usage, measure},
    metered::Metered,
    workload::{Rank, on_all_ranks},
};

/// What one rank needed beyond what the caller passes in.
#[derive(Clone, Copy, Debug)]
pub struct RankMemory {
    /// The caller's queries, keys and values.
    pub inputs: u64,
    /// The forward pass, its results included.
    pub forward: Pass,
    /// The backward pass, its results included; output, log-sum-exp and incoming gradient are the caller's.
    pub backward: Pass,
}

/// One pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// What the heap saw.
    pub usage: Usage,
    /// What the estimate says of the same.
    pub estimate: u64,
}

impl Pass {
    /// `measured / estimated`
    pub fn ratio(&self) -> f64 {
        self.usage.peak as f64 / self.estimate as f64
    }
}

/// Bytes of the kernels' tiles on one thread.
pub fn scratch(spec: &AttentionSpec) -> u64 {
    CpuKernels::scratch_bytes(spec.shape.head_dim, 1) as u64
}

/// Runs the computation, every rank on one thread, and tells what each rank needed.
///
/// The program must have declared [`CountingAllocator`](crate::heap::CountingAllocator) its global allocator.
///
/// # Panics
/// If the computation fails.
pub fn measure_ranks(spec: &AttentionSpec) -> Vec<RankMemory> {
    on_all_ranks(spec.world_size, |endpoint| {
        let rank = Rank::new(spec, Metered(endpoint), 1);
        let (result, forward) = measure(|| rank.forward());
        let result = result.expect("the forward pass succeeds");
        let (gradients, backward) = measure(|| rank.backward(&result));
        gradients.expect("the backward pass succeeds");
        let [of_forward, of_backward] = estimates(&rank.plan);
        RankMemory {
            inputs: of_forward.query + of_forward.key_value,
            forward: Pass {
                usage: forward,
                estimate: of_forward.total - of_forward.query - of_forward.key_value,
            },
            backward: Pass {
                usage: backward,
                // The incoming gradient is as large as the queries.
                estimate: of_backward.total
                    - 2 * of_backward.query
                    - of_backward.key_value
                    - of_backward.output,
            },
        }
    })
}

/// The estimates of a plan's two passes.
pub fn estimates(plan: &Plan) -> [MemoryEstimate; 2] {
    let scratch = scratch(plan.spec());
    [
        MemoryEstimate::forward(plan, scratch),
        MemoryEstimate::backward(plan, scratch),
    ]
}

/// All that one rank held at one time in a pass, its inputs included.
#[derive(Clone, Copy, Debug)]
pub struct Total {
    /// What the heap saw.
    pub measured: u64,
    /// What the estimate says of the same.
    pub estimate: u64,
}

impl Total {
    /// `estimated / measured`
    pub fn ratio(&self) -> f64 {
        self.estimate as f64 / self.measured as f64
    }
}

/// Runs the computation, every rank on `threads` threads, and tells what each rank held, `[forward, backward]`.
///
/// The program must have declared [`CountingAllocator`](crate::heap::CountingAllocator) its global allocator.
///
/// # Panics
/// If the computation fails.
pub fn measure_totals(spec: &AttentionSpec, threads: usize) -> Vec<[Total; 2]> {
    let largest = largest_message(spec);
    on_all_ranks(spec.world_size, |endpoint| {
        let rank = Rank::new(spec, Metered(endpoint), threads);
        // What threads other than this one allocate, their scratch memory, is not in this thread's account.
        let of_others = || match threads {
            1 => 0,
            _ => rank.kernels().scratch_statistics().kept_bytes,
        };
        let inputs: [usize; 4] = rank.tensors().map(Buffer::byte_len);
        let (result, forward) = measure(|| rank.forward());
        let result = result.expect("the forward pass succeeds");
        let before = inputs[..3].iter().sum::<usize>();
        let of_forward = before + forward.peak + of_others();
        let (gradients, backward) = measure(|| rank.backward(&result));
        gradients.expect("the backward pass succeeds");
        let held = usize::try_from(forward.held).expect("results are held");
        let of_backward = before + inputs[3] + held + backward.peak + of_others();
        let head_dim = spec.shape.head_dim;
        let estimates = [
            MemoryEstimate::forward(
                &rank.plan,
                CpuKernels::forward_scratch_bytes(head_dim, threads) as u64,
            ),
            MemoryEstimate::backward(
                &rank.plan,
                CpuKernels::scratch_bytes(head_dim, threads) as u64,
            ),
        ];
        let [forward, backward] =
            estimates.map(|estimate| estimate.in_group(&rank.plan, largest).total);
        [(of_forward, forward), (of_backward, backward)].map(|(measured, estimate)| Total {
            measured: measured as u64,
            estimate,
        })
    })
}

/// Elements of the largest message of a group.
fn largest_message(spec: &AttentionSpec) -> u64 {
    let plan = |rank| Plan::new(spec, rank).expect("the specification is sound");
    let largest = (0..spec.world_size).map(|rank| MemoryEstimate::largest_message(&plan(rank)));
    largest.max().unwrap_or(0)
}

/// The rank that needed most, by pass: `[forward, backward]`.
pub fn worst(ranks: &[RankMemory]) -> [Pass; 2] {
    let worst_by = |pass: fn(&RankMemory) -> Pass| {
        ranks
            .iter()
            .map(pass)
            .max_by_key(|pass| pass.usage.peak)
            .expect("a group has ranks")
    };
    [
        worst_by(|rank| rank.forward),
        worst_by(|rank| rank.backward),
    ]
}
