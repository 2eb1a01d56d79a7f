//! Decoding against a sharded cache, judged by the O(N^2) float64 oracle on the whole sequence.

mod cases;

use std::{
    net::SocketAddr,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use half::bf16;
use proptest::prelude::*;
use ring_comm::{
    CommErrorKind, Communicator, Loopback, Tcp,
    buffer::{Buffer, DType, HostBuffer},
    launch::from_variables,
};
use ring_core::{
    AttentionSpec, CacheError, Decoded, DropoutSeed, Error, KeyValueCache, Mixing, NewTokens,
    Pattern, Shape, Sharding, decode,
    oracle::{OracleInput, OracleOutput, attention},
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};
use socket2::{Domain, Socket, Type};

const DEADLINE: Duration = Duration::from_secs(60);

/// A prompt, and what follows it.
#[derive(Clone, Debug)]
struct Case {
    /// Of the prompt.
    spec: AttentionSpec,
    /// Tokens that come at once.
    batches: Vec<usize>,
    chunk: usize,
}

impl Case {
    fn length(&self) -> usize {
        self.spec.key_length + self.batches.iter().sum::<usize>()
    }

    /// The computation over the whole sequence.
    fn whole(&self) -> AttentionSpec {
        AttentionSpec {
            query_length: self.length(),
            key_length: self.length(),
            ..self.spec.clone()
        }
    }
}

/// Numbers in (-1, 1) from a seed, times `factor`.
fn numbers(len: usize, seed: u64, factor: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        factor * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// Query, key and value of the whole sequence, `[batch, heads, length, head_dim]`.
fn tensors(case: &Case) -> [Vec<f32>; 3] {
    let Shape {
        batch,
        query_heads,
        kv_heads,
        head_dim,
    } = case.spec.shape;
    let rows = batch * case.length() * head_dim;
    let rounded = |values: Vec<f32>| match case.spec.dtype {
        DType::BF16 => values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
        _ => values,
    };
    [
        rounded(numbers(query_heads * rows, 1, 3.0)),
        rounded(numbers(kv_heads * rows, 2, 3.0)),
        rounded(numbers(kv_heads * rows, 3, 1.0)),
    ]
}

fn oracle(case: &Case, [query, key, value]: &[Vec<f32>; 3]) -> OracleOutput {
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let input = OracleInput {
        query: &wide(query),
        key: &wide(key),
        value: &wide(value),
        grad_output: None,
        grad_log_sum_exp: None,
        dropout: DropoutSeed::default(),
    };
    attention(&case.whole(), input)
}

/// The rows at `positions` of `[outer, length, head_dim]`.
fn rows(case: &Case, whole: &[f32], positions: impl Iterator<Item = usize> + Clone) -> HostBuffer {
    let (length, dim) = (case.length(), case.spec.shape.head_dim);
    let outers = whole.chunks(length * dim);
    let values = outers.flat_map(|outer| {
        let positions = positions.clone();
        positions.flat_map(move |position| outer[position * dim..][..dim].iter().copied())
    });
    match case.spec.dtype {
        DType::BF16 => HostBuffer::BF16(values.map(bf16::from_f32).collect()),
        _ => HostBuffer::F32(values.collect()),
    }
}

fn tensor<'a>(buffer: &'a HostBuffer, layout: &'a RowLayout) -> Tensor<'a, HostBuffer> {
    Tensor {
        data: buffer.view(),
        layout,
    }
}

/// A rank's cache of the prompt.
fn prefill(
    case: &Case,
    [_, key, value]: &[Vec<f32>; 3],
    kernels: &CpuKernels,
    rank: usize,
) -> Result<KeyValueCache, Error> {
    let spec = &case.spec;
    let spans = spec
        .key_sharding
        .spans(spec.key_length, spec.world_size, rank);
    let positions = spans.iter().flat_map(|span| span.start..span.end);
    let layout = RowLayout::contiguous(
        spec.shape.kv_heads,
        positions.clone().count(),
        spec.shape.head_dim,
    );
    let [key, value] = [key, value].map(|whole| rows(case, whole, positions.clone()));
    let (key, value) = (tensor(&key, &layout), tensor(&value, &layout));
    Ok(KeyValueCache::new(kernels, spec, rank, key, value)?.with_chunk(case.chunk))
}

/// Decodes the tokens at `first..first + count`.
fn step(
    case: &Case,
    [query, key, value]: &[Vec<f32>; 3],
    kernels: &CpuKernels,
    communicator: &Communicator<HostBuffer>,
    cache: &mut KeyValueCache,
    first: usize,
    count: usize,
) -> Result<Decoded, Error> {
    let shape = case.spec.shape;
    let [query, key, value] =
        [query, key, value].map(|whole| rows(case, whole, first..first + count));
    let of_queries = RowLayout::contiguous(shape.query_heads, count, shape.head_dim);
    let of_keys = RowLayout::contiguous(shape.kv_heads, count, shape.head_dim);
    let tokens = NewTokens {
        count,
        query: tensor(&query, &of_queries),
        key: tensor(&key, &of_keys),
        value: tensor(&value, &of_keys),
    };
    decode(kernels, communicator, cache, tokens)
}

/// What one rank ends with: output and log-sum-exp of every batch of tokens, and the rows that every rank holds.
type Outcome = (Vec<(Vec<f32>, Vec<f32>)>, Vec<usize>);

fn run_rank(
    case: &Case,
    tensors: &[Vec<f32>; 3],
    communicator: &Communicator<HostBuffer>,
) -> Result<Outcome, Error> {
    let kernels = CpuKernels::new(1 + communicator.rank() % 2).unwrap();
    let mut cache = prefill(case, tensors, &kernels, communicator.rank())?;
    let mut results = Vec::new();
    for &count in &case.batches {
        let first = cache.length();
        let decoded = step(
            case,
            tensors,
            &kernels,
            communicator,
            &mut cache,
            first,
            count,
        )?;
        let output = match decoded.output {
            HostBuffer::F32(values) => values,
            HostBuffer::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
            HostBuffer::BF16(values) => values.iter().map(|x| x.to_f32()).collect(),
        };
        results.push((output, decoded.log_sum_exp));
    }
    let ranks = 0..communicator.world_size();
    Ok((results, ranks.map(|rank| cache.rows(rank)).collect()))
}

/// Every rank's outcome.
fn run(case: &Case, tensors: &[Vec<f32>; 3]) -> Vec<Result<Outcome, Error>> {
    let results = Loopback::run(case.spec.world_size, DEADLINE, |endpoint| {
        run_rank(case, tensors, &Communicator::new(Arc::new(endpoint)))
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn bits(outcome: &Outcome) -> Vec<u32> {
    let parts = outcome.0.iter();
    let values = parts.flat_map(|(output, log_sum_exp)| output.iter().chain(log_sum_exp));
    values.map(|value| value.to_bits()).collect()
}

/// Holds what the ranks decoded against the oracle's rows.
fn judge(case: &Case, tolerance: f64) {
    let tensors = tensors(case);
    let expected = oracle(case, &tensors);
    let outcomes: Vec<Outcome> = run(case, &tensors)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let (length, dim) = (case.length(), case.spec.shape.head_dim);
    for other in &outcomes[1..] {
        assert_eq!(bits(other), bits(&outcomes[0]), "ranks differ");
    }
    let heads = case.spec.shape.batch * case.spec.shape.query_heads;
    let mut first = case.spec.key_length;
    for (&count, (output, log_sum_exp)) in case.batches.iter().zip(&outcomes[0].0) {
        for head in 0..heads {
            for token in 0..count {
                let (got, at) = (head * count + token, head * length + first + token);
                let (lse, right) = (f64::from(log_sum_exp[got]), expected.log_sum_exp[at]);
                let near = (lse - right).abs() <= tolerance * (1.0 + right.abs());
                assert!(lse == right || near, "log-sum-exp {lse}, not {right}");
                for d in 0..dim {
                    let (x, right) = (
                        f64::from(output[got * dim + d]),
                        expected.output[at * dim + d],
                    );
                    let near = (x - right).abs() <= tolerance;
                    assert!(near, "position {}: {x}, not {right}", first + token);
                }
            }
        }
        first += count;
    }
    check_balance(case, &outcomes[0].1);
}

/// All rows are somewhere, and ranks that began alike stay so.
fn check_balance(case: &Case, rows: &[usize]) {
    assert_eq!(rows.iter().sum::<usize>(), case.length());
    let spec = &case.spec;
    let at_first = |rank| {
        let ranks = spec.world_size;
        spec.key_sharding.shard_len(spec.key_length, ranks, rank)
    };
    let spread = |rows: &[usize]| rows.iter().max().unwrap() - rows.iter().min().unwrap();
    let at_first: Vec<usize> = (0..spec.world_size).map(at_first).collect();
    assert!(
        spread(rows) <= case.chunk.max(spread(&at_first)),
        "{rows:?}"
    );
}

/// Cases from those of the plans' tests, made causal self-attention without documents, padding and dropout.
fn any_case() -> impl Strategy<Value = Case> {
    (
        cases::any_spec(90),
        prop::collection::vec(1_usize..6, 1..6),
        1_usize..8,
    )
        .prop_map(|(spec, batches, chunk)| {
            let window = spec.pattern.window().left;
            let spec = AttentionSpec {
                pattern: spec.pattern.causal().with_window(window, None),
                world_size: spec.world_size.min(6),
                query_length: spec.key_length,
                query_offset: 0,
                query_sharding: spec.key_sharding,
                documents: None,
                key_lengths: None,
                dropout: 0.0,
                ..spec
            };
            Case {
                spec,
                batches,
                chunk,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn decoded_rows_are_those_of_the_whole_sequence(case in any_case()) {
        judge(&case, 2e-5);
    }
}

fn longnet(ranks: usize) -> AttentionSpec {
    let pattern = Pattern::dilated(&[16, 64], &[1, 4]).unwrap().causal();
    let shape = Shape {
        batch: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };
    let spec = AttentionSpec::new(pattern, shape, 100).unwrap();
    spec.sharded(Sharding::Zigzag, ranks).unwrap()
}

fn case(spec: AttentionSpec) -> Case {
    Case {
        spec,
        batches: vec![1; 5],
        chunk: 4,
    }
}

#[test]
fn a_long_answer_keeps_the_ranks_balanced() {
    let case = Case {
        batches: vec![1; 150],
        ..case(longnet(3))
    };
    judge(&case, 2e-5);
}

#[test]
fn sixteen_bit_rows_are_decoded_too() {
    let spec = longnet(3).with_dtype(DType::BF16);
    // A unit in the last place of numbers below 1: half of it is the output's, the rest that of weights.
    judge(&case(spec), 0.004);
}

#[test]
fn an_answer_may_begin_with_nothing() {
    let spec = AttentionSpec {
        query_length: 0,
        key_length: 0,
        ..longnet(4)
    };
    judge(&case(spec), 2e-5);
}

/// Windows and segments that hide everything but the last token: all ranks but its owner see nothing.
#[test]
fn ranks_that_see_nothing_contribute_nothing() {
    let spec = longnet(4);
    for pattern in [
        Pattern::full().causal().with_window(Some(0), None),
        Pattern::dilated(&[1], &[1]).unwrap().causal(),
        Pattern::dilated(&[7, 50], &[3, 5])
            .unwrap()
            .causal()
            .with_mixing(Mixing::HeadGroups),
    ] {
        let spec = spec.clone();
        judge(&case(AttentionSpec { pattern, ..spec }), 2e-5);
    }
}

/// What ranks that are connected over TCP decode.
fn run_over_tcp(case: &Case, tensors: &[Vec<f32>; 3]) -> Vec<Outcome> {
    // Nobody else is given the port as long as the socket is there; rank 0 can listen at it.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&anywhere.into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    let ranks = case.spec.world_size;
    let rank = &|rank: usize| {
        let launch = from_variables(|name| match name {
            "RANK" => Some(rank.to_string().into()),
            "WORLD_SIZE" => Some(ranks.to_string().into()),
            "MASTER_ADDR" => Some("127.0.0.1".into()),
            "MASTER_PORT" => Some(port.to_string().into()),
            "RING_JOB_TOKEN" => Some("sesame".into()),
            _ => None,
        });
        let tcp = Tcp::init(&launch.unwrap()).unwrap();
        let group = tcp.group(DEADLINE).unwrap();
        run_rank(case, tensors, &Communicator::new(Arc::new(group))).unwrap()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|number| scope.spawn(move || rank(number)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.collect()
    })
}

#[test]
fn the_bits_do_not_depend_on_the_transport() {
    let case = case(longnet(3));
    let tensors = tensors(&case);
    let loopback = run(&case, &tensors);
    for (rank, outcome) in run_over_tcp(&case, &tensors).iter().enumerate() {
        assert_eq!(bits(outcome), bits(loopback[rank].as_ref().unwrap()));
    }
}

/// The errors of all ranks, where rank 1 does something else after two tokens that all decode alike.
fn errors_when_rank_1_differs(
    differ: impl Fn(&Case, &CpuKernels, &Communicator<HostBuffer>, &mut KeyValueCache) -> Error + Sync,
) -> Vec<Error> {
    let case = case(longnet(3));
    let tensors = tensors(&case);
    let all_have_two = Barrier::new(3);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let kernels = CpuKernels::new(1).unwrap();
        let mut cache = prefill(&case, &tensors, &kernels, communicator.rank()).unwrap();
        let next = |cache: &mut KeyValueCache| {
            let first = cache.length();
            step(&case, &tensors, &kernels, &communicator, cache, first, 1)
        };
        next(&mut cache).unwrap();
        cache.note(7);
        next(&mut cache).unwrap();
        // What fails ends what others have not finished.
        all_have_two.wait();
        let error = match communicator.rank() {
            1 => differ(&case, &kernels, &communicator, &mut cache),
            _ => next(&mut cache).unwrap_err(),
        };
        let again = next(&mut cache).unwrap_err();
        assert!(matches!(
            again,
            Error::Cache(CacheError::Failed) | Error::Comm { .. }
        ));
        error
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn field_that_differs(error: &Error) -> (usize, String) {
    let Error::Comm { source, .. } = error else {
        panic!("{error}");
    };
    match &source.root().kind {
        CommErrorKind::Disagreement(disagreement) => {
            (disagreement.culprit, disagreement.field.clone())
        }
        _ => panic!("{error}"),
    }
}

#[test]
fn a_rank_that_is_a_token_behind_is_told_to_all() {
    let errors = errors_when_rank_1_differs(|case, kernels, communicator, cache| {
        let tensors = tensors(case);
        let mut behind = prefill(case, &tensors, kernels, 1).unwrap();
        behind.note(7);
        let missing = cache.length() - behind.length();
        let first = behind.length();
        let alone = Communicator::single();
        let refused = step(case, &tensors, kernels, &alone, &mut behind, first, missing);
        let place = refused.unwrap_err();
        assert!(matches!(place, Error::Cache(CacheError::Place { .. })));
        step(case, &tensors, kernels, communicator, &mut behind, first, 1).unwrap_err()
    });
    for error in &errors {
        let expected = (1, "positions in the cache".to_string());
        assert_eq!(field_that_differs(error), expected);
    }
}

#[test]
fn another_note_is_told_to_all() {
    let errors = errors_when_rank_1_differs(|case, kernels, communicator, cache| {
        cache.note(8);
        let first = cache.length();
        let tensors = tensors(case);
        step(case, &tensors, kernels, communicator, cache, first, 1).unwrap_err()
    });
    for error in &errors {
        let expected = (1, "note on the tokens".to_string());
        assert_eq!(field_that_differs(error), expected);
    }
}

#[test]
fn another_number_of_tokens_is_told_to_all() {
    let errors = errors_when_rank_1_differs(|case, kernels, communicator, cache| {
        let first = cache.length();
        let tensors = tensors(case);
        step(case, &tensors, kernels, communicator, cache, first, 2).unwrap_err()
    });
    for error in &errors {
        let Error::Comm { source, .. } = error else {
            panic!("{error}");
        };
        let kind = &source.root().kind;
        assert!(
            matches!(kind, CommErrorKind::SizeMismatch { .. }),
            "{error}"
        );
    }
}

#[test]
fn another_computation_is_told_in_words() {
    let case = case(longnet(2));
    let tensors = tensors(&case);
    let results = Loopback::run(2, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let spec = match communicator.rank() {
            1 => case.spec.clone().with_softcap(3.0).unwrap(),
            _ => case.spec.clone(),
        };
        let case = Case {
            spec,
            ..case.clone()
        };
        run_rank(&case, &tensors, &communicator).unwrap_err()
    });
    for error in results.into_iter().map(Result::unwrap) {
        assert_eq!(field_that_differs(&error), (1, "softcap".to_string()));
    }
}

#[test]
fn what_cannot_go_on_is_refused() {
    let good = case(longnet(1));
    let refused = |spec: AttentionSpec| {
        let case = Case {
            spec,
            ..good.clone()
        };
        let kernels = CpuKernels::new(1).unwrap();
        prefill(&case, &tensors(&good), &kernels, 0).unwrap_err()
    };
    let not_causal = AttentionSpec {
        pattern: Pattern::full(),
        ..good.spec.clone()
    };
    assert_eq!(refused(not_causal), CacheError::NotCausal.into());
    let padded = good.spec.clone().with_key_lengths(vec![3, 4]).unwrap();
    let error = refused(padded).to_string();
    assert!(error.contains("padding"), "{error}");
    let error = refused(good.spec.clone().with_query_offset(1)).to_string();
    assert!(error.contains("cross-attention"), "{error}");
    let sixteen_bits = good.spec.clone().with_dtype(DType::F16);
    let kernels = CpuKernels::new(1).unwrap();
    let short = HostBuffer::zeros(DType::F16, 10);
    let layout = RowLayout::contiguous(2, 100, 8);
    let (key, value) = (tensor(&short, &layout), tensor(&short, &layout));
    let error = KeyValueCache::new(&kernels, &sixteen_bits, 0, key, value).unwrap_err();
    assert!(
        matches!(error, Error::Cache(CacheError::Size { .. })),
        "{error}"
    );
    let error = KeyValueCache::new(&kernels, &good.spec, 0, key, value).unwrap_err();
    assert!(matches!(error, Error::DType { .. }), "{error}");
}

/// Memory follows the rows that a rank holds, however many tokens came.
#[test]
fn memory_is_that_of_the_own_rows() {
    let case = Case {
        batches: vec![5; 200],
        ..case(longnet(4))
    };
    let tensors = tensors(&case);
    let results = Loopback::run(4, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let kernels = CpuKernels::new(1).unwrap();
        let mut cache = prefill(&case, &tensors, &kernels, communicator.rank()).unwrap();
        for &count in &case.batches {
            let first = cache.length();
            step(
                &case,
                &tensors,
                &kernels,
                &communicator,
                &mut cache,
                first,
                count,
            )
            .unwrap();
        }
        (cache.rows(communicator.rank()), cache.bytes())
    });
    for (rows, bytes) in results.into_iter().map(Result::unwrap) {
        let of_row = 2 * 2 * 2 * 8 * size_of::<f32>();
        assert!((270..=280).contains(&rows), "a quarter of 1100, not {rows}");
        assert!(bytes >= rows * of_row && bytes <= (rows + rows / 4 + 64) * of_row);
    }
}
