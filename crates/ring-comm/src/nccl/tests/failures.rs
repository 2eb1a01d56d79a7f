//! Groups that fail while something is on a stream, and the groups after them.

use super::*;
use crate::error::CommError;

const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);
const ONE: Expected = Expected {
    dtype: DType::F32,
    len: 1,
};

fn message(rank: Rank) -> HostBuffer {
    HostBuffer::F32(vec![rank as f32])
}

/// One shift round the ring.
fn shift(endpoint: &RemoteEndpoint) -> Result<HostBuffer, CommError> {
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let receive = endpoint.irecv((rank + world_size - 1) % world_size, TAG, ONE)?;
    let send = endpoint.isend((rank + 1) % world_size, TAG, message(rank))?;
    let received = receive.wait()?;
    send.wait()?;
    Ok(received)
}

/// A group in which all goes well.
fn assert_works(rank: Rank, engine: &Arc<Engine>) {
    let endpoint = join(engine, PATIENT).unwrap();
    let previous = (rank + endpoint.world_size() - 1) % endpoint.world_size();
    assert_eq!(shift(&endpoint).unwrap(), message(previous));
}

/// Waits until every rank has something on its stream.
fn await_running(world: &World, world_size: usize) {
    let expiry = Instant::now() + PATIENT;
    while !(0..world_size).all(|rank| world.fabric.is_running(rank)) {
        assert!(Instant::now() < expiry, "nothing was issued");
        thread::yield_now();
    }
}

/// Three ranks in a shift that does not go on; then `fail` happens on rank 1. All that the ranks hear of it.
fn errors_of(
    world: &World,
    deadline: Duration,
    fail: impl Fn(&RemoteEndpoint) + Sync,
) -> Vec<CommError> {
    let held = Barrier::new(3);
    let results = std::sync::Mutex::new(Vec::new());
    world.run(3, |rank, engine| {
        assert_works(rank, engine);
        if held.wait().is_leader() {
            world.fabric.hold(true);
        }
        held.wait();

        let endpoint = join(engine, deadline).unwrap();
        let error = thread::scope(|scope| {
            let shift = scope.spawn(|| shift(&endpoint).unwrap_err());
            if rank == 1 {
                await_running(world, 3);
                fail(&endpoint);
            }
            shift.join().unwrap()
        });
        assert!(endpoint.poisoned().is_some());
        drop(endpoint);
        results.lock().unwrap().push(error);
        if held.wait().is_leader() {
            world.fabric.hold(false);
        }
        held.wait();
        assert_works(rank, engine);
    });
    (0..3).for_each(|rank| assert!(!world.fabric.is_running(rank)));
    results.into_inner().unwrap()
}

#[test]
fn an_abort_frees_what_is_on_the_streams() {
    for fake in [PROMPT, TARDY] {
        let world = fake.world(3);
        let start = Instant::now();
        for error in errors_of(&world, PATIENT, |endpoint| endpoint.abort("staged")) {
            assert_eq!(error.culprit(), 1, "{error}");
            assert!(error.to_string().contains("staged"), "{error}");
        }
        assert!(
            start.elapsed() < PATIENT,
            "somebody waited for the deadline"
        );
        assert_eq!(world.fabric.communicators(), 1, "a new one, once");
    }
}

#[test]
fn a_device_that_fails_blames_its_rank() {
    let world = PROMPT.world(3);
    let fail = |_: &RemoteEndpoint| world.fabric.fail(1, "unhandled cuda error");
    for error in errors_of(&world, PATIENT, fail) {
        assert_eq!(error.culprit(), 1, "{error}");
        let text = error.to_string();
        assert!(
            text.contains("ncclCommGetAsyncError failed: unhandled cuda error"),
            "{text}"
        );
    }
    assert_eq!(world.fabric.communicators(), 1);
}

#[test]
fn streams_that_stand_still_end_at_the_deadline() {
    let world = PROMPT.world(3);
    let deadline = Duration::from_millis(300);
    for error in errors_of(&world, deadline, |_| {}) {
        assert!(
            matches!(error.root().kind, CommErrorKind::Deadline { .. }),
            "{error}"
        );
    }
}

/// A failure with nothing on the streams leaves the communicator as it is.
#[test]
fn a_communicator_that_is_not_in_use_survives() {
    let world = PROMPT.world(3);
    world.run(3, |rank, engine| {
        assert_works(rank, engine);
        let endpoint = join(engine, PATIENT).unwrap();
        if rank == 2 {
            endpoint.abort("staged");
        }
        assert!(endpoint.all_gather_bytes(0, Vec::new()).is_err());
        drop(endpoint);
        assert_works(rank, engine);
    });
    assert_eq!(world.fabric.communicators(), 0);
}

/// The control wire of rank 2 is cut while all are busy: the others find out at their deadline, and nothing stays on their streams.
#[test]
fn a_rank_that_is_lost_is_not_waited_for() {
    let world = PROMPT.world(3);
    let deadline = Duration::from_millis(300);
    let held = Barrier::new(3);
    world.fabric.hold(true);
    thread::scope(|scope| {
        for rank in 0..3 {
            let (world, held) = (&world, &held);
            scope.spawn(move || {
                let engine = world.engine_within(rank, Duration::from_secs(1));
                let endpoint = join(&engine, deadline).unwrap();
                let start = Instant::now();
                let error = thread::scope(|scope| {
                    let shift = scope.spawn(|| shift(&endpoint).unwrap_err());
                    if rank == 0 {
                        await_running(world, 3);
                        world.net.cut(2);
                    }
                    shift.join().unwrap()
                });
                assert!(
                    matches!(error.root().kind, CommErrorKind::Deadline { .. }),
                    "{error}"
                );
                assert!(start.elapsed() < deadline + PATIENT);
                assert!(!engine_is_running(world, rank), "its memory is free");
                held.wait();
            });
        }
    });
}

/// The engine aborts what is on the stream within moments of the failure.
fn engine_is_running(world: &World, rank: Rank) -> bool {
    let expiry = Instant::now() + PATIENT;
    while world.fabric.is_running(rank) && Instant::now() < expiry {
        thread::yield_now();
    }
    world.fabric.is_running(rank)
}

#[test]
fn a_rank_without_memory_for_a_message_says_so() {
    let world = PROMPT.world(2);
    world.fabric.fill_up(1);
    world.run(2, |rank, engine| {
        let endpoint = join(engine, PATIENT).unwrap();
        // What is brought is enough.
        if rank == 1 {
            let memory = Some(message(1));
            let receive = endpoint.irecv_into(0, TAG, ONE, memory).unwrap();
            assert_eq!(receive.wait().unwrap(), message(0));
        } else {
            endpoint.isend(1, TAG, message(0)).unwrap().wait().unwrap();
        }
        let error = shift(&endpoint).unwrap_err();
        assert_eq!(error.culprit(), 1, "{error}");
        assert!(
            error
                .to_string()
                .contains("cuMemAllocAsync failed: out of memory"),
            "{error}"
        );
    });
}
