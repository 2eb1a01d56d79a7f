//! The modules, token by token: as on the whole sequence, in every type, and errors for what cannot be.

use std::{sync::Arc, time::Duration};

use burn::tensor::{DType, Device, Distribution, Tensor};
use ring_burn::{
    Communicator, DilatedAttentionConfig, HostBuffer, KeyValueCache, Loopback, Mixing, Ring,
    RingAttentionConfig, Sharding, alibi_slopes, shard_tensor,
};

const DEADLINE: Duration = Duration::from_secs(60);

fn draw(shape: [usize; 4]) -> Tensor<4> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// Holds prompts of 40 positions and seven tokens after them, over three ranks, against the whole sequence.
macro_rules! check {
    ($attention:expr, $dtype:expr, $tolerance:expr) => {{
        let (attention, length) = ($attention, 47);
        let inputs = [6, 3, 3].map(|heads| draw([2, heads, length, 8]).cast($dtype));
        let [query, key, value] = inputs.clone();
        let whole = attention.forward(query, key, value, &Ring::single(length).unwrap());
        let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let ring = Ring::new(communicator, Sharding::Zigzag, 40).unwrap();
            let mut cache = KeyValueCache::new();
            let of_prompt = inputs.clone().map(|tensor| tensor.narrow(2, 0, 40));
            let own = of_prompt.map(|tensor| shard_tensor(tensor, 2, &ring).unwrap());
            let [query, key, value] = own;
            let output = attention
                .try_prefill(query, key, value, &ring, &mut cache)
                .unwrap();
            let expected = shard_tensor(whole.clone().narrow(2, 0, 40), 2, &ring).unwrap();
            let mut off = vec![distance(output, expected)];
            for (first, count) in [(40, 1), (41, 2), (43, 4)] {
                let next = inputs.clone().map(|tensor| tensor.narrow(2, first, count));
                let [query, key, value] = next;
                let output = attention
                    .try_decode(query, key, value, &ring, &mut cache)
                    .unwrap();
                assert_eq!(output.dtype(), $dtype);
                off.push(distance(output, whole.clone().narrow(2, first, count)));
            }
            assert_eq!(cache.length(), 47);
            off
        });
        for off in results {
            let off = off.unwrap();
            assert!(off.iter().all(|&off| off < $tolerance), "{off:?}");
        }
    }};
}

fn distance(a: Tensor<4>, b: Tensor<4>) -> f32 {
    let (a, b) = (a.cast(DType::F32), b.cast(DType::F32));
    (a - b).abs().max().into_scalar::<f32>()
}

#[test]
fn modules_decode_what_they_compute_at_once() {
    let full = RingAttentionConfig::new().with_causal(true);
    check!(full.init(), DType::F32, 1e-5);
    check!(
        full.clone()
            .with_scale(Some(0.7))
            .with_softcap(Some(2.0))
            .init(),
        DType::F32,
        1e-5
    );
    check!(
        full.with_alibi_slopes(Some(alibi_slopes(6))).init(),
        DType::F32,
        1e-5
    );
    let dilated = DilatedAttentionConfig::new(vec![8, 32], vec![1, 3]).with_causal(true);
    check!(dilated.init(), DType::F32, 1e-5);
    check!(
        dilated.clone().with_mixing(Mixing::HeadGroups).init(),
        DType::F32,
        1e-5
    );
    check!(
        dilated.clone().with_window(Some((9, 0))).init(),
        DType::F32,
        1e-5
    );
    check!(dilated.clone().init(), DType::BF16, 0.03);
    check!(dilated.init(), DType::F16, 0.005);
}

#[test]
fn what_cannot_be_decoded_is_refused_with_the_reason() {
    let ring = Ring::single(4).unwrap();
    let attention = RingAttentionConfig::new().with_causal(true).init();
    let mut cache = KeyValueCache::new();
    let mut decode = |query: [usize; 4], key: [usize; 4], value: [usize; 4]| {
        attention.try_decode(draw(query), draw(key), draw(value), &ring, &mut cache)
    };
    decode([1, 2, 1, 8], [1, 2, 1, 8], [1, 2, 1, 8]).unwrap();
    for (query, key, value, reason) in [
        ([1, 2, 1, 8], [1, 2, 2, 8], [1, 2, 1, 8], "key has shape"),
        ([1, 2, 1, 8], [1, 2, 1, 8], [1, 2, 1, 4], "value has shape"),
        ([2, 2, 1, 8], [2, 2, 1, 8], [2, 2, 1, 8], "of the cache"),
        ([1, 4, 1, 8], [1, 2, 1, 8], [1, 2, 1, 8], "of the cache"),
        ([1, 2, 0, 8], [1, 2, 0, 8], [1, 2, 0, 8], "at least 1"),
    ] {
        let error = decode(query, key, value).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    decode([1, 2, 3, 8], [1, 2, 3, 8], [1, 2, 3, 8]).unwrap();
    assert_eq!(cache.length(), 4);
    let tensor = || draw([1, 2, 1, 8]);
    let causal = RingAttentionConfig::new().with_causal(true);
    for other in [
        causal.clone().with_scale(Some(0.5)),
        causal.clone().with_softcap(Some(3.0)),
        causal.with_alibi_slopes(Some(alibi_slopes(2))),
    ] {
        let other = other.init();
        let error = other.try_decode(tensor(), tensor(), tensor(), &ring, &mut cache);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("another attention"), "{error}");
    }
    let halves = || tensor().cast(DType::F16);
    let error = attention.try_decode(halves(), halves(), halves(), &ring, &mut cache);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the plan is for f32"), "{error}");
    let with_gradients = || Tensor::<4>::zeros([1, 2, 1, 8], &Device::flex().autodiff());
    let error = attention.try_decode(
        with_gradients(),
        with_gradients(),
        with_gradients(),
        &ring,
        &mut cache,
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("valid()"), "{error}");
    let both_ways = RingAttentionConfig::new().init();
    let mut cache = KeyValueCache::new();
    let error = both_ways.try_decode(tensor(), tensor(), tensor(), &ring, &mut cache);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("must be causal"), "{error}");
    let rows = || draw([1, 2, 4, 8]);
    let padded = ring.with_key_lengths(vec![3]);
    let error = attention.try_prefill(rows(), rows(), rows(), &padded, &mut cache);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("padding"), "{error}");
    assert_eq!(cache.length(), 0);
}

/// A rank whose tensors do not fit ends the decoding of all, with its reason.
#[test]
fn an_error_on_one_rank_reaches_all() {
    let attention = RingAttentionConfig::new().with_causal(true).init();
    let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Contiguous, 0).unwrap();
        let of_values = if ring.rank() == 1 { 4 } else { 8 };
        let tensor = |head_dim| draw([1, 2, 1, head_dim]);
        let mut cache = KeyValueCache::new();
        attention.try_decode(tensor(8), tensor(8), tensor(of_values), &ring, &mut cache)
    });
    for result in results {
        let error = result.unwrap().unwrap_err().to_string();
        assert!(error.contains("value has shape"), "{error}");
    }
}
