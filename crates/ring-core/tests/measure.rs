//! A machine that is measured is the same on all ranks.

use std::{sync::Arc, time::Duration};

use ring_comm::{Communicator, Loopback};
use ring_core::MachineModel;
use ring_kernels::CpuKernels;

#[test]
fn all_ranks_get_the_same_positive_figures() {
    for ranks in [1, 3] {
        let models = Loopback::run(ranks, Duration::from_secs(60), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            MachineModel::measure(&CpuKernels::new(1).unwrap(), &communicator).unwrap()
        });
        let models: Vec<MachineModel> = models.into_iter().map(Result::unwrap).collect();
        for model in &models {
            assert_eq!(*model, models[0]);
        }
        let model = models[0];
        assert!(model.forward_pair_seconds > 0.0 && model.forward_pair_seconds < 1e-6);
        assert!(model.backward_pair_seconds > model.forward_pair_seconds);
        assert!(model.copy_bytes_per_second > 1e6);
        assert!(model.bytes_per_second > 1e6);
        assert!((1.0..=ranks as f64).contains(&model.parallel_ranks));
    }
}
