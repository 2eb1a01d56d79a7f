//! The suite over [`Staged`], with a device that is none, and what it copies and allocates.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::{
    buffer::{DType, HostView},
    communicator::Communicator,
    conformance::{self, Backend, Hosted, RankBody, Staging as Common},
    loopback::{Loopback, RankPanic},
    transport::Payload,
};

/// Counts what happens on it; can be out of order.
#[derive(Debug, Default)]
struct Device {
    allocations: AtomicUsize,
    copies_in: AtomicUsize,
    copies_out: AtomicUsize,
}

/// Memory of that device.
#[derive(Debug)]
struct DeviceBuffer {
    contents: HostBuffer,
    capacity: usize,
    device: Arc<Device>,
}

impl Buffer for DeviceBuffer {
    type View<'a> = HostView<'a>;

    fn dtype(&self) -> DType {
        self.contents.dtype()
    }

    fn len(&self) -> usize {
        self.contents.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn view(&self) -> HostView<'_> {
        self.contents.view()
    }

    fn shorten<'short, 'long: 'short>(view: HostView<'long>) -> HostView<'short> {
        view
    }
}

/// A device that cannot copy this value.
const UNCOPYABLE: f32 = -77.0;

impl Staging for DeviceBuffer {
    type Device = Arc<Device>;
    type Error = &'static str;

    fn copy_to_host(&self, host: &mut HostBuffer) -> Result<(), Self::Error> {
        assert_eq!((host.dtype(), host.len()), (self.dtype(), self.len()));
        self.device.copies_out.fetch_add(1, Ordering::SeqCst);
        host.as_bytes_mut()
            .copy_from_slice(self.contents.as_bytes());
        refuse(host)
    }

    fn copy_from_host(
        device: &Arc<Device>,
        host: &HostBuffer,
        memory: Option<Self>,
    ) -> Result<Self, Self::Error> {
        device.copies_in.fetch_add(1, Ordering::SeqCst);
        let will_do =
            |memory: &Self| memory.dtype() == host.dtype() && memory.capacity >= host.len();
        let capacity = match memory.filter(will_do) {
            Some(memory) => memory.capacity,
            None => {
                device.allocations.fetch_add(1, Ordering::SeqCst);
                host.len()
            }
        };
        Ok(Self {
            contents: host.clone(),
            capacity,
            device: Arc::clone(device),
        })
    }
}

fn refuse(host: &HostBuffer) -> Result<(), &'static str> {
    match host.as_f32() {
        Some([UNCOPYABLE, ..]) => Err("staged"),
        _ => Ok(()),
    }
}

type Endpoint = Staged<DeviceBuffer>;

/// Loopback for host memory, for devices, for host memory again.
struct StagedLoopback;

impl Backend for StagedLoopback {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        let run = |endpoint| {
            let device = Arc::new(Device::default());
            let staged = Endpoint::new(Arc::new(endpoint), Arc::clone(&device));
            body(Arc::new(Hosted::new(staged, device)));
        };
        let results = Loopback::run(world_size, deadline, run);
        results.into_iter().filter_map(Result::err).collect()
    }

    fn max_world_size(&self) -> usize {
        usize::MAX
    }

    fn staging(&self) -> Common {
        Common::CommonMemory
    }
}

#[test]
fn staged_loopback_conforms() {
    conformance::run_all(&StagedLoopback);
}

const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);
const LEN: usize = 5;
const EXPECTED: Expected = Expected {
    dtype: DType::F32,
    len: LEN,
};

/// One copy out of the device for a send, one into it for a receive, into what was brought; host memory is the same all the time.
#[test]
fn every_message_is_copied_once_each_way_and_nothing_is_allocated_twice() {
    const SHIFTS: usize = 20;
    let results = Loopback::run(2, Duration::from_secs(30), |endpoint| {
        let device = Arc::new(Device::default());
        let staged = Endpoint::new(Arc::new(endpoint), Arc::clone(&device));
        let (rank, peer) = (staged.rank(), 1 - staged.rank());
        let zeros = HostBuffer::zeros(DType::F32, LEN);
        let new = |host: &HostBuffer| DeviceBuffer::copy_from_host(&device, host, None).unwrap();
        let mut held = new(&HostBuffer::F32(vec![rank as f32; LEN]));
        let mut spare = Some(new(&zeros));
        let mut passing_through = Vec::new();
        for shift in 0..SHIFTS {
            let receive = staged
                .irecv_into(peer, TAG, EXPECTED, spare.take())
                .unwrap();
            let send = staged.isend(peer, TAG, held).unwrap();
            held = receive.wait().unwrap();
            spare = send.wait().unwrap();
            let from = (rank + shift + 1) % 2;
            assert_eq!(held.contents, HostBuffer::F32(vec![from as f32; LEN]));
            passing_through.push(staged.shared.host.bytes());
        }
        let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
        assert_eq!(count(&device.copies_out), SHIFTS);
        assert_eq!(count(&device.copies_in), 2 + SHIFTS);
        assert_eq!(count(&device.allocations), 2, "only the first two");
        let one_message = EXPECTED.len * EXPECTED.dtype.size();
        assert_eq!(passing_through, vec![2 * one_message; SHIFTS]);
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn a_copy_that_fails_poisons_the_group() {
    let results = Loopback::run(2, Duration::from_secs(30), |endpoint| {
        let device = Arc::new(Device::default());
        let staged = Endpoint::new(Arc::new(endpoint), Arc::clone(&device));
        if staged.rank() == 1 {
            let received = staged
                .irecv(0, TAG, EXPECTED)
                .and_then(|request| request.wait());
            return received.map(drop).unwrap_err();
        }
        let host = HostBuffer::F32(vec![UNCOPYABLE; LEN]);
        let buffer = DeviceBuffer::copy_from_host(&device, &host, None).unwrap();
        staged.isend(1, TAG, buffer).map(drop).unwrap_err()
    });
    for result in results {
        let error: CommError = result.unwrap();
        assert_eq!(error.culprit(), 0);
        assert!(
            error.to_string().contains("host and device: staged"),
            "{error}"
        );
        assert!(error.history().is_some());
    }
}

/// Ranks of which one has its buffers on a device and the other in host memory are in step, whichever of its communicators they use.
#[test]
fn host_and_device_communicators_of_a_group_count_together() {
    let results = Loopback::run(2, Duration::from_secs(30), |endpoint| {
        let host = Communicator::new(Arc::new(endpoint));
        let device = Arc::new(Device::default());
        let staged = host.staged::<DeviceBuffer>(Arc::clone(&device));
        let fields = [("answer".to_owned(), "42".to_owned())];
        let mut operations = vec![host.next_operation(), staged.next_operation()];
        if host.rank() == 0 {
            staged.agree_once("a question", &fields).unwrap();
        } else {
            host.agree_once("a question", &fields).unwrap();
        }
        // Known to both by now: no messages.
        host.agree_once("a question", &fields).unwrap();
        staged.agree_once("a question", &fields).unwrap();
        operations.push(host.next_operation());
        operations
    });
    for result in results {
        assert_eq!(result.unwrap(), [0, 1, 3]);
    }
}
