//! A machine measured: [`MachineModel::measure`].

use std::time::Instant;

use ring_comm::{
    CommError, Communicator, Expected, Payload, Tag,
    buffer::{Buffer, DType, HostBuffer},
    collective::{all_reduce_sum_f64, barrier},
};
use ring_kernels::{
    BackwardInputs, Block, HeadBlocks, HeadRows, KernelError, Kernels, KeyValue, KeyValueGradient,
    Mask, PackedRows, Problem, Rows, Scores, Tensor, TensorShape,
};

use super::MachineModel;
use crate::error::Error;

/// Positions and elements of the attention that is measured.
const ROWS: usize = 768;
const HEAD_DIM: usize = 64;
/// Elements of the message that is measured.
const MESSAGE: usize = 1 << 20;
/// Of so many times the best counts: others have been disturbed.
const REPEATS: usize = 3;
/// Repetitions when all ranks compute at the same time, which is meant to disturb them: long enough for the system to share out its
/// cores, and the mean counts.
const REPEATS_TOGETHER: usize = 16;
/// Rows whose copying is measured: more than caches hold.
const COPIED_ROWS: usize = 16 * ROWS;

impl MachineModel {
    /// Measures this machine with its kernels and its network, which takes about a tenth of a second. All ranks must call it, and
    /// all get the same.
    ///
    /// What is measured differs from run to run, and with it, where strategies are close, what [`Auto`](super::Auto) chooses: for
    /// results that are the same bits in every run give a model, or a strategy.
    ///
    /// # Errors
    /// [`enum@Error`] as from any exchange, or from a kernel; every rank of the group gets one.
    pub fn measure<K: Kernels<HostBuffer>>(
        kernels: &K,
        communicator: &Communicator<HostBuffer>,
    ) -> Result<Self, Error> {
        let ranks = communicator.world_size() as f64;
        let fails = |source| Error::Comm {
            step: "the measurement of the machine".into(),
            source,
        };
        let measured = Measured::new(kernels);
        let told = |result: Result<Times, KernelError>| {
            result.map_err(|source| {
                let rank = communicator.rank();
                let error = Error::Kernel { rank, source };
                communicator.abort(&error.to_string());
                error
            })
        };
        barrier(communicator).map_err(fails)?;
        let together = told(measured.together())?;
        barrier(communicator).map_err(fails)?;
        let mut alone = Times::default();
        if communicator.rank() == 0 {
            alone = told(measured.times())?;
        }
        barrier(communicator).map_err(fails)?;
        let exchange = exchange(communicator).map_err(fails)?;
        // Alone, rank 0 was measured; of everything else the mean counts.
        let mine = [
            alone.forward * ranks,
            alone.backward * ranks,
            alone.copy * ranks,
            together.forward + together.backward,
            exchange.0,
            exchange.1,
        ];
        let sums = all_reduce_sum_f64(communicator, &mine).map_err(fails)?;
        let mean = |index: usize| (sums[index] / ranks).max(1e-12);
        let pairs = (ROWS * ROWS * HEAD_DIM) as f64;
        let bytes = (MESSAGE * size_of::<f32>()) as f64;
        Ok(Self {
            forward_pair_seconds: mean(0) / pairs,
            backward_pair_seconds: mean(1) / pairs,
            copy_bytes_per_second: (COPIED_ROWS * HEAD_DIM * size_of::<f32>()) as f64 / mean(2),
            parallel_ranks: (ranks * (mean(0) + mean(1)) / mean(3)).clamp(1.0, ranks),
            latency_seconds: mean(4),
            bytes_per_second: bytes / mean(5),
        })
    }
}

/// Seconds of one call.
#[derive(Clone, Copy, Default)]
struct Times {
    forward: f64,
    backward: f64,
    copy: f64,
}

/// Seconds that the exchange of a small and of a large message takes, each rank with its neighbours.
fn exchange(communicator: &Communicator<HostBuffer>) -> Result<(f64, f64), CommError> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    if ranks == 1 {
        return Ok((0.0, 0.0));
    }
    let transport = communicator.transport();
    let operation = communicator.next_operation();
    let mut best = [f64::INFINITY; 2];
    for repeat in 0..REPEATS as u32 {
        for (index, len) in [1, MESSAGE].into_iter().enumerate() {
            let tag = Tag::new(operation, repeat, Payload::Custom(index as u32));
            let message = HostBuffer::zeros(DType::F32, len);
            barrier(communicator)?;
            let began = Instant::now();
            let dtype = DType::F32;
            let receive =
                transport.irecv((rank + ranks - 1) % ranks, tag, Expected { dtype, len })?;
            let send = transport.isend((rank + 1) % ranks, tag, message)?;
            receive.wait()?;
            send.wait()?;
            best[index] = best[index].min(began.elapsed().as_secs_f64());
        }
    }
    Ok((best[0], best[1]))
}

/// An attention to be measured.
struct Measured<'a, K> {
    kernels: &'a K,
    problem: Problem,
    blocks: Vec<HeadBlocks>,
    tensor: HostBuffer,
    numbers: HostBuffer,
}

impl<'a, K: Kernels<HostBuffer>> Measured<'a, K> {
    fn new(kernels: &'a K) -> Self {
        let problem = Problem {
            batch: 1,
            query_heads: 1,
            kv_heads: 1,
            head_dim: HEAD_DIM,
            queries: ROWS,
            keys: ROWS,
            scale: 1.0,
            mask: Mask::NONE,
            scores: Scores::default(),
        };
        let block = Block {
            queries: rows_of(ROWS),
            keys: rows_of(ROWS),
            branch: 0,
        };
        Self {
            kernels,
            blocks: vec![HeadBlocks {
                entries: vec![0],
                kv_heads: vec![0],
                blocks: vec![block],
            }],
            tensor: HostBuffer::F32(vec![0.5; problem.key_shape().elements()]),
            numbers: HostBuffer::F32(vec![0.5; ROWS]),
            problem,
        }
    }

    /// The mean of more calls.
    fn together(&self) -> Result<Times, KernelError> {
        let mut mean = Times::default();
        for _ in 0..REPEATS_TOGETHER {
            let times = self.passes()?;
            mean.forward += times.forward / REPEATS_TOGETHER as f64;
            mean.backward += times.backward / REPEATS_TOGETHER as f64;
        }
        Ok(mean)
    }

    /// The best of some calls, after one that does not count.
    fn times(&self) -> Result<Times, KernelError> {
        let mut best = self.once()?;
        for _ in 0..REPEATS {
            let times = self.once()?;
            best.forward = best.forward.min(times.forward);
            best.backward = best.backward.min(times.backward);
            best.copy = best.copy.min(times.copy);
        }
        Ok(best)
    }

    /// One forward and one backward pass.
    fn passes(&self) -> Result<Times, KernelError> {
        let Self {
            kernels,
            problem,
            blocks,
            tensor,
            numbers,
        } = self;
        let shape = problem.key_shape();
        let layout = shape.contiguous();
        let tensor = Tensor {
            data: tensor.view(),
            layout: &layout,
        };
        let own = KeyValue::Own {
            key: tensor,
            value: tensor,
        };
        let mut state = kernels.start(problem)?;
        let began = Instant::now();
        kernels.forward(problem, tensor, &own, blocks, &mut state)?;
        let forward = began.elapsed().as_secs_f64();

        let zeros = || kernels.allocate(DType::F32, shape.elements(), None);
        let (mut query, mut key, mut value) = (zeros()?, zeros()?, zeros()?);
        let inputs = BackwardInputs {
            query: tensor,
            grad_output: tensor,
            log_sum_exp: numbers.view(),
            delta: numbers,
        };
        let target = KeyValueGradient::Own {
            key: &mut key,
            value: &mut value,
        };
        let began = Instant::now();
        kernels.backward(problem, &inputs, &own, blocks, 1.0, &mut query, target)?;
        let backward = began.elapsed().as_secs_f64();

        Ok(Times {
            forward,
            backward,
            copy: 0.0,
        })
    }

    /// Those, and rows copied into a message, whose memory is new as that of most messages of divided heads.
    fn once(&self) -> Result<Times, KernelError> {
        let times = self.passes()?;
        let shape = TensorShape {
            rows: COPIED_ROWS,
            ..self.problem.key_shape()
        };
        let rows = self.kernels.allocate(DType::F32, shape.elements(), None)?;
        let layout = shape.contiguous();
        let tensor = Tensor {
            data: rows.view(),
            layout: &layout,
        };
        let (heads, runs) = (vec![0], vec![rows_of(COPIED_ROWS)]);
        let packed = PackedRows::new(shape, vec![HeadRows { heads, runs }], 1);
        let began = Instant::now();
        self.kernels.pack(shape, &[tensor], &packed, None)?;
        Ok(Times {
            copy: began.elapsed().as_secs_f64(),
            ..times
        })
    }
}

fn rows_of(count: usize) -> Rows {
    Rows {
        first_row: 0,
        row_step: 1,
        count,
        first_position: 0,
        position_step: 1,
    }
}
