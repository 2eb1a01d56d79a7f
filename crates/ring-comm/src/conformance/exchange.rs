//! Messages that arrive: order, matching, bounds, accounting.

use half::{bf16, f16};

use super::{Case, Endpoint, Stage, f32s, meet, receive, send, tag, telling};
use crate::{
    buffer::{Buffer, DType, HostBuffer},
    error::CommErrorKind,
    transport::{Expected, MAX_OUTSTANDING_SENDS, Payload, Rank, Tag, Traffic},
};

pub(super) const CASES: &[Case] = &[
    Case::messages(
        "a ring shift brings every buffer round",
        &[1, 2, 3, 4, 7],
        ring_shift,
    ),
    Case::messages(
        "a receive may bring memory, a send yields memory with room for its message or none",
        &[2, 3],
        memory_for_memory,
    ),
    Case::messages(
        "messages are matched by tag, whatever their order",
        &[2],
        out_of_tag_order,
    ),
    Case::messages(
        "messages with equal tags keep their order",
        &[2],
        equal_tags_in_order,
    ),
    Case::messages(
        "two rings with different tags do not mix",
        &[2, 3, 4],
        interleaved_rings,
    ),
    Case::messages(
        "every element type travels bit by bit",
        &[2],
        every_element_type,
    ),
    Case::messages("empty buffers are messages too", &[2], empty_buffers),
    Case::messages(
        "a posted receive takes its message without being waited for",
        &[2],
        posted_receives_take,
    ),
    Case::messages(
        "a full queue moves on when a message is taken",
        &[2],
        full_queue_moves_on,
    ),
    Case::common_memory(
        "untaken messages have a limit",
        &[2],
        untaken_messages_have_a_limit,
    ),
    Case::messages(
        "traffic counts payload bytes",
        &[2, 3],
        traffic_counts_payload,
    ),
    Case::messages(
        "many groups can be made one after the other",
        &[2],
        many_groups,
    ),
];

fn ring_shift(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
        let (next, previous) = (
            (rank + 1) % world_size,
            (rank + world_size - 1) % world_size,
        );
        let mut held = telling(rank);
        for hop in 1..world_size {
            let incoming = endpoint.irecv(previous, tag(hop as u32), f32s(1)).unwrap();
            let outgoing = endpoint.isend(next, tag(hop as u32), held).unwrap();
            held = incoming.wait().unwrap();
            outgoing.wait().unwrap();
            assert_eq!(held, telling((rank + world_size - hop) % world_size));
        }
        assert_eq!(endpoint.traffic().messages_received, world_size as u64 - 1);
    });
}

fn memory_for_memory(stage: &Stage<'_>) {
    const LEN: usize = 5;
    stage.run(|endpoint| {
        let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
        let (next, previous) = (
            (rank + 1) % world_size,
            (rank + world_size - 1) % world_size,
        );
        let message = |from: Rank| HostBuffer::F32(vec![from as f32; LEN]);
        for (step, spare) in [LEN, 3 * LEN].into_iter().enumerate() {
            // Its contents, and how much larger it is, must not matter.
            let memory = Some(HostBuffer::F32(vec![f32::NAN; spare]));
            let tag = tag(step as u32);
            let incoming = endpoint.irecv_into(previous, tag, f32s(LEN), memory);
            let outgoing = endpoint.isend(next, tag, message(rank)).unwrap();
            assert_eq!(incoming.unwrap().wait().unwrap(), message(previous));
            if let Some(memory) = outgoing.wait().unwrap() {
                assert!(memory.dtype() == DType::F32 && memory.capacity() >= LEN);
            }
        }
    });
}

fn out_of_tag_order(stage: &Stage<'_>) {
    const MESSAGES: u32 = 40;
    stage.run(|endpoint| {
        if endpoint.rank() == 0 {
            let isend = |step| {
                endpoint
                    .isend(1, tag(step), telling(step as usize))
                    .unwrap()
            };
            let sends: Vec<_> = (0..MESSAGES).map(isend).collect();
            sends
                .into_iter()
                .for_each(|send| assert!(send.wait().is_ok()));
        } else {
            let irecv = |step| (step, endpoint.irecv(0, tag(step), f32s(1)).unwrap());
            let receives: Vec<_> = (0..MESSAGES).rev().map(irecv).collect();
            let (even, odd): (Vec<_>, Vec<_>) =
                receives.into_iter().partition(|(step, _)| step % 2 == 0);
            for (step, receive) in even.into_iter().chain(odd) {
                assert_eq!(receive.wait().unwrap(), telling(step as usize));
            }
        }
    });
}

fn equal_tags_in_order(stage: &Stage<'_>) {
    const MESSAGES: usize = 20;
    stage.run(|endpoint| {
        if endpoint.rank() == 0 {
            let sends: Vec<_> = (0..MESSAGES)
                .map(|number| endpoint.isend(1, tag(0), telling(number)).unwrap())
                .collect();
            sends
                .into_iter()
                .for_each(|send| assert!(send.wait().is_ok()));
        } else {
            let receives: Vec<_> = (0..MESSAGES)
                .map(|_| endpoint.irecv(0, tag(0), f32s(1)).unwrap())
                .collect();
            for (number, receive) in receives.into_iter().enumerate().rev() {
                assert_eq!(
                    receive.wait().unwrap(),
                    telling(number),
                    "in the order posted, not waited for"
                );
            }
        }
    });
}

fn interleaved_rings(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
        let (next, previous) = (
            (rank + 1) % world_size,
            (rank + world_size - 1) % world_size,
        );
        let forth = tag(0);
        let back = Tag {
            payload: Payload::KeyValueGradient,
            ..forth
        };
        for _ in 1..world_size {
            let from_previous = endpoint.irecv(previous, forth, f32s(1)).unwrap();
            let from_next = endpoint.irecv(next, back, f32s(1)).unwrap();
            let to_previous = endpoint.isend(previous, back, telling(100 + rank)).unwrap();
            let to_next = endpoint.isend(next, forth, telling(rank)).unwrap();
            assert_eq!(from_next.wait().unwrap(), telling(100 + next));
            assert_eq!(from_previous.wait().unwrap(), telling(previous));
            to_next.wait().unwrap();
            to_previous.wait().unwrap();
        }
    });
}

fn every_element_type(stage: &Stage<'_>) {
    let buffers = [
        HostBuffer::F32(vec![f32::MIN_POSITIVE / 2.0, -0.0, f32::NEG_INFINITY]),
        HostBuffer::F16(vec![f16::MIN_POSITIVE_SUBNORMAL, f16::NEG_ZERO]),
        HostBuffer::BF16(vec![
            bf16::MIN_POSITIVE_SUBNORMAL,
            bf16::NEG_ZERO,
            bf16::MAX,
            bf16::ONE,
        ]),
    ];
    exchange_each(stage, &buffers);
}

fn empty_buffers(stage: &Stage<'_>) {
    exchange_each(
        stage,
        &[DType::F32, DType::F16, DType::BF16].map(|dtype| HostBuffer::zeros(dtype, 0)),
    );
}

/// Rank 0 sends every buffer to rank 1, which compares the bytes.
fn exchange_each(stage: &Stage<'_>, buffers: &[HostBuffer]) {
    stage.run(|endpoint| {
        for (step, buffer) in (0..).zip(buffers) {
            if endpoint.rank() == 0 {
                let send = endpoint.isend(1, tag(step), buffer.clone()).unwrap();
                send.wait().unwrap();
            } else {
                let expected = Expected {
                    dtype: buffer.dtype(),
                    len: buffer.len(),
                };
                let received = endpoint
                    .irecv(0, tag(step), expected)
                    .unwrap()
                    .wait()
                    .unwrap();
                assert_eq!(received.dtype(), buffer.dtype());
                assert_eq!(received.as_bytes(), buffer.as_bytes());
            }
        }
    });
}

fn posted_receives_take(stage: &Stage<'_>) {
    const MESSAGES: u32 = 2 * MAX_OUTSTANDING_SENDS as u32 + 1;
    stage.run(|endpoint| {
        if endpoint.rank() == 0 {
            meet(&endpoint, 0).unwrap();
            for step in 0..MESSAGES {
                send(&endpoint, 1, step, step as usize).unwrap();
            }
            meet(&endpoint, 1).unwrap();
        } else {
            let irecv = |step| endpoint.irecv(0, tag(step), f32s(1)).unwrap();
            let receives: Vec<_> = (0..MESSAGES).map(irecv).collect();
            meet(&endpoint, 0).unwrap();
            meet(&endpoint, 1).unwrap();
            for (number, receive) in receives.into_iter().enumerate() {
                assert_eq!(receive.wait().unwrap(), telling(number));
            }
        }
    });
}

fn full_queue_moves_on(stage: &Stage<'_>) {
    const MESSAGES: u32 = 5 * MAX_OUTSTANDING_SENDS as u32;
    stage.run(|endpoint| {
        if endpoint.rank() == 0 {
            let isend = |step| {
                endpoint
                    .isend(1, tag(step), telling(step as usize))
                    .unwrap()
            };
            let sends: Vec<_> = (0..MESSAGES).map(isend).collect();
            sends
                .into_iter()
                .for_each(|send| assert!(send.wait().is_ok()));
        } else {
            for step in 0..MESSAGES {
                assert_eq!(receive(&endpoint, 0, step).unwrap(), telling(step as usize));
            }
        }
    });
}

/// Rank 1 takes nothing before rank 0 has its error, so the send beyond the limit must wait in vain.
fn untaken_messages_have_a_limit(stage: &Stage<'_>) {
    let rank_0_has_its_error = std::sync::Barrier::new(2);
    stage.run_impatiently(|endpoint| {
        if endpoint.rank() == 1 {
            rank_0_has_its_error.wait();
            // What was sent before the failure may arrive; what waited in vain for room was never sent.
            let mut steps = 0..=MAX_OUTSTANDING_SENDS as u32;
            let error = steps.find_map(|step| receive(&endpoint, 0, step).err());
            assert_eq!(error.expect("the group has failed").culprit(), 1);
            return;
        }
        let isend = |step| endpoint.isend(1, tag(step), telling(0));
        let within_limit: Vec<_> = (0..MAX_OUTSTANDING_SENDS as u32).map(isend).collect();
        let beyond = isend(MAX_OUTSTANDING_SENDS as u32);
        rank_0_has_its_error.wait();

        assert!(within_limit.iter().all(Result::is_ok));
        let error = beyond.unwrap_err();
        assert_eq!(
            (error.peer, error.tag),
            (Some(1), Some(tag(MAX_OUTSTANDING_SENDS as u32)))
        );
        assert!(
            matches!(error.kind, CommErrorKind::Deadline { .. }),
            "{error}"
        );
        for send in within_limit {
            assert_eq!(send.unwrap().wait().unwrap_err(), error);
        }
    });
}

fn traffic_counts_payload(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let last = endpoint.world_size() - 1;
        if endpoint.rank() == 0 {
            let request = endpoint
                .isend(last, tag(0), HostBuffer::zeros(DType::F32, 3))
                .unwrap();
            request.wait().unwrap();
            let request = endpoint
                .isend(last, tag(1), HostBuffer::zeros(DType::BF16, 5))
                .unwrap();
            request.wait().unwrap();
        } else if endpoint.rank() == last {
            endpoint.irecv(0, tag(0), f32s(3)).unwrap().wait().unwrap();
            let halves = Expected {
                dtype: DType::BF16,
                len: 5,
            };
            endpoint.irecv(0, tag(1), halves).unwrap().wait().unwrap();
        }
        endpoint.all_gather_bytes(1, vec![0; 100]).unwrap();
        assert_eq!(endpoint.traffic(), expected_traffic(&endpoint, 22, 2));
    });
}

/// Rank 0 has sent, the last rank received, the others nothing; control data does not count.
fn expected_traffic(endpoint: &Endpoint, bytes: u64, messages: u64) -> Traffic {
    let nothing = Traffic::default();
    match endpoint.rank() {
        0 => Traffic {
            bytes_sent: bytes,
            messages_sent: messages,
            ..nothing
        },
        rank if rank == endpoint.world_size() - 1 => Traffic {
            bytes_received: bytes,
            messages_received: messages,
            ..nothing
        },
        _ => nothing,
    }
}

fn many_groups(stage: &Stage<'_>) {
    for number in 0..1000 {
        stage.run(|endpoint| {
            if endpoint.rank() == 0 {
                send(&endpoint, 1, 0, number).unwrap();
            } else {
                assert_eq!(receive(&endpoint, 0, 0).unwrap(), telling(number));
            }
        });
    }
}
