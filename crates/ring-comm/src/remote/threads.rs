//! A wire between threads of one process, to test everything above a wire without a network.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    endpoint::RemoteEndpoint,
    engine::Engine,
    frame::{Failure, Frame, Header},
    wire::{End, Event, Wire, host_room_for},
};
use crate::{
    attempt::panicked,
    buffer::{DType, HostBuffer},
    conformance::{self, Backend, RankBody, Staging},
    error::{CommError, CommErrorKind},
    loopback::RankPanic,
    transport::{Expected, Payload, Rank, Tag, Transport},
};

pub(crate) const PATIENT: Duration = Duration::from_secs(30);
/// For ranks whose peers do not come or go in an orderly way.
const BRIEF: Duration = Duration::from_secs(1);
const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);

/// What is on its way to one rank.
#[derive(Default)]
struct Inbox {
    frames: Vec<(Rank, Vec<u8>)>,
    /// Data by source and number.
    data: HashMap<(Rank, u64), Vec<u8>>,
}

/// What the ranks' wires share.
pub(crate) struct Net {
    inboxes: Vec<Mutex<Inbox>>,
    /// Whether the wire of a rank is cut: nothing comes, nothing goes, and nobody is told.
    cut: Vec<AtomicBool>,
    behaviour: Behaviour,
    frames_sent: AtomicUsize,
}

/// How unkind the wire is, within what it promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    Prompt,
    /// One frame arrives per look, those of the last rank first, and data a look later than it could.
    Tardy,
}

pub(crate) struct ThreadWire {
    net: Arc<Net>,
    rank: Rank,
    frames: VecDeque<(Rank, Vec<u8>)>,
    sending: Vec<(Rank, u64, HostBuffer)>,
    receiving: Vec<(Rank, u64, HostBuffer)>,
    discarding: Vec<(Rank, u64)>,
    looks: usize,
}

impl Net {
    pub(crate) fn new(world_size: usize, behaviour: Behaviour) -> Arc<Self> {
        Arc::new(Self {
            inboxes: (0..world_size).map(|_| Mutex::default()).collect(),
            cut: (0..world_size).map(|_| AtomicBool::new(false)).collect(),
            behaviour,
            frames_sent: AtomicUsize::new(0),
        })
    }

    fn engine(self: &Arc<Self>, rank: Rank, deadline: Duration) -> Arc<Engine> {
        let net = Arc::clone(self);
        let make_wire = move || Ok::<_, ()>(ThreadWire::new(net, rank));
        let engine = Engine::start(deadline, make_wire);
        Arc::new(engine.ok().expect("a thread, and no failure"))
    }

    /// Cuts the wire of a rank: nothing comes, nothing goes, and nobody is told.
    pub(crate) fn cut(&self, rank: Rank) {
        self.cut[rank].store(true, Ordering::SeqCst);
    }

    /// Frames that the ranks have sent so far.
    #[cfg(feature = "nccl")]
    pub(crate) fn frames_sent(&self) -> usize {
        self.frames_sent.load(Ordering::SeqCst)
    }

    fn is_cut(&self, rank: Rank) -> bool {
        self.cut[rank].load(Ordering::SeqCst)
    }
}

impl ThreadWire {
    pub(crate) fn new(net: Arc<Net>, rank: Rank) -> Self {
        Self {
            net,
            rank,
            frames: VecDeque::new(),
            sending: Vec::new(),
            receiving: Vec::new(),
            discarding: Vec::new(),
            looks: 0,
        }
    }

    /// What has come for a receive, if it is there.
    fn arrival(&self, peer: Rank, sequence: u64) -> Option<Vec<u8>> {
        let mut inbox = self.net.inboxes[self.rank].lock().unwrap();
        inbox.data.remove(&(peer, sequence))
    }
}

impl Wire<HostBuffer> for ThreadWire {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.net.inboxes.len()
    }

    fn send_frame(&mut self, peer: Rank, frame: Vec<u8>) {
        self.net.frames_sent.fetch_add(1, Ordering::SeqCst);
        if !self.net.is_cut(self.rank) && !self.net.is_cut(peer) {
            let mut inbox = self.net.inboxes[peer].lock().unwrap();
            inbox.frames.push((self.rank, frame));
        }
    }

    fn room_for(
        &mut self,
        expected: Expected,
        memory: Option<HostBuffer>,
    ) -> Result<HostBuffer, String> {
        host_room_for(expected, memory)
    }

    fn send_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        let mut inbox = self.net.inboxes[peer].lock().unwrap();
        let before = inbox
            .data
            .insert((self.rank, sequence), buffer.as_bytes().to_vec());
        assert_eq!(before, None, "a number is used twice");
        drop(inbox);
        self.sending.push((peer, sequence, buffer));
    }

    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        self.receiving.push((peer, sequence, buffer));
    }

    fn discard_data(&mut self, peer: Rank, sequence: u64, _: Expected) {
        self.discarding.push((peer, sequence));
    }

    fn poll(&mut self, events: &mut Vec<Event<HostBuffer>>) {
        self.looks += 1;
        if self.net.is_cut(self.rank) {
            return;
        }
        let tardy = self.net.behaviour == Behaviour::Tardy;
        let mut come = std::mem::take(&mut self.net.inboxes[self.rank].lock().unwrap().frames);
        if tardy {
            // The order between peers is nobody's promise; that within a peer is.
            come.sort_by_key(|&(peer, _)| std::cmp::Reverse(peer));
        }
        self.frames.extend(come);
        let now = if tardy { 1 } else { self.frames.len() };
        let frames = self.frames.drain(..now.min(self.frames.len()));
        events.extend(frames.map(|(peer, bytes)| Event::Frame { peer, bytes }));
        if tardy && self.looks.is_multiple_of(2) {
            return;
        }
        let mut discarding = std::mem::take(&mut self.discarding);
        discarding.retain(|&(peer, sequence)| self.arrival(peer, sequence).is_none());
        self.discarding = discarding;
        for (peer, sequence, buffer) in self.sending.drain(..) {
            events.push(Event::Sent {
                peer,
                sequence,
                buffer,
            });
        }
        for (peer, sequence, mut buffer) in std::mem::take(&mut self.receiving) {
            match self.arrival(peer, sequence) {
                None => self.receiving.push((peer, sequence, buffer)),
                Some(bytes) => {
                    buffer.as_bytes_mut().copy_from_slice(&bytes);
                    events.push(Event::Received {
                        peer,
                        sequence,
                        buffer,
                    });
                }
            }
        }
    }

    fn is_busy(&self) -> bool {
        !self.sending.is_empty() || !self.receiving.is_empty() || !self.discarding.is_empty()
    }

    fn abandon(&mut self) {
        self.sending.clear();
        self.receiving.clear();
    }

    fn is_flushed(&self) -> bool {
        true
    }

    fn close(&mut self, _end: End) {}
}

/// Ranks as threads, each with a wire and an engine of its own.
struct Threads(Behaviour);

impl Threads {
    fn run<R: Send>(
        &self,
        world_size: usize,
        deadline: Duration,
        body: impl Fn(RemoteEndpoint) -> R + Sync,
    ) -> Vec<thread::Result<R>> {
        let net = Net::new(world_size, self.0);
        let engine = |rank| net.engine(rank, deadline.max(PATIENT));
        run_on_threads(world_size, engine, deadline, body)
    }
}

/// What `body` gives on every rank of a new group, each on a thread of its own, with what `engine` gives there.
pub(crate) fn run_on_threads<R: Send>(
    world_size: usize,
    engine: impl Fn(Rank) -> Arc<Engine> + Sync,
    deadline: Duration,
    body: impl Fn(RemoteEndpoint) -> R + Sync,
) -> Vec<thread::Result<R>> {
    let run = |rank| {
        let engine = engine(rank);
        let endpoint = join(&engine, deadline).unwrap();
        let body = AssertUnwindSafe(|| {
            let _membership = endpoint.membership();
            body(endpoint)
        });
        catch_unwind(body)
    };
    thread::scope(|scope| {
        let start = |rank| {
            let run = &run;
            scope.spawn(move || run(rank))
        };
        let threads: Vec<_> = (0..world_size).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    })
}

/// The panics among what ranks give.
pub(crate) fn panics(results: Vec<thread::Result<()>>) -> Vec<RankPanic> {
    let panic = |(rank, result): (Rank, thread::Result<()>)| {
        let payload = result.err()?;
        Some(RankPanic::new(rank, payload.as_ref()))
    };
    results.into_iter().enumerate().filter_map(panic).collect()
}

/// Joining must not fail because a case is impatient.
pub(crate) fn join(engine: &Arc<Engine>, deadline: Duration) -> Result<RemoteEndpoint, CommError> {
    engine.join_within(PATIENT, deadline)
}

impl Backend for Threads {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        panics(Threads::run(self, world_size, deadline, |endpoint| {
            body(Arc::new(endpoint));
        }))
    }

    fn max_world_size(&self) -> usize {
        usize::MAX
    }

    fn staging(&self) -> Staging {
        Staging::CommonMemory
    }
}

#[test]
fn remote_ranks_conform() {
    conformance::run_all(&Threads(Behaviour::Prompt));
}

#[test]
fn remote_ranks_conform_over_a_tardy_wire() {
    conformance::run_all(&Threads(Behaviour::Tardy));
}

/// The send yields the very memory it was given, the receive the very memory it brought.
#[test]
fn memory_stays_on_its_rank() {
    let results = Threads(Behaviour::Prompt).run(2, PATIENT, |endpoint| {
        let own = vec![endpoint.rank() as f32; 3];
        let address = own.as_ptr();
        if endpoint.rank() == 0 {
            let send = endpoint.isend(1, TAG, HostBuffer::F32(own)).unwrap();
            let memory = send.wait().unwrap().unwrap();
            assert_eq!(memory.as_f32().unwrap().as_ptr(), address);
        } else {
            let expected = Expected {
                dtype: DType::F32,
                len: 2 + endpoint.rank(),
            };
            let memory = Some(HostBuffer::F32(own));
            let receive = endpoint.irecv_into(0, TAG, expected, memory).unwrap();
            let buffer = receive.wait().unwrap();
            assert_eq!(buffer, HostBuffer::F32(vec![0.0; 3]));
            assert_eq!(buffer.as_f32().unwrap().as_ptr(), address);
        }
    });
    assert!(results.iter().all(Result::is_ok));
}

/// Nobody is told of the cut; both sides find out by themselves, and in time.
#[test]
fn a_cut_wire_ends_at_the_deadline() {
    let deadline = Duration::from_millis(100);
    let net = Net::new(3, Behaviour::Prompt);
    let met = std::sync::Barrier::new(3);
    thread::scope(|scope| {
        for rank in 0..3 {
            let (net, met) = (&net, &met);
            scope.spawn(move || {
                let engine = net.engine(rank, BRIEF);
                let endpoint = join(&engine, deadline).unwrap();
                if met.wait().is_leader() {
                    net.cut(0);
                }
                met.wait();
                let start = Instant::now();
                let error = endpoint.all_gather_bytes(0, Vec::new()).unwrap_err();
                assert!(
                    matches!(error.root().kind, CommErrorKind::Deadline { .. }),
                    "{error}"
                );
                match rank {
                    0 => assert!(error.culprit() != 0),
                    _ => assert_eq!(error.culprit(), 0),
                }
                assert!(start.elapsed() < deadline + Duration::from_secs(10));
            });
        }
    });
}

/// A process that is in one group after the other: what was sent in the first and never taken is not taken in the second, and does
/// not stay on the wire either.
#[test]
fn a_late_message_does_not_match_the_next_group() {
    let net = Net::new(2, Behaviour::Prompt);
    let first_is_over = std::sync::Barrier::new(2);
    thread::scope(|scope| {
        for rank in 0..2 {
            let (net, first_is_over) = (&net, &first_is_over);
            scope.spawn(move || {
                let engine = net.engine(rank, PATIENT);
                let first = join(&engine, PATIENT).unwrap();
                if rank == 0 {
                    drop(first.isend(1, TAG, HostBuffer::F32(vec![1.0])));
                }
                first_is_over.wait();
                drop(first);

                let second = join(&engine, PATIENT).unwrap();
                assert_eq!(second.poisoned(), None);
                if rank == 0 {
                    let send = second.isend(1, TAG, HostBuffer::F32(vec![2.0]));
                    send.unwrap().wait().unwrap();
                } else {
                    let expected = Expected {
                        dtype: DType::F32,
                        len: 1,
                    };
                    let received = second.irecv(0, TAG, expected).unwrap().wait().unwrap();
                    assert_eq!(received, HostBuffer::F32(vec![2.0]));
                }
            });
        }
    });
    let is_empty = |inbox: &Mutex<Inbox>| inbox.lock().unwrap().data.is_empty();
    assert!(net.inboxes.iter().all(is_empty));
}

/// The one message is of another size than what is expected, the other is expected by nobody.
#[test]
fn what_a_group_refuses_does_not_stay_on_the_wire() {
    let net = Net::new(2, Behaviour::Prompt);
    thread::scope(|scope| {
        for rank in 0..2 {
            let net = &net;
            scope.spawn(move || {
                let engine = net.engine(rank, PATIENT);
                let endpoint = join(&engine, PATIENT).unwrap();
                if rank == 0 {
                    let other = Tag::new(0, 1, Payload::KeyValue);
                    let sends = [TAG, other].map(|tag| {
                        endpoint
                            .isend(1, tag, HostBuffer::zeros(DType::F32, 2))
                            .unwrap()
                    });
                    let errors = sends.map(|send| send.wait().unwrap_err());
                    return assert_eq!(errors.map(|error| error.culprit()), [0, 0]);
                }
                let expected = Expected {
                    dtype: DType::F32,
                    len: 1,
                };
                let error = endpoint
                    .irecv(0, TAG, expected)
                    .unwrap()
                    .wait()
                    .unwrap_err();
                assert!(
                    matches!(error.kind, CommErrorKind::SizeMismatch { .. }),
                    "{error}"
                );
            });
        }
    });
    let is_empty = |inbox: &Mutex<Inbox>| inbox.lock().unwrap().data.is_empty();
    assert!(net.inboxes.iter().all(is_empty));
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let net = Net::new(2, Behaviour::Prompt);
    let engine = net.engine(1, BRIEF);
    let error = engine.join(Duration::from_millis(20)).unwrap_err();
    assert!(
        matches!(error.kind, CommErrorKind::Deadline { .. }),
        "{error}"
    );
    assert_eq!((error.rank, error.peer, error.tag), (1, Some(0), None));
}

#[test]
fn noise_on_the_line_is_an_error() {
    let net = Net::new(2, Behaviour::Prompt);
    let noise = (0, b"noise".to_vec());
    net.inboxes[1].lock().unwrap().frames.push(noise);
    let error = net.engine(1, BRIEF).join(PATIENT).unwrap_err();
    assert!(
        matches!(&error.kind, CommErrorKind::PeerLost { reason } if reason.contains("not a frame")),
        "{error}"
    );
    assert_eq!(error.culprit(), 0);
}

#[test]
fn a_frame_that_is_missing_is_an_error() {
    let net = Net::new(2, Behaviour::Prompt);
    let header = Header {
        epoch: 1,
        number: 5,
    };
    let early = (0, Frame::Depart.encode(header));
    net.inboxes[1].lock().unwrap().frames.push(early);
    let error = net.engine(1, BRIEF).join(PATIENT).unwrap_err();
    assert!(
        matches!(&error.kind, CommErrorKind::PeerLost { reason } if reason.contains("frame 5 where 0")),
        "{error}"
    );
}

/// Rank 0 has met everybody and fails before rank 1 has heard of rank 2.
#[test]
fn a_group_that_fails_while_a_rank_joins_says_so_at_the_first_call() {
    let net = Net::new(3, Behaviour::Prompt);
    let hello = Frame::Hello {
        world_size: 3,
        process: None,
    };
    let poison = Frame::Poison(Failure {
        origin: 0,
        cause: panicked(0),
        completed: Vec::new(),
        failed: Vec::new(),
    });
    for (frame, number) in [hello, poison].into_iter().zip(0..) {
        let bytes = frame.encode(Header { epoch: 1, number });
        net.inboxes[1].lock().unwrap().frames.push((0, bytes));
    }
    let endpoint = net.engine(1, BRIEF).join(PATIENT).unwrap();
    let error = endpoint.all_gather_bytes(0, Vec::new()).unwrap_err();
    assert_eq!(error.root(), &panicked(0));
}
