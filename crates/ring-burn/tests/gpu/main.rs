//! The Burn modules on a GPU backend: on wgpu's CPU adapter (Mesa's lavapipe), with Burn's fusion if that is compiled in.

mod devices;
#[path = "../judged/mod.rs"]
mod judged;
mod random;

use std::time::Duration;

use burn::tensor::{Device, DeviceKind, Tensor, TensorData};

/// Software rendering takes its time.
const DEADLINE: Duration = Duration::from_secs(300);

/// The device.
fn gpu() -> Device {
    Device::wgpu(DeviceKind::Cpu)
}

fn upload(data: &TensorData, device: &Device) -> Tensor<4> {
    Tensor::from_data(data.clone(), (device, data.dtype()))
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// `||got - expected|| / ||expected||`; where one is infinite both are.
fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &expected) in got.iter().zip(expected) {
        let got = f64::from(got);
        if got.is_infinite() || expected.is_infinite() {
            assert_eq!(got, expected);
            continue;
        }
        assert!(got.is_finite(), "got {got}, expected {expected}");
        error += (got - expected).powi(2);
        norm += expected.powi(2);
    }
    error.sqrt() / norm.sqrt().max(1e-12)
}

#[test]
fn everything_together_is_what_the_oracle_says() {
    judged::everything_together(&gpu());
}

#[test]
fn cross_attention_is_what_the_oracle_says() {
    judged::cross_attention(&gpu());
}

#[test]
fn what_is_dropped_is_what_the_processor_drops() {
    judged::dropped_weights(&gpu());
}
