//! Buffers of the device between ranks, by way of host memory.

use std::{sync::Arc, time::Duration};

#[cfg(feature = "emulated-cuda")]
use ring_comm::RankPanic;
use ring_comm::buffer::{DType, HostBuffer};
#[cfg(feature = "emulated-cuda")]
use ring_comm::conformance::{self, Backend, Hosted, RankBody, Staging};
use ring_comm::{Expected, Loopback, Payload, Staged, Tag, Transport};

use super::on_device::device;
use crate::{CubeBuffer, CubeKernels, Kernels};

const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);

/// Odd, so that messages of half-precision numbers are no whole number of words.
const LEN: usize = 33;

const EXPECTED: Expected = Expected {
    dtype: DType::F16,
    len: LEN,
};

#[test]
fn what_a_kernel_has_just_computed_reaches_a_kernel_of_another_rank() {
    let results = Loopback::run(2, Duration::from_secs(60), |endpoint| {
        let staged = Staged::<CubeBuffer>::new(Arc::new(endpoint), device());
        let kernels = CubeKernels::new(device()).unwrap();
        let (rank, peer) = (staged.rank(), 1 - staged.rank());
        let mut spare = None;
        for shift in 0..10 {
            let number = |rank: usize| (10 * rank + shift) as f32;
            let own = HostBuffer::F32(vec![number(rank); LEN]);
            let own = CubeBuffer::from_host(&device(), &own).unwrap();
            let own = kernels.round(own, DType::F16).unwrap();
            let receive = staged
                .irecv_into(peer, TAG, EXPECTED, spare.take())
                .unwrap();
            let send = staged.isend(peer, TAG, own).unwrap();
            let arrived = receive.wait().unwrap();
            let expected = HostBuffer::F16(vec![half::f16::from_f32(number(peer)); LEN]);
            assert_eq!(arrived.to_host().unwrap(), expected);
            let zeros = kernels.allocate(DType::F16, LEN, Some(arrived)).unwrap();
            assert_eq!(zeros.to_host().unwrap(), HostBuffer::zeros(DType::F16, LEN));
            spare = send.wait().unwrap().or(Some(zeros));
        }
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

/// The suite, whose messages are copied to the device, from there, and back at the other end. Some are of bf16.
#[cfg(feature = "emulated-cuda")]
struct OverTheDevice;

#[cfg(feature = "emulated-cuda")]
impl Backend for OverTheDevice {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        let results = Loopback::run(world_size, deadline, |endpoint| {
            let staged = Staged::<CubeBuffer>::new(Arc::new(endpoint), device());
            body(Arc::new(Hosted::new(staged, device())));
        });
        results.into_iter().filter_map(Result::err).collect()
    }

    fn max_world_size(&self) -> usize {
        4
    }

    fn staging(&self) -> Staging {
        Staging::CommonMemory
    }
}

#[cfg(feature = "emulated-cuda")]
#[test]
fn the_transport_conforms() {
    conformance::run_all(&OverTheDevice);
}
