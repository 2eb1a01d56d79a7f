//! Ranks that do something wrong: wrong sizes, tags, peers, requests not waited for.

use super::{
    Case, Endpoint, Stage, assert_poisoned, assert_stays_poisoned, f32s, meet, receive, send, tag,
    telling,
};
use crate::{
    buffer::{DType, HostBuffer},
    error::{CommError, CommErrorKind},
    transport::{Expected, Tag},
};

pub(super) const CASES: &[Case] = &[
    Case::messages("another size is refused", &[2, 3], wrong_size),
    Case::messages(
        "another element type is refused",
        &[2, 3],
        wrong_element_type,
    ),
    Case::messages("ranks out of step end at the deadline", &[2], wrong_tag),
    Case::messages("a send dropped unfinished poisons", &[2, 3], dropped_send),
    Case::messages(
        "a receive dropped unfinished poisons",
        &[2, 3],
        dropped_receive,
    ),
    Case::messages(
        "a request dropped after its message was taken poisons",
        &[2],
        dropped_after_taken,
    ),
    Case::messages(
        "an invalid peer is refused and harms nobody",
        &[1, 2, 3],
        invalid_peer,
    ),
];

fn wrong_size(stage: &Stage<'_>) {
    let sent = HostBuffer::zeros(DType::F32, 4);
    let kind = CommErrorKind::SizeMismatch {
        expected_len: 3,
        expected_dtype: DType::F32,
        got_len: 4,
        got_dtype: DType::F32,
    };
    expect_mismatch(stage, &sent, f32s(3), &kind);
}

/// The number of bytes is right.
fn wrong_element_type(stage: &Stage<'_>) {
    let sent = HostBuffer::zeros(DType::BF16, 4);
    let expected = Expected {
        dtype: DType::F16,
        len: 4,
    };
    let kind = CommErrorKind::SizeMismatch {
        expected_len: 4,
        expected_dtype: DType::F16,
        got_len: 4,
        got_dtype: DType::BF16,
    };
    expect_mismatch(stage, &sent, expected, &kind);
}

/// Rank 0 sends something else than rank 1 expects; the other ranks hear of it.
fn expect_mismatch(stage: &Stage<'_>, sent: &HostBuffer, expected: Expected, kind: &CommErrorKind) {
    stage.run(|endpoint| {
        let error = match endpoint.rank() {
            0 => send_then_meet(&endpoint, sent.clone()),
            1 => {
                let result = endpoint.irecv(0, tag(0), expected).unwrap().wait();
                let error = result.unwrap_err();
                assert_eq!((error.peer, error.tag), (Some(0), Some(tag(0))));
                assert_eq!(&error.kind, kind, "the receiver is told directly");
                error
            }
            _ => meet(&endpoint, 0).unwrap_err(),
        };
        assert_poisoned(&endpoint, &error, 0, kind);
    });
}

/// The send succeeds if it is taken before it is refused.
fn send_then_meet(endpoint: &Endpoint, buffer: HostBuffer) -> CommError {
    let send = endpoint.isend(1, tag(0), buffer).unwrap();
    match send.wait() {
        Ok(_) => meet(endpoint, 0).unwrap_err(),
        Err(error) => error,
    }
}

/// Rank 0 sends step 0 where rank 1 expects step 5. Both wait in vain; either may be the first to give up.
fn wrong_tag(stage: &Stage<'_>) {
    stage.run_impatiently(|endpoint| {
        let error = match endpoint.rank() {
            0 => send(&endpoint, 1, 0, 0).unwrap_err(),
            _ => receive(&endpoint, 0, 5).unwrap_err(),
        };
        let root = error.root();
        let (awaited, sent_instead): (Tag, &[Tag]) = match root.rank {
            0 => (tag(0), &[]),
            _ => (tag(5), &[tag(0)]),
        };
        assert_eq!(root.tag, Some(awaited));
        assert!(
            matches!(&root.kind, CommErrorKind::Deadline { pending, .. } if pending == sent_instead),
            "{error}"
        );
        assert_stays_poisoned(&endpoint, &error, 1 - root.rank);
    });
}

fn dropped_send(stage: &Stage<'_>) {
    expect_dropped(stage, |endpoint| {
        drop(endpoint.isend(1, tag(1), telling(0)).unwrap())
    });
}

fn dropped_receive(stage: &Stage<'_>) {
    expect_dropped(stage, |endpoint| {
        drop(endpoint.irecv(1, tag(1), f32s(1)).unwrap())
    });
}

/// Rank 0 drops a request; the others wait for something else.
fn expect_dropped(stage: &Stage<'_>, drop_request: impl Fn(&Endpoint) + Sync) {
    let kind = CommErrorKind::RequestDropped { culprit: 0 };
    stage.run(|endpoint| {
        let error = match endpoint.rank() {
            0 => {
                drop_request(&endpoint);
                endpoint.poisoned().expect("a dropped request poisons")
            }
            _ => receive(&endpoint, 0, 0).unwrap_err(),
        };
        assert_eq!(error.root().tag, Some(tag(1)));
        assert_poisoned(&endpoint, &error, 0, &kind);
    });
}

/// The same mistake must not show on some runs only.
fn dropped_after_taken(stage: &Stage<'_>) {
    let kind = CommErrorKind::RequestDropped { culprit: 0 };
    stage.run(|endpoint| {
        let error = match endpoint.rank() {
            0 => {
                let request = endpoint.isend(1, tag(0), telling(0)).unwrap();
                meet(&endpoint, 0).unwrap();
                drop(request);
                endpoint.poisoned().expect("a dropped request poisons")
            }
            _ => {
                assert_eq!(receive(&endpoint, 0, 0).unwrap(), telling(0));
                meet(&endpoint, 0).unwrap();
                receive(&endpoint, 0, 1).unwrap_err()
            }
        };
        assert_poisoned(&endpoint, &error, 0, &kind);
    });
}

fn invalid_peer(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        for peer in [endpoint.rank(), endpoint.world_size(), usize::MAX] {
            let kind = CommErrorKind::InvalidPeer(peer);
            let refused = CommError::new(endpoint.rank(), Some(peer), Some(tag(0)), kind);
            assert_eq!(
                endpoint.isend(peer, tag(0), telling(0)).unwrap_err(),
                refused
            );
            assert_eq!(endpoint.irecv(peer, tag(0), f32s(1)).unwrap_err(), refused);
            assert_eq!(refused.culprit(), endpoint.rank());
        }
        assert_eq!(endpoint.poisoned(), None);
        meet(&endpoint, 0).unwrap();
    });
}
