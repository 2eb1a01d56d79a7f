//! Computations with everything that masks and scores can be, held against the float64 oracle, on any device.

use std::{sync::Arc, time::Duration};

use burn::tensor::{Device, Tensor, TensorData};
use ring_burn::{
    AttentionOutput, Communicator, DilatedAttentionConfig, Documents, HostBuffer, Loopback, Ring,
    RingAttention, RingAttentionConfig, RingError, Sharding, philox, shard_tensor,
};
use ring_core::{
    AttentionSpec, DropoutSeed, Pattern, Shape,
    oracle::{OracleInput, attention},
};
use ring_kernels::Dropout;

/// Also for a GPU in software.
const DEADLINE: Duration = Duration::from_secs(300);
const STRIPED: Sharding = Sharding::Striped {
    chunk_size: Some(5),
};

/// Sizes of the tensors, and the numbers in them.
pub(crate) struct Problem {
    pub(crate) shape: Shape,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
}

/// Output, log-sum-exp, and gradients of query, key and value: whole tensors.
type Results = [Vec<f64>; 5];

impl Problem {
    fn dims(&self, tensor: usize) -> [usize; 4] {
        let Shape {
            batch,
            query_heads,
            kv_heads,
            head_dim,
        } = self.shape;
        match tensor {
            0 | 3 => [batch, query_heads, self.queries, head_dim],
            _ => [batch, kv_heads, self.keys, head_dim],
        }
    }

    /// Query, key, value, gradient of the output, of the log-sum-exp.
    fn numbers(&self, tensor: usize) -> Vec<f64> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(tensor as u64 + 1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f64::from((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 1.7
        };
        let count: usize = match tensor {
            4 => self.dims(0)[..3].iter().product(),
            _ => self.dims(tensor).iter().product(),
        };
        (0..count).map(|_| next()).collect()
    }

    pub(crate) fn tensor(&self, tensor: usize) -> Tensor<4> {
        let numbers: Vec<f32> = self.numbers(tensor).iter().map(|&x| x as f32).collect();
        let data = TensorData::new(numbers, self.dims(tensor));
        Tensor::from_data(data, &Device::flex())
    }

    /// What the definition says.
    fn oracle(&self, spec: &AttentionSpec, dropout: DropoutSeed) -> Results {
        let [query, key, value, grad_output, grad_log_sum_exp] =
            [0, 1, 2, 3, 4].map(|tensor| self.numbers(tensor));
        let results = attention(
            spec,
            OracleInput {
                query: &query,
                key: &key,
                value: &value,
                grad_output: Some(&grad_output),
                grad_log_sum_exp: Some(&grad_log_sum_exp),
                dropout,
            },
        );
        [
            results.output,
            results.log_sum_exp,
            results.grad_query,
            results.grad_key,
            results.grad_value,
        ]
    }

    /// What the module computes on so many ranks; `prepare` gives every rank its ring.
    fn over_ranks(
        &self,
        device: &Device,
        ranks: usize,
        prepare: impl Fn(Ring) -> Ring + Sync,
        module: impl Fn([Tensor<4>; 3], &Ring) -> Result<AttentionOutput, RingError> + Sync,
    ) -> Results {
        let parts = Loopback::run::<HostBuffer, _>(ranks, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let ring = Ring::new(communicator, Sharding::Contiguous, self.queries).unwrap();
            let ring = prepare(ring);
            // Places of the keys, as those of queries of another ring.
            let of_keys = Ring::new(ring.communicator().clone(), ring.key_sharding(), self.keys);
            let of_keys = of_keys.unwrap();
            let device = device.clone().autodiff();
            let own = |tensor: usize, ring: &Ring| {
                let own = shard_tensor(self.tensor(tensor), 2, ring).unwrap();
                Tensor::<4>::from_data(own.into_data(), &device)
            };
            let leaves = [own(0, &ring), own(1, &of_keys), own(2, &of_keys)];
            let leaves = leaves.map(Tensor::<4>::require_grad);
            let result = module(leaves.clone(), &ring).unwrap();
            let [batch, heads, ..] = self.dims(0);
            let weights: Vec<f32> = self.numbers(4).iter().map(|&x| x as f32).collect();
            let weights = TensorData::new(weights, [batch, heads, self.queries]);
            let weights = Tensor::<3>::from_data(weights, &Device::flex());
            let weights = shard_tensor(weights, 2, &ring).unwrap();
            let weights = Tensor::<3>::from_data(weights.into_data(), &device);
            let loss = (result.output.clone() * own(3, &ring)).sum()
                + (result.log_sum_exp.clone() * weights).sum();
            let mut gradients = loss.backward();
            let [query, key, value] = leaves.map(|leaf| leaf.grad_remove(&mut gradients).unwrap());
            let log_sum_exp = result.log_sum_exp.inner().unsqueeze_dim(3);
            let tensors = [result.output.inner(), log_sum_exp, query, key, value];
            let places = [ring.positions(), of_keys.positions()];
            (places, tensors.map(Tensor::into_data))
        });
        let lengths = [0, 0, 0, 1, 1].map(|of| [self.queries, self.keys][of]);
        let mut whole: Results = Default::default();
        for part in parts {
            let (places, tensors) = part.unwrap();
            for (index, tensor) in tensors.into_iter().enumerate() {
                let places = &places[usize::from(index > 2)];
                let [batch, heads, rows, dim] = tensor.shape().dims();
                assert_eq!(rows, places.len());
                let (whole, length) = (&mut whole[index], lengths[index]);
                whole.resize(batch * heads * length * dim, f64::NAN);
                let numbers: Vec<f64> = tensor.iter().collect();
                for head in 0..batch * heads {
                    for (row, place) in places.iter().enumerate() {
                        whole[(head * length + place) * dim..][..dim]
                            .copy_from_slice(&numbers[(head * rows + row) * dim..][..dim]);
                    }
                }
            }
        }
        whole
    }
}

fn assert_close(got: &Results, expected: &Results, how: &str) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let name = ["output", "log-sum-exp", "of query", "of key", "of value"][index];
        assert_eq!(got.len(), expected.len());
        let (mut error, mut norm) = (0.0, 0.0);
        for (&got, &expected) in got.iter().zip(expected) {
            if expected == f64::NEG_INFINITY {
                assert_eq!(got, expected, "{name} {how}");
                continue;
            }
            error += (got - expected).powi(2);
            norm += expected.powi(2);
        }
        let distance = error.sqrt() / norm.sqrt().max(1e-12);
        assert!(distance < 2e-5, "{name} is off by {distance:e} {how}");
    }
}

/// The seed of a layer, anew: the first two words that Philox draws for its stream with the ring's seed as key.
fn seed_of(seed: u64, stream: u32) -> u64 {
    let key = seed.to_le_bytes();
    let word = |at: usize| u32::from_le_bytes(key[at..at + 4].try_into().unwrap());
    let words = philox([stream, !0, !0, !0], [word(0), word(4)]);
    (u64::from(words[1]) << 32) + u64::from(words[0])
}

/// Windows, documents, padding, softcap, ALiBi and dropout together.
pub(crate) fn everything_together(device: &Device) {
    let problem = Problem {
        shape: Shape {
            batch: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
        },
        queries: 45,
        keys: 45,
    };
    let documents = Documents::per_entry(vec![vec![20, 0, 25], vec![1, 40, 4]]);
    let slopes = vec![0.5, 0.03, 0.0, 0.125];
    let config = DilatedAttentionConfig::new(vec![16, 45], vec![1, 2])
        .with_causal(true)
        .with_scale(Some(0.7))
        .with_window(Some((21, -1)))
        .with_softcap(Some(1.5))
        .with_alibi_slopes(Some(slopes.clone()))
        .with_dropout(0.3)
        .with_dropout_stream(5);
    let pattern = Pattern::dilated(&[16, 45], &[1, 2]).unwrap().causal();
    let spec = AttentionSpec::new(pattern.with_window(Some(21), None), problem.shape, 45)
        .and_then(|spec| spec.with_scale(0.7))
        .and_then(|spec| spec.with_softcap(1.5))
        .and_then(|spec| spec.with_alibi_slopes(slopes.iter().map(|&x| x as f32).collect()))
        .and_then(|spec| spec.with_dropout(0.3))
        .and_then(|spec| spec.with_documents(documents.clone()))
        .and_then(|spec| spec.with_key_lengths(vec![45, 38]))
        .unwrap();
    let dropout = DropoutSeed {
        seed: seed_of(99, 5),
        first_entry: 2,
    };
    let expected = problem.oracle(&spec, dropout);
    assert!(expected[1].contains(&f64::NEG_INFINITY));
    for (ranks, sharding) in [
        (1, Sharding::Contiguous),
        (3, Sharding::Zigzag),
        (3, STRIPED),
    ] {
        let got = problem.over_ranks(
            device,
            ranks,
            |ring| {
                let ring = Ring::new(ring.communicator().clone(), sharding, 45).unwrap();
                ring.with_documents(documents.clone())
                    .with_key_lengths(vec![45, 38])
                    .with_seed(99)
                    .with_first_batch_entry(2)
            },
            |[query, key, value], ring| {
                let attention = config.init();
                attention.try_forward_with_log_sum_exp(query, key, value, ring)
            },
        );
        assert_close(&got, &expected, &format!("on {ranks} ranks, {sharding}"));
    }
}

/// Queries and keys of other lengths and shardings; where queries stand.
pub(crate) fn cross_attention(device: &Device) {
    let configs = [
        RingAttentionConfig::new(),
        RingAttentionConfig::new().with_causal(true),
        RingAttentionConfig::new().with_window(Some((9, 4))),
        // Hides the future as causality does, so that queries stand where they would with it.
        RingAttentionConfig::new().with_window(Some((30, 0))),
    ];
    for (queries, keys) in [(13, 50), (37, 12)] {
        let problem = Problem {
            shape: Shape {
                batch: 1,
                query_heads: 2,
                kv_heads: 1,
                head_dim: 8,
            },
            queries,
            keys,
        };
        for (index, config) in configs.iter().enumerate() {
            for offset in [None, Some(11), Some(-3)] {
                let pattern = match index {
                    0 => Pattern::full(),
                    1 => Pattern::full().causal(),
                    2 => Pattern::full().with_window(Some(9), Some(4)),
                    _ => Pattern::full().with_window(Some(30), Some(0)),
                };
                let aligned = if matches!(index, 1 | 3) {
                    keys as i64 - queries as i64
                } else {
                    0
                };
                let spec = AttentionSpec::new(pattern, problem.shape, 0)
                    .and_then(|spec| spec.with_lengths(queries, keys))
                    .unwrap()
                    .with_query_offset(offset.unwrap_or(aligned));
                let expected = problem.oracle(&spec, DropoutSeed::default());
                for (ranks, of_queries, of_keys) in [
                    (1, Sharding::Contiguous, Sharding::Contiguous),
                    (2, Sharding::Zigzag, Sharding::Contiguous),
                    (3, Sharding::Contiguous, STRIPED),
                    (4, STRIPED, Sharding::Zigzag),
                ] {
                    let got = problem.over_ranks(
                        device,
                        ranks,
                        |ring| {
                            let ring = Ring::new(ring.communicator().clone(), of_queries, queries);
                            let ring = ring.unwrap().with_keys(of_keys, keys);
                            match offset {
                                Some(offset) => ring.with_query_offset(offset),
                                None => ring,
                            }
                        },
                        |[query, key, value], ring| {
                            let attention = config.init();
                            attention.try_forward_with_log_sum_exp(query, key, value, ring)
                        },
                    );
                    let how = format!(
                        "of {queries} queries, {keys} keys, {config}, offset {offset:?}, on {ranks} ranks"
                    );
                    assert_close(&got, &expected, &how);
                }
            }
        }
    }
}

pub(crate) const ROWS: usize = 32;

/// Which weights are dropped, `[batch, heads, query, key]`: all scores are 0, values are the rows of the unit matrix, so that the
/// output is the weights.
pub(crate) fn dropped(
    attention: &RingAttention,
    batch: usize,
    ring: &Ring,
    device: &Device,
) -> Vec<bool> {
    let heads = 3;
    let zeros = Tensor::<4>::zeros([batch, heads, ROWS, ROWS], &Device::flex());
    let own = |tensor: Tensor<4>| {
        Tensor::<4>::from_data(shard_tensor(tensor, 2, ring).unwrap().into_data(), device)
    };
    let unit = Tensor::<2>::eye(ROWS, &Device::flex()).expand([batch, heads, ROWS, ROWS]);
    let output = attention.forward(own(zeros.clone()), own(zeros), own(unit), ring);
    output
        .into_data()
        .iter::<f32>()
        .map(|weight| weight == 0.0)
        .collect()
}

/// What is dropped is what the definition says, and depends on seed, stream, entry, head and positions alone.
pub(crate) fn dropped_weights(device: &Device) {
    let config = RingAttentionConfig::new()
        .with_dropout(0.4)
        .with_dropout_stream(7);
    let device = device.clone().autodiff();
    let single = || Ring::single(ROWS).unwrap().with_seed(3);
    let drop = |config: &RingAttentionConfig, batch, ring: Ring| {
        dropped(&config.init(), batch, &ring, &device)
    };
    let whole = drop(&config, 2, single());
    let definition = Dropout::new(0.4, seed_of(3, 7), 0);
    for (index, &is_dropped) in whole.iter().enumerate() {
        let (row, key) = (index / ROWS, (index % ROWS) as i64);
        let (head, query) = (row / ROWS, (row % ROWS) as i64);
        let stream = definition.stream(head / 3, 3, head % 3);
        assert_eq!(is_dropped, !definition.keeps(stream, 0, query, key));
    }
    assert_eq!(drop(&config, 2, single()), whole, "the same every time");
    assert_ne!(drop(&config, 2, single().with_seed(4)), whole);
    assert_ne!(
        drop(&config.clone().with_dropout_stream(8), 2, single()),
        whole
    );
    let second_entry = drop(&config, 1, single().with_first_batch_entry(1));
    assert_eq!(second_entry, whole[whole.len() / 2..]);

    let parts = Loopback::run::<HostBuffer, _>(4, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Zigzag, ROWS)
            .unwrap()
            .with_seed(3);
        let own = dropped(&config.init(), 2, &ring, &device);
        (ring.positions(), own)
    });
    for part in parts {
        let (positions, own) = part.unwrap();
        for head in 0..6 {
            for (row, position) in positions.iter().enumerate() {
                let own = &own[(head * positions.len() + row) * ROWS..][..ROWS];
                assert_eq!(own, &whole[(head * ROWS + position) * ROWS..][..ROWS]);
            }
        }
    }
}
