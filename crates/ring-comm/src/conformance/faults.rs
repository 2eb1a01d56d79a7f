//! Ranks that fail, leave, are slow or give up, and what the others see of it.

use std::sync::{Barrier, Mutex};

use super::{
    Case, Endpoint, IMPATIENT, Stage, assert_poisoned, f32s, meet, receive, send, tag, telling,
};
use crate::{
    buffer::HostBuffer,
    error::{CommError, CommErrorKind},
    transport::{MAX_OUTSTANDING_SENDS, Rank},
};

pub(super) const CASES: &[Case] = &[
    Case::common_memory("a panic reaches every rank", &[2, 3, 4], panic_reaches_all),
    Case::common_memory(
        "a panic with an open request is a panic",
        &[2],
        panic_with_open_request,
    ),
    Case::common_memory(
        "nothing can be received from a departed rank",
        &[2, 4],
        receive_from_departed,
    ),
    Case::common_memory(
        "nothing can be sent to a departed rank",
        &[2],
        send_to_departed,
    ),
    Case::common_memory(
        "a full queue ends with the departure of its rank",
        &[2],
        full_queue_of_departed,
    ),
    Case::common_memory(
        "a departed rank takes nothing more",
        &[2],
        departed_takes_nothing,
    ),
    Case::common_memory(
        "a departed rank is missed in an all-gather",
        &[2, 3],
        departed_in_all_gather,
    ),
    Case::common_memory(
        "what a departed rank sent arrives",
        &[2],
        departed_messages_arrive,
    ),
    Case::common_memory(
        "a slow rank is named, with what it sent instead",
        &[2],
        slow_peer,
    ),
    Case::messages(
        "an abort reaches every kind of wait",
        &[6],
        abort_reaches_every_wait,
    ),
    Case::messages(
        "an abort that races a message leaves the one or the other",
        &[2],
        abort_races_message,
    ),
    Case::messages(
        "of two failures at once all ranks see the same",
        &[2, 3, 4],
        two_failures,
    ),
    Case::messages(
        "of two deadlines at once all ranks see the same",
        &[2, 3, 4],
        two_deadlines,
    ),
    Case::messages("the first cause stays", &[3], first_cause_stays),
    Case::messages(
        "what a failed group has sent does not come in the next",
        &[2, 3],
        late_messages,
    ),
];

fn panic_reaches_all(stage: &Stage<'_>) {
    let culprit = stage.world_size - 1;
    let kind = CommErrorKind::Panicked { culprit };
    stage.run_with_panic_of(culprit, |endpoint| {
        if endpoint.rank() == culprit {
            panic!("staged");
        }
        // Each waits for the next, so that all but one wait for a rank that is alive.
        let error = receive(&endpoint, endpoint.rank() + 1, 0).unwrap_err();
        assert_poisoned(&endpoint, &error, culprit, &kind);
    });
}

/// Unwinding drops the request; that must not hide the panic.
fn panic_with_open_request(stage: &Stage<'_>) {
    let kind = CommErrorKind::Panicked { culprit: 1 };
    stage.run_with_panic_of(1, |endpoint| {
        if endpoint.rank() == 1 {
            let _open = endpoint.isend(0, tag(1), telling(0)).unwrap();
            panic!("staged");
        }
        let error = receive(&endpoint, 1, 0).unwrap_err();
        assert_poisoned(&endpoint, &error, 1, &kind);
    });
}

fn receive_from_departed(stage: &Stage<'_>) {
    expect_departed(stage, |endpoint, departed| {
        receive(endpoint, departed, 0).map(drop)
    });
}

fn send_to_departed(stage: &Stage<'_>) {
    let departed = Barrier::new(2);
    stage.run(|endpoint| {
        if endpoint.rank() == 1 {
            drop(endpoint);
            departed.wait();
            return;
        }
        departed.wait();
        // If the news has not come yet the send begins, in vain.
        let send = endpoint.isend(1, tag(0), telling(0));
        let error = send.and_then(|send| send.wait()).unwrap_err();
        assert_eq!((error.peer, error.tag), (Some(1), Some(tag(0))));
        assert_poisoned(&endpoint, &error, 1, &CommErrorKind::Departed);
    });
}

/// The queue is full, so the send may be waiting in the call itself when the peer leaves.
fn full_queue_of_departed(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        if endpoint.rank() == 1 {
            return meet(&endpoint, 0).unwrap();
        }
        let isend = |step| endpoint.isend(1, tag(step), telling(0));
        let full = (0..MAX_OUTSTANDING_SENDS as u32)
            .map(isend)
            .collect::<Result<Vec<_>, _>>();
        meet(&endpoint, 0).unwrap();
        let error = isend(MAX_OUTSTANDING_SENDS as u32).unwrap_err();
        assert_poisoned(&endpoint, &error, 1, &CommErrorKind::Departed);
        for send in full.unwrap() {
            assert_eq!(send.wait().unwrap_err(), error);
        }
    });
}

/// The send was accepted while the peer was there.
fn departed_takes_nothing(stage: &Stage<'_>) {
    let sent = Barrier::new(2);
    stage.run(|endpoint| {
        if endpoint.rank() == 1 {
            sent.wait();
            return;
        }
        let request = endpoint.isend(1, tag(0), telling(0));
        sent.wait();
        let error = request.unwrap().wait().unwrap_err();
        assert_eq!((error.peer, error.tag), (Some(1), Some(tag(0))));
        assert_poisoned(&endpoint, &error, 1, &CommErrorKind::Departed);
    });
}

fn departed_in_all_gather(stage: &Stage<'_>) {
    expect_departed(stage, |endpoint, _| meet(endpoint, 0));
}

/// The last rank leaves at once; the others need something from it.
fn expect_departed(
    stage: &Stage<'_>,
    act: impl Fn(&Endpoint, Rank) -> Result<(), CommError> + Sync,
) {
    let departed = stage.world_size - 1;
    stage.run(|endpoint| {
        if endpoint.rank() == departed {
            return;
        }
        let error = act(&endpoint, departed).unwrap_err();
        assert_eq!(error.root().peer, Some(departed));
        assert_poisoned(&endpoint, &error, departed, &CommErrorKind::Departed);
    });
}

fn departed_messages_arrive(stage: &Stage<'_>) {
    let departed = Barrier::new(2);
    stage.run(|endpoint| {
        if endpoint.rank() == 1 {
            let request = endpoint.isend(0, tag(0), telling(7));
            drop(endpoint);
            departed.wait();
            request.unwrap().wait().unwrap();
            return;
        }
        departed.wait();
        assert_eq!(receive(&endpoint, 1, 0).unwrap(), telling(7));
        assert_eq!(
            endpoint.poisoned(),
            None,
            "a departure by itself is no failure"
        );
    });
}

/// Rank 1 sends another message and then nothing before rank 0 has its error.
fn slow_peer(stage: &Stage<'_>) {
    let other_message_sent = Barrier::new(2);
    let rank_0_has_its_error = Barrier::new(2);
    let kind = CommErrorKind::Deadline {
        deadline: IMPATIENT,
        pending: vec![tag(7)],
    };
    stage.run_impatiently(|endpoint| {
        let error = if endpoint.rank() == 1 {
            let other = endpoint.isend(0, tag(7), telling(0));
            other_message_sent.wait();
            rank_0_has_its_error.wait();
            other.unwrap().wait().unwrap_err()
        } else {
            other_message_sent.wait();
            let result = receive(&endpoint, 1, 1);
            rank_0_has_its_error.wait();
            let error = result.unwrap_err();
            assert_eq!((error.peer, error.tag), (Some(1), Some(tag(1))));
            error
        };
        assert_poisoned(&endpoint, &error, 1, &kind);
    });
}

/// Rank 5 aborts; the others wait for a message, for room, for a message to be taken, for an all-gather, for a rank that
/// waits itself.
fn abort_reaches_every_wait(stage: &Stage<'_>) {
    let kind = aborted(5, "staged");
    stage.run(|endpoint| {
        let pending = endpoint
            .irecv((endpoint.rank() + 1) % 6, tag(99), f32s(1))
            .unwrap();
        meet(&endpoint, 0).unwrap();
        let error = match endpoint.rank() {
            0 => receive(&endpoint, 5, 0).unwrap_err(),
            1 => send_without_end(&endpoint, 0),
            2 => send(&endpoint, 0, 0, 0).unwrap_err(),
            3 => meet(&endpoint, 1).unwrap_err(),
            4 => receive(&endpoint, 3, 0).unwrap_err(),
            _ => {
                endpoint.abort("staged");
                endpoint.poisoned().expect("an abort poisons")
            }
        };
        assert_poisoned(&endpoint, &error, 5, &kind);
        assert_eq!(pending.wait().unwrap_err().root(), error.root());
    });
}

fn send_without_end(endpoint: &Endpoint, peer: Rank) -> CommError {
    let mut requests = Vec::new();
    loop {
        match endpoint.isend(peer, tag(0), telling(0)) {
            Ok(request) => requests.push(request),
            Err(error) => return error,
        }
        assert!(requests.len() <= MAX_OUTSTANDING_SENDS);
    }
}

fn abort_races_message(stage: &Stage<'_>) {
    for _ in 0..200 {
        let kind = aborted(0, "staged");
        stage.run(|endpoint| {
            if endpoint.rank() == 0 {
                let request = endpoint.isend(1, tag(0), telling(3)).unwrap();
                endpoint.abort("staged");
                if let Err(error) = request.wait() {
                    assert_eq!(error.kind, kind);
                }
                return;
            }
            let error = match receive(&endpoint, 0, 0) {
                Ok(message) => {
                    assert_eq!(message, telling(3));
                    receive(&endpoint, 0, 1).unwrap_err()
                }
                Err(error) => error,
            };
            assert_poisoned(&endpoint, &error, 0, &kind);
        });
    }
}

/// All ranks abort at the same moment.
fn two_failures(stage: &Stage<'_>) {
    for _ in 0..100 {
        let causes = Causes::new(stage);
        stage.run(|endpoint| {
            meet(&endpoint, 0).unwrap();
            endpoint.abort("staged");
            let error = meet(&endpoint, 1).unwrap_err();
            let cause = error.root().clone();
            let kind = aborted(cause.rank, "staged");
            assert_poisoned(&endpoint, &error, cause.rank, &kind);
            causes.note(endpoint.rank(), cause);
        });
        causes.expect_one(stage);
    }
}

/// All ranks wait for one another in vain, and lose their patience at the same moment.
fn two_deadlines(stage: &Stage<'_>) {
    let world_size = stage.world_size;
    let after = |rank| (rank + 1) % world_size;
    for _ in 0..5 {
        let causes = Causes::new(stage);
        stage.run_impatiently(|endpoint| {
            let error = receive(&endpoint, after(endpoint.rank()), 0).unwrap_err();
            let cause = error.root().clone();
            assert!(
                matches!(cause.kind, CommErrorKind::Deadline { .. }),
                "{error}"
            );
            assert_eq!(cause.peer, Some(after(cause.rank)));
            causes.note(endpoint.rank(), cause);
        });
        causes.expect_one(stage);
    }
}

/// What the ranks of a group take for the cause of its failure; of each rank where it runs.
struct Causes(Vec<Mutex<Option<CommError>>>);

impl Causes {
    fn new(stage: &Stage<'_>) -> Self {
        Self((0..stage.world_size).map(|_| Mutex::default()).collect())
    }

    fn note(&self, rank: Rank, cause: CommError) {
        *self.0[rank].lock().unwrap() = Some(cause);
    }

    /// The ranks compare what they have noted, in a group of its own.
    fn expect_one(&self, stage: &Stage<'_>) {
        stage.run(|endpoint| {
            let own = self.0[endpoint.rank()].lock().unwrap().clone();
            let own = own.expect("every rank has noted a cause");
            let told = endpoint.all_gather_bytes(0, own.to_string().into_bytes());
            for cause in told.unwrap() {
                assert_eq!(String::from_utf8(cause).unwrap(), own.to_string());
            }
        });
    }
}

/// In every other group, rank 0 sends what the last rank never receives, because it aborts: before, after, or while that is sent.
fn late_messages(stage: &Stage<'_>) {
    let last = stage.world_size - 1;
    for number in 0..100 {
        // A few bytes, or more than a network takes without a receive.
        let len = if number % 4 < 2 { 1 } else { 100_000 };
        let message = || HostBuffer::F32(vec![number as f32; len]);
        let send = |endpoint: &Endpoint| endpoint.isend(last, tag(0), message())?.wait();
        stage.run(|endpoint| match endpoint.rank() {
            0 if number % 2 == 0 => assert_eq!(send(&endpoint).unwrap_err().culprit(), last),
            0 => assert!(send(&endpoint).is_ok()),
            rank if rank == last && number % 2 == 0 => endpoint.abort("staged"),
            rank if rank == last => {
                let receive = endpoint.irecv(0, tag(0), f32s(len)).unwrap();
                assert_eq!(receive.wait().unwrap(), message());
            }
            _ => {}
        });
    }
}

/// Rank 1 aborts; whatever goes wrong afterwards does not change the story.
fn first_cause_stays(stage: &Stage<'_>) {
    let kind = aborted(1, "first");
    stage.run(|endpoint| {
        let open = endpoint
            .irecv((endpoint.rank() + 1) % 3, tag(9), f32s(1))
            .unwrap();
        meet(&endpoint, 0).unwrap();
        if endpoint.rank() == 1 {
            endpoint.abort("first");
        }
        let error = meet(&endpoint, 1).unwrap_err();
        endpoint.abort("second");
        drop(open);
        assert_poisoned(&endpoint, &error, 1, &kind);
    });
}

fn aborted(culprit: Rank, reason: &str) -> CommErrorKind {
    CommErrorKind::Aborted {
        culprit,
        reason: reason.to_owned(),
    }
}
