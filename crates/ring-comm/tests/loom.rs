//! Every interleaving of two ranks on loopback's lock, up to a number of preemptions that finds what is known to go wrong.
//!
//! Loom takes the place of the lock and the condition and tries the interleavings one by one; a rank that nobody wakes is a
//! deadlock to it. It runs by `.ci/models`. `LOOM_MAX_PREEMPTIONS` sets another bound.
#![cfg(loom)]

use std::{env, time::Duration};

use loom::{model::Builder, thread};
use ring_comm::{
    CommError, CommErrorKind, Expected, GroupId, Loopback, LoopbackEndpoint, Payload, Rank, Tag,
    Transport,
    buffer::{DType, HostBuffer},
};

use Part::{Leaves, Stays};

type Endpoint = LoopbackEndpoint<HostBuffer>;
type Outcome = Result<(), CommError>;

/// What a rank does.
#[derive(Clone, Copy)]
enum Part {
    /// It stays in the group until all have ended, so that its departure wakes nobody.
    Stays(fn(&Endpoint) -> Outcome),
    Leaves(fn(Endpoint) -> Outcome),
}

impl Part {
    fn play(self, endpoint: Endpoint) -> (Outcome, Option<Endpoint>) {
        match self {
            Stays(act) => (act(&endpoint), Some(endpoint)),
            Leaves(act) => (act(endpoint), None),
        }
    }
}

/// Runs the parts of all ranks of a group, and judges what they return, in every interleaving.
fn check<const P: usize>(parts: [Part; P], judge: fn([Outcome; P])) {
    let mut builder = Builder::new();
    if env::var_os("LOOM_MAX_PREEMPTIONS").is_none() {
        builder.preemption_bound = Some(3);
    }
    builder.check(move || {
        let endpoints = Loopback::group(P, Duration::MAX);
        let mut ranks: Vec<_> = endpoints.into_iter().zip(parts).collect();
        let (endpoint, part) = ranks.remove(0);
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|(endpoint, part)| thread::spawn(move || part.play(endpoint)))
            .collect();
        let mut ended = vec![part.play(endpoint)];
        ended.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
        let outcomes: Vec<Outcome> = ended.iter().map(|(outcome, _)| outcome.clone()).collect();
        judge(outcomes.try_into().unwrap());
    });
}

fn tag(step: u32) -> Tag {
    Tag::new(0, step, Payload::KeyValue)
}

fn message(step: u32) -> HostBuffer {
    HostBuffer::F32(vec![step as f32])
}

fn send(endpoint: &Endpoint, peer: Rank, step: u32) -> Outcome {
    endpoint
        .isend(peer, tag(step), message(step))?
        .wait()
        .map(drop)
}

fn receive(endpoint: &Endpoint, peer: Rank, step: u32) -> Outcome {
    let expected = Expected {
        dtype: DType::F32,
        len: 1,
    };
    let received = endpoint.irecv(peer, tag(step), expected)?.wait()?;
    assert_eq!(received, message(step));
    Ok(())
}

/// Among ranks 0 and 1.
fn gather(endpoint: &Endpoint) -> Outcome {
    let own = vec![endpoint.rank() as u8];
    let parts = endpoint.all_gather_bytes_among(GroupId::WHOLE, &[0, 1], 0, own)?;
    assert_eq!(parts, [[0], [1]]);
    Ok(())
}

fn aborted(culprit: Rank) -> CommErrorKind {
    CommErrorKind::Aborted {
        culprit,
        reason: "staged".to_owned(),
    }
}

/// A rank that fails has heard of the abort of `culprit`, and of nothing else.
fn assert_at_most_aborted(outcomes: &[Outcome], culprit: Rank) {
    for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!(error.root().kind, aborted(culprit));
    }
}

fn abort(endpoint: &Endpoint) -> Outcome {
    endpoint.abort("staged");
    Ok(())
}

fn leave(_: Endpoint) -> Outcome {
    Ok(())
}

/// Not a rank that takes part, but the clock.
fn let_the_deadline_pass(endpoint: &Endpoint) -> Outcome {
    endpoint.pass_deadline();
    Ok(())
}

#[test]
fn a_message_arrives() {
    check(
        [
            Stays(|endpoint| send(endpoint, 1, 0)),
            Stays(|endpoint| receive(endpoint, 0, 0)),
        ],
        |outcomes| assert_eq!(outcomes, [Ok(()), Ok(())]),
    );
}

#[test]
fn a_message_each_way_arrives() {
    fn swap(endpoint: &Endpoint) -> Outcome {
        let peer = 1 - endpoint.rank();
        let outgoing = endpoint.isend(peer, tag(0), message(0))?;
        receive(endpoint, peer, 0)?;
        outgoing.wait().map(drop)
    }
    check([Stays(swap), Stays(swap)], |outcomes| {
        assert_eq!(outcomes, [Ok(()), Ok(())])
    });
}

#[test]
fn a_full_queue_moves_on() {
    fn send_three(endpoint: &Endpoint) -> Outcome {
        let isend = |step| endpoint.isend(1, tag(step), message(step));
        let requests: Vec<_> = (0..3).map(isend).collect::<Result<_, _>>()?;
        requests
            .into_iter()
            .try_for_each(|request| request.wait().map(drop))
    }
    fn receive_three(endpoint: &Endpoint) -> Outcome {
        (0..3).try_for_each(|step| receive(endpoint, 0, step))
    }
    check([Stays(send_three), Stays(receive_three)], |outcomes| {
        assert_eq!(outcomes, [Ok(()), Ok(())])
    });
}

#[test]
fn an_abort_ends_a_send() {
    check(
        [Stays(|endpoint| send(endpoint, 1, 0)), Stays(abort)],
        |[sent, _]| {
            assert_eq!(sent.unwrap_err().root().kind, aborted(1));
        },
    );
}

#[test]
fn an_abort_races_a_message() {
    check(
        [
            Stays(|endpoint| send(endpoint, 1, 0)),
            Stays(|endpoint| receive(endpoint, 0, 0)),
            Stays(abort),
        ],
        |outcomes| assert_at_most_aborted(&outcomes, 2),
    );
}

#[test]
fn a_departure_ends_a_send_and_a_receive() {
    fn assert_departed(error: &CommError) {
        assert_eq!(
            (&error.kind, error.culprit()),
            (&CommErrorKind::Departed, 1)
        );
    }
    check(
        [Stays(|endpoint| send(endpoint, 1, 0)), Leaves(leave)],
        |[sent, _]| {
            assert_departed(&sent.unwrap_err());
        },
    );
    check(
        [Stays(|endpoint| receive(endpoint, 1, 0)), Leaves(leave)],
        |[received, _]| {
            assert_departed(&received.unwrap_err());
        },
    );
    check([Stays(gather), Leaves(leave)], |[gathered, _]| {
        assert_departed(&gathered.unwrap_err());
    });
}

#[test]
fn what_a_departing_rank_sent_arrives() {
    fn send_and_leave(endpoint: Endpoint) -> Outcome {
        let request = endpoint.isend(0, tag(0), message(0))?;
        drop(endpoint);
        request.wait().map(drop)
    }
    check(
        [
            Stays(|endpoint| receive(endpoint, 1, 0)),
            Leaves(send_and_leave),
        ],
        |outcomes| {
            assert_eq!(outcomes, [Ok(()), Ok(())]);
        },
    );
}

#[test]
fn a_dropped_request_poisons() {
    fn send_and_drop(endpoint: &Endpoint) -> Outcome {
        drop(endpoint.isend(1, tag(0), message(0))?);
        endpoint.poisoned().map_or(Ok(()), Err)
    }
    check(
        [
            Stays(send_and_drop),
            Stays(|endpoint| receive(endpoint, 0, 0)),
        ],
        |[dropped, received]| {
            let cause = dropped.unwrap_err();
            assert_eq!(cause.kind, CommErrorKind::RequestDropped { culprit: 0 });
            if let Err(error) = received {
                assert_eq!(error.root(), &cause);
            }
        },
    );
}

#[test]
fn a_complete_all_gather_succeeds_whatever_comes_then() {
    fn gather_and_abort(endpoint: &Endpoint) -> Outcome {
        gather(endpoint)?;
        abort(endpoint)
    }
    check([Stays(gather), Stays(gather_and_abort)], |outcomes| {
        assert_eq!(outcomes, [Ok(()), Ok(())]);
    });
}

#[test]
fn an_all_gather_that_races_an_abort_succeeds_everywhere_or_nowhere() {
    check([Stays(gather), Stays(gather), Stays(abort)], |outcomes| {
        assert_eq!(outcomes[0].is_ok(), outcomes[1].is_ok());
        assert_at_most_aborted(&outcomes, 2);
    });
}

#[test]
fn a_deadline_that_races_a_message_ends_both_ranks_or_none() {
    check(
        [
            Stays(|endpoint| send(endpoint, 1, 0)),
            Stays(|endpoint| receive(endpoint, 0, 0)),
            Stays(let_the_deadline_pass),
        ],
        |[sent, received, _]| match (sent, received) {
            (Ok(()), Ok(())) => {}
            (Err(one), Err(other)) => {
                assert_eq!(one.root(), other.root());
                assert!(
                    matches!(one.root().kind, CommErrorKind::Deadline { .. }),
                    "{one}"
                );
            }
            (sent, received) => panic!("{sent:?} and {received:?}"),
        },
    );
}

#[test]
fn of_two_aborts_both_ranks_see_the_same() {
    fn abort_and_gather(endpoint: &Endpoint) -> Outcome {
        endpoint.abort("staged");
        gather(endpoint)
    }
    check(
        [Stays(abort_and_gather), Stays(abort_and_gather)],
        |[one, other]| {
            let (one, other) = (one.unwrap_err(), other.unwrap_err());
            assert_eq!(one.root(), other.root());
            assert_eq!(one.root().kind, aborted(one.culprit()));
        },
    );
}
