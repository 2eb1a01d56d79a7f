//! Modules that get a ring with a recovery go through it, forward and backward, and compute the same bits.

use std::{sync::Arc, time::Duration};

use burn::tensor::{Device, Tensor, TensorData};
use ring_burn::{
    Communicator, HostBuffer, Loopback, Recovery, RecoveryPolicy, RecoveryStatistics, Ring,
    RingAttentionConfig, Sharding,
};

const SEQUENCE: usize = 48;

/// Output and gradients of a rank.
fn attend(ring: &Ring) -> [TensorData; 4] {
    let device = Device::flex().autodiff();
    let shape = [1, 2, ring.shard_len(), 8];
    let tensor = |seed: usize| {
        let value = |i: usize| ((i * 37 + seed * 11 + ring.rank()) % 101) as f32 / 50.0 - 1.0;
        let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        Tensor::<4>::from_data(TensorData::new(values, shape), &device).require_grad()
    };
    let [query, key, value] = [1, 2, 3].map(tensor);
    let attention = RingAttentionConfig::new().with_causal(true).init();
    let output = attention.forward(query.clone(), key.clone(), value.clone(), ring);
    let gradients = (output.clone() * tensor(4)).sum().backward();
    let [query, key, value] =
        [query, key, value].map(|input| input.grad(&gradients).unwrap().into_data());
    [output.into_data(), query, key, value]
}

#[test]
fn a_ring_with_a_recovery_computes_the_same_and_counts() {
    let results = Loopback::run::<HostBuffer, _>(3, Duration::from_secs(60), |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Zigzag, SEQUENCE).unwrap();
        let plain = attend(&ring);
        let recovery = Recovery::new(RecoveryPolicy::default());
        let ring = ring.with_recovery(recovery.clone());
        assert!(ring.recovery().is_some());
        assert_eq!(attend(&ring), plain);
        recovery.statistics()
    });
    for statistics in results {
        let expected = RecoveryStatistics {
            passes: 2,
            ..RecoveryStatistics::default()
        };
        assert_eq!(statistics, Ok(expected));
    }
}
