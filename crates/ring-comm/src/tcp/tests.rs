//! Ranks as threads of one process, over the loopback interface.

mod strangers;
mod stream;

use std::{
    collections::BTreeMap,
    io::Write,
    net::{TcpListener, TcpStream},
    panic::resume_unwind,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{Tcp, TcpError, link::Link, mesh::Mesh, record::Record};
use crate::{
    buffer::{Buffer, DType, HostBuffer},
    conformance::{self, Backend, RankBody, Staging},
    error::CommErrorKind,
    launch::{
        Launch, Origin, Rendezvous, Setting, Token,
        store::{Membership, Store},
    },
    loopback::RankPanic,
    remote::{Event, RemoteEndpoint, panics, run_on_threads},
    transport::{Expected, Payload, Rank, Tag, Transport},
};

/// Longer than anything takes on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);
const TOKEN: &str = "sesame";

fn setting<T>(value: T) -> Setting<T> {
    Setting {
        value,
        origin: Origin::Default,
    }
}

/// A rank of a job that meets at `port` of this host.
fn launch(rank: Rank, world_size: usize, port: u16) -> Launch {
    Launch {
        rank: setting(rank),
        world_size: setting(world_size),
        local_rank: None,
        rendezvous: Some(setting(Rendezvous {
            host: "127.0.0.1".to_owned(),
            port,
        })),
        job_id: Some(setting("training".to_owned())),
        token: Some(setting(Token::new(TOKEN))),
        deadline: setting(PATIENT),
    }
}

/// The store of rank 0, on a free port.
fn serve(launch: &Launch) -> Store {
    Store::open("127.0.0.1:0", launch.membership(), PATIENT).unwrap()
}

/// What `work` gives on every rank, each on a thread of its own.
fn on_threads<T: Send>(world_size: usize, work: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let start = |rank| {
            let work = &work;
            scope.spawn(move || work(rank))
        };
        let threads: Vec<_> = (0..world_size).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, T>| {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

/// All ranks of a job, connected.
fn job(world_size: usize) -> Vec<Tcp> {
    if world_size == 1 {
        return vec![Tcp::init(&launch(0, 1, 0)).unwrap()];
    }
    let zero = serve(&launch(0, world_size, 0));
    let port = zero.address().port();
    let zero = Mutex::new(Some(zero));
    on_threads(world_size, |rank| {
        let launch = launch(rank, world_size, port);
        if rank > 0 {
            return Tcp::init(&launch).unwrap();
        }
        let store = zero.lock().unwrap().take().unwrap();
        let mesh = Mesh::connect_over(&store, &launch, Instant::now() + PATIENT);
        Tcp::over(mesh.unwrap(), PATIENT).unwrap()
    })
}

/// Ends all ranks at once, as they wait for each other.
fn part(job: Vec<Tcp>) {
    thread::scope(|scope| {
        for tcp in job {
            scope.spawn(|| drop(tcp));
        }
    });
}

fn engine(job: &[Tcp], rank: Rank) -> Arc<crate::remote::Engine> {
    Arc::clone(&job[rank].engine)
}

/// Runs `body` on every rank of a new group of the job; none may panic.
fn run<R: Send>(job: &[Tcp], body: impl Fn(RemoteEndpoint) -> R + Sync) -> Vec<R> {
    let results = run_on_threads(job.len(), |rank| engine(job, rank), PATIENT, body);
    let value = |result: thread::Result<R>| result.unwrap_or_else(|panic| resume_unwind(panic));
    results.into_iter().map(value).collect()
}

/// One job of every size, whose groups follow one another.
#[derive(Default)]
struct Jobs(Mutex<BTreeMap<usize, Vec<Tcp>>>);

impl Backend for Jobs {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        let mut jobs = self.0.lock().unwrap();
        let job = jobs.entry(world_size).or_insert_with(|| job(world_size));
        let engine = |rank| engine(job, rank);
        let results = run_on_threads(world_size, engine, deadline, |endpoint| {
            body(Arc::new(endpoint));
        });
        panics(results)
    }

    fn max_world_size(&self) -> usize {
        usize::MAX
    }

    fn staging(&self) -> Staging {
        Staging::CommonMemory
    }
}

#[test]
fn tcp_conforms() {
    let jobs = Jobs::default();
    conformance::run_all(&jobs);
    jobs.0.into_inner().unwrap().into_values().for_each(part);
}

fn tag(step: u32) -> Tag {
    Tag::new(0, step, Payload::KeyValue)
}

fn f32s(len: usize) -> Expected {
    Expected {
        dtype: DType::F32,
        len,
    }
}

/// Sizes around those of a piece, both ways at once, in the memory that was brought.
#[test]
fn messages_of_all_sizes_arrive_in_the_memory_that_was_brought() {
    const PIECE: usize = super::record::MAX_PIECE_BYTES / 4;
    let job = job(2);
    run(&job, |endpoint| {
        let peer = 1 - endpoint.rank();
        let lens = [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 3];
        for (step, len) in (0..).zip(lens) {
            let message = |rank: usize| {
                let value = |index| (rank * 10_000_000 + index) as f32;
                HostBuffer::F32((0..len).map(value).collect())
            };
            let memory = HostBuffer::zeros(DType::F32, len + 1);
            let address = memory.as_bytes().as_ptr();
            let receive = endpoint.irecv_into(peer, tag(step), f32s(len), Some(memory));
            let send = endpoint.isend(peer, tag(step), message(endpoint.rank()));
            let received = receive.unwrap().wait().unwrap();
            assert_eq!(received, message(peer));
            assert_eq!(received.as_bytes().as_ptr(), address);
            let own = send.unwrap().wait().unwrap();
            assert_eq!(own, Some(message(endpoint.rank())));
        }
    });
    part(job);
}

/// A message that nobody takes keeps neither other messages nor control data waiting; nor does a large one on its way.
#[test]
fn nothing_waits_behind_a_message_that_waits() {
    const LARGE: usize = 8 << 20;
    let job = job(2);
    run(&job, |endpoint| {
        let large = || HostBuffer::zeros(DType::F32, LARGE);
        if endpoint.rank() == 0 {
            let waits = endpoint.isend(1, tag(0), large()).unwrap();
            let passes = endpoint.isend(1, tag(1), large()).unwrap();
            passes.wait().unwrap();
            endpoint.all_gather_bytes(0, vec![0]).unwrap();
            waits.wait().unwrap();
        } else {
            let passes = endpoint.irecv(0, tag(1), f32s(LARGE)).unwrap();
            assert_eq!(passes.wait().unwrap().len(), LARGE);
            endpoint.all_gather_bytes(0, vec![1]).unwrap();
            let waits = endpoint.irecv(0, tag(0), f32s(LARGE)).unwrap();
            waits.wait().unwrap();
        }
    });
    part(job);
}

/// A group fails with large messages under way in all directions; the next one, over the same connections, is sound.
#[test]
fn what_is_abandoned_does_not_disturb_the_next_group() {
    const LARGE: usize = 4 << 20;
    let job = job(3);
    for round in 0..10 {
        run(&job, |endpoint| {
            let peers = (0..3).filter(|&peer| peer != endpoint.rank());
            let mut requests = Vec::new();
            for peer in peers {
                let receive = endpoint.irecv(peer, tag(0), f32s(LARGE));
                let send = endpoint.isend(peer, tag(0), HostBuffer::zeros(DType::F32, LARGE));
                requests.push((receive, send));
            }
            if endpoint.rank() == round % 3 {
                endpoint.abort("staged");
            }
            drop(requests);
            let error = endpoint.all_gather_bytes(0, Vec::new()).unwrap_err();
            assert!(
                matches!(
                    error.root().kind,
                    CommErrorKind::Aborted { .. } | CommErrorKind::RequestDropped { .. }
                ),
                "{error}"
            );
        });
        run(&job, |endpoint| {
            let parts = endpoint.all_gather_bytes(0, vec![endpoint.rank() as u8]);
            assert_eq!(parts.unwrap(), [[0], [1], [2]]);
            let (next, before) = ((endpoint.rank() + 1) % 3, (endpoint.rank() + 2) % 3);
            let own = HostBuffer::F32(vec![endpoint.rank() as f32; 1000]);
            let receive = endpoint.irecv(before, tag(0), f32s(1000)).unwrap();
            let send = endpoint.isend(next, tag(0), own).unwrap();
            assert_eq!(
                receive.wait().unwrap(),
                HostBuffer::F32(vec![before as f32; 1000])
            );
            send.wait().unwrap();
        });
    }
    part(job);
}

/// Rank 2 fails and leaves at once, with large messages on their way to it that it never reads.
#[test]
fn the_last_words_of_a_rank_arrive() {
    const LARGE: usize = 8 << 20;
    for _ in 0..5 {
        let ranks = job(3).into_iter().map(|tcp| Mutex::new(Some(tcp)));
        let ranks: Vec<_> = ranks.collect();
        on_threads(3, |rank| {
            let tcp = ranks[rank].lock().unwrap().take().unwrap();
            let endpoint = tcp.group(PATIENT).unwrap();
            let peers = || (0..3).filter(|&peer| peer != rank);
            let receive = |peer| endpoint.irecv(peer, tag(0), f32s(LARGE));
            let receives: Vec<_> = peers().map(receive).collect();
            let large = || HostBuffer::zeros(DType::F32, LARGE);
            let sends: Vec<_> = peers()
                .map(|peer| endpoint.isend(peer, tag(0), large()))
                .collect();
            if rank == 2 {
                endpoint.abort("staged");
                return;
            }
            let received = receives.into_iter().map(|receive| receive?.wait());
            // Some may have succeeded before.
            let failed = received.filter_map(Result::err).collect::<Vec<_>>();
            let gathered = endpoint.all_gather_bytes(0, Vec::new());
            for error in failed.into_iter().chain([gathered.unwrap_err()]) {
                let kind = &error.root().kind;
                let is_abort = matches!(kind, CommErrorKind::Aborted { culprit: 2, .. });
                assert!(is_abort, "{error}");
            }
            drop(sends);
        });
    }
}

/// Nothing can be written any more, but what the peer has said before can be read.
#[test]
fn what_was_said_before_a_connection_broke_is_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (own, _) = listener.accept().unwrap();
    own.set_nonblocking(true).unwrap();
    let mut link = Link::new(1, own);
    let mut said = Record::Frame { len: 4 }.header().to_vec();
    said.extend(b"last");
    peer.write_all(&said).unwrap();
    // It does not read this, so its end is a reset.
    link.send_frame(b"unread".to_vec());
    drop(peer);
    let start = Instant::now();
    while !link.is_broken() {
        link.send_frame(b"nobody reads this".to_vec());
        assert!(start.elapsed() < PATIENT);
    }
    let mut events = Vec::new();
    link.poll(&mut events).unwrap_err();
    let [Event::Frame { peer: 1, bytes }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(bytes, b"last");
}

#[test]
fn a_single_rank_needs_no_network() {
    let mut launch = launch(0, 1, 1);
    launch.rendezvous = None;
    let tcp = Tcp::init(&launch).unwrap();
    let endpoint = tcp.group(PATIENT).unwrap();
    assert_eq!(endpoint.all_gather_bytes(0, vec![7]).unwrap(), [[7]]);
}

#[test]
fn several_ranks_need_a_place_to_meet() {
    let mut launch = launch(0, 2, 1);
    launch.rendezvous = None;
    let error = Tcp::init(&launch).unwrap_err();
    assert!(matches!(error, TcpError::Launch(_)), "{error}");
}
