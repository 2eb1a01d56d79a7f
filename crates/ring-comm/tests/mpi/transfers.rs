//! Messages larger than what MPI takes at once.

use ring_comm::{
    Expected, Mpi, Payload, Tag, Transport,
    buffer::{DType, HostBuffer},
};

use crate::processes::PATIENT;

/// Sizes around those of one and of two chunks, both ways at once, several on their way.
pub(crate) fn in_chunks() {
    const CHUNK: usize = 64;
    let mpi = Mpi::init_with_chunks(PATIENT, CHUNK).unwrap();
    let endpoint = mpi.group(PATIENT).unwrap();
    let peer = 1 - endpoint.rank();
    let lens = [0, 1, 15, 16, 17, 31, 32, 33, 1000, 100_000];
    for (step, len) in (0..).zip(lens) {
        let tag = Tag::new(0, step, Payload::KeyValue);
        let message = |rank: usize| {
            let value = |index| (rank * 1_000_000 + index) as f32;
            HostBuffer::F32((0..len).map(value).collect())
        };
        let expected = Expected {
            dtype: DType::F32,
            len,
        };
        let receive = endpoint.irecv(peer, tag, expected).unwrap();
        let send = endpoint.isend(peer, tag, message(endpoint.rank())).unwrap();
        assert_eq!(receive.wait().unwrap(), message(peer));
        assert_eq!(send.wait().unwrap(), Some(message(endpoint.rank())));
    }
}

/// More bytes than MPI can count, and more than two true chunks.
pub(crate) fn large() {
    const LEN: usize = (1 << 30) + 1000;
    let mpi = Mpi::init(PATIENT).unwrap();
    let endpoint = mpi.group(PATIENT).unwrap();
    let tag = Tag::new(0, 0, Payload::KeyValue);
    let bits = |index: usize| half::bf16::from_bits((index % 65_521) as u16);
    if endpoint.rank() == 0 {
        let message = HostBuffer::BF16((0..LEN).map(bits).collect());
        endpoint.isend(1, tag, message).unwrap().wait().unwrap();
    } else {
        let expected = Expected {
            dtype: DType::BF16,
            len: LEN,
        };
        let received = endpoint.irecv(0, tag, expected).unwrap().wait().unwrap();
        let HostBuffer::BF16(values) = received else {
            panic!("another type");
        };
        let differs = (0..LEN).find(|&index| values[index].to_bits() != bits(index).to_bits());
        assert_eq!(differs, None);
    }
}
