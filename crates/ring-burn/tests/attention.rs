//! The Burn modules: against Burn's own operations on one device, against one rank on several.

use std::{sync::Arc, time::Duration};

use burn::tensor::{
    DType, Device, Distribution, Tensor, TensorData, Tolerance, activation::softmax,
};
use ring_burn::{
    Communicator, DilatedAttentionConfig, HostBuffer, Loopback, Ring, RingAttentionConfig,
    RingError, Sharding, shard_tensor,
};

const DEADLINE: Duration = Duration::from_secs(60);

fn draw<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// Attention as Burn's operations write it: scores materialised, causal if asked.
fn by_hand(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    causal: bool,
) -> (Tensor<4>, Tensor<3>) {
    let [batch, heads, n, dim] = query.dims();
    let group = heads / key.dims()[1];
    let repeat = |tensor: Tensor<4>| {
        let [batch, heads, n, dim] = tensor.dims();
        tensor
            .reshape([batch, heads, 1, n, dim])
            .repeat_dim(2, group)
            .reshape([batch, heads * group, n, dim])
    };
    let (key, value) = (repeat(key), repeat(value));
    let mut scores = query
        .matmul(key.transpose())
        .div_scalar((dim as f64).sqrt());
    if causal {
        let mask = Tensor::<2>::ones([n, n], &scores.device().inner())
            .tril(0)
            .equal_elem(0.0)
            .reshape([1, 1, n, n])
            .expand([batch, heads, n, n]);
        scores = scores.mask_fill(mask, f32::NEG_INFINITY);
    }
    let max = scores.clone().detach().max_dim(3);
    let lse = (scores.clone() - max.clone()).exp().sum_dim(3).log() + max;
    (
        softmax(scores, 3).matmul(value),
        lse.reshape([batch, heads, n]),
    )
}

fn assert_close(got: TensorData, expected: TensorData) {
    got.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-4, 1e-5));
}

/// How inputs reach the operation.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Contiguous,
    /// `[batch, seq, heads, dim]` in memory, as a projection gives them.
    Swapped,
    /// The last dimension is not contiguous.
    Transposed,
}

fn check_gradients(kv_heads: usize, causal: bool, layout: Layout, use_output: bool, use_lse: bool) {
    let device = Device::flex().autodiff();
    let (batch, heads, n, dim) = (2, 4, 37, 8);
    let arrange = |tensor: Tensor<4>| match layout {
        Layout::Contiguous => tensor,
        Layout::Swapped => tensor.swap_dims(1, 2),
        Layout::Transposed => tensor.transpose(),
    };
    let leaf = |heads: usize| {
        let shape = match layout {
            Layout::Contiguous => [batch, heads, n, dim],
            Layout::Swapped => [batch, n, heads, dim],
            Layout::Transposed => [batch, heads, dim, n],
        };
        draw(shape, &device).require_grad()
    };
    let leaves = [leaf(heads), leaf(kv_heads), leaf(kv_heads)];
    let weight = draw([batch, heads, n, dim], &device.clone().inner());
    let run = |custom: bool| {
        let [query, key, value] = leaves.clone().map(arrange);
        let (output, lse) = if custom {
            let attention = RingAttentionConfig::new().with_causal(causal).init();
            let ring = Ring::single(n).unwrap();
            let result = attention
                .try_forward_with_log_sum_exp(query, key, value, &ring)
                .unwrap();
            (result.output, result.log_sum_exp)
        } else {
            by_hand(query, key, value, causal)
        };
        let mut loss = Tensor::<1>::zeros([1], &device);
        if use_output {
            loss = loss + (output * Tensor::from_inner(weight.clone())).sum();
        }
        if use_lse {
            loss = loss + (lse.clone() * lse).sum();
        }
        let value = loss.clone().into_data();
        let mut gradients = loss.backward();
        let gradients = leaves
            .clone()
            .map(|leaf| leaf.grad_remove(&mut gradients).map(Tensor::into_data));
        (value, gradients)
    };
    let (got, expected) = (run(true), run(false));
    assert_close(got.0, expected.0);
    for (index, (got, expected)) in got.1.into_iter().zip(expected.1).enumerate() {
        match (got, expected) {
            (Some(got), Some(expected)) => assert_close(got, expected),
            // Without the output the values have no part in the loss: no gradient, or a zero one.
            (Some(got), None) => assert!(index == 2 && got.iter::<f32>().all(|x| x == 0.0)),
            (got, expected) => assert_eq!(got, expected),
        }
    }
}

#[test]
fn gradients_agree_with_materialised_attention() {
    for causal in [false, true] {
        for kv_heads in [4, 2, 1] {
            for layout in [Layout::Contiguous, Layout::Swapped, Layout::Transposed] {
                check_gradients(kv_heads, causal, layout, true, true);
            }
        }
    }
}

#[test]
fn either_output_may_go_unused() {
    check_gradients(2, true, Layout::Contiguous, true, false);
    check_gradients(2, true, Layout::Contiguous, false, true);
}

#[test]
fn untracked_inputs_get_no_gradient_and_others_theirs() {
    let device = Device::flex().autodiff();
    let query = draw([1, 2, 9, 4], &device).require_grad();
    let (key, value) = (draw([1, 2, 9, 4], &device), draw([1, 2, 9, 4], &device));
    let attention = RingAttentionConfig::new().init();
    let ring = Ring::single(9).unwrap();
    let output = attention.forward(query.clone(), key.clone(), value.clone(), &ring);
    let gradients = output.sum().backward();
    assert!(query.grad(&gradients).is_some());
    assert!(key.grad(&gradients).is_none());
    let plain = Device::flex();
    let (inner, _) = by_hand(
        query.clone().inner(),
        key.clone().inner(),
        value.clone().inner(),
        false,
    );
    for device in [&device, &plain] {
        let on = |tensor: &Tensor<4>| {
            let plain = tensor.clone().inner();
            if device.is_autodiff() {
                Tensor::from_inner(plain)
            } else {
                plain
            }
        };
        let output = attention.forward(on(&query), on(&key), on(&value), &ring);
        assert_close(output.into_data(), inner.clone().into_data());
    }
}

#[test]
fn sixteen_bit_inputs_give_sixteen_bit_outputs_and_gradients() {
    for dtype in [DType::BF16, DType::F16] {
        let device = Device::flex().autodiff();
        let make = || draw([1, 2, 33, 8], &device).cast(dtype);
        let (query, key, value) = (make(), make(), make());
        let query = query.detach().require_grad();
        let ring = Ring::single(33).unwrap();
        let result = RingAttentionConfig::new()
            .init()
            .try_forward_with_log_sum_exp(query.clone(), key.clone(), value.clone(), &ring)
            .unwrap();
        assert_eq!(
            (result.output.dtype(), result.log_sum_exp.dtype()),
            (dtype, DType::F32)
        );
        let wide = |tensor: &Tensor<4>| tensor.clone().inner().cast(DType::F32);
        let (expected, _) = by_hand(wide(&query), wide(&key), wide(&value), false);
        result
            .output
            .clone()
            .inner()
            .cast(DType::F32)
            .into_data()
            .assert_approx_eq::<f32>(&expected.into_data(), Tolerance::rel_abs(1e-2, 1e-2));
        let gradients = result.output.sum().backward();
        assert_eq!(query.grad(&gradients).unwrap().dtype(), dtype);
    }
}

/// Output and gradients of dilated attention over `ranks` ranks, whole.
fn over_ranks(
    ranks: usize,
    sharding: Sharding,
    n: usize,
    inputs: &[TensorData; 4],
) -> Vec<Vec<f32>> {
    let results = Loopback::run::<HostBuffer, _>(ranks, DEADLINE, |endpoint| {
        let ring = Ring::new(Communicator::new(Arc::new(endpoint)), sharding, n).unwrap();
        let own = |data: &TensorData| {
            let whole = Tensor::<4>::from_data(data.clone(), &Device::flex());
            Tensor::<4>::from_inner(shard_tensor(whole, 2, &ring).unwrap())
        };
        let [query, key, value, weight] = inputs.each_ref().map(own);
        let leaves = [query, key, value].map(Tensor::require_grad);
        let [query, key, value] = leaves.clone();
        let attention = DilatedAttentionConfig::new(vec![16, 64], vec![1, 2])
            .with_causal(true)
            .init();
        let output = attention.forward(query, key, value, &ring);
        let mut gradients = (output.clone() * weight).sum().backward();
        let parts = std::iter::once(output.inner())
            .chain(leaves.map(|leaf| leaf.grad_remove(&mut gradients).unwrap()))
            .map(|tensor| tensor.into_data().iter::<f32>().collect::<Vec<f32>>())
            .collect::<Vec<_>>();
        (ring.positions(), parts)
    });
    let (heads, dim) = (4, 8);
    let mut whole = vec![vec![f32::NAN; heads * n * dim]; 4];
    for result in results {
        let (positions, parts) = result.unwrap();
        for (whole, part) in whole.iter_mut().zip(parts) {
            for head in 0..heads {
                for (row, &position) in positions.iter().enumerate() {
                    whole[(head * n + position) * dim..][..dim]
                        .copy_from_slice(&part[(head * positions.len() + row) * dim..][..dim]);
                }
            }
        }
    }
    whole
}

#[test]
fn the_number_of_ranks_changes_neither_outputs_nor_gradients() {
    let n = 75;
    let inputs = [(); 4].map(|()| draw([1, 4, n, 8], &Device::flex()).into_data());
    let expected = over_ranks(1, Sharding::Contiguous, n, &inputs);
    for (ranks, sharding) in [
        (2, Sharding::Contiguous),
        (3, Sharding::Zigzag),
        (
            4,
            Sharding::Striped {
                chunk_size: Some(5),
            },
        ),
        (7, Sharding::Zigzag),
    ] {
        let got = over_ranks(ranks, sharding, n, &inputs);
        for (got, expected) in got.iter().zip(&expected) {
            for (got, expected) in got.iter().zip(expected) {
                assert!(
                    (got - expected).abs() < 1e-4,
                    "{got} {expected} at {ranks} ranks"
                );
            }
        }
    }
}

#[test]
fn ranks_without_positions_take_part() {
    let n = 3;
    let inputs = [(); 4].map(|()| draw([1, 4, n, 8], &Device::flex()).into_data());
    let expected = over_ranks(1, Sharding::Contiguous, n, &inputs);
    let got = over_ranks(5, Sharding::Contiguous, n, &inputs);
    for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
        assert!((got - expected).abs() < 1e-4);
    }
}

#[test]
fn gradient_checkpointing_does_not_repeat_the_exchange() {
    let n = 24;
    let inputs = [(); 3].map(|()| draw([1, 2, n, 8], &Device::flex()).into_data());
    let run = |device: Device| {
        let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let ring = Ring::new(communicator.clone(), Sharding::Zigzag, n).unwrap();
            let leaves = inputs.each_ref().map(|data| {
                let whole = Tensor::<4>::from_data(data.clone(), &Device::flex());
                let own = shard_tensor(whole, 2, &ring).unwrap();
                Tensor::<4>::from_data(own.into_data(), &device).require_grad()
            });
            let [query, key, value] = leaves.clone().map(|leaf| leaf * 2.0);
            let attention = RingAttentionConfig::new().with_causal(true).init();
            let output = attention.forward(query, key, value, &ring);
            let mut gradients = output.exp().sum().backward();
            let gradients =
                leaves.map(|leaf| leaf.grad_remove(&mut gradients).unwrap().into_data());
            (gradients, communicator.traffic().bytes_received)
        });
        results.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let plain = run(Device::flex().autodiff());
    let checkpointed = run(Device::flex().autodiff().gradient_checkpointing());
    for ((plain, bytes), (checkpointed, same_bytes)) in plain.into_iter().zip(checkpointed) {
        assert_eq!(bytes, same_bytes);
        for (plain, checkpointed) in plain.into_iter().zip(checkpointed) {
            assert_close(checkpointed, plain);
        }
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let device = Device::flex();
    let ring = Ring::single(16).unwrap();
    let attention = RingAttentionConfig::new().init();
    let make = |heads: usize, n: usize, dim: usize| draw([1, heads, n, dim], &device);
    let refused = |query, key, value| attention.try_forward(query, key, value, &ring).unwrap_err();
    let shape = |error: RingError| matches!(error, RingError::Shape { .. });
    assert!(shape(refused(
        make(2, 15, 4),
        make(2, 16, 4),
        make(2, 16, 4)
    )));
    assert!(shape(refused(
        make(2, 16, 4),
        make(2, 15, 4),
        make(2, 15, 4)
    )));
    assert!(shape(refused(
        make(2, 16, 4),
        make(2, 16, 5),
        make(2, 16, 5)
    )));
    assert!(shape(refused(
        make(2, 16, 4),
        make(2, 16, 4),
        make(1, 16, 4)
    )));
    assert!(matches!(
        refused(make(3, 16, 4), make(2, 16, 4), make(2, 16, 4)),
        RingError::Spec(_)
    ));
    assert!(matches!(
        refused(
            make(2, 16, 4).cast(DType::BF16),
            make(2, 16, 4),
            make(2, 16, 4)
        ),
        RingError::DType { .. }
    ));
    assert!(matches!(
        refused(
            make(2, 16, 4),
            Tensor::from_inner(make(2, 16, 4)),
            make(2, 16, 4)
        ),
        RingError::MixedAutodiff
    ));
    // Nothing is lost: the ring still serves.
    attention
        .try_forward(make(2, 16, 4), make(2, 16, 4), make(2, 16, 4), &ring)
        .unwrap();
}

#[test]
fn bad_configurations_are_refused() {
    for config in [
        DilatedAttentionConfig::new(vec![], vec![]),
        DilatedAttentionConfig::new(vec![8], vec![1, 2]),
        DilatedAttentionConfig::new(vec![0], vec![1]),
        DilatedAttentionConfig::new(vec![8], vec![0]),
        DilatedAttentionConfig::new(vec![8], vec![1]).with_scale(Some(f64::NAN)),
    ] {
        assert!(config.try_init().is_err(), "{config:?}");
    }
    assert!(
        RingAttentionConfig::new()
            .with_scale(Some(f64::INFINITY))
            .try_init()
            .is_err()
    );
}

#[test]
#[should_panic(expected = "RingAttention: query has shape [1, 2, 15, 4]")]
fn forward_panics_with_the_reason() {
    let make = || draw([1, 2, 15, 4], &Device::flex());
    let ring = Ring::single(16).unwrap();
    let _ = RingAttentionConfig::new()
        .init()
        .forward(make(), make(), make(), &ring);
}

#[test]
fn a_rank_that_panics_in_its_backward_ends_all_with_errors_that_name_it() {
    let results = Loopback::run::<HostBuffer, ()>(4, DEADLINE, |endpoint| {
        let device = Device::flex().autodiff();
        let ring = Ring::new(
            Communicator::new(Arc::new(endpoint)),
            Sharding::Contiguous,
            64,
        )
        .unwrap();
        let attention = RingAttentionConfig::new().init();
        let make = || draw([1, 2, ring.shard_len(), 8], &device).require_grad();
        let hidden = attention.forward(make(), make(), make(), &ring);
        let output = attention.forward(hidden.clone(), hidden.clone(), hidden, &ring);
        if ring.rank() == 2 {
            // Its peers are in the backward of the second layer by now, or will be.
            panic!("rank 2 has had enough");
        }
        let _ = output.sum().backward();
    });
    for (rank, result) in results.into_iter().enumerate() {
        let panic = result.unwrap_err();
        if rank == 2 {
            assert!(panic.message.contains("had enough"));
        } else {
            assert!(
                panic.message.contains("rank 2 panicked"),
                "rank {rank}: {}",
                panic.message
            );
        }
    }
}
