//! Memory of the device, as CubeCL counts it: it grows with the length of the sequence, not with its square.

use burn::{
    backend::DispatchDevice,
    tensor::{Device, DeviceKind, Distribution, Tensor},
};
use ring_burn::{DilatedAttentionConfig, Ring, RingAttentionConfig};
use ring_kernels::cubecl::{MemoryScope, client::Client};

const HEADS: usize = 2;
const HEAD_DIM: usize = 32;
/// What a pool sets aside whatever is asked of it, in bytes.
const POOL: u64 = 8 << 20;

/// What the device has set aside for a forward and a backward pass, in bytes.
fn reserved(
    client: &Client,
    device: &Device,
    length: usize,
    pass: impl Fn([Tensor<4>; 3]) -> Tensor<4>,
) -> u64 {
    client.memory_cleanup().unwrap();
    let before = client.memory_report(MemoryScope::Device).usage();
    {
        let leaf = || {
            let shape = [1, HEADS, length, HEAD_DIM];
            Tensor::<4>::random(shape, Distribution::Default, device).require_grad()
        };
        let leaves = [leaf(), leaf(), leaf()];
        let mut gradients = pass(leaves.clone()).sum().backward();
        for leaf in leaves {
            let gradient = leaf.grad_remove(&mut gradients).unwrap();
            assert!(gradient.sum().into_scalar::<f32>().is_finite());
        }
    }
    let after = client.memory_report(MemoryScope::Device).usage();
    after.bytes_reserved.saturating_sub(before.bytes_reserved)
}

#[test]
fn memory_grows_with_the_length_and_not_with_its_square() {
    let device = Device::wgpu(DeviceKind::Cpu);
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        panic!("not a GPU: {device:?}");
    };
    let client = cube.client();
    let device = device.clone().autodiff();
    let full = |length: usize| {
        let ring = Ring::single(length).unwrap();
        let attention = RingAttentionConfig::new().with_causal(true).init();
        reserved(&client, &device, length, |[query, key, value]| {
            attention.forward(query, key, value, &ring)
        })
    };
    let dilated = |length: usize| {
        let ring = Ring::single(length).unwrap();
        let attention = DilatedAttentionConfig::new(vec![256, 1024], vec![1, 4]).init();
        reserved(&client, &device, length, |[query, key, value]| {
            attention.forward(query, key, value, &ring)
        })
    };
    // Kernels are compiled, and pools opened.
    full(64);
    dilated(64);
    for (name, measure, lengths) in [
        ("full", &full as &dyn Fn(usize) -> u64, [1024, 2048, 4096]),
        ("dilated", &dilated, [4096, 8192, 16384]),
    ] {
        let bytes = lengths.map(measure);
        println!("{name}: {lengths:?} positions, {bytes:?} bytes");
        let tensor = |length: usize| (HEADS * length * HEAD_DIM * size_of::<f32>()) as u64;
        for (length, bytes) in lengths.into_iter().zip(bytes) {
            // Query, key, value, output, its gradient, their gradients, sums, and what the pool rounds up to.
            assert!(
                bytes < 24 * tensor(length) + POOL,
                "{name}: {bytes} bytes for {length} positions, {} tensors",
                bytes / tensor(length)
            );
            let scores = (HEADS * length * length * size_of::<f32>()) as u64;
            assert!(
                bytes < scores / 2 || length < 2048,
                "{name}: {bytes} bytes, a score matrix has {scores}"
            );
        }
    }
}
