//! The loopback backend keeps the promises of a transport.

use std::{collections::HashSet, sync::Arc, time::Duration};

use proptest::prelude::*;
use ring_comm::{
    Communicator, Loopback, buffer::HostBuffer, collective::all_reduce_sum, conformance,
};

#[test]
fn loopback_conforms() {
    conformance::run_all(&Loopback);
}

#[test]
fn cases_have_names_of_their_own() {
    let names: Vec<_> = conformance::cases().map(|case| case.name).collect();
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
}

/// One vector per rank, all of one length.
fn vectors() -> impl Strategy<Value = Vec<Vec<f32>>> {
    (1..6usize, 0..12usize).prop_flat_map(|(world_size, len)| {
        prop::collection::vec(prop::collection::vec(any::<f32>(), len), world_size)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_are_sequential_sums_in_rank_order(vectors in vectors()) {
        let sums = Loopback::run::<HostBuffer, _>(vectors.len(), Duration::from_secs(60), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            all_reduce_sum(&communicator, vectors[communicator.rank()].clone()).unwrap()
        });
        let mut expected = vectors[0].clone();
        for vector in &vectors[1..] {
            expected.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for sum in sums {
            prop_assert_eq!(bits(&sum.unwrap()), bits(&expected));
        }
    }
}
