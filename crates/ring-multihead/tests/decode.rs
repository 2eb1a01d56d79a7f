//! A model that continues a sequence token by token gives the scores of the whole sequence.

use std::{sync::Arc, time::Duration};

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor, TensorData},
};
use ring_burn::{Communicator, HostBuffer, KeyValueCache, Loopback, Ring, RingError, Sharding};
use ring_multihead::{LongNet, LongNetCache, LongNetConfig, MultiheadDilatedAttentionConfig};

const DEADLINE: Duration = Duration::from_secs(60);

fn config() -> LongNetConfig {
    LongNetConfig::new(vec![16, 32, 64], vec![1, 2, 4])
        .with_embed_dim(32)
        .with_num_layers(2)
        .with_num_kv_heads(Some(2))
        .with_sub_layer_norm(true)
}

fn model(config: &LongNetConfig) -> LongNet {
    config.try_init(&Device::flex()).unwrap().materialize()
}

fn ring(communicator: Communicator<HostBuffer>, sharding: Sharding, length: usize) -> Ring {
    let ring = Ring::new(communicator, sharding, length).unwrap();
    ring.with_threads(1).unwrap()
}

/// Two sequences of tokens.
fn tokens(length: usize) -> Vec<Vec<i64>> {
    let token = |entry: usize, i: usize| ((entry + 3) * i * i + 7 * i) as i64 % 251;
    let entry = |entry| (0..length).map(|i| token(entry, i)).collect();
    (0..2).map(entry).collect()
}

/// The tokens at `positions` of every sequence.
fn part(tokens: &[Vec<i64>], positions: &[usize]) -> Tensor<2, Int> {
    let pick = |entry: &Vec<i64>| positions.iter().map(|&at| entry[at]).collect::<Vec<i64>>();
    let shape = [tokens.len(), positions.len()];
    let values: Vec<i64> = tokens.iter().flat_map(pick).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// Scores of the tokens after a prompt, decoded in batches of those sizes.
fn decoded(
    model: &LongNet,
    tokens: &[Vec<i64>],
    prompt: usize,
    batches: &[usize],
    ring: &Ring,
) -> Result<Vec<f32>, RingError> {
    let mut cache = LongNetCache::new();
    if prompt > 0 {
        let ring = ring.clone().with_sequence_length(prompt);
        model.try_prefill(part(tokens, &ring.positions()), &ring, &mut cache)?;
    }
    let mut scores = Vec::new();
    for &count in batches {
        let positions: Vec<usize> = (cache.length()..cache.length() + count).collect();
        scores.push(model.try_decode(part(tokens, &positions), ring, &mut cache)?);
    }
    assert_eq!(cache.length(), prompt + batches.iter().sum::<usize>());
    Ok(Tensor::cat(scores, 1).into_data().iter::<f32>().collect())
}

#[test]
fn scores_are_those_of_the_whole_sequence() {
    // Further than the longest segment reaches, so that segments begin while tokens are decoded.
    let batches = [1, 1, 3, 1, 5, 1, 1, 2, 1, 4];
    let full = LongNetConfig::new(vec![], vec![]).with_embed_dim(32);
    for (config, prompt) in [
        (config(), 53),
        (config(), 0),
        (config().with_window(Some((20, 0))).with_alibi(true), 53),
        (config().with_softcap(Some(1.0)), 61),
        (full, 40),
    ] {
        let model = model(&config);
        let length = prompt + batches.iter().sum::<usize>();
        let tokens = tokens(length);
        let all: Vec<usize> = (0..length).collect();
        let whole = model.forward(part(&tokens, &all), &Ring::single(length).unwrap());
        let expected = whole.narrow(1, prompt, length - prompt).into_data();
        let expected: Vec<f32> = expected.iter::<f32>().collect();
        for (ranks, sharding) in [
            (1, Sharding::Contiguous),
            (3, Sharding::Zigzag),
            (
                3,
                Sharding::Striped {
                    chunk_size: Some(5),
                },
            ),
        ] {
            let results = Loopback::run(ranks, DEADLINE, |endpoint| {
                let ring = ring(Communicator::new(Arc::new(endpoint)), sharding, 0);
                decoded(&model, &tokens, prompt, &batches, &ring).unwrap()
            });
            for scores in results.into_iter().map(Result::unwrap) {
                assert_eq!(scores.len(), expected.len());
                let off = scores
                    .iter()
                    .zip(&expected)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                assert!(off < 1e-4, "{config}: off by {off}");
            }
        }
    }
}

#[test]
fn ranks_that_choose_different_tokens_are_told() {
    let model = model(&config());
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let ring = ring(Communicator::new(Arc::new(endpoint)), Sharding::Zigzag, 20);
        let mut cache = LongNetCache::new();
        let tokens = tokens(22);
        model.try_prefill(part(&tokens, &ring.positions()), &ring, &mut cache)?;
        let chosen = if ring.rank() == 2 { 21 } else { 20 };
        model.try_decode(part(&tokens, &[chosen]), &ring, &mut cache)
    });
    for result in results {
        let error = result.unwrap().unwrap_err().to_string();
        assert!(error.contains("note on the tokens"), "{error}");
        assert!(error.contains("rank 2 has"), "{error}");
    }
}

#[test]
fn a_cache_of_another_model_is_refused() {
    let ring = Ring::single(8).unwrap();
    let (positions, tokens) = (ring.positions(), tokens(9));
    let mut cache = LongNetCache::new();
    let small = model(&config());
    small
        .try_prefill(part(&tokens, &positions), &ring, &mut cache)
        .unwrap();
    let again = small.try_prefill(part(&tokens, &positions), &ring, &mut cache);
    let error = again.unwrap_err().to_string();
    assert!(error.contains("8 positions already"), "{error}");
    let next = || part(&tokens, &[8]);
    for (config, reason) in [
        (config().with_num_layers(3), "2 blocks"),
        (config().with_window(Some((3, 0))), "another attention"),
        (config().with_num_kv_heads(Some(4)), "of the cache"),
    ] {
        let error = model(&config).try_decode(next(), &ring, &mut cache);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    // What was refused before anything was done does no harm.
    small.try_decode(next(), &ring, &mut cache).unwrap();
}

#[test]
fn ranks_take_tokens_in_turn() {
    let model = model(&config());
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let ring = ring(
            Communicator::new(Arc::new(endpoint)),
            Sharding::Contiguous,
            0,
        );
        let mut cache = LongNetCache::new();
        let tokens = tokens(600);
        for first in (0..600).step_by(5) {
            let positions: Vec<usize> = (first..first + 5).collect();
            model
                .try_decode(part(&tokens, &positions), &ring, &mut cache)
                .unwrap();
        }
        (0..3).map(|rank| cache.rows(rank)).collect::<Vec<_>>()
    });
    for rows in results.into_iter().map(Result::unwrap) {
        assert_eq!(rows.iter().sum::<usize>(), 600);
        assert!(
            rows.iter().max().unwrap() - rows.iter().min().unwrap() <= 64,
            "{rows:?}"
        );
    }
}

/// A block in the middle refuses what the blocks before it have taken.
#[test]
fn a_cache_that_was_filled_halfway_is_not_gone_on_with() {
    let ring = Ring::single(8).unwrap();
    let (tokens, device) = (tokens(9), Device::flex());
    let other = MultiheadDilatedAttentionConfig::new(32, 4, vec![16], vec![1]).init(&device);
    let good = model(&config());
    let mut bad = good.clone();
    bad.blocks[1].attention = other; // not causal
    let mut cache = LongNetCache::new();
    let prompt = || part(&tokens, &ring.positions());
    let error = bad.try_prefill(prompt(), &ring, &mut cache).unwrap_err();
    assert!(error.to_string().contains("must be causal"), "{error}");
    let error = good.try_decode(part(&tokens, &[8]), &ring, &mut cache);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("halfway"), "{error}");
    let error = good.try_prefill(prompt(), &ring, &mut cache);
    assert!(error.unwrap_err().to_string().contains("halfway"));
}

/// A rank whose input does not fit ends the decoding of all at once.
#[test]
fn an_input_that_one_rank_refuses_is_told_to_all() {
    let attention = MultiheadDilatedAttentionConfig::new(32, 4, vec![16], vec![1])
        .with_causal(true)
        .init(&Device::flex());
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let size = if communicator.rank() == 1 { 16 } else { 32 };
        let ring = ring(communicator, Sharding::Zigzag, 0);
        let input = Tensor::<3>::zeros([1, 1, size], &Device::flex());
        let result = attention.try_decode(input, None, &ring, &mut KeyValueCache::new());
        (result.unwrap_err().to_string(), ring)
    });
    // The rings are still there: that a rank has left is not what the others were told.
    for result in results {
        let (error, _ring) = result.unwrap();
        assert!(error.contains("[batch, tokens, 32]"), "{error}");
    }
}
