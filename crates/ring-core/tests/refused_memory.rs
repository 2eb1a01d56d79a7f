//! Memory that is refused is an error of the rank that asked for it, whichever allocation it is, and never the end of the process.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    ptr,
    sync::Arc,
    time::Duration,
};

use ring_comm::{
    Communicator, Loopback,
    buffer::{Buffer, DType, HostBuffer},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Error, Gradients, Inputs, Output, Pattern, Plan, Recovery,
    RecoveryPolicy, Saved, Shape, Sharding, backward, forward,
};
use ring_kernels::{
    CpuKernels, KernelError, Kernels, RowLayout, Tensor,
    failing::{FailingAllocations, REFUSED_BYTES},
};

/// The system's allocator, which refuses a thread a large allocation if it was told to.
struct Refusing;

/// Bytes of an allocation that may be refused. Smaller ones are lists of blocks, layouts and the like, whose refusal ends the process.
const LARGE: usize = 4 << 10;

thread_local! {
    /// How many more large allocations are admitted; `None` for all.
    static ADMITTED: Cell<Option<usize>> = const { Cell::new(None) };
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

impl Refusing {
    fn refuses(layout: Layout) -> bool {
        let refuses = |admitted: &Cell<Option<usize>>| match admitted.get() {
            Some(left) if layout.size() >= LARGE => {
                admitted.set(left.checked_sub(1));
                left == 0
            }
            _ => false,
        };
        ADMITTED.try_with(refuses).unwrap_or(false)
    }
}

// SAFETY: an allocation is refused with a null pointer, as the contract has it; every other call is passed on unchanged to the
// system's allocator. Counting touches only a thread-local cell without destructor.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if Self::refuses(layout) {
            return ptr::null_mut();
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise that `memory` came from here with `layout` is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

const DEADLINE: Duration = Duration::from_secs(60);

/// A rank's tensors: as many query heads and rows as key heads and rows, so that one serves for all.
struct Tensors {
    buffer: HostBuffer,
    layout: RowLayout,
}

impl Tensors {
    fn of(plan: &Plan) -> Self {
        let problem = plan.problem();
        let len = problem.batch * problem.kv_heads * problem.keys * problem.head_dim;
        let values = (0..len).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0);
        let buffer = match plan.spec().dtype {
            DType::BF16 => HostBuffer::BF16(values.map(half::bf16::from_f32).collect()),
            _ => HostBuffer::F32(values.collect()),
        };
        Self {
            buffer,
            layout: RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim),
        }
    }

    fn tensor(&self) -> Tensor<'_, HostBuffer> {
        Tensor {
            data: self.buffer.view(),
            layout: &self.layout,
        }
    }

    fn inputs(&self) -> Inputs<'_, HostBuffer> {
        Inputs {
            query: self.tensor(),
            key: self.tensor(),
            value: self.tensor(),
            dropout: DropoutSeed::default(),
        }
    }
}

fn spec(ranks: usize, dtype: DType) -> AttentionSpec {
    let shape = Shape {
        batch: 1,
        query_heads: 8,
        kv_heads: 8,
        head_dim: 8,
    };
    AttentionSpec::new(Pattern::full().causal(), shape, 256 * ranks)
        .and_then(|spec| spec.sharded(Sharding::Zigzag, ranks))
        .unwrap()
        .with_dtype(dtype)
}

type Results = (Output<HostBuffer>, Gradients<HostBuffer>);

/// Forward and backward of one rank, without anything kept from an earlier call.
fn run(
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    plan: &Plan,
    tensors: &Tensors,
) -> Result<Results, Error> {
    let output = forward(kernels, communicator, plan, tensors.inputs())?;
    let saved = Saved {
        operation: output.operation,
        output: output.output.view(),
        log_sum_exp: output.log_sum_exp.view(),
        grad_output: tensors.tensor(),
        grad_log_sum_exp: None,
    };
    let gradients = backward(kernels, communicator, plan, tensors.inputs(), saved)?;
    Ok((output, gradients))
}

/// Runs on all ranks; only rank 0 has `kernels` made for it, and `admitted` large allocations.
fn run_all<K: Kernels<HostBuffer>>(
    spec: &AttentionSpec,
    kernels: impl Fn(CpuKernels, bool) -> K + Sync,
    admitted: Option<usize>,
) -> Vec<Result<(), Error>> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let first = communicator.rank() == 0;
        let plan = Plan::new(spec, communicator.rank()).unwrap();
        let tensors = Tensors::of(&plan);
        let kernels = kernels(CpuKernels::new(1).unwrap(), first);
        ADMITTED.set(admitted.filter(|_| first));
        let result = run(&kernels, &communicator, &plan, &tensors);
        ADMITTED.set(None);
        result.map(drop)
    });
    results.into_iter().map(|result| result.unwrap()).collect()
}

/// Whether rank 0 was refused memory, with so many bytes asked for, and all others were told who still waited for it.
fn refused(results: &[Result<(), Error>]) -> Option<usize> {
    if results.iter().all(Result::is_ok) {
        return None;
    }
    for other in &results[1..] {
        match other {
            Err(Error::Comm { source, .. }) => assert_eq!(source.culprit(), 0, "{source}"),
            // Nothing was left to receive from rank 0.
            Ok(()) => {}
            other => panic!("{other:?}"),
        }
    }
    match results[0] {
        Err(Error::Kernel {
            rank: 0,
            source: KernelError::Allocation { bytes },
        }) => Some(bytes),
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn every_call_of_a_kernel_may_be_refused_memory() {
    for (ranks, least) in [(1, 9), (3, 19)] {
        let spec = spec(ranks, DType::BF16);
        let fails_at = |first| {
            let results = run_all(
                &spec,
                |kernels, is_first| {
                    let times = usize::from(is_first);
                    FailingAllocations::new(kernels, first, times)
                },
                None,
            );
            refused(&results)
        };
        let failures = (0..).map_while(fails_at);
        let counted = failures.inspect(|&bytes| assert_eq!(bytes, REFUSED_BYTES));
        assert!(counted.count() >= least);
    }
}

#[test]
fn every_large_allocation_may_be_refused() {
    for dtype in [DType::F32, DType::BF16] {
        for (ranks, least) in [(1, 9), (3, 12)] {
            let spec = spec(ranks, dtype);
            let fails_at =
                |admitted| refused(&run_all(&spec, |kernels, _| kernels, Some(admitted)));
            let failures = (0..).map_while(fails_at);
            let counted = failures.inspect(|&bytes| assert!(bytes >= LARGE, "{bytes}"));
            let count = counted.count();
            assert!(count >= least, "{ranks} ranks, {dtype}: {count}");
        }
    }
}

#[test]
fn a_rank_alone_can_try_again_with_less_memory() {
    let plan = Plan::new(&spec(1, DType::F32), 0).unwrap();
    let (tensors, communicator) = (Tensors::of(&plan), Communicator::single());
    let kernels = CpuKernels::new(1).unwrap();
    let (output, gradients) = run(&kernels, &communicator, &plan, &tensors).unwrap();
    let failing = FailingAllocations::new(kernels, 1, 2);
    let levels = (0..).map_while(|level| failing.with_less_memory(level));
    let mut attempts = levels.map(|kernels| {
        kernels.release_memory().unwrap();
        run(&kernels, &communicator, &plan, &tensors)
    });
    assert!(attempts.next().unwrap().is_err(), "in the second call");
    assert!(attempts.next().unwrap().is_err(), "at once");
    let (again, gradients_again) = attempts.next().unwrap().unwrap();
    assert_eq!(again.output, output.output);
    assert_eq!(again.log_sum_exp, output.log_sum_exp);
    assert_eq!(gradients_again.query, gradients.query);
    assert_eq!(gradients_again.key, gradients.key);
    assert_eq!(gradients_again.value, gradients.value);
}

/// The same with a recovery, and how many passes recovered.
fn run_recovering(
    kernels: &CpuKernels,
    communicator: &Communicator<HostBuffer>,
    plan: &Plan,
    tensors: &Tensors,
) -> Result<(Results, u64), Error> {
    let recovery = Recovery::new(RecoveryPolicy::default());
    let output = recovery.forward(kernels, communicator, plan, tensors.inputs())?;
    let saved = Saved {
        operation: output.operation,
        output: output.output.view(),
        log_sum_exp: output.log_sum_exp.view(),
        grad_output: tensors.tensor(),
        grad_log_sum_exp: None,
    };
    let gradients = recovery.backward(kernels, communicator, plan, tensors.inputs(), saved)?;
    Ok(((output, gradients), recovery.statistics().recovered))
}

/// How it ends if rank 0 is refused the large allocation after `admitted`: whether all recovered, `None` if none was refused. Whoever
/// has results has those of a run without.
fn recovered(spec: &AttentionSpec, admitted: usize) -> Option<bool> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let plan = Plan::new(spec, communicator.rank()).unwrap();
        let tensors = Tensors::of(&plan);
        let kernels = CpuKernels::new(1).unwrap();
        let expected = run(&kernels, &communicator, &plan, &tensors).unwrap();
        kernels.release_memory().unwrap();
        communicator.buffers().release();
        ADMITTED.set((communicator.rank() == 0).then_some(admitted));
        let result = run_recovering(&kernels, &communicator, &plan, &tensors);
        let was_refused = communicator.rank() == 0 && ADMITTED.replace(None).is_none();
        let result = result.map(|((output, gradients), recovered)| {
            assert_eq!(output.output, expected.0.output);
            assert_eq!(output.log_sum_exp, expected.0.log_sum_exp);
            assert_eq!(gradients.query, expected.1.query);
            assert_eq!(gradients.key, expected.1.key);
            assert_eq!(gradients.value, expected.1.value);
            recovered
        });
        (result, was_refused)
    });
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    if !results[0].1 {
        return None;
    }
    let results: Vec<_> = results.into_iter().map(|(result, _)| result).collect();
    if results.iter().all(|result| *result == Ok(1)) {
        return Some(true);
    }
    refused(
        &results
            .into_iter()
            .map(|result| result.map(drop))
            .collect::<Vec<_>>(),
    );
    Some(false)
}

#[test]
fn every_large_allocation_but_those_of_kernels_can_be_recovered_from() {
    // What kernels allocate by themselves: delta, and what is rounded of output and gradients.
    for (dtype, of_kernels) in [(DType::F32, 1), (DType::BF16, 5)] {
        for ranks in [1, 3] {
            let spec = spec(ranks, dtype);
            let refusals = (0..).map_while(|admitted| recovered(&spec, admitted));
            let (recovered, failed): (Vec<bool>, _) = refusals.partition(|&recovered| recovered);
            assert_eq!(failed.len(), of_kernels, "{ranks} ranks, {dtype}");
            assert!(recovered.len() >= 8, "{ranks} ranks: {}", recovered.len());
        }
    }
}
