//! One computation on ranks that are threads: whole tensors divided among them, the drivers, and the results put together.

#![allow(dead_code, reason = "each test uses a part of it")]

pub(crate) mod faulty;

use std::{sync::Arc, time::Duration};

use half::bf16;
use ring_comm::{
    Communicator, Loopback,
    buffer::{DType, HostBuffer, HostView},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Error, Inputs, Plan, Saved, Shape, backward, forward,
    oracle::{OracleInput, OracleOutput, attention},
};
use ring_kernels::{CpuKernels, Kernels, RowLayout, Tensor};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const SEED: DropoutSeed = DropoutSeed {
    seed: 0x1234_5678_9abc_def0,
    first_entry: 3,
};

/// Numbers in (-1, 1) from a seed.
pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Whole tensors of one computation.
pub(crate) struct Whole {
    pub(crate) query: Vec<f32>,
    pub(crate) key: Vec<f32>,
    pub(crate) value: Vec<f32>,
    pub(crate) grad_output: Vec<f32>,
    pub(crate) grad_log_sum_exp: Vec<f32>,
    pub(crate) seed: DropoutSeed,
}

impl Whole {
    pub(crate) fn random(spec: &AttentionSpec) -> Self {
        let Shape {
            batch,
            query_heads,
            kv_heads,
            head_dim,
        } = spec.shape;
        let query_rows = batch * query_heads * spec.query_length;
        let key_rows = batch * kv_heads * spec.key_length;
        Self {
            query: numbers(query_rows * head_dim, 1)
                .iter()
                .map(|x| 3.0 * x)
                .collect(),
            key: numbers(key_rows * head_dim, 2)
                .iter()
                .map(|x| 3.0 * x)
                .collect(),
            value: numbers(key_rows * head_dim, 3),
            grad_output: numbers(query_rows * head_dim, 4),
            grad_log_sum_exp: numbers(query_rows, 5),
            seed: SEED,
        }
    }

    pub(crate) fn oracle(&self, spec: &AttentionSpec) -> OracleOutput {
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        attention(
            spec,
            OracleInput {
                query: &wide(&self.query),
                key: &wide(&self.key),
                value: &wide(&self.value),
                grad_output: Some(&wide(&self.grad_output)),
                grad_log_sum_exp: Some(&wide(&self.grad_log_sum_exp)),
                dropout: self.seed,
            },
        )
    }
}

/// Positions of a rank's rows.
pub(crate) fn owned(spec: &AttentionSpec, rank: usize, keys: bool) -> Vec<usize> {
    let (sharding, length) = if keys {
        (spec.key_sharding, spec.key_length)
    } else {
        (spec.query_sharding, spec.query_length)
    };
    sharding
        .spans(length, spec.world_size, rank)
        .iter()
        .flat_map(|span| span.start..span.end)
        .collect()
}

/// A rank's rows of `[outer, length, inner]`.
pub(crate) fn shard(whole: &[f32], length: usize, inner: usize, positions: &[usize]) -> Vec<f32> {
    if length == 0 {
        return Vec::new();
    }
    whole
        .chunks(length * inner)
        .flat_map(|outer| {
            positions
                .iter()
                .flat_map(move |&position| outer[position * inner..][..inner].iter().copied())
        })
        .collect()
}

/// Puts a rank's rows back.
pub(crate) fn unshard(
    whole: &mut [f32],
    length: usize,
    inner: usize,
    positions: &[usize],
    part: &[f32],
) {
    if positions.is_empty() || inner == 0 {
        return;
    }
    for (outer, part) in whole
        .chunks_mut((length * inner).max(1))
        .zip(part.chunks(positions.len() * inner))
    {
        for (row, &position) in positions.iter().enumerate() {
            outer[position * inner..][..inner].copy_from_slice(&part[row * inner..][..inner]);
        }
    }
}

/// Results of all ranks put together, and what each rank received forward and in all.
pub(crate) struct Gathered {
    pub(crate) output: Vec<f32>,
    pub(crate) log_sum_exp: Vec<f32>,
    pub(crate) grad_query: Vec<f32>,
    pub(crate) grad_key: Vec<f32>,
    pub(crate) grad_value: Vec<f32>,
    pub(crate) received: Vec<(u64, u64)>,
}

/// What one rank ends with.
pub(crate) struct RankResult {
    pub(crate) output: Vec<f32>,
    pub(crate) log_sum_exp: Vec<f32>,
    pub(crate) gradients: [Vec<f32>; 3],
    pub(crate) received: (u64, u64),
}

pub(crate) fn buffer(values: Vec<f32>, dtype: DType) -> HostBuffer {
    match dtype {
        DType::F32 => HostBuffer::F32(values),
        DType::BF16 => HostBuffer::BF16(values.into_iter().map(bf16::from_f32).collect()),
        DType::F16 => HostBuffer::F16(values.into_iter().map(half::f16::from_f32).collect()),
    }
}

pub(crate) fn to_f32(buffer: &HostBuffer) -> Vec<f32> {
    match buffer {
        HostBuffer::F32(values) => values.clone(),
        HostBuffer::BF16(values) => values.iter().map(|x| x.to_f32()).collect(),
        HostBuffer::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
    }
}

pub(crate) fn view(buffer: &HostBuffer) -> HostView<'_> {
    ring_comm::buffer::Buffer::view(buffer)
}

pub(crate) fn run_rank(
    spec: &AttentionSpec,
    whole: &Whole,
    communicator: &Communicator<HostBuffer>,
    threads: usize,
) -> Result<RankResult, Error> {
    let kernels = CpuKernels::new(threads).unwrap();
    run_rank_on(&kernels, spec, whole, communicator)
}

pub(crate) fn run_rank_on(
    kernels: &impl Kernels<HostBuffer>,
    spec: &AttentionSpec,
    whole: &Whole,
    communicator: &Communicator<HostBuffer>,
) -> Result<RankResult, Error> {
    let rank = communicator.rank();
    let plan = Plan::new(spec, rank)?;
    let problem = plan.problem();
    let dim = spec.shape.head_dim;
    let (queries, keys) = (owned(spec, rank, false), owned(spec, rank, true));
    let query = buffer(
        shard(&whole.query, spec.query_length, dim, &queries),
        spec.dtype,
    );
    let key = buffer(shard(&whole.key, spec.key_length, dim, &keys), spec.dtype);
    let value = buffer(shard(&whole.value, spec.key_length, dim, &keys), spec.dtype);
    let grad_output = buffer(
        shard(&whole.grad_output, spec.query_length, dim, &queries),
        spec.dtype,
    );
    let grad_lse = HostBuffer::F32(shard(
        &whole.grad_log_sum_exp,
        spec.query_length,
        1,
        &queries,
    ));
    let query_layout = RowLayout::contiguous(spec.shape.query_heads, problem.queries, dim);
    let key_layout = RowLayout::contiguous(spec.shape.kv_heads, problem.keys, dim);
    let inputs = Inputs {
        query: Tensor {
            data: view(&query),
            layout: &query_layout,
        },
        key: Tensor {
            data: view(&key),
            layout: &key_layout,
        },
        value: Tensor {
            data: view(&value),
            layout: &key_layout,
        },
        dropout: whole.seed,
    };
    let before = communicator.traffic().bytes_received;
    let result = forward(kernels, communicator, &plan, inputs)?;
    let after = communicator.traffic().bytes_received;
    let gradients = backward(
        kernels,
        communicator,
        &plan,
        inputs,
        Saved {
            operation: result.operation,
            output: view(&result.output),
            log_sum_exp: view(&result.log_sum_exp),
            grad_output: Tensor {
                data: view(&grad_output),
                layout: &query_layout,
            },
            grad_log_sum_exp: Some(view(&grad_lse)),
        },
    )?;
    Ok(RankResult {
        output: to_f32(&result.output),
        log_sum_exp: to_f32(&result.log_sum_exp),
        gradients: [&gradients.query, &gradients.key, &gradients.value].map(to_f32),
        received: (
            after - before,
            communicator.traffic().bytes_received - after,
        ),
    })
}

pub(crate) fn run(spec: &AttentionSpec, whole: &Whole, threads: usize) -> Gathered {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        run_rank(spec, whole, &communicator, threads).unwrap()
    });
    let mut gathered = Gathered {
        output: vec![f32::NAN; whole.query.len()],
        log_sum_exp: vec![f32::NAN; whole.grad_log_sum_exp.len()],
        grad_query: vec![f32::NAN; whole.query.len()],
        grad_key: vec![f32::NAN; whole.key.len()],
        grad_value: vec![f32::NAN; whole.value.len()],
        received: Vec::new(),
    };
    let dim = spec.shape.head_dim;
    for (rank, result) in results.into_iter().enumerate() {
        let result = result.unwrap();
        let (queries, keys) = (owned(spec, rank, false), owned(spec, rank, true));
        let (nq, nk) = (spec.query_length, spec.key_length);
        unshard(&mut gathered.output, nq, dim, &queries, &result.output);
        unshard(
            &mut gathered.log_sum_exp,
            nq,
            1,
            &queries,
            &result.log_sum_exp,
        );
        unshard(
            &mut gathered.grad_query,
            nq,
            dim,
            &queries,
            &result.gradients[0],
        );
        unshard(&mut gathered.grad_key, nk, dim, &keys, &result.gradients[1]);
        unshard(
            &mut gathered.grad_value,
            nk,
            dim,
            &keys,
            &result.gradients[2],
        );
        gathered.received.push(result.received);
    }
    gathered
}

/// `||got - expected|| / ||expected||`, and the same `-inf` in both.
pub(crate) fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &expected) in got.iter().zip(expected) {
        if expected == f64::NEG_INFINITY || got == f32::NEG_INFINITY {
            assert_eq!(f64::from(got), expected);
            continue;
        }
        assert!(got.is_finite(), "got {got}, expected {expected}");
        error += (f64::from(got) - expected).powi(2);
        norm += expected.powi(2);
    }
    error.sqrt() / norm.sqrt().max(1e-3)
}

pub(crate) fn assert_close(
    spec: &AttentionSpec,
    got: &Gathered,
    expected: &OracleOutput,
    tolerance: f64,
) {
    for (name, got, expected) in [
        ("output", &got.output, &expected.output),
        ("log-sum-exp", &got.log_sum_exp, &expected.log_sum_exp),
        (
            "gradient of the queries",
            &got.grad_query,
            &expected.grad_query,
        ),
        ("gradient of the keys", &got.grad_key, &expected.grad_key),
        (
            "gradient of the values",
            &got.grad_value,
            &expected.grad_value,
        ),
    ] {
        let distance = distance(got, expected);
        assert!(
            distance <= tolerance,
            "{name} off by {distance:e} for {spec:?}"
        );
    }
}
