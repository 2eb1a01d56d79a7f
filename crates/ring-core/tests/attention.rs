//! The drivers over loopback ranks, judged by the O(N^2) float64 oracle.

mod cases;
mod ranks;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use half::bf16;
use proptest::prelude::*;
use ranks::{
    DEADLINE, SEED, Whole, assert_close, distance,
    faulty::{Fault, Faulty},
    owned, run, run_rank, run_rank_on, shard, view,
};
use ring_comm::{
    Communicator, Loopback, Transport,
    buffer::{DType, HostBuffer, HostView},
};
use ring_core::{
    AttentionSpec, CommunicationEstimate, Documents, DropoutSeed, Error, Inputs, Pattern, Plan,
    Saved, Shape, Sharding, backward, forward,
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn forward_and_backward_agree_with_the_definition(spec in cases::any_divided_spec(80), threads in 1_usize..3) {
        let whole = Whole::random(&spec);
        let got = run(&spec, &whole, threads);
        assert_close(&spec, &got, &whole.oracle(&spec), 2e-5);
        for (rank, &(forward, backward)) in got.received.iter().enumerate() {
            let estimate = CommunicationEstimate::new(&Plan::new(&spec, rank).unwrap());
            prop_assert_eq!(forward, estimate.forward_received);
            prop_assert_eq!(backward, estimate.backward_received);
        }
    }
}

fn spec(pattern: Pattern, length: usize, sharding: Sharding, ranks: usize) -> AttentionSpec {
    let shape = Shape {
        batch: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 16,
    };
    AttentionSpec::new(pattern, shape, length)
        .unwrap()
        .sharded(sharding, ranks)
        .unwrap()
}

#[test]
fn bytes_on_the_wire_are_the_lower_bound_for_longnet() {
    let pattern = Pattern::dilated(&[16, 64, 128], &[1, 2, 4]).unwrap();
    let spec = spec(pattern, 128, Sharding::Contiguous, 4);
    let whole = Whole::random(&spec);
    // l = 32: (64 - 32)/2 + (128 - 64)/4 rows of each head
    let v_min = 32 * 2 * 2 * spec.row_bytes();
    for (forward, _) in run(&spec, &whole, 1).received {
        assert_eq!(forward, v_min);
    }
}

#[test]
fn bf16_inputs_are_rounded_once_at_the_end() {
    for (ranks, with_options) in [(1, false), (4, false), (1, true), (4, true)] {
        let pattern = Pattern::dilated(&[32, 64], &[1, 2]).unwrap().causal();
        let mut spec = spec(pattern, 96, Sharding::Zigzag, ranks).with_dtype(DType::BF16);
        if with_options {
            spec = spec
                .with_documents(Documents::per_entry(vec![vec![30, 66], vec![80, 16]]))
                .and_then(|spec| spec.with_key_lengths(vec![90, 96]))
                .and_then(|spec| spec.with_softcap(2.0))
                .and_then(|spec| spec.with_alibi_slopes(vec![0.1, 0.02, 0.05, 0.0]))
                .and_then(|spec| spec.with_dropout(0.3))
                .unwrap();
        }
        let mut whole = Whole::random(&spec);
        for tensor in [
            &mut whole.query,
            &mut whole.key,
            &mut whole.value,
            &mut whole.grad_output,
        ] {
            for x in tensor.iter_mut() {
                *x = bf16::from_f32(*x).to_f32();
            }
        }
        let expected = whole.oracle(&spec);
        let got = run(&spec, &whole, 1);
        assert_close(&spec, &got, &expected, 5e-3);
        // State in bf16 over the hops would show here first.
        assert!(distance(&got.log_sum_exp, &expected.log_sum_exp) < 1e-5);
    }
}

/// On every number of ranks, with every sharding, the results are those of the oracle.
fn assert_everywhere(base: &AttentionSpec) {
    let whole = Whole::random(base);
    let expected = whole.oracle(base);
    for ranks in 1..=8 {
        for sharding in [
            Sharding::Contiguous,
            Sharding::Zigzag,
            Sharding::Striped {
                chunk_size: Some(7),
            },
        ] {
            let spec = base.clone().sharded(sharding, ranks).unwrap();
            assert_close(&spec, &run(&spec, &whole, 1), &expected, 2e-5);
        }
    }
}

#[test]
fn the_number_of_ranks_and_the_sharding_change_only_the_rounding() {
    let pattern = Pattern::dilated(&[24, 48, 200], &[1, 3, 5])
        .unwrap()
        .causal();
    let base = spec(pattern, 150, Sharding::Contiguous, 1);
    assert_everywhere(&base);
}

/// Everything at once, on every number of ranks.
#[test]
fn masks_scores_and_dropout_do_not_depend_on_ranks_and_sharding() {
    let pattern = Pattern::dilated(&[24, 48, 200], &[1, 3, 5])
        .unwrap()
        .causal()
        .with_window(Some(70), None);
    let base = spec(pattern, 150, Sharding::Contiguous, 1)
        .with_documents(Documents::per_entry(vec![
            vec![40, 1, 109],
            vec![7, 90, 53],
        ]))
        .and_then(|spec| spec.with_key_lengths(vec![150, 141]))
        .and_then(|spec| spec.with_softcap(3.0))
        .and_then(|spec| spec.with_alibi_slopes(vec![0.1, 0.02, 0.5, 0.0]))
        .and_then(|spec| spec.with_dropout(0.3))
        .unwrap();
    assert_everywhere(&base);
}

/// Weights of a pair are read off by values that are one-hot: which are 0 is the mask.
#[test]
fn ranks_drop_the_same_weights_to_the_bit() {
    let length = 48;
    let shape = Shape {
        batch: 2,
        query_heads: 2,
        kv_heads: 2,
        head_dim: length,
    };
    let pattern = Pattern::dilated(&[16, 48], &[1, 2]).unwrap();
    let base = AttentionSpec::new(pattern, shape, length)
        .and_then(|spec| spec.with_dropout(0.4))
        .unwrap();
    let mut whole = Whole::random(&base);
    let keys = whole.value.chunks_exact_mut(length).enumerate();
    for (row, value) in keys {
        value.fill(0.0);
        value[row % length] = 1.0;
    }
    let mask = |ranks, sharding| {
        let spec = base.clone().sharded(sharding, ranks).unwrap();
        let output = run(&spec, &whole, 2).output;
        output
            .iter()
            .map(|&weight| weight != 0.0)
            .collect::<Vec<_>>()
    };
    let expected: Vec<bool> = whole
        .oracle(&base)
        .output
        .iter()
        .map(|&x| x != 0.0)
        .collect();
    for (ranks, sharding) in [
        (1, Sharding::Contiguous),
        (4, Sharding::Zigzag),
        (3, Sharding::Contiguous),
    ] {
        assert_eq!(mask(ranks, sharding), expected, "{ranks} ranks");
    }
}

#[test]
fn large_logits_stay_finite() {
    let spec = spec(Pattern::full().causal(), 64, Sharding::Zigzag, 3);
    let mut whole = Whole::random(&spec);
    whole.query.iter_mut().for_each(|x| *x *= 300.0);
    let expected = whole.oracle(&spec);
    let got = run(&spec, &whole, 1);
    assert_close(&spec, &got, &expected, 2e-4);
}

#[test]
fn ranks_that_plan_differently_are_told_who_differs_in_what() {
    let good = spec(Pattern::full().causal(), 64, Sharding::Zigzag, 3);
    let bad = spec(Pattern::full().causal(), 64, Sharding::Contiguous, 3);
    let whole = Whole::random(&good);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let mine = if endpoint.rank() == 2 { &bad } else { &good };
        let communicator = Communicator::new(Arc::new(endpoint));
        run_rank(mine, &whole, &communicator, 1).err().unwrap()
    });
    for error in results {
        let Ok(Error::Comm { source, .. }) = error else {
            panic!("not a communication error")
        };
        assert_eq!(source.culprit(), 2);
        let text = source.to_string();
        assert!(
            text.contains("sharding") && text.contains("zigzag"),
            "{text}"
        );
    }
}

#[test]
fn a_rank_that_fails_before_its_backward_is_named_by_all() {
    let spec = spec(Pattern::full(), 64, Sharding::Contiguous, 4);
    let whole = Whole::random(&spec);
    let results = Loopback::run(4, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let shorter = Whole {
            query: whole.query.clone(),
            key: whole.key.clone(),
            value: whole.value.clone(),
            // Rank 1 passes an incoming gradient of another size: an error of its own kernel.
            grad_output: if communicator.rank() == 1 {
                Vec::new()
            } else {
                whole.grad_output.clone()
            },
            grad_log_sum_exp: whole.grad_log_sum_exp.clone(),
            seed: whole.seed,
        };
        run_rank(&spec, &shorter, &communicator, 1).err().unwrap()
    });
    for (rank, error) in results.into_iter().enumerate() {
        match error.unwrap() {
            Error::Kernel { rank: culprit, .. } => assert_eq!((rank, culprit), (1, 1)),
            Error::Comm { source, .. } => {
                assert_eq!(source.culprit(), 1);
                assert!(
                    source
                        .to_string()
                        .contains("attention kernel failed on rank 1"),
                    "{source}"
                );
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn every_field_of_the_computation_is_compared() {
    let good = spec(Pattern::full(), 30, Sharding::Contiguous, 3);
    let whole = Whole::random(&good);
    let heads = |query_heads, kv_heads| Shape {
        query_heads,
        kv_heads,
        ..good.shape
    };
    let shaped = |shape| AttentionSpec {
        shape,
        ..good.clone()
    };
    let others = [
        AttentionSpec {
            pattern: Pattern::full().causal(),
            ..good.clone()
        },
        AttentionSpec {
            query_sharding: Sharding::Zigzag,
            ..good.clone()
        },
        AttentionSpec {
            key_sharding: Sharding::Zigzag,
            ..good.clone()
        },
        AttentionSpec {
            query_length: 29,
            ..good.clone()
        },
        AttentionSpec {
            key_length: 29,
            ..good.clone()
        },
        AttentionSpec {
            query_offset: 1,
            ..good.clone()
        },
        AttentionSpec {
            scale: good.scale * 1.000_001,
            ..good.clone()
        },
        AttentionSpec {
            dtype: DType::BF16,
            ..good.clone()
        },
        shaped(Shape {
            batch: 1,
            ..good.shape
        }),
        shaped(Shape {
            head_dim: 8,
            ..good.shape
        }),
        shaped(heads(2, 2)),
        shaped(heads(4, 4)),
        AttentionSpec {
            pattern: Pattern::full().with_window(Some(3), None),
            ..good.clone()
        },
        good.clone()
            .with_documents(Documents::new(vec![10, 20]))
            .unwrap(),
        good.clone().with_key_lengths(vec![30, 29]).unwrap(),
        good.clone().with_softcap(30.0).unwrap(),
        good.clone()
            .with_alibi_slopes(vec![0.5, 0.25, 0.1, 0.0])
            .unwrap(),
        good.clone().with_dropout(0.1).unwrap(),
    ];
    for other in others {
        assert_ne!(other, good);
        let results = Loopback::run(3, DEADLINE, |endpoint| {
            let mine = if endpoint.rank() == 1 { &other } else { &good };
            let own = Whole::random(mine);
            let whole = if endpoint.rank() == 1 { &own } else { &whole };
            run_rank(mine, whole, &Communicator::new(Arc::new(endpoint)), 1).err()
        });
        for error in results {
            let Ok(Some(Error::Comm { source, .. })) = error else {
                panic!("not noticed by all: {other:?}")
            };
            assert_eq!(source.culprit(), 1, "{source}");
        }
    }
}

#[test]
fn a_rank_that_is_a_batch_behind_is_told_at_once() {
    let batch = |lengths: &[usize]| {
        spec(Pattern::full(), 30, Sharding::Contiguous, 3)
            .with_documents(Documents::new(lengths.to_vec()))
            .unwrap()
    };
    let (first, second) = (batch(&[10, 20]), batch(&[25, 5]));
    let whole = Whole::random(&first);
    let results = Loopback::run(3, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        run_rank(&first, &whole, &communicator, 1).unwrap();
        let mine = match communicator.rank() {
            1 => &first,
            _ => &second,
        };
        run_rank(mine, &whole, &communicator, 1).err().unwrap()
    });
    for error in results {
        let Ok(Error::Comm { source, .. }) = error else {
            panic!("not a communication error")
        };
        assert_eq!(source.culprit(), 1);
        let text = source.to_string();
        assert!(text.contains("documents = 10,20"), "{text}");
    }
}

#[test]
fn a_rank_that_drops_by_another_seed_or_entry_is_told() {
    let spec = spec(Pattern::full(), 30, Sharding::Contiguous, 3)
        .with_dropout(0.2)
        .unwrap();
    let seed = DropoutSeed {
        seed: SEED.seed + 1,
        ..SEED
    };
    let first_entry = DropoutSeed {
        first_entry: SEED.first_entry + 1,
        ..SEED
    };
    for (other, field) in [(seed, "dropout seed"), (first_entry, "first batch entry")] {
        let results = Loopback::run(3, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let mut whole = Whole::random(&spec);
            // What all agreed on before does not hide it.
            run_rank(&spec, &whole, &communicator, 1).unwrap();
            if communicator.rank() == 2 {
                whole.seed = other;
            }
            run_rank(&spec, &whole, &communicator, 1).err().unwrap()
        });
        for error in results {
            let Ok(Error::Comm { source, .. }) = error else {
                panic!("not a communication error")
            };
            assert_eq!(source.culprit(), 2);
            assert!(source.to_string().contains(field), "{source}");
        }
    }
}

#[test]
fn tensors_of_another_type_than_planned_are_refused_and_the_peers_told() {
    let spec = spec(Pattern::full(), 16, Sharding::Contiguous, 2);
    let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let plan = Plan::new(&spec, rank).unwrap();
        let tensors = [4, 2, 2].map(|heads| {
            let dtype = if rank == 1 && heads == 2 {
                DType::BF16
            } else {
                DType::F32
            };
            let layout = RowLayout::contiguous(heads, plan.problem().queries, 16);
            (HostBuffer::zeros(dtype, 2 * heads * 8 * 16), layout)
        });
        let [query, key, value] = tensors.each_ref().map(|(buffer, layout)| Tensor {
            data: view(buffer),
            layout,
        });
        let inputs = Inputs {
            query,
            key,
            value,
            dropout: SEED,
        };
        forward(&CpuKernels::new(1).unwrap(), &communicator, &plan, inputs).unwrap_err()
    });
    let [first, second] = results.try_into().unwrap();
    assert!(matches!(second, Ok(Error::DType { what: "key", .. })));
    assert!(first.unwrap().to_string().contains("key is bf16"));
}

#[test]
fn backwards_in_another_order_on_one_rank_are_an_error_not_a_mixture() {
    let spec = spec(Pattern::full(), 16, Sharding::Contiguous, 2);
    let whole = Whole::random(&spec);
    let deadline = Duration::from_millis(300);
    let results = Loopback::run::<HostBuffer, _>(2, deadline, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let rank = communicator.rank();
        let kernels = CpuKernels::new(1).unwrap();
        let plan = Plan::new(&spec, rank).unwrap();
        let (queries, keys) = (owned(&spec, rank, false), owned(&spec, rank, true));
        let tensors = [
            (
                shard(&whole.query, 16, 16, &queries),
                RowLayout::contiguous(4, 8, 16),
            ),
            (
                shard(&whole.key, 16, 16, &keys),
                RowLayout::contiguous(2, 8, 16),
            ),
            (
                shard(&whole.value, 16, 16, &keys),
                RowLayout::contiguous(2, 8, 16),
            ),
        ];
        let [query, key, value] = tensors.each_ref().map(|(values, layout)| Tensor {
            data: HostView::F32(values),
            layout,
        });
        let inputs = Inputs {
            query,
            key,
            value,
            dropout: SEED,
        };
        let attend = || forward(&kernels, &communicator, &plan, inputs).unwrap();
        let (first, second) = (attend(), attend());
        let of = |result: &ring_core::Output<HostBuffer>| {
            let saved = Saved {
                operation: result.operation,
                output: view(&result.output),
                log_sum_exp: view(&result.log_sum_exp),
                grad_output: Tensor {
                    data: view(&result.output),
                    layout: &tensors[0].1,
                },
                grad_log_sum_exp: None,
            };
            backward(&kernels, &communicator, &plan, inputs, saved).err()
        };
        if rank == 0 { of(&first) } else { of(&second) }
    });
    for error in results {
        assert!(matches!(error, Ok(Some(Error::Comm { .. }))));
    }
}

#[test]
fn a_plan_of_another_rank_is_refused() {
    let spec = spec(Pattern::full(), 16, Sharding::Contiguous, 2);
    let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let plan = Plan::new(&spec, 0).unwrap();
        let problem = plan.problem();
        let data = vec![0.0; problem.batch * 4 * problem.queries * 16];
        let layout = RowLayout::contiguous(4, problem.queries, 16);
        let tensor = Tensor {
            data: HostView::F32(&data),
            layout: &layout,
        };
        let inputs = Inputs {
            query: tensor,
            key: tensor,
            value: tensor,
            dropout: SEED,
        };
        forward(&CpuKernels::new(1).unwrap(), &communicator, &plan, inputs).err()
    });
    assert!(
        results
            .iter()
            .all(|result| result.as_ref().unwrap().is_some())
    );
    assert!(
        results
            .iter()
            .any(|result| matches!(result, Ok(Some(Error::WrongPlan { .. }))))
    );
}

#[test]
fn a_rank_that_panics_in_the_middle_of_a_backward_ends_all_within_the_deadline() {
    let spec = spec(Pattern::full().causal(), 64, Sharding::Zigzag, 4);
    let whole = Whole::random(&spec);
    let started = Instant::now();
    let results = Loopback::run(4, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let kernels = match communicator.rank() {
            // On its second step, with messages under way both ways.
            2 => Faulty::at("backward", 1, Fault::Panic),
            _ => Faulty::never(),
        };
        run_rank_on(&kernels, &spec, &whole, &communicator).err()
    });
    assert!(
        started.elapsed() < DEADLINE / 4,
        "the others waited for the deadline"
    );
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Err(panic) => assert!(rank == 2 && panic.message.contains("out of order")),
            Ok(Some(Error::Comm { source, .. })) => {
                assert_eq!(source.culprit(), 2, "{source}");
                assert!(source.to_string().contains("rank 2 panicked"), "{source}");
            }
            Ok(other) => panic!("rank {rank} ended with {other:?}"),
        }
    }
}
