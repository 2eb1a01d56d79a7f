//! After its first call a plan runs without allocating per hop: the driver and the loopback transport, counted alone, under
//! kernels that compute nothing.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::Arc,
    time::Duration,
};

use half::{bf16, f16};
use ring_comm::{
    Communicator, Loopback, LoopbackEndpoint,
    buffer::{Buffer, DType, HostBuffer, HostView},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Inputs, KeyValueCache, NewTokens, Pattern, Plan, Saved, Shape,
    Sharding, backward, decode, forward,
};
use ring_kernels::{
    BackwardInputs, ForwardState, HeadBlocks, KernelError, Kernels, KeyValue, KeyValueGradient,
    PackedRows, Problem, RowLayout, Tensor, TensorShape,
};

/// The system's allocator, counting what each thread asks for.
struct Counting;

/// What a thread asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    allocations: usize,
    largest: usize,
}

thread_local! {
    static COUNT: Cell<Count> = const { Cell::new(Count { allocations: 0, largest: 0 }) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract; counting touches only a
// thread-local cell without destructor. `realloc` and `alloc_zeroed` are the trait's own, made of these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| {
            let Count {
                allocations,
                largest,
            } = count.get();
            count.set(Count {
                allocations: allocations + 1,
                largest: largest.max(layout.size()),
            });
        });
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise that `memory` came from here with `layout` is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn counted<T>(work: impl FnOnce() -> T) -> (T, Count) {
    COUNT.set(Count::default());
    let result = work();
    (result, COUNT.get())
}

/// Kernels that make buffers of the right sizes and types, in the memory they are given, and compute nothing.
struct Idle;

fn sized(dtype: DType, len: usize, reuse: Option<HostBuffer>) -> HostBuffer {
    let mut buffer = match reuse {
        Some(buffer) if buffer.dtype() == dtype && buffer.capacity() >= len => buffer,
        _ => HostBuffer::zeros(dtype, len),
    };
    match &mut buffer {
        HostBuffer::F32(values) => values.resize(len, 0.0),
        HostBuffer::F16(values) => values.resize(len, f16::ZERO),
        HostBuffer::BF16(values) => values.resize(len, bf16::ZERO),
    }
    buffer
}

fn query_rows(problem: &Problem) -> usize {
    problem.batch * problem.query_heads * problem.queries
}

impl Kernels<HostBuffer> for Idle {
    fn allocate(
        &self,
        dtype: DType,
        len: usize,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        Ok(sized(dtype, len, reuse))
    }

    fn dtype(&self, view: HostView<'_>) -> DType {
        view.dtype()
    }

    fn pack(
        &self,
        _: TensorShape,
        tensors: &[Tensor<'_, HostBuffer>],
        rows: &PackedRows,
        reuse: Option<HostBuffer>,
    ) -> Result<HostBuffer, KernelError> {
        Ok(sized(tensors[0].data.dtype(), rows.len(), reuse))
    }

    fn place_rows(
        &self,
        _: TensorShape,
        _: &HostBuffer,
        _: &PackedRows,
        _: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        Ok(())
    }

    fn start(&self, problem: &Problem) -> Result<ForwardState<HostBuffer>, KernelError> {
        let rows = query_rows(problem);
        Ok(ForwardState {
            output: sized(DType::F32, rows * problem.head_dim, None),
            max: sized(DType::F32, rows, None),
            denominator: sized(DType::F32, rows, None),
        })
    }

    fn forward(
        &self,
        _: &Problem,
        _: Tensor<'_, HostBuffer>,
        _: &KeyValue<'_, HostBuffer>,
        _: &[HeadBlocks],
        _: &mut ForwardState<HostBuffer>,
    ) -> Result<(), KernelError> {
        Ok(())
    }

    fn finish(
        &self,
        _: &Problem,
        state: ForwardState<HostBuffer>,
        dtype: DType,
        _: f32,
    ) -> Result<(HostBuffer, HostBuffer), KernelError> {
        Ok((self.round(state.output, dtype)?, state.max))
    }

    fn delta(
        &self,
        problem: &Problem,
        _: HostView<'_>,
        _: Tensor<'_, HostBuffer>,
        _: HostView<'_>,
        _: Option<HostView<'_>>,
    ) -> Result<HostBuffer, KernelError> {
        Ok(sized(DType::F32, query_rows(problem), None))
    }

    fn backward(
        &self,
        _: &Problem,
        _: &BackwardInputs<'_, HostBuffer>,
        _: &KeyValue<'_, HostBuffer>,
        _: &[HeadBlocks],
        _: f32,
        _: &mut HostBuffer,
        _: KeyValueGradient<'_, HostBuffer>,
    ) -> Result<(), KernelError> {
        Ok(())
    }

    fn add_rows(
        &self,
        _: TensorShape,
        _: &HostBuffer,
        _: &PackedRows,
        _: &mut [&mut HostBuffer],
    ) -> Result<(), KernelError> {
        Ok(())
    }

    fn round(&self, buffer: HostBuffer, dtype: DType) -> Result<HostBuffer, KernelError> {
        Ok(if dtype == DType::F32 {
            buffer
        } else {
            sized(dtype, buffer.len(), None)
        })
    }
}

/// Positions of each rank.
const SHARD: usize = 64;

const SHAPE: Shape = Shape {
    batch: 1,
    query_heads: 4,
    kv_heads: 4,
    head_dim: 16,
};

/// What one rank counted in one call.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    forward: Count,
    backward: Count,
    /// Bytes that the pool keeps after the call.
    kept: usize,
}

/// A rank's tensors. There are as many query heads as key heads, and as many rows: one serves for all.
struct Tensors {
    buffer: HostBuffer,
    layout: RowLayout,
}

impl Tensors {
    fn of(plan: &Plan) -> Self {
        let problem = plan.problem();
        let len = query_rows(&problem) * problem.head_dim;
        Self {
            buffer: HostBuffer::zeros(plan.spec().dtype, len),
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

fn spec(pattern: &Pattern, sharding: Sharding, dtype: DType, ranks: usize) -> AttentionSpec {
    AttentionSpec::new(pattern.clone(), SHAPE, ranks * SHARD)
        .and_then(|spec| spec.sharded(sharding, ranks))
        .unwrap()
        .with_dtype(dtype)
}

fn calls(spec: &AttentionSpec, endpoint: LoopbackEndpoint<HostBuffer>) -> [Call; 4] {
    let communicator = Communicator::new(Arc::new(endpoint));
    let plan = Plan::new(spec, communicator.rank()).unwrap();
    let tensors = Tensors::of(&plan);
    let inputs = || tensors.inputs();
    [(); 4].map(|()| {
        let (result, forward) = counted(|| forward(&Idle, &communicator, &plan, inputs()).unwrap());
        let saved = Saved {
            operation: result.operation,
            output: result.output.view(),
            log_sum_exp: result.log_sum_exp.view(),
            grad_output: tensors.tensor(),
            grad_log_sum_exp: None,
        };
        let (_, backward) =
            counted(|| backward(&Idle, &communicator, &plan, inputs(), saved).unwrap());
        Call {
            forward,
            backward,
            kept: communicator.buffers().bytes(),
        }
    })
}

fn all_calls(spec: &AttentionSpec) -> Vec<[Call; 4]> {
    let deadline = Duration::from_secs(60);
    Loopback::run(spec.world_size, deadline, |endpoint| calls(spec, endpoint))
        .into_iter()
        .map(|calls| calls.unwrap())
        .collect()
}

fn cases() -> Vec<(Pattern, Sharding)> {
    let longnet = Pattern::dilated(&[32, 128, 512], &[1, 2, 4]).unwrap();
    vec![
        (Pattern::full(), Sharding::Contiguous),
        (Pattern::full().causal(), Sharding::Contiguous),
        (Pattern::full().causal(), Sharding::Zigzag),
        (longnet.clone(), Sharding::Contiguous),
        (longnet.clone().causal(), Sharding::Contiguous),
        (longnet.causal(), Sharding::Zigzag),
    ]
}

/// Not only the payloads: requests, queues, layouts, lists of blocks - nothing at all is allocated per hop.
#[test]
fn later_calls_allocate_the_same_with_any_number_of_ranks() {
    for (pattern, sharding) in cases() {
        for dtype in [DType::F32, DType::BF16] {
            let run = |ranks| all_calls(&spec(&pattern, sharding, dtype, ranks));
            let (two, eight) = (run(2), run(8));
            let [_, _, expected, _] = &two[0];
            for [first, second, third, fourth] in two.iter().chain(&eight) {
                let case = format!("{pattern}, {sharding}, {dtype}");
                for later in [second, third, fourth] {
                    assert_eq!(later.forward, expected.forward, "{case}");
                    assert_eq!(later.backward, expected.backward, "{case}");
                    assert_eq!(later.kept, first.kept, "{case}");
                }
            }
        }
    }
}

#[test]
fn the_pool_keeps_a_constant_number_of_messages() {
    for (pattern, sharding) in cases() {
        for (dtype, slots) in [(DType::F32, 6 * 4), (DType::BF16, 3 * 2 + 3 * 4)] {
            let spec = spec(&pattern, sharding, dtype, 8);
            let row_elements = 2 * SHAPE.head_dim;
            let largest = (0..8)
                .map(|rank| Plan::new(&spec, rank).unwrap())
                .flat_map(|plan| {
                    let messages = plan.exchanges().flat_map(|hop| [&hop.send, &hop.receive]);
                    let rows = messages.flatten().map(|message| message.row_count());
                    rows.max()
                })
                .max()
                .unwrap();
            for [.., fourth] in all_calls(&spec) {
                let bound = slots * largest * row_elements;
                assert!(
                    fourth.kept <= bound,
                    "{pattern}, {sharding}, {dtype}: {} bytes kept, bound {bound}",
                    fourth.kept
                );
            }
        }
    }
}

#[test]
fn ranks_of_different_size_and_plans_in_turn_settle_too() {
    let longnet = Pattern::dilated(&[32, 128, 512], &[1, 2, 4]).unwrap();
    let ragged = AttentionSpec::new(longnet.causal(), SHAPE, 333)
        .and_then(|spec| spec.sharded(Sharding::Contiguous, 5))
        .unwrap();
    let small = spec(&Pattern::full(), Sharding::Contiguous, DType::F32, 5);
    let deadline = Duration::from_secs(60);
    let results = Loopback::run(5, deadline, |endpoint| {
        let communicator = Communicator::<HostBuffer>::new(Arc::new(endpoint));
        let plans = [&ragged, &small].map(|spec| Plan::new(spec, communicator.rank()).unwrap());
        let call = |plan: &Plan| {
            let tensors = Tensors::of(plan);
            counted(|| forward(&Idle, &communicator, plan, tensors.inputs()).unwrap()).1
        };
        [(); 3].map(|()| plans.each_ref().map(call))
    });
    for result in results {
        let [_, second, third] = result.unwrap();
        assert_eq!(second, third);
    }
}

/// What every rank allocates for some tokens after a prompt of `length` positions, of which it holds many pieces.
fn decoding(length: usize) -> Vec<Vec<Count>> {
    let shape = Shape {
        batch: 1,
        query_heads: 4,
        kv_heads: 4,
        head_dim: 1,
    };
    let pattern = Pattern::dilated(&[32, 128], &[1, 2]).unwrap().causal();
    let sharding = Sharding::Striped {
        chunk_size: Some(16),
    };
    let spec = AttentionSpec::new(pattern, shape, length)
        .and_then(|spec| spec.sharded(sharding, 4))
        .unwrap();
    let results = Loopback::run(4, Duration::from_secs(60), |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rows = spec.problem(communicator.rank()).keys;
        let (prompt, of_prompt) = (
            HostBuffer::zeros(DType::F32, 4 * rows),
            RowLayout::contiguous(4, rows, 1),
        );
        let (token, of_token) = (
            HostBuffer::zeros(DType::F32, 4),
            RowLayout::contiguous(4, 1, 1),
        );
        let prompt = Tensor {
            data: prompt.view(),
            layout: &of_prompt,
        };
        let token = Tensor {
            data: token.view(),
            layout: &of_token,
        };
        let rank = communicator.rank();
        let mut cache = KeyValueCache::new(&Idle, &spec, rank, prompt, prompt).unwrap();
        let tokens = NewTokens {
            count: 1,
            query: token,
            key: token,
            value: token,
        };
        let mut next = || decode(&Idle, &communicator, &mut cache, tokens).unwrap();
        // A chunk on every rank: each has added to its memory once, and needs no more for the next tokens.
        (0..4 * 64).for_each(|_| drop(next()));
        (0..20).map(|_| counted(&mut next).1).collect()
    });
    results.into_iter().map(Result::unwrap).collect()
}

/// Neither a list of all pieces nor a copy of the cache: what a token sees counts, not how long the sequence is.
#[test]
fn a_decoded_token_allocates_little_however_long_the_sequence() {
    let (short, long) = (decoding(4096), decoding(1 << 20));
    for counts in short.iter().chain(&long) {
        for count in counts {
            assert!(count.allocations < 60 && count.largest < 4096, "{count:?}");
        }
    }
    assert_eq!(short, long);
}
