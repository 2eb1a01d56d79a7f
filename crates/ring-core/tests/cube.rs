//! The drivers with the CubeCL kernels, several ranks over staged loopback, against those with the kernels of the CPU, which the
//! oracle judges. The device is wgpu's CPU adapter (Mesa's lavapipe), or with the feature `emulated-cuda` the emulator of a CUDA
//! device.
#![cfg(any(feature = "wgpu", feature = "emulated-cuda"))]

use std::{sync::Arc, time::Duration};

use half::{bf16, f16};
use ring_comm::{
    Communicator, Loopback,
    buffer::{Buffer, DType, HostBuffer},
};
use ring_core::{
    AttentionSpec, DropoutSeed, Inputs, Pattern, Plan, Saved, Shape, Sharding, Strategy, backward,
    forward,
};
use ring_kernels::{
    CpuKernels, CubeBuffer, CubeDevice, CubeKernels, Kernels, RowLayout, Tensor,
    cubecl::client::Client,
};

const RANKS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(120);

const SHAPE: Shape = Shape {
    batch: 2,
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
};

/// Numbers in (-1, 1) from a seed.
fn numbers(len: usize, seed: u64, dtype: DType) -> HostBuffer {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values = (0..len).map(|_| next());
    match dtype {
        DType::F16 => HostBuffer::F16(values.map(f16::from_f32).collect()),
        DType::BF16 => HostBuffer::BF16(values.map(bf16::from_f32).collect()),
        DType::F32 => HostBuffer::F32(values.collect()),
    }
}

fn tensor<'a, B: Buffer>(buffer: &'a B, layout: &'a RowLayout) -> Tensor<'a, B> {
    Tensor {
        data: buffer.view(),
        layout,
    }
}

/// Output, log-sum-exp and gradients of one rank, twice, with memory of the first time used again.
fn run<B: Buffer>(
    kernels: &impl Kernels<B>,
    communicator: &Communicator<B>,
    spec: &AttentionSpec,
    up: impl Fn(HostBuffer) -> B,
    down: impl Fn(&B) -> HostBuffer,
) -> Vec<HostBuffer> {
    let plan = Plan::new(spec, communicator.rank()).unwrap();
    let problem = plan.problem();
    let (of_queries, of_keys) = (
        RowLayout::contiguous(problem.query_heads, problem.queries, problem.head_dim),
        RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim),
    );
    let random = |layout: &RowLayout, seed: u64| {
        let seed = 10 * communicator.rank() as u64 + seed;
        up(numbers(
            problem.batch * layout.batch_stride,
            seed,
            spec.dtype,
        ))
    };
    let (query, grad_output) = (random(&of_queries, 1), random(&of_queries, 2));
    let (key, value) = (random(&of_keys, 3), random(&of_keys, 4));
    let inputs = || Inputs {
        query: tensor(&query, &of_queries),
        key: tensor(&key, &of_keys),
        value: tensor(&value, &of_keys),
        dropout: DropoutSeed::default(),
    };
    let mut results = Vec::new();
    for _ in 0..2 {
        let result = forward(kernels, communicator, &plan, inputs()).unwrap();
        let saved = Saved {
            operation: result.operation,
            output: result.output.view(),
            log_sum_exp: result.log_sum_exp.view(),
            grad_output: tensor(&grad_output, &of_queries),
            grad_log_sum_exp: None,
        };
        let gradients = backward(kernels, communicator, &plan, inputs(), saved).unwrap();
        results = vec![
            down(&result.output),
            down(&result.log_sum_exp),
            down(&gradients.query),
            down(&gradients.key),
            down(&gradients.value),
        ];
    }
    results
}

fn on_cpu(spec: &AttentionSpec) -> Vec<Vec<HostBuffer>> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let kernels = CpuKernels::new(1).unwrap();
        run(
            &kernels,
            &communicator,
            spec,
            |host| host,
            HostBuffer::clone,
        )
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn on_device(spec: &AttentionSpec, device: &CubeDevice) -> Vec<Vec<HostBuffer>> {
    let results = Loopback::run(spec.world_size, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint)).staged(device.clone());
        let kernels = CubeKernels::new(device.clone()).unwrap();
        let up = |host: HostBuffer| CubeBuffer::from_host(device, &host).unwrap();
        run(&kernels, &communicator, spec, up, |buffer| {
            buffer.to_host().unwrap()
        })
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn widened(buffer: &HostBuffer) -> Vec<f64> {
    match buffer {
        HostBuffer::F32(values) => values.iter().map(|&x| x.into()).collect(),
        HostBuffer::F16(values) => values.iter().map(|&x| x.into()).collect(),
        HostBuffer::BF16(values) => values.iter().map(|&x| x.into()).collect(),
    }
}

/// Relative error in the Euclidean norm.
fn relative_error(got: &HostBuffer, expected: &HostBuffer) -> f64 {
    assert_eq!((got.dtype(), got.len()), (expected.dtype(), expected.len()));
    let (got, expected) = (widened(got), widened(expected));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(
        &mut got
            .iter()
            .zip(&expected)
            .map(|(got, expected)| got - expected),
    );
    error / norm(&mut expected.iter().copied())
}

#[cfg(feature = "emulated-cuda")]
fn client() -> Client {
    cuda_emulator::client()
}

#[cfg(not(feature = "emulated-cuda"))]
fn client() -> Client {
    let kind = ring_kernels::cubecl::device::WgpuDeviceKind::Cpu;
    ring_kernels::cubecl::Device::wgpu(kind).unwrap().client()
}

/// Element types that the device has, and relative errors.
const DTYPES: &[(DType, f64)] = &[
    (DType::F32, 1e-5),
    (DType::F16, 1e-3),
    #[cfg(feature = "emulated-cuda")]
    (DType::BF16, 1e-2),
];

fn check(spec: &AttentionSpec, tolerance: f64, device: &CubeDevice) {
    let ranks = on_device(spec, device).into_iter().zip(on_cpu(spec));
    for (rank, (got, expected)) in ranks.enumerate() {
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = relative_error(got, expected);
            assert!(
                error < tolerance,
                "rank {rank}, result {index}: {error:e}, of {spec:?}"
            );
        }
    }
}

fn spec(pattern: &Pattern, sharding: Sharding, ranks: usize, dtype: DType) -> AttentionSpec {
    AttentionSpec::new(pattern.clone(), SHAPE, 200)
        .and_then(|spec| spec.sharded(sharding, ranks))
        .unwrap()
        .with_dtype(dtype)
}

fn longnet() -> Pattern {
    Pattern::dilated(&[32, 96, 200], &[1, 2, 4]).unwrap()
}

#[test]
fn ranks_on_a_device_compute_what_ranks_on_the_cpu_do() {
    let device = CubeDevice::new(client());
    for (pattern, sharding) in [
        (Pattern::full(), Sharding::Contiguous),
        (Pattern::full().causal(), Sharding::Zigzag),
        (longnet().causal(), Sharding::Contiguous),
        (longnet(), Sharding::Zigzag),
    ] {
        for (dtype, tolerance) in DTYPES.iter().copied() {
            check(&spec(&pattern, sharding, RANKS, dtype), tolerance, &device);
        }
    }
}

#[test]
fn strategies_on_a_device_compute_what_they_do_on_the_cpu() {
    let device = CubeDevice::new(client());
    for (strategy, ranks, sharding) in [
        (Strategy::RingQuery, 3, Sharding::Zigzag),
        (Strategy::AllGather, 3, Sharding::Contiguous),
        (Strategy::HeadParallel, 2, Sharding::Zigzag),
        (Strategy::Mesh { head_ranks: 2 }, 4, Sharding::Contiguous),
        (Strategy::OneRank, 2, Sharding::Contiguous),
    ] {
        for (dtype, tolerance) in DTYPES.iter().copied() {
            // Slopes and dropped weights belong to heads, wherever these are.
            let mut spec = spec(&longnet().causal(), sharding, ranks, dtype);
            if strategy == Strategy::RingQuery {
                // With grouped heads keys would be fewer bytes, and queries stay.
                spec.shape.kv_heads = spec.shape.query_heads;
            }
            let spec = spec
                .with_alibi_slopes(vec![0.01, 0.02, 0.04, 0.08])
                .and_then(|spec| spec.with_dropout(0.2))
                .and_then(|spec| spec.with_strategy(strategy))
                .unwrap();
            check(&spec, tolerance, &device);
        }
    }
}
