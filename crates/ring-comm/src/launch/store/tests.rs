//! A store whose ranks are threads, over the loopback interface.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use socket2::{Domain, Socket, Type};

use super::{
    connection::Timed,
    wire::{MAX_FRAME, Request, read_frame, write_frame},
    *,
};

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);
/// Long enough for something that does not happen.
const SHORT: Duration = Duration::from_millis(100);
const ANYWHERE: &str = "127.0.0.1:0";

/// An address that nobody else is given while the socket is kept, and at which anybody can listen.
fn reserve() -> (Socket, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let anywhere: SocketAddr = ANYWHERE.parse().unwrap();
    socket.bind(&anywhere.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address.to_string())
}

/// Rank 0 of a job of `world_size` ranks.
fn serve(world_size: usize) -> Store {
    Store::open(ANYWHERE, Membership::new(0, world_size), LONG).unwrap()
}

fn try_join(zero: &Store, membership: Membership) -> Result<Store, StoreError> {
    Store::open(&zero.address().to_string(), membership, LONG)
}

fn join(zero: &Store, rank: Rank) -> Store {
    try_join(zero, Membership::new(rank, zero.world_size())).unwrap()
}

/// The stores of all ranks of a job.
fn job(world_size: usize) -> Vec<Store> {
    let mut stores = vec![serve(world_size)];
    stores.extend(
        (1..world_size)
            .map(|rank| join(&stores[0], rank))
            .collect::<Vec<_>>(),
    );
    stores
}

/// What `work` gives on every rank, each on a thread of its own.
fn on_every_rank<T: Send>(stores: &[Store], work: impl Fn(&Store) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = stores
            .iter()
            .map(|store| scope.spawn(|| work(store)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

fn aborted(rank: Rank, reason: &str) -> Failure {
    let kind = FailureKind::Aborted(reason.to_owned());
    Failure { rank, kind }
}

/// Waits until rank 0 ends a connection.
fn expect_end(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
}

#[test]
fn ranks_exchange_what_they_set() {
    for world_size in 1..=8 {
        let stores = job(world_size);
        on_every_rank(&stores, |store| {
            let rank = store.rank();
            store
                .set(&format!("of {rank}"), vec![rank as u8; rank])
                .unwrap();
            for peer in 0..world_size {
                let value = store.get(&format!("of {peer}"), LONG).unwrap();
                assert_eq!(value, vec![peer as u8; peer]);
            }
            // Names can be used again.
            for round in 0..3u8 {
                let values = store
                    .all_gather("parts", [round, rank as u8], LONG)
                    .unwrap();
                let expected: Vec<_> = (0..world_size).map(|p| vec![round, p as u8]).collect();
                assert_eq!(values, expected);
            }
            store.barrier("end", LONG).unwrap();
        });
    }
}

#[test]
fn a_get_waits_for_its_key_and_a_set_replaces() {
    let stores = job(2);
    thread::scope(|scope| {
        let getter = scope.spawn(|| stores[1].get("late", LONG));
        stores[0].set("late", "first").unwrap();
        assert_eq!(getter.join().unwrap().unwrap(), b"first");
    });
    stores[1].set("late", "second").unwrap();
    assert_eq!(stores[0].get("late", SHORT).unwrap(), b"second");
}

#[test]
fn rank_zero_may_be_late() {
    // Something that lets rank 1 connect once, and is gone before rank 0 comes.
    let (_reserved, address) = reserve();
    let early = TcpListener::bind(&address).unwrap();
    thread::scope(|scope| {
        let one = scope.spawn(|| Store::open(&address, Membership::new(1, 2), LONG));
        drop(early.accept().unwrap());
        drop(early);
        let zero = Store::open(&address, Membership::new(0, 2), LONG).unwrap();
        let one = one.join().unwrap().unwrap();
        on_every_rank(&[zero, one], |store| store.barrier("met", LONG).unwrap());
    });
}

#[test]
fn rank_zero_may_leave_after_a_barrier() {
    for _ in 0..50 {
        thread::scope(|scope| {
            for store in job(4) {
                scope.spawn(move || store.barrier("end", LONG).unwrap());
            }
        });
    }
}

#[test]
fn rank_zero_that_never_comes_is_an_error_at_the_deadline() {
    let (_reserved, address) = reserve();
    let listener = TcpListener::bind(&address).unwrap();
    // Accepted by the system, never answered.
    let start = Instant::now();
    let error = Store::open(&address, Membership::new(1, 2), SHORT).unwrap_err();
    assert!(
        matches!(&error, StoreError::Unreachable { rank: 1, .. }),
        "{error}"
    );
    drop(listener);
    let error = Store::open(&address, Membership::new(1, 2), SHORT).unwrap_err();
    assert!(
        matches!(&error, StoreError::Unreachable { rank: 1, .. }),
        "{error}"
    );
    assert!(start.elapsed() < LONG / 3);
}

#[test]
fn an_absent_rank_is_named_at_the_deadline() {
    let zero = serve(4);
    let two = join(&zero, 2);
    let missing = |error| match error {
        StoreError::Deadline { missing, .. } => missing,
        error => panic!("{error}"),
    };
    assert_eq!(missing(zero.get("nothing", SHORT).unwrap_err()), [1, 3]);
    assert_eq!(missing(two.barrier("all", SHORT).unwrap_err()), [0, 1, 3]);
    let error = zero.barrier("all", SHORT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rank 0: gather \"all\": no answer within 100ms; missing: rank 1, 2, 3"
    );
    // A deadline ends a wait, not the store.
    let stores = [join(&zero, 1), join(&zero, 3), zero, two];
    on_every_rank(&stores, |store| store.barrier("all", LONG).unwrap());
}

/// Two wait for a third; the one whose deadline passes first was there all the same.
#[test]
fn who_does_not_wait_any_longer_was_not_absent() {
    let zero = serve(3);
    let one = join(&zero, 1);
    let missing = |error| match error {
        StoreError::Deadline { missing, .. } => missing,
        error => panic!("{error}"),
    };
    let start = Instant::now();
    thread::scope(|scope| {
        let second = scope.spawn(|| one.barrier("all", SHORT * 20).unwrap_err());
        // Until the other has come too.
        while missing(zero.barrier("all", SHORT / 4).unwrap_err()) != [2] {
            assert!(start.elapsed() < LONG);
        }
        assert_eq!(missing(second.join().unwrap()), [2]);
    });
}

#[test]
fn who_does_not_belong_to_the_job_is_refused() {
    let member = |rank, world_size| {
        Membership::new(rank, world_size)
            .job_id("training")
            .token(Token::new("sesame"))
    };
    let zero = Store::open(ANYWHERE, member(0, 3), LONG).unwrap();
    let address = zero.address();
    let refusal = |membership| try_join(&zero, membership).unwrap_err();

    let wrong_token = StoreError::WrongToken { rank: 1, address };
    assert_eq!(
        refusal(member(1, 3).token(Token::new("guess"))),
        wrong_token
    );
    assert_eq!(
        refusal(Membership::new(1, 3).job_id("training")),
        wrong_token
    );
    // Who does not know the token learns nothing else.
    assert_eq!(refusal(Membership::new(1, 5)), wrong_token);
    assert_eq!(
        refusal(member(1, 4)),
        StoreError::WrongWorldSize {
            rank: 1,
            address,
            expected: 3,
            got: 4
        }
    );
    assert_eq!(
        refusal(member(1, 3).job_id("another")),
        StoreError::WrongJob {
            rank: 1,
            address,
            expected: "training".into(),
            got: "another".into()
        }
    );
    let one = try_join(&zero, member(1, 3)).unwrap();
    assert_eq!(
        refusal(member(1, 3)),
        StoreError::DuplicateRank { rank: 1, address }
    );
    // Nobody was disturbed.
    let two = try_join(&zero, member(2, 3)).unwrap();
    on_every_rank(&[zero, one, two], |store| {
        store.barrier("all", LONG).unwrap()
    });
}

#[test]
fn impossible_members_do_not_even_try() {
    let open = |membership| Store::open(ANYWHERE, membership, LONG).unwrap_err();
    assert_eq!(
        open(Membership::new(2, 2)),
        StoreError::RankOutOfRange {
            rank: 2,
            world_size: 2
        }
    );
    assert!(matches!(
        open(Membership::new(0, 0)),
        StoreError::RankOutOfRange { .. }
    ));
    assert!(matches!(
        open(Membership::new(0, MAX_WORLD_SIZE + 1)),
        StoreError::TooManyRanks { .. }
    ));
    let name = "n".repeat(MAX_JOB_ID_BYTES + 1);
    assert!(matches!(
        open(Membership::new(0, 1).job_id(&name)),
        StoreError::TooLong { what: "job id", .. }
    ));
}

#[test]
fn a_port_in_use_is_an_error_that_says_so() {
    let other = TcpListener::bind(ANYWHERE).unwrap();
    let address = other.local_addr().unwrap().to_string();
    assert_eq!(
        Store::open(&address, Membership::new(0, 1), LONG).unwrap_err(),
        StoreError::AddressInUse { address }
    );
}

#[test]
fn an_address_of_another_host_cannot_be_listened_at() {
    // Reserved for documentation: no host has it.
    let error = Store::open("192.0.2.1:0", Membership::new(0, 1), LONG).unwrap_err();
    assert!(matches!(error, StoreError::CannotListen { .. }), "{error}");
}

/// What rank 1 makes of a listener that answers its hello with `bytes`.
fn answer_with(bytes: &[u8]) -> StoreError {
    let listener = TcpListener::bind(ANYWHERE).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let one = scope.spawn(|| Store::open(&address, Membership::new(1, 2), LONG));
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 44]).unwrap();
        stream.write_all(bytes).unwrap();
        one.join().unwrap().unwrap_err()
    })
}

#[test]
fn what_is_no_store_is_recognised() {
    let error = answer_with(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    assert!(
        matches!(&error, StoreError::NotAStore { got, .. } if got == "HTTP/1.1"),
        "{error}"
    );

    let hello = |version: u32| [&b"ringstor"[..], &version.to_le_bytes(), &[7; 32]].concat();
    let error = answer_with(&hello(9));
    assert!(
        matches!(error, StoreError::Version { theirs: 9, .. }),
        "{error}"
    );

    let mut impostor = hello(1);
    let proof = [7; 32];
    write_frame(&mut impostor, &handshake::Verdict::Welcome { proof }).unwrap();
    let error = answer_with(&impostor);
    assert!(
        matches!(error, StoreError::Impostor { rank: 1, .. }),
        "{error}"
    );
}

#[test]
fn garbage_does_no_harm() {
    let zero = serve(2);
    let hello = |version: u32| [&b"ringstor"[..], &version.to_le_bytes(), &[7; 32]].concat();
    let garbage: [Vec<u8>; 6] = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 10_000],
        hello(9),
        // A frame that is too long, one that is no message, and one that proves nothing.
        [hello(1), u32::MAX.to_le_bytes().to_vec()].concat(),
        [hello(1), vec![3, 0, 0, 0, 255, 255, 255]].concat(),
        [hello(1), vec![40, 0, 0, 0], vec![1; 40]].concat(),
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(zero.address()).unwrap();
        // May fail if rank 0 has closed by then.
        let _ = stream.write_all(&bytes);
        expect_end(&stream);
    }
    // One that breaks off.
    let mut stream = TcpStream::connect(zero.address()).unwrap();
    stream.write_all(b"rings").unwrap();
    drop(stream);
    let stores = [join(&zero, 1), zero];
    on_every_rank(&stores, |store| store.barrier("all", LONG).unwrap());
    assert_eq!(stores[1].failure(), None);
}

#[test]
fn silent_connections_are_limited_and_keep_nobody_out() {
    let zero = serve(2);
    let silent: Vec<TcpStream> = (0..MAX_STRANGERS)
        .map(|_| TcpStream::connect(zero.address()).unwrap())
        .collect();
    let start = Instant::now();
    expect_end(&TcpStream::connect(zero.address()).unwrap());
    assert!(start.elapsed() < HANDSHAKE_DEADLINE);
    thread::scope(|scope| {
        let one = scope.spawn(|| join(&zero, 1));
        drop(silent);
        one.join().unwrap().set("in", "yes").unwrap();
    });
}

#[test]
fn silent_connections_end_at_the_deadline_of_the_handshake() {
    let zero = serve(2);
    let mut dripping = TcpStream::connect(zero.address()).unwrap();
    dripping.write_all(b"r").unwrap();
    let start = Instant::now();
    expect_end(&dripping);
    assert!(start.elapsed() >= HANDSHAKE_DEADLINE / 2);
}

#[test]
fn a_rank_that_sends_nonsense_is_lost() {
    let too_long = |stream: &mut TcpStream| stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let nonsense = |stream: &mut TcpStream| write_frame(stream, &[255u8; 9]).unwrap();
    for (spoil, reason) in [
        (
            &too_long as &dyn Fn(&mut TcpStream),
            "a message of 4294967295 bytes",
        ),
        (&nonsense, "a message that cannot be decoded"),
    ] {
        let zero = serve(2);
        let mut stream = TcpStream::connect(zero.address()).unwrap();
        let mut timed = Timed::new(&stream, Instant::now() + LONG);
        let membership = Membership::new(1, 2);
        assert!(handshake::join(&mut timed, zero.address(), &membership).is_ok());
        spoil(&mut stream);
        let failure = zero.wait_for_failure(LONG).unwrap();
        assert_eq!(failure.rank, 1);
        assert!(failure.to_string().contains(reason), "{failure}");
    }
}

#[test]
fn sizes_are_limited_on_both_sides() {
    let zero = serve(2);
    let long_key = "k".repeat(MAX_KEY_BYTES + 1);
    let too_long = |result: Result<(), StoreError>| {
        assert!(
            matches!(result, Err(StoreError::TooLong { .. })),
            "{result:?}"
        );
    };
    too_long(zero.set(&long_key, ""));
    too_long(zero.get(&long_key, LONG).map(drop));
    too_long(zero.barrier(&long_key, LONG));
    too_long(zero.set("key", vec![0; MAX_VALUE_BYTES + 1]));
    too_long(
        zero.all_gather("name", vec![0; MAX_VALUE_BYTES / 2 + 1], LONG)
            .map(drop),
    );
    zero.set("key", vec![7; MAX_VALUE_BYTES]).unwrap();
    assert_eq!(zero.get("key", LONG).unwrap(), vec![7; MAX_VALUE_BYTES]);

    // Rank 0 does not rely on the others to check.
    let mut stream = TcpStream::connect(zero.address()).unwrap();
    let mut timed = Timed::new(&stream, Instant::now() + LONG);
    assert!(handshake::join(&mut timed, zero.address(), &Membership::new(1, 2)).is_ok());
    let key = long_key;
    let question = Question::Get { key };
    write_frame(
        &mut stream,
        &Request::Ask {
            number: 5,
            question,
        },
    )
    .unwrap();
    let refusal = wire::Refusal::TooLong;
    assert_eq!(
        read_frame::<Answer>(&mut stream, MAX_FRAME).unwrap(),
        Answer::Refused { number: 5, refusal }
    );
}

#[test]
fn a_full_store_refuses_and_goes_on() {
    let zero = serve(1);
    let value = vec![0; MAX_VALUE_BYTES];
    let set = |index: usize| zero.set(&format!("{index:03}"), value.clone());
    let fitting = MAX_STORED_BYTES / (MAX_VALUE_BYTES + 3);
    for index in 0..fitting {
        set(index).unwrap();
    }
    let full = StoreError::Full {
        limit: MAX_STORED_BYTES,
    };
    assert_eq!(set(fitting), Err(full));
    // In place of a value there is room for another.
    set(0).unwrap();
    zero.set("small", "x").unwrap();
}

#[test]
fn one_rank_contributes_once() {
    let zero = serve(2);
    thread::scope(|scope| {
        let gather = |value: &'static str| {
            let zero = &zero;
            scope.spawn(move || zero.all_gather("twice", value, LONG))
        };
        let both = [gather("a"), gather("b")];
        // The second is refused; only then does rank 1 come.
        while !both.iter().any(|thread| thread.is_finished()) {
            thread::yield_now();
        }
        let values = join(&zero, 1).all_gather("twice", "c", LONG).unwrap();
        let results = both.map(|thread| thread.join().unwrap());
        let name = "twice".to_owned();
        let refused = Err(StoreError::GatheringAlready { rank: 0, name });
        assert!(results.contains(&refused), "{results:?}");
        assert!(results.contains(&Ok(values)), "{results:?}");
    });
}

#[test]
fn an_abort_is_seen_by_all_at_once() {
    let stores = job(4);
    let failure = aborted(2, "out of memory");
    let (sender, callbacks) = mpsc::channel();
    for store in &stores {
        let (sender, rank) = (sender.clone(), store.rank());
        store.on_failure(move |failure| sender.send((rank, failure.clone())).unwrap());
    }
    let start = Instant::now();
    thread::scope(|scope| {
        // Waits that are under way end too.
        let waiting = stores
            .iter()
            .map(|store| scope.spawn(|| store.get("never", LONG)));
        let waiting: Vec<_> = waiting.collect();
        stores[2].abort("out of memory");
        for waiting in waiting {
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error, StoreError::Failed(failure.clone()));
        }
    });
    for store in &stores {
        assert_eq!(store.wait_for_failure(LONG), Some(failure.clone()));
        assert_eq!(
            store.set("key", ""),
            Err(StoreError::Failed(failure.clone()))
        );
    }
    let mut called: Vec<_> = (0..4)
        .map(|_| callbacks.recv_timeout(LONG).unwrap())
        .collect();
    called.sort_by_key(|(rank, _)| *rank);
    assert_eq!(called, [0, 1, 2, 3].map(|rank| (rank, failure.clone())));
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );

    // Later callbacks are called at once, and only the first failure counts.
    let (sender, late) = mpsc::channel();
    stores[1].on_failure(move |failure| sender.send(failure.clone()).unwrap());
    assert_eq!(late.try_recv(), Ok(failure.clone()));
    stores[3].abort("too late");
    assert_eq!(stores[3].failure(), Some(failure.clone()));
    assert_eq!(stores[0].failure(), Some(failure));
}

#[test]
fn a_job_can_meet_again_where_one_was_aborted() {
    let stores = job(3);
    let address = stores[0].address().to_string();
    stores[1].abort("again");
    for store in &stores {
        assert_eq!(store.wait_for_failure(LONG), Some(aborted(1, "again")));
    }
    drop(stores);
    let zero = Store::open(&address, Membership::new(0, 2), LONG).unwrap();
    let stores = [join(&zero, 1), zero];
    on_every_rank(&stores, |store| store.barrier("again", LONG).unwrap());
}

#[test]
fn who_joins_after_a_failure_hears_of_it() {
    let zero = serve(3);
    join(&zero, 1).abort("early");
    assert_eq!(
        join(&zero, 2).wait_for_failure(LONG),
        Some(aborted(1, "early"))
    );
}

#[test]
fn a_panic_is_an_abort() {
    let stores = job(3);
    let mut stores = stores.into_iter();
    let (zero, one, two) = (
        stores.next().unwrap(),
        stores.next().unwrap(),
        stores.next(),
    );
    let panicked = thread::spawn(move || {
        let _store = two;
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    for store in [&one, &zero] {
        assert_eq!(
            store.wait_for_failure(LONG),
            Some(aborted(2, "it panicked"))
        );
    }
}

#[test]
fn a_connection_that_breaks_is_a_lost_rank() {
    let stores = job(3);
    stores[1].client.cut();
    for store in [&stores[0], &stores[2]] {
        let failure = store.wait_for_failure(LONG).unwrap();
        assert_eq!(failure.rank, 1);
        assert!(matches!(failure.kind, FailureKind::Lost(_)), "{failure}");
    }
    // What is left of rank 1 has lost rank 0.
    assert_eq!(stores[1].wait_for_failure(LONG).unwrap().rank, 0);
}

#[test]
fn who_leaves_in_peace_disturbs_nobody_and_may_return() {
    let zero = serve(3);
    let two = join(&zero, 2);
    drop(join(&zero, 1));
    zero.set("still", "here").unwrap();
    assert_eq!(two.get("still", LONG).unwrap(), b"here");
    let one = join(&zero, 1);
    let stores = [one, two, zero];
    on_every_rank(&stores, |store| store.barrier("all", LONG).unwrap());
    assert!(stores.iter().all(|store| store.failure().is_none()));
}

#[test]
fn the_store_ends_in_peace_with_rank_zero() {
    let mut stores = job(3);
    let zero = stores.remove(0);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| stores[0].get("never", LONG));
        let start = Instant::now();
        drop(zero);
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(waiting.join().unwrap(), Err(StoreError::Closed));
    });
    for store in stores {
        assert_eq!(store.wait_for_failure(LONG), None);
        assert_eq!(store.set("key", ""), Err(StoreError::Closed));
        store.abort("nobody hears");
    }
}

#[test]
fn a_callback_may_use_and_drop_its_store() {
    let zero = serve(2);
    let one = Arc::new(join(&zero, 1));
    let (sender, done) = mpsc::channel();
    let held = Arc::clone(&one);
    one.on_failure(move |_| {
        held.abort("a second time");
        let result = held.set("key", "");
        drop(held);
        sender.send(result).unwrap();
    });
    drop(one);
    zero.abort("first");
    let failure = aborted(0, "first");
    assert_eq!(
        done.recv_timeout(LONG).unwrap(),
        Err(StoreError::Failed(failure))
    );
}

#[test]
fn a_deadline_may_be_as_long_as_can_be_said() {
    let zero = Store::open(ANYWHERE, Membership::new(0, 1), Duration::MAX).unwrap();
    zero.set("key", "value").unwrap();
    assert_eq!(zero.get("key", Duration::MAX).unwrap(), b"value");
}

#[test]
fn a_host_name_will_do() {
    let zero = Store::open("localhost:0", Membership::new(0, 2), LONG).unwrap();
    assert!(zero.address().ip().is_loopback());
    let address = format!("localhost:{}", zero.address().port());
    let one = Store::open(&address, Membership::new(1, 2), LONG).unwrap();
    on_every_rank(&[one, zero], |store| store.barrier("met", LONG).unwrap());
}

#[test]
fn rank_zero_reaches_itself_where_it_listens_for_everybody() {
    let zero = Store::open("0.0.0.0:0", Membership::new(0, 1), LONG).unwrap();
    assert!(zero.address().ip().is_unspecified());
    zero.barrier("alone", LONG).unwrap();
}

#[test]
fn a_silent_connection_is_asked_whether_it_lives() {
    let zero = serve(1);
    let socket = socket2::SockRef::from(zero.client.stream());
    assert!(socket.keepalive().unwrap());
    assert_eq!(
        socket.tcp_keepalive_time().unwrap(),
        Duration::from_secs(10)
    );
}

#[test]
fn long_reasons_are_cut() {
    let stores = job(2);
    stores[1].abort(&"\u{e9}".repeat(MAX_REASON_BYTES));
    let failure = stores[0].wait_for_failure(LONG).unwrap();
    assert_eq!(failure, aborted(1, &"\u{e9}".repeat(MAX_REASON_BYTES / 2)));
}

/// A job with this token, and what a rank that joins and leaves sends to rank 0, and what that sends back.
fn listened_in(secret: &str) -> (Store, [Vec<u8>; 2]) {
    let member = |rank| Membership::new(rank, 2).token(Token::new(secret));
    let zero = Store::open(ANYWHERE, member(0), LONG).unwrap();
    // Rank 1 goes through something that listens in.
    let middle = TcpListener::bind(ANYWHERE).unwrap();
    let address = middle.local_addr().unwrap().to_string();
    let heard = thread::scope(|scope| {
        let one = scope.spawn(|| Store::open(&address, member(1), LONG).map(drop));
        let from = Arc::new(middle.accept().unwrap().0);
        let to = Arc::new(TcpStream::connect(zero.address()).unwrap());
        let (back, forth) = (Arc::clone(&to), Arc::clone(&from));
        let down = scope.spawn(move || pass_on(&back, &forth));
        let up = pass_on(&from, &to);
        one.join().unwrap().unwrap();
        [up, down.join().unwrap()]
    });
    (zero, heard)
}

#[test]
fn the_token_is_not_sent_in_clear() {
    let secret = "a secret that is easy to find";
    let (zero, heard) = listened_in(secret);
    for heard in heard {
        let found = |text: &str| {
            heard
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        };
        assert!(found("ringstor"));
        assert!(!found(secret));
    }
    assert_eq!(zero.failure(), None);
}

#[test]
fn what_was_heard_lets_nobody_in() {
    let (zero, [heard, _]) = listened_in("sesame");
    let mut stream = TcpStream::connect(zero.address()).unwrap();
    // Its hello, and its first frame.
    let len = u32::from_le_bytes(heard[44..48].try_into().unwrap()) as usize;
    stream.write_all(&heard[..48 + len]).unwrap();
    stream.read_exact(&mut [0; 44]).unwrap();
    let verdict: handshake::Verdict = read_frame(&mut stream, MAX_FRAME).unwrap();
    assert_eq!(verdict, handshake::Verdict::WrongToken);
}

/// Passes on all that comes; returns it.
fn pass_on(mut from: &TcpStream, mut to: &TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let mut bytes = [0; 1024];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        heard.extend(&bytes[..len]);
        to.write_all(&bytes[..len]).unwrap();
    }
    // Fails only if the connection has ended already.
    let _ = to.shutdown(Shutdown::Write);
    heard
}
