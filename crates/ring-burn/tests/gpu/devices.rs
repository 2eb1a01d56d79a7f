//! What tensors on a device are like before and after: lazily computed, slices of others, on the wrong device, of a type that the
//! device does not have.

use std::sync::Arc;

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use ring_burn::{
    Communicator, CubeBuffer, CubeDevice, DilatedAttentionConfig, HostBuffer, Loopback, Ring,
    RingAttentionConfig, RingError, Sharding,
};

use super::{DEADLINE, distance, gpu, numbers, upload};

const SHAPE: [usize; 4] = [2, 3, 41, 8];

fn draw() -> TensorData {
    Tensor::<4>::random(SHAPE, Distribution::Default, &Device::flex()).into_data()
}

/// Attention between operations that a backend may put off, of inputs that are parts of other tensors; results and gradients.
fn surrounded(inputs: &[TensorData; 3], device: &Device) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let leaves = inputs
        .each_ref()
        .map(|data| upload(data, &device).require_grad());
    let [query, key, value] = leaves.clone();
    let n = SHAPE[2] - 4;
    // Rows 3 to n + 3, a lazy sum, and a tensor whose last dimension is not contiguous.
    let query = (query * 1.5 + 0.25).narrow(2, 3, n);
    let key = key.narrow(2, 1, n).exp() - 1.0;
    let value = value
        .transpose()
        .mul_scalar(2.0)
        .transpose()
        .narrow(2, 0, n);
    let attention = DilatedAttentionConfig::new(vec![8, 64], vec![1, 2])
        .with_causal(true)
        .init();
    let ring = Ring::single(n).unwrap();
    let result = attention
        .try_forward_with_log_sum_exp(query, key, value, &ring)
        .unwrap();
    let output = (result.output * 3.0).tanh();
    let loss = output.clone().sum() + result.log_sum_exp.powf_scalar(2.0).mean();
    let mut gradients = loss.clone().backward();
    let mut results = vec![numbers(output), numbers(loss)];
    results.extend(leaves.map(|leaf| numbers(leaf.grad_remove(&mut gradients).unwrap())));
    results
}

#[test]
fn operations_before_and_after_fit() {
    let inputs = [draw(), draw(), draw()];
    let expected = surrounded(&inputs, &Device::flex());
    let got = surrounded(&inputs, &gpu());
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let expected: Vec<f64> = expected.iter().map(|&number| number.into()).collect();
        let distance = distance(got, &expected);
        assert!(distance < 1e-5, "result {index} is off by {distance:e}");
    }
}

#[test]
fn tensors_on_different_devices_are_refused() {
    let on = |device: &Device| upload(&draw(), device);
    let attention = RingAttentionConfig::new().init();
    let ring = Ring::single(SHAPE[2]).unwrap();
    let error = attention
        .try_forward(on(&gpu()), on(&gpu()), on(&Device::flex()), &ring)
        .unwrap_err();
    assert!(
        matches!(error, RingError::Device { what: "value", .. }),
        "{error}"
    );
}

/// Lavapipe has no bf16: all ranks are told, also those that have.
#[test]
fn a_type_that_one_device_does_not_have_ends_all_ranks() {
    let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Contiguous, 2 * SHAPE[2]).unwrap();
        let device = [gpu(), Device::flex()][ring.rank()].clone();
        let data = draw().convert_dtype(DType::BF16);
        let tensor = || upload(&data, &device);
        let attention = RingAttentionConfig::new().init();
        let result = attention.try_forward(tensor(), tensor(), tensor(), &ring);
        result.unwrap_err().to_string()
    });
    for result in results {
        let error = result.unwrap();
        assert!(error.contains("bf16"), "{error}");
    }
}

fn cube_client(device: &Device) -> ring_kernels::cubecl::client::Client {
    match device.as_dispatch() {
        burn::backend::DispatchDevice::Cube(device) => device.client(),
        other => panic!("not a GPU: {other:?}"),
    }
}

/// Tensors of a device may have a communicator of their own.
#[test]
fn a_communicator_of_the_device_is_used() {
    let data = [draw(), draw(), draw()];
    let run = |own: bool| {
        let control = Loopback::group::<HostBuffer>(2, DEADLINE);
        let device = CubeDevice::new(cube_client(&gpu()));
        let mut of_device: Vec<_> = Loopback::group::<CubeBuffer>(2, DEADLINE)
            .into_iter()
            .map(Some)
            .collect();
        std::thread::scope(|scope| {
            let ranks: Vec<_> = control
                .into_iter()
                .zip(of_device.iter_mut())
                .map(|(control, of_device)| {
                    let (data, device) = (&data, device.clone());
                    let of_device = of_device.take().unwrap();
                    scope.spawn(move || {
                        let control = Communicator::new(Arc::new(control));
                        let mut ring =
                            Ring::new(control.clone(), Sharding::Contiguous, 2 * SHAPE[2]).unwrap();
                        let of_device = Communicator::new(Arc::new(of_device));
                        if own {
                            ring = ring
                                .with_device_communicator(device, of_device.clone())
                                .unwrap();
                        }
                        let [query, key, value] = data.each_ref().map(|data| upload(data, &gpu()));
                        let attention = RingAttentionConfig::new().init();
                        let output = attention.forward(query, key, value, &ring);
                        let sent = |traffic: ring_comm::Traffic| traffic.bytes_sent;
                        (
                            numbers(output),
                            sent(control.traffic()),
                            sent(of_device.traffic()),
                        )
                    })
                })
                .collect();
            ranks
                .into_iter()
                .map(|rank| rank.join().unwrap())
                .collect::<Vec<_>>()
        })
    };
    let (staged, direct) = (run(false), run(true));
    for (staged, direct) in staged.iter().zip(&direct) {
        assert_eq!(staged.0, direct.0);
        assert!(staged.1 > 0 && staged.2 == 0);
        assert!(direct.1 == 0 && direct.2 == staged.1);
    }
}

#[test]
fn a_communicator_of_another_group_is_refused() {
    let device = CubeDevice::new(cube_client(&gpu()));
    let [_first, second]: [_; 2] = Loopback::group::<CubeBuffer>(2, DEADLINE)
        .try_into()
        .unwrap();
    let communicator = Communicator::new(Arc::new(second));
    let ring = Ring::single(8).unwrap();
    let error = ring
        .with_device_communicator(device, communicator)
        .unwrap_err();
    assert!(error.to_string().contains("rank 1 of 2"), "{error}");
}
