//! How long a large message takes, both ways at once.

use std::time::Instant;

use ring_comm::{
    Expected, Payload, Tag, Tcp, Transport,
    buffer::{DType, HostBuffer},
};

use crate::{PATIENT, launch, processes::launch::report};

/// A task: two ranks give each other a large message, again and again.
pub(crate) const SHIFT: &str = "shift";
const BYTES: usize = 64 << 20;
const TIMES: u32 = 10;

pub(crate) fn report_figure() {
    let outcome = launch(SHIFT, 2);
    outcome.expect_success();
    (0..2).for_each(|rank| println!("    rank {rank}: {}", outcome.finding(rank)));
}

pub(crate) fn time(tcp: &Tcp) {
    let endpoint = tcp.group(PATIENT).unwrap();
    let peer = 1 - endpoint.rank();
    let expected = Expected {
        dtype: DType::F32,
        len: BYTES / 4,
    };
    let buffer = || HostBuffer::F32(vec![1.0; BYTES / 4]);
    let (mut own, mut memory) = (Some(buffer()), Some(buffer()));
    let mut times = Vec::new();
    for step in 0..TIMES {
        endpoint.all_gather_bytes(step.into(), Vec::new()).unwrap();
        let tag = Tag::new(0, step, Payload::KeyValue);
        let start = Instant::now();
        let receive = endpoint.irecv_into(peer, tag, expected, memory.take());
        let send = endpoint.isend(peer, tag, own.take().unwrap()).unwrap();
        memory = Some(receive.unwrap().wait().unwrap());
        own = send.wait().unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    let best = times[0].as_secs_f64() * 1e3;
    let median = times[times.len() / 2].as_secs_f64() * 1e3;
    report(
        endpoint.rank(),
        &format!("best {best:.1} ms, median {median:.1} ms"),
    );
}
