//! Several loopback groups in one process: beside each other, and one after the failure of another.

use std::{sync::Mutex, thread, time::Duration};

use ring_comm::{
    CommError, CommErrorKind, Expected, Loopback, LoopbackEndpoint, Payload, Tag, Transport,
    buffer::{DType, HostBuffer},
};

const DEADLINE: Duration = Duration::from_secs(60);
const RANKS: usize = 3;

type Endpoint = LoopbackEndpoint<HostBuffer>;

fn shift(endpoint: &Endpoint, step: u32, number: f32) -> Result<f32, CommError> {
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let tag = Tag::new(0, step, Payload::KeyValue);
    let expected = Expected {
        dtype: DType::F32,
        len: 1,
    };
    let previous = (rank + world_size - 1) % world_size;
    let incoming = endpoint.irecv(previous, tag, expected)?;
    let outgoing = endpoint.isend((rank + 1) % world_size, tag, HostBuffer::F32(vec![number]))?;
    let received = incoming.wait()?;
    outgoing.wait()?;
    Ok(received.as_f32().expect("the type expected")[0])
}

/// Nobody goes on before all are here; what a rank does then keeps none of them here.
fn meet(endpoint: &Endpoint) {
    endpoint.all_gather_bytes(0, Vec::new()).unwrap();
}

/// Runs `body` with an endpoint of each of two groups; in the second, the ranks run the other way.
fn run_in_two_groups(body: impl Fn(Endpoint, Endpoint) + Sync) {
    let first = Loopback::group(RANKS, DEADLINE);
    let second = Loopback::group(RANKS, DEADLINE);
    let body = &body;
    thread::scope(|scope| {
        for (one, other) in first.into_iter().zip(second.into_iter().rev()) {
            scope.spawn(move || body(one, other));
        }
    });
}

#[test]
fn equal_tags_of_two_groups_do_not_mix() {
    run_in_two_groups(|one, other| {
        for step in [0, 1, 0, 0] {
            let in_one = shift(&one, step, one.rank() as f32).unwrap();
            let in_other = shift(&other, step, 100.0 + other.rank() as f32).unwrap();
            let previous = |endpoint: &Endpoint| (endpoint.rank() + RANKS - 1) % RANKS;
            assert_eq!(in_one, previous(&one) as f32);
            assert_eq!(in_other, 100.0 + previous(&other) as f32);
            let parts = one.all_gather_bytes(0, vec![1]).unwrap();
            assert_eq!(parts, [[1]; RANKS]);
            let parts = other.all_gather_bytes(0, vec![2]).unwrap();
            assert_eq!(parts, [[2]; RANKS]);
        }
    });
}

#[test]
fn a_group_does_not_suffer_from_the_failure_of_another() {
    let causes = Mutex::new(Vec::new());
    run_in_two_groups(|one, other| {
        meet(&one);
        if one.rank() == 1 {
            one.abort("staged");
        }
        let error = shift(&one, 1, 0.0).unwrap_err();
        causes.lock().unwrap().push(error.root().kind.clone());
        assert_eq!(shift(&other, 1, 5.0).unwrap(), 5.0);
        assert_eq!(other.poisoned(), None);
    });
    let aborted = CommErrorKind::Aborted {
        culprit: 1,
        reason: "staged".to_owned(),
    };
    assert_eq!(causes.into_inner().unwrap(), vec![aborted; RANKS]);
}

/// The same threads, and the same tags.
#[test]
fn after_an_abort_a_new_group_can_be_made() {
    let generations: Vec<Vec<Endpoint>> =
        (0..20).map(|_| Loopback::group(RANKS, DEADLINE)).collect();
    let mut of_ranks: Vec<Vec<Endpoint>> = (0..RANKS).map(|_| Vec::new()).collect();
    for generation in generations {
        of_ranks
            .iter_mut()
            .zip(generation)
            .for_each(|(own, endpoint)| own.push(endpoint));
    }
    thread::scope(|scope| {
        for endpoints in of_ranks {
            scope.spawn(move || {
                for (generation, endpoint) in endpoints.into_iter().enumerate() {
                    let number = generation as f32;
                    assert_eq!(shift(&endpoint, 0, number).unwrap(), number);
                    meet(&endpoint);
                    if endpoint.rank() == generation % RANKS {
                        endpoint.abort("staged");
                    }
                    let error = shift(&endpoint, 1, number).unwrap_err();
                    assert_eq!(error.culprit(), generation % RANKS);
                }
            });
        }
    });
}
