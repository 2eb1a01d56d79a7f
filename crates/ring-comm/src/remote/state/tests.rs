//! The rules, without threads: the ranks' states are in one place, and frames go from one to the other by hand.

use std::time::{Duration, Instant};

use super::*;
use crate::{
    attempt::panicked,
    buffer::{Buffer, HostBuffer},
    remote::wire::host_room_for,
    transport::{MAX_OUTSTANDING_SENDS, Payload},
};

const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);
const KEY: (GroupId, u64) = (GroupId::WHOLE, 7);

/// Ranks that have met; nothing else has happened.
fn ranks(world_size: usize) -> Vec<State<HostBuffer>> {
    let new = |rank| State::new(rank, world_size, 100, None);
    let mut ranks: Vec<State<HostBuffer>> = (0..world_size).map(new).collect();
    deliver_all(&mut ranks);
    assert!(
        ranks
            .iter()
            .all(|rank| matches!(rank.meet(), Attempt::Done(())))
    );
    ranks
}

/// Does what `rank` wants done on the wire. Data arrives at once where memory waits for it.
fn deliver(ranks: &mut [State<HostBuffer>], rank: Rank) {
    for output in ranks[rank].take_outputs() {
        match output {
            Output::Frame { peer, frame } => ranks[peer].hear(rank, frame, Instant::now()),
            Output::SendData {
                peer,
                sequence,
                buffer,
            } => ranks[rank].sent(peer, sequence, buffer),
            Output::ReceiveData {
                peer,
                sequence,
                expected,
                memory,
            } => {
                let buffer = host_room_for(expected, memory).unwrap();
                ranks[rank].received(peer, sequence, buffer, Instant::now());
            }
        }
    }
}

fn deliver_all(ranks: &mut [State<HostBuffer>]) {
    while let Some(rank) = ranks.iter().position(State::has_outputs) {
        deliver(ranks, rank);
    }
}

fn f32s(len: usize) -> Expected {
    Expected {
        dtype: DType::F32,
        len,
    }
}

fn send(state: &mut State<HostBuffer>, peer: Rank, len: usize) -> Option<Ticket> {
    let mut buffer = Some(HostBuffer::zeros(DType::F32, len));
    match state.send(peer, TAG, &mut buffer) {
        Attempt::Done(ticket) => Some(ticket),
        _ => None,
    }
}

fn gather(state: &mut State<HostBuffer>, part: &mut Option<Vec<u8>>) -> Attempt<Vec<Vec<u8>>> {
    let everybody: Vec<Rank> = (0..state.world_size()).collect();
    state.all_gather(KEY, &everybody, part)
}

#[test]
fn only_taken_messages_make_room() {
    let mut ranks = ranks(2);
    for _ in 0..MAX_OUTSTANDING_SENDS {
        assert!(send(&mut ranks[0], 1, 1).is_some());
    }
    deliver_all(&mut ranks);
    assert_eq!(
        send(&mut ranks[0], 1, 1),
        None,
        "the data has left, but nobody took it"
    );
    assert_eq!(ranks[1].untaken(0), [TAG; MAX_OUTSTANDING_SENDS]);

    ranks[1].post(0, TAG, f32s(1), None);
    deliver_all(&mut ranks);
    assert!(send(&mut ranks[0], 1, 1).is_some());
}

#[test]
fn a_departure_does_not_take_back_what_is_on_its_way() {
    let mut ranks = ranks(2);
    let receive = ranks[1].post(0, TAG, f32s(1), None);
    let send = send(&mut ranks[0], 1, 1).unwrap();
    ranks[0].depart();
    let now = Instant::now();
    for output in ranks[0].take_outputs() {
        if let Output::Frame { frame, .. } = output {
            ranks[1].hear(0, frame, now);
        }
    }
    assert!(ranks[1].has_departed(0));
    assert!(matches!(ranks[1].collect(0, receive), Attempt::Underway(0)));
    deliver_all(&mut ranks);
    assert!(matches!(ranks[1].collect(0, receive), Attempt::Done(_)));
    assert!(matches!(ranks[0].finish(1, send), Attempt::Underway(1)));
    ranks[0].sent(1, send, HostBuffer::zeros(DType::F32, 1));
    assert!(matches!(ranks[0].finish(1, send), Attempt::Done(_)));
}

#[test]
fn what_is_not_expected_is_not_taken() {
    let mut ranks = ranks(2);
    let send = send(&mut ranks[0], 1, 2).unwrap();
    deliver_all(&mut ranks);
    let receive = ranks[1].post(0, TAG, f32s(3), None);
    assert!(!ranks[1].has_outputs());
    assert!(matches!(
        ranks[1].collect(0, receive),
        Attempt::Failed(CommErrorKind::SizeMismatch {
            expected_len: 3,
            got_len: 2,
            ..
        })
    ));
    assert!(matches!(ranks[0].finish(1, send), Attempt::Blocked(1)));
}

#[test]
fn a_receive_uses_the_memory_it_brings_if_that_fits() {
    let mut ranks = ranks(2);
    // What was brought is told by its capacity: its address may be that of new memory too.
    for (memory, capacity) in [
        (HostBuffer::zeros(DType::F32, 9), 9),
        (HostBuffer::zeros(DType::F32, 2), 3),
        (HostBuffer::zeros(DType::BF16, 9), 3),
    ] {
        send(&mut ranks[0], 1, 3).unwrap();
        deliver_all(&mut ranks);
        let receive = ranks[1].post(0, TAG, f32s(3), Some(memory));
        deliver_all(&mut ranks);
        let Attempt::Done((buffer, _)) = ranks[1].collect(0, receive) else {
            panic!("it has arrived");
        };
        assert_eq!((buffer.dtype(), buffer.len()), (DType::F32, 3));
        assert_eq!(buffer.capacity(), capacity);
    }
}

/// Rank 1 fails because of what it got in an all-gather; rank 2 hears of it before it has heard of rank 0's part.
#[test]
fn an_all_gather_that_succeeded_for_the_one_that_fails_succeeds_for_all() {
    let mut ranks = ranks(3);
    let mut parts: Vec<_> = (0..3u8).map(|rank| Some(vec![rank])).collect();
    for rank in 0..3 {
        assert!(matches!(
            gather(&mut ranks[rank], &mut parts[rank]),
            Attempt::Blocked(_)
        ));
    }
    // What rank 0 tells rank 2 stays on its way.
    let mut late = Vec::new();
    for output in ranks[0].take_outputs() {
        match output {
            Output::Frame { peer: 1, frame } => ranks[1].hear(0, frame, Instant::now()),
            other => late.push(other),
        }
    }
    deliver(&mut ranks, 2);
    deliver(&mut ranks, 1);
    assert!(matches!(
        gather(&mut ranks[1], &mut parts[1]),
        Attempt::Done(_)
    ));
    ranks[1].poison(panicked(1), Instant::now());
    deliver_all(&mut ranks);

    assert_eq!(ranks[2].cause(), Some(&panicked(1)));
    let Attempt::Done(all) = gather(&mut ranks[2], &mut parts[2]) else {
        panic!("it must succeed");
    };
    assert_eq!(all, [[0], [1], [2]]);
    assert_eq!(late.len(), 1);
}

/// Rank 0 has given up an all-gather; its part, which is there, must not let rank 1 through.
#[test]
fn an_all_gather_that_was_given_up_does_not_succeed_later() {
    let mut ranks = ranks(2);
    assert!(matches!(
        gather(&mut ranks[0], &mut Some(vec![0])),
        Attempt::Blocked(1)
    ));
    deliver_all(&mut ranks);
    ranks[0].poison(panicked(0), Instant::now());
    deliver_all(&mut ranks);
    assert!(matches!(
        gather(&mut ranks[1], &mut Some(vec![1])),
        Attempt::Blocked(0)
    ));
}

#[test]
fn of_two_failures_at_once_the_ranks_settle_on_one() {
    let mut ranks = ranks(3);
    for rank in [1, 2] {
        ranks[rank].poison(panicked(rank), Instant::now());
        assert_eq!(ranks[rank].cause(), None, "rank 0 has not decided yet");
    }
    deliver(&mut ranks, 2);
    deliver_all(&mut ranks);
    for state in &ranks {
        assert_eq!(state.cause(), Some(&panicked(2)));
    }
}

/// Two deadlines have passed at the same moment.
#[test]
fn ranks_that_blame_each_other_settle_on_one_failure() {
    let mut ranks = ranks(3);
    for (rank, peer) in [(0, 1), (1, 0), (2, 1)] {
        ranks[rank].poison(blaming(rank, peer), Instant::now());
    }
    deliver_all(&mut ranks);
    ranks[0].tick(Instant::now() + HEARING);
    deliver_all(&mut ranks);
    let cause = ranks[0].cause().cloned();
    assert!(cause.is_some());
    assert!(ranks.iter().all(|rank| rank.cause() == cause.as_ref()));
}

/// Rank 0 waits for rank 2, which waits for rank 1, which does not wait for anybody.
#[test]
fn who_is_waited_for_and_does_not_wait_is_to_blame() {
    for order in [[0, 2], [2, 0]] {
        let mut ranks = ranks(3);
        for rank in order {
            let peer = if rank == 0 { 2 } else { 1 };
            ranks[rank].poison(blaming(rank, peer), Instant::now());
            deliver_all(&mut ranks);
        }
        assert!(ranks.iter().all(|rank| rank.cause().is_none()));
        ranks[0].tick(Instant::now() + HEARING);
        deliver_all(&mut ranks);
        for state in &ranks {
            assert_eq!(state.cause(), Some(&blaming(2, 1)));
        }
    }
}

#[test]
fn judges_that_say_nothing_are_not_waited_for() {
    let mut ranks = ranks(3);
    let now = Instant::now();
    ranks[2].poison(panicked(2), now);
    ranks[2].tick(now + VERDICT_WITHIN);
    assert_eq!(ranks[2].cause(), None, "the next one is asked");
    ranks[2].tick(now + 2 * VERDICT_WITHIN - Duration::from_millis(1));
    assert_eq!(ranks[2].cause(), None);
    ranks[2].tick(now + 2 * VERDICT_WITHIN);
    assert_eq!(ranks[2].cause(), Some(&panicked(2)));
}

/// Rank 0 is stopped, say: what it is told stays where it is.
#[test]
fn the_next_rank_judges_when_the_first_says_nothing() {
    let mut ranks = ranks(3);
    let now = Instant::now();
    for rank in [1, 2] {
        ranks[rank].poison(blaming(rank, 0), now);
        ranks[rank].take_outputs();
    }
    ranks[2].tick(now + VERDICT_WITHIN);
    deliver(&mut ranks, 2);
    ranks[1].tick(now + VERDICT_WITHIN);
    ranks[1].tick(Instant::now() + VERDICT_WITHIN + HEARING);
    deliver(&mut ranks, 1);
    for rank in [1, 2] {
        assert_eq!(ranks[rank].cause(), Some(&blaming(2, 0)));
    }
}

fn blaming(rank: Rank, peer: Rank) -> CommError {
    let kind = CommErrorKind::Deadline {
        deadline: Duration::ZERO,
        pending: Vec::new(),
    };
    CommError::new(rank, Some(peer), None, kind)
}

#[test]
fn the_next_rank_judges_when_the_first_is_gone() {
    let mut ranks = ranks(3);
    let now = Instant::now();
    ranks[2].poison(panicked(2), now);
    ranks[2].hear(0, Frame::Depart, now);
    deliver(&mut ranks, 2);
    deliver(&mut ranks, 1);
    assert_eq!(ranks[1].cause(), Some(&panicked(2)));
    assert_eq!(ranks[2].cause(), Some(&panicked(2)));
}

#[test]
fn a_lost_rank_is_a_failure_and_a_departed_one_is_not() {
    let mut ranks = ranks(3);
    let now = Instant::now();
    ranks[0].hear(1, Frame::Depart, now);
    ranks[0].lost(1, "staged", now);
    assert_eq!(ranks[0].cause(), None);
    ranks[0].lost(2, "staged", now);
    let cause = ranks[0].cause().unwrap();
    assert_eq!((cause.rank, cause.culprit()), (0, 2));
    assert!(matches!(&cause.kind, CommErrorKind::PeerLost { reason } if reason == "staged"));
}

#[test]
fn a_rank_of_a_group_of_another_size_is_refused() {
    let mut state = State::<HostBuffer>::new(0, 2, 0, None);
    let hello = Frame::Hello {
        world_size: 3,
        process: None,
    };
    state.hear(1, hello, Instant::now());
    let cause = state.cause().unwrap();
    assert_eq!(cause.culprit(), 1);
    assert!(
        cause.to_string().contains("a group of 3 ranks, not of 2"),
        "{cause}"
    );
}

#[test]
fn a_rank_whose_wire_fails_blames_itself() {
    let mut ranks = ranks(2);
    ranks[1].broken("no memory", Instant::now());
    deliver_all(&mut ranks);
    for state in &ranks {
        let cause = state.cause().unwrap();
        assert_eq!((cause.rank, cause.culprit()), (1, 1));
        assert!(cause.to_string().contains("no memory"), "{cause}");
    }
}
