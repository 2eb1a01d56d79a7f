//! Random computations over several ranks on one device, against the oracle.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::f16;
use proptest::{prelude::*, test_runner::TestRunner};
use ring_burn::{
    AttentionOutput, Communicator, DilatedAttentionConfig, HeadOffsets, HostBuffer, Loopback, Ring,
    RingAttentionConfig, RingError, Sharding,
};
use ring_core::{
    AttentionSpec, DropoutSeed, Pattern, Shape,
    oracle::{OracleInput, OracleOutput, attention},
};

use super::{DEADLINE, distance, gpu, numbers, upload};

/// A computation.
#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    length: usize,
    /// Segment lengths and dilation rates; none is full attention.
    branches: Vec<(usize, usize)>,
    causal: bool,
    offsets: HeadOffsets,
    ranks: usize,
    sharding: Sharding,
    half_precision: bool,
    /// `[batch, length, heads, head_dim]` in memory, as a projection gives them.
    swapped: bool,
    seed: u64,
}

fn any_case() -> impl Strategy<Value = Case> {
    let sharding = prop_oneof![
        Just(Sharding::Contiguous),
        Just(Sharding::Zigzag),
        Just(Sharding::Striped {
            chunk_size: Some(5)
        }),
    ];
    let branches = prop::collection::vec((1_usize..60, 1_usize..5), 0..4);
    let sizes = (1_usize..3, 1_usize..4, 1_usize..3, 0_usize..90);
    let head_dim = prop_oneof![Just(4_usize), Just(7), Just(16)];
    let flags = any::<[bool; 4]>();
    (
        sizes,
        head_dim,
        branches,
        sharding,
        1_usize..6,
        flags,
        any::<u64>(),
    )
        .prop_map(
            |(sizes, head_dim, branches, sharding, ranks, flags, seed)| {
                let (batch, kv_heads, group, length) = sizes;
                let [causal, blocked, half_precision, swapped] = flags;
                Case {
                    batch,
                    kv_heads,
                    group,
                    head_dim,
                    length,
                    branches,
                    causal,
                    offsets: match blocked {
                        true => HeadOffsets::Blocked,
                        false => HeadOffsets::Cyclic,
                    },
                    ranks,
                    sharding,
                    half_precision,
                    swapped,
                    seed,
                }
            },
        )
}

impl Case {
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Numbers that the element type has, uniform in [-1, 1).
    fn draw(&self, heads: usize, which: u64) -> Vec<f64> {
        let mut state = (self.seed ^ which.wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let number = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            match self.half_precision {
                true => f16::from_f32(number).into(),
                false => f64::from(number),
            }
        };
        let count = self.batch * heads * self.length * self.head_dim;
        (0..count).map(|_| next()).collect()
    }

    fn spec(&self) -> AttentionSpec {
        let (lengths, rates): (Vec<_>, Vec<_>) = self.branches.iter().copied().unzip();
        let pattern = match lengths.is_empty() {
            true => Pattern::full(),
            false => Pattern::dilated(&lengths, &rates)
                .unwrap()
                .with_offsets(self.offsets),
        };
        let pattern = match self.causal {
            true => pattern.causal(),
            false => pattern,
        };
        let shape = Shape {
            batch: self.batch,
            query_heads: self.heads(),
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        };
        AttentionSpec::new(pattern, shape, self.length).unwrap()
    }

    fn forward(&self, tensors: [Tensor<4>; 3], ring: &Ring) -> Result<AttentionOutput, RingError> {
        let [query, key, value] = tensors;
        if self.branches.is_empty() {
            let attention = RingAttentionConfig::new().with_causal(self.causal).init();
            return attention.try_forward_with_log_sum_exp(query, key, value, ring);
        }
        let (lengths, rates) = self.branches.iter().copied().unzip();
        DilatedAttentionConfig::new(lengths, rates)
            .with_causal(self.causal)
            .with_offsets(self.offsets)
            .init()
            .try_forward_with_log_sum_exp(query, key, value, ring)
    }

    /// The rows of `positions` of a whole tensor of `width` numbers per row.
    fn rows<T: Copy>(&self, whole: &[T], width: usize, positions: &[usize]) -> Vec<T> {
        let of_head = |head: &[T]| -> Vec<T> {
            let row = |&position: &usize| &head[position * width..][..width];
            positions.iter().flat_map(row).copied().collect()
        };
        match self.length {
            0 => Vec::new(),
            length => whole.chunks(length * width).flat_map(of_head).collect(),
        }
    }

    /// This rank's part of a tensor, on an autodiff device.
    fn own(&self, whole: &[f64], ring: &Ring, device: &Device) -> Tensor<4> {
        let positions = ring.positions();
        let rows = self.rows(whole, self.head_dim, &positions);
        let heads = whole.len() / (self.batch * self.length * self.head_dim).max(1);
        let heads = heads.max(1);
        let shape = [self.batch, heads, positions.len(), self.head_dim];
        let rows: Vec<f32> = rows.into_iter().map(|number| number as f32).collect();
        let data = TensorData::new(rows, shape);
        match self.half_precision {
            true => upload(&data.convert_dtype(DType::F16), device),
            false => upload(&data, device),
        }
    }

    /// Computes on all ranks; `Err` says what is wrong.
    fn check(&self, devices: &[Device]) {
        let of_queries = |which| self.draw(self.heads(), which);
        let of_keys = |which| self.draw(self.kv_heads, which);
        let (query, key, value) = (of_queries(1), of_keys(2), of_keys(3));
        let grad_output = of_queries(4);
        let expected = attention(
            &self.spec(),
            OracleInput {
                query: &query,
                key: &key,
                value: &value,
                grad_output: Some(&grad_output),
                grad_log_sum_exp: None,
                dropout: DropoutSeed::default(),
            },
        );
        let results = Loopback::run::<HostBuffer, _>(self.ranks, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let ring = Ring::new(communicator, self.sharding, self.length).unwrap();
            let device = devices[ring.rank() % devices.len()].clone().autodiff();
            let leaf = |whole: &[f64]| {
                let own = self.own(whole, &ring, &device);
                match self.swapped {
                    true => own.swap_dims(1, 2).mul_scalar(1.0).require_grad(),
                    false => own.require_grad(),
                }
            };
            let leaves = [&query, &key, &value].map(|whole| leaf(whole));
            let arranged = leaves.clone().map(|leaf| match self.swapped {
                true => leaf.swap_dims(1, 2),
                false => leaf,
            });
            let AttentionOutput {
                output,
                log_sum_exp,
            } = self.forward(arranged, &ring).unwrap();
            let weight = self.own(&grad_output, &ring, &device.clone().inner());
            let loss = (output.clone() * Tensor::from_inner(weight)).sum();
            let mut gradients = loss.backward();
            let gradients = leaves.map(|leaf| {
                let gradient = leaf.grad_remove(&mut gradients).unwrap();
                numbers(match self.swapped {
                    true => gradient.swap_dims(1, 2),
                    false => gradient,
                })
            });
            let results = (numbers(output.inner()), numbers(log_sum_exp.inner()));
            self.hold(&ring, results, gradients, &expected);
        });
        for result in results {
            result.unwrap_or_else(|panic| panic!("{self:?}: {panic}"));
        }
    }

    /// Holds a rank's results against the oracle's.
    fn hold(
        &self,
        ring: &Ring,
        (output, log_sum_exp): (Vec<f32>, Vec<f32>),
        [grad_query, grad_key, grad_value]: [Vec<f32>; 3],
        expected: &OracleOutput,
    ) {
        let tolerance = if self.half_precision { 2e-3 } else { 2e-5 };
        let positions = ring.positions();
        let dim = self.head_dim;
        for (name, got, expected, width) in [
            ("output", output, &expected.output, dim),
            ("log-sum-exp", log_sum_exp, &expected.log_sum_exp, 1),
            ("grad_query", grad_query, &expected.grad_query, dim),
            ("grad_key", grad_key, &expected.grad_key, dim),
            ("grad_value", grad_value, &expected.grad_value, dim),
        ] {
            let expected = self.rows(expected, width, &positions);
            // Of a rank whose rows are next to nothing, as where every row sees itself alone, errors are counted from 1e-2 on.
            let norm = |numbers: &[f64]| numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
            let finite: Vec<f64> = expected.iter().copied().filter(|x| x.is_finite()).collect();
            let scale = (norm(&finite) / 1e-2).min(1.0);
            let distance = distance(&got, &expected) * scale;
            let rank = ring.rank();
            assert!(
                distance <= tolerance,
                "{name} of rank {rank} is off by {distance:e}"
            );
        }
    }
}

/// Also with ranks that compute on the processor, and ranks on another device.
#[test]
fn random_computations_agree_with_the_oracle() {
    let config = ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let device = gpu();
    TestRunner::new(config)
        .run(&any_case(), |case| {
            case.check(std::slice::from_ref(&device));
            Ok(())
        })
        .unwrap();
}

fn fixed(half_precision: bool) -> Case {
    Case {
        batch: 2,
        kv_heads: 2,
        group: 2,
        head_dim: 16,
        length: 101,
        branches: vec![(32, 1), (128, 3)],
        causal: true,
        offsets: HeadOffsets::Cyclic,
        ranks: 4,
        sharding: Sharding::Zigzag,
        half_precision,
        swapped: true,
        seed: 7,
    }
}

#[test]
fn ranks_may_have_a_device_each() {
    // The same adapter by another name is another device to Burn.
    let other = Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    for half_precision in [false, true] {
        fixed(half_precision).check(&[gpu(), other.clone()]);
    }
}

#[test]
fn some_ranks_may_compute_on_the_processor() {
    for half_precision in [false, true] {
        fixed(half_precision).check(&[gpu(), Device::flex()]);
    }
}
