//! The one thread of a rank that owns its wire.
//!
//! It goes round: looks at the wire, tells the state what has happened, does on the wire what the state wants. A process can be in
//! many groups, one after the other; frames carry the number of theirs (the *epoch*), so that one that comes late is not
//! taken for one of the next group, and one that comes early waits for it. Data is numbered through all groups.

use std::{
    cmp::Ordering,
    fmt, mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    endpoint::RemoteEndpoint,
    frame::{Frame, Header},
    process::ProcessIdentity,
    session::{Inner, Session},
    state::{Output, State},
    wire::{End, Event, Wire},
};
use crate::{
    attempt::Subject,
    buffer::{Buffer, HostBuffer},
    error::{CommError, CommErrorKind},
    transport::{Expected, Rank},
};

/// How long the engine looks at the wire without a break when somebody waits for data that is flowing, and nothing seems to happen.
const EAGER: Duration = Duration::from_millis(200);
/// The same when something is expected from a peer.
const ATTENTIVE: Duration = Duration::from_micros(50);
/// Between two looks at the wire when data is flowing, or somebody waits for something.
const SHORT_BREAK: Duration = Duration::from_micros(100);
/// Between two looks at the wire when nothing is expected, or for long.
const LONG_BREAK: Duration = Duration::from_millis(2);
/// Between two looks at the processes of the peers.
const BETWEEN_CHECKS: Duration = Duration::from_millis(50);
/// How long a rank that leaves after a failure waits for the others to leave too.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// A rank's connection to the network; leaves it when dropped.
pub(crate) struct Engine<B: Buffer = HostBuffer> {
    rank: Rank,
    world_size: usize,
    deadline: Duration,
    process: Option<ProcessIdentity>,
    control: Arc<Control<B>>,
    thread: Option<JoinHandle<()>>,
}

/// Why an engine did not start.
pub(crate) enum StartError<E> {
    /// There is no wire.
    Wire(E),
    /// Making the wire took longer than the deadline.
    Deadline,
    /// The system refuses a thread.
    Thread(std::io::Error),
}

/// What the engine is asked for from outside of a group.
struct Control<B> {
    orders: Mutex<Orders<B>>,
    changed: Condvar,
}

struct Orders<B> {
    /// The group to join next.
    next: Option<Arc<Session<B>>>,
    /// A group is joined or about to be.
    is_active: bool,
    /// Number of the next data, when no group is active.
    next_sequence: u64,
    /// The last group has failed.
    has_failed: bool,
    leave: Option<Leave>,
    is_over: bool,
}

#[derive(Clone, Copy)]
struct Leave {
    /// How long to wait for the others to leave too.
    within: Duration,
    in_peace: bool,
}

impl<B: Buffer> fmt::Debug for Engine<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .finish_non_exhaustive()
    }
}

impl<B: Buffer> Engine<B> {
    /// Makes the wire on the engine's thread and keeps it there. Neither this nor leaving takes longer than `deadline`, or not much.
    pub(crate) fn start<W: Wire<B>, E: Send + 'static>(
        deadline: Duration,
        make_wire: impl FnOnce() -> Result<W, E> + Send + 'static,
    ) -> Result<Self, StartError<E>> {
        let control = Arc::new(Control::default());
        let (report, started) = mpsc::channel();
        let run = {
            let control = Arc::clone(&control);
            move || {
                let wire = match make_wire() {
                    Ok(wire) => wire,
                    Err(error) => return drop(report.send(Err(error))),
                };
                let identity = (wire.rank(), wire.world_size());
                // If nobody listens any more the order to leave has come.
                let _ = report.send(Ok(identity));
                Driver::new(wire, control).run();
            }
        };
        let thread = thread::Builder::new().name("ring-engine".to_owned());
        let thread = thread.spawn(run).map_err(StartError::Thread)?;
        let started = started.recv_timeout(deadline);
        let (rank, world_size) = match started {
            Ok(identity) => identity.map_err(StartError::Wire)?,
            Err(_) => {
                control.order().leave = Some(Leave {
                    within: Duration::ZERO,
                    in_peace: false,
                });
                return Err(StartError::Deadline);
            }
        };
        Ok(Self {
            rank,
            world_size,
            deadline,
            process: ProcessIdentity::own(),
            control,
            thread: Some(thread),
        })
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    pub(crate) fn world_size(&self) -> usize {
        self.world_size
    }

    /// Joins the next group, when this rank has left the one before; returns when all ranks have joined.
    pub(crate) fn join(
        self: &Arc<Self>,
        deadline: Duration,
    ) -> Result<RemoteEndpoint<B>, CommError> {
        self.join_within(deadline, deadline)
    }

    /// As [`join`](Self::join), with another deadline for this than for the waits in the group.
    pub(crate) fn join_within(
        self: &Arc<Self>,
        patience: Duration,
        deadline: Duration,
    ) -> Result<RemoteEndpoint<B>, CommError> {
        let subject = Subject {
            rank: self.rank,
            peer: None,
            tag: None,
        };
        let session = self.begin_session(patience, deadline).ok_or_else(|| {
            subject.error(CommErrorKind::Deadline {
                deadline: patience,
                pending: Vec::new(),
            })
        })?;
        let endpoint = RemoteEndpoint::new(Arc::clone(self), Arc::clone(&session));
        match session.complete_within(patience, subject, |state| state.meet()) {
            Ok(()) => Ok(endpoint),
            // Another rank has failed, perhaps after it had met everybody. The first call says so, as if that were a little later.
            Err(error) if matches!(error.kind, CommErrorKind::Poisoned(_)) => Ok(endpoint),
            Err(error) => Err(error),
        }
    }

    /// `None` if this rank does not leave the group before in time.
    fn begin_session(&self, patience: Duration, deadline: Duration) -> Option<Arc<Session<B>>> {
        let expiry = Instant::now().checked_add(patience);
        let mut orders = self.control.order();
        while orders.is_active {
            orders = self.control.wait(orders, expiry)?;
        }
        let state = State::new(
            self.rank,
            self.world_size,
            orders.next_sequence,
            self.process.clone(),
        );
        let session = Arc::new(Session::new(state, deadline));
        orders.is_active = true;
        orders.next = Some(Arc::clone(&session));
        self.control.changed.notify_all();
        Some(session)
    }
}

impl<B: Buffer> Drop for Engine<B> {
    /// Waits until all ranks leave, up to the deadline; not longer than a moment if something has failed.
    fn drop(&mut self) {
        let mut orders = self.control.order();
        orders.leave = Some(Leave {
            within: self.deadline,
            in_peace: !thread::panicking(),
        });
        self.control.changed.notify_all();
        let start = Instant::now();
        while !orders.is_over {
            let within = leave_within(self.deadline, orders.has_failed);
            let expiry = start.checked_add(within.saturating_add(2 * LEAVE_WITHIN));
            match self.control.wait(orders, expiry) {
                Some(woken) => orders = woken,
                // The network does not let go of the thread, which ends with the process then.
                None => return,
            }
        }
        drop(orders);
        if let Some(thread) = self.thread.take() {
            // Its panic has been reported, and the group poisoned.
            let _ = thread.join();
        }
    }
}

/// How long a rank waits for the others to leave too, if all may wait up to `deadline`.
fn leave_within(deadline: Duration, has_failed: bool) -> Duration {
    if has_failed {
        deadline.min(LEAVE_WITHIN)
    } else {
        deadline
    }
}

impl<B> Default for Control<B> {
    fn default() -> Self {
        let orders = Orders {
            next: None,
            is_active: false,
            has_failed: false,
            next_sequence: 0,
            leave: None,
            is_over: false,
        };
        Self {
            orders: Mutex::new(orders),
            changed: Condvar::new(),
        }
    }
}

impl<B> Control<B> {
    fn order(&self) -> MutexGuard<'_, Orders<B>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` if it has expired.
    fn wait<'a>(
        &self,
        orders: MutexGuard<'a, Orders<B>>,
        expiry: Option<Instant>,
    ) -> Option<MutexGuard<'a, Orders<B>>> {
        let Some(expiry) = expiry else {
            return Some(
                self.changed
                    .wait(orders)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        };
        let remaining = expiry.checked_duration_since(Instant::now())?;
        let woken = self.changed.wait_timeout(orders, remaining);
        Some(woken.unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// Tells those who wait that the engine is no more, even if it has panicked.
struct Over<B>(Arc<Control<B>>);

impl<B> Drop for Over<B> {
    fn drop(&mut self) {
        let mut orders = self.0.order();
        orders.is_over = true;
        self.0.changed.notify_all();
    }
}

/// The engine's thread.
struct Driver<B, W> {
    wire: W,
    control: Arc<Control<B>>,
    epoch: u64,
    peers: Vec<Line>,
    events: Vec<Event<B>>,
    /// Frames for groups that this rank has not joined yet.
    early: Vec<(u64, Rank, Frame)>,
    /// The last group has failed.
    has_failed: bool,
    process: Option<ProcessIdentity>,
    next_check: Instant,
}

/// What the engine knows of one peer, through all groups.
#[derive(Clone, Default)]
struct Line {
    frames_sent: u64,
    frames_heard: u64,
    lost: Option<String>,
    /// It has said that it leaves the network, in peace or not.
    finished: Option<bool>,
    process: Option<ProcessIdentity>,
    /// Its process was not there when last looked at.
    is_suspect: bool,
}

/// What the state must be told.
enum News<B> {
    Frame { peer: Rank, frame: Frame },
    Wire(Event<B>),
}

impl<B: Buffer, W: Wire<B>> Driver<B, W> {
    fn new(wire: W, control: Arc<Control<B>>) -> Self {
        Self {
            peers: vec![Line::default(); wire.world_size()],
            wire,
            control,
            epoch: 0,
            events: Vec::new(),
            early: Vec::new(),
            has_failed: false,
            process: ProcessIdentity::own(),
            next_check: Instant::now(),
        }
    }

    fn run(mut self) {
        let _over = Over(Arc::clone(&self.control));
        let leave = loop {
            match self.next_order() {
                Ok(session) => self.serve(&session),
                Err(leave) => break leave,
            }
        };
        self.leave(leave);
    }

    /// The next group, or the order to leave. Keeps the wire going meanwhile.
    fn next_order(&mut self) -> Result<Arc<Session<B>>, Leave> {
        loop {
            let expiry = Instant::now() + LONG_BREAK;
            {
                let mut orders = self.control.order();
                if let Some(session) = orders.next.take() {
                    return Ok(session);
                }
                if let Some(leave) = orders.leave {
                    return Err(leave);
                }
                drop(self.control.wait(orders, Some(expiry)));
            }
            self.look_between_groups();
        }
    }

    /// The whole life of a group.
    fn serve(&mut self, session: &Session<B>) {
        let _rescue = Rescue(session);
        self.epoch += 1;
        self.wire.begin(self.epoch);
        let mut news = self.early_news();
        let mut last_event = Instant::now();
        let mut is_failure_known = false;
        loop {
            news.extend(self.look());
            let now = Instant::now();
            news.extend(self.find_dead(now));
            let has_news = !news.is_empty();
            let mut inner = session.lock();
            for piece in news.drain(..) {
                tell(&mut inner.state, piece, now);
            }
            inner.state.tick(now);
            let outputs = inner.state.take_outputs();
            let has_failed = inner.state.cause().is_some();
            drop(inner);

            let is_active = has_news || !outputs.is_empty();
            outputs.into_iter().for_each(|output| self.put(output));
            if has_failed && !is_failure_known {
                is_failure_known = true;
                self.wire.fail();
            }
            if is_active {
                session.tell_change();
                last_event = now;
            }
            let inner = session.end_round();
            if inner.has_work() {
                continue;
            }
            if inner.is_closed {
                return self.end_session(&inner.state);
            }
            if !is_active {
                rest(session, inner, now - last_event);
            }
        }
    }

    /// What came for this group before this rank joined it.
    fn early_news(&mut self) -> Vec<News<B>> {
        let epoch = self.epoch;
        let (now, later): (Vec<_>, Vec<_>) = mem::take(&mut self.early)
            .into_iter()
            .partition(|&(of, ..)| of <= epoch);
        self.early = later;
        let frames = now.into_iter().filter(|&(of, ..)| of == epoch);
        let frames = frames.map(|(_, peer, frame)| News::Frame { peer, frame });
        let lost = self.peers.iter().enumerate().filter_map(|(peer, line)| {
            let reason = line.lost.clone()?;
            Some(News::Wire(Event::Lost { peer, reason }))
        });
        frames.chain(lost).collect()
    }

    fn end_session(&mut self, state: &State<B>) {
        if self.wire.is_busy() {
            self.wire.abandon();
        }
        for (peer, sequence, expected) in state.refused_data() {
            self.wire.discard_data(peer, sequence, expected);
        }
        self.has_failed = state.cause().is_some();
        let mut orders = self.control.order();
        orders.has_failed = self.has_failed;
        orders.next_sequence = state.next_sequence();
        orders.is_active = false;
        self.control.changed.notify_all();
    }

    /// What the wire has to report to the present group.
    fn look(&mut self) -> Vec<News<B>> {
        let mut events = mem::take(&mut self.events);
        self.wire.poll(&mut events);
        let news = events
            .drain(..)
            .filter_map(|event| match event {
                Event::Frame { peer, bytes } => self.hear(peer, &bytes),
                Event::Lost { peer, reason } => Some(self.lose(peer, reason)),
                other => Some(News::Wire(other)),
            })
            .collect();
        self.events = events;
        news
    }

    /// Looks at the wire when nobody is interested in what comes.
    fn look_between_groups(&mut self) {
        for news in self.look() {
            if let News::Frame { peer, frame } = news {
                self.discard(peer, &frame);
            }
        }
    }

    /// What is said to a group that is over; its peer must get rid of what it has sent.
    fn discard(&mut self, peer: Rank, frame: &Frame) {
        if let Frame::Offer {
            dtype,
            len,
            sequence,
            ..
        } = *frame
        {
            let expected = Expected { dtype, len };
            self.wire.discard_data(peer, sequence, expected);
        }
    }

    fn hear(&mut self, peer: Rank, bytes: &[u8]) -> Option<News<B>> {
        let (header, frame) = match Frame::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => return Some(self.lose(peer, error.to_string())),
        };
        let line = &mut self.peers[peer];
        if header.number != line.frames_heard {
            let (heard, awaited) = (header.number, line.frames_heard);
            let reason = format!("it sent frame {heard} where {awaited} was next");
            return Some(self.lose(peer, reason));
        }
        line.frames_heard += 1;
        match &frame {
            Frame::Hello { process, .. } => line.process.clone_from(process),
            Frame::Finish { in_peace } => {
                line.finished = Some(*in_peace);
                return None;
            }
            _ => {}
        }
        match header.epoch.cmp(&self.epoch) {
            Ordering::Less => {
                self.discard(peer, &frame);
                None
            }
            Ordering::Equal => Some(News::Frame { peer, frame }),
            Ordering::Greater => {
                self.early.push((header.epoch, peer, frame));
                None
            }
        }
    }

    fn lose(&mut self, peer: Rank, reason: String) -> News<B> {
        self.peers[peer].lost = Some(reason.clone());
        News::Wire(Event::Lost { peer, reason })
    }

    fn put(&mut self, output: Output<B>) {
        match output {
            Output::Frame { peer, frame } => self.send_frame(peer, &frame),
            Output::SendData {
                peer,
                sequence,
                buffer,
            } => self.wire.send_data(peer, sequence, buffer),
            Output::ReceiveData {
                peer,
                sequence,
                expected,
                memory,
            } => match self.wire.room_for(expected, memory) {
                Ok(buffer) => self.wire.receive_data(peer, sequence, buffer),
                Err(reason) => self.events.push(Event::Failed { reason }),
            },
        }
    }

    fn send_frame(&mut self, peer: Rank, frame: &Frame) {
        let line = &mut self.peers[peer];
        if line.lost.is_some() {
            return;
        }
        let header = Header {
            epoch: self.epoch,
            number: line.frames_sent,
        };
        line.frames_sent += 1;
        self.wire.send_frame(peer, frame.encode(header));
    }

    /// Looks now and then whether the processes of the peers on this machine are alive. Twice, because what one has said with its
    /// last breath may be on its way.
    fn find_dead(&mut self, now: Instant) -> Vec<News<B>> {
        if now < self.next_check {
            return Vec::new();
        }
        self.next_check = now + BETWEEN_CHECKS;
        let mut dead = Vec::new();
        for (peer, line) in self.peers.iter_mut().enumerate() {
            let (Some(own), Some(process)) = (&self.process, &line.process) else {
                continue;
            };
            let is_dead = process.shares_machine_with(own) && !process.is_alive();
            let was_suspect = mem::replace(&mut line.is_suspect, is_dead);
            if is_dead && was_suspect && line.finished.is_none() && line.lost.is_none() {
                dead.push((peer, format!("its process {} has ended", process.number())));
            }
        }
        let lose = |(peer, reason)| self.lose(peer, reason);
        dead.into_iter().map(lose).collect()
    }

    /// Waits until all that was sent has arrived, says farewell, waits for that of the others, and leaves.
    fn leave(&mut self, leave: Leave) {
        let within = leave_within(leave.within, self.has_failed || !leave.in_peace);
        let expiry = Instant::now().checked_add(within);
        let own = self.wire.rank();
        let others: Vec<Rank> = (0..self.peers.len()).filter(|&rank| rank != own).collect();
        let mut has_said_farewell = false;
        let end = loop {
            self.look_between_groups();
            self.find_dead(Instant::now());
            let peers = || others.iter().map(|&peer| &self.peers[peer]);
            let are_all_settled =
                peers().all(|line| line.finished.is_some() || line.lost.is_some());
            let is_any_lost = peers().any(|line| line.lost.is_some());
            let is_any_unpeaceful = peers().any(|line| line.finished == Some(false));
            let are_all_peaceful = peers().all(|line| line.finished == Some(true)) && !is_any_lost;
            let is_quiet = self.wire.is_flushed() && !self.wire.is_busy();
            let is_hopeless =
                !leave.in_peace || is_any_unpeaceful || (are_all_settled && is_any_lost);
            let has_expired = expiry.is_some_and(|expiry| Instant::now() >= expiry);
            if !has_said_farewell && (is_quiet || is_hopeless || has_expired) {
                let in_peace = leave.in_peace && is_quiet;
                let farewell = Frame::Finish { in_peace };
                others
                    .iter()
                    .for_each(|&peer| self.send_frame(peer, &farewell));
                has_said_farewell = true;
                continue;
            }
            if is_quiet && leave.in_peace && are_all_peaceful {
                break End::Together;
            }
            if has_expired || (is_hopeless && self.wire.is_flushed()) {
                break End::Alone;
            }
            thread::sleep(SHORT_BREAK);
        };
        self.wire.close(end);
    }
}

fn tell<B: Buffer>(state: &mut State<B>, news: News<B>, now: Instant) {
    match news {
        News::Frame { peer, frame } => state.hear(peer, frame, now),
        News::Wire(Event::Sent {
            peer,
            sequence,
            buffer,
        }) => state.sent(peer, sequence, buffer),
        News::Wire(Event::Received {
            peer,
            sequence,
            buffer,
        }) => state.received(peer, sequence, buffer, now),
        News::Wire(Event::Lost { peer, reason }) => state.lost(peer, &reason, now),
        News::Wire(Event::Failed { reason }) => state.broken(&reason, now),
        // Already made into one of the above.
        News::Wire(Event::Frame { .. }) => {}
    }
}

/// Pauses, the shorter the more is waited for: nobody shall wait for this thread, nor shall it take a core from who computes.
fn rest<B: Buffer>(session: &Session<B>, inner: MutexGuard<'_, Inner<B>>, quiet: Duration) {
    let is_awaited = inner.waiting > 0;
    let is_flowing = inner.state.is_flowing();
    let is_expectant = is_awaited || inner.state.expects_something();
    let eager = match (is_flowing, is_expectant) {
        (true, _) if is_awaited => EAGER,
        (_, true) => ATTENTIVE,
        (_, false) => Duration::ZERO,
    };
    if quiet < eager {
        drop(inner);
        return thread::yield_now();
    }
    let longest = if is_awaited || is_flowing {
        SHORT_BREAK
    } else if is_expectant {
        (quiet / 4).clamp(SHORT_BREAK, LONG_BREAK)
    } else {
        LONG_BREAK
    };
    session.await_work(inner, longest);
}

/// Poisons the group if the engine panics in it, so that nobody waits for the engine.
struct Rescue<'a, B: Buffer>(&'a Session<B>);

impl<B: Buffer> Drop for Rescue<'_, B> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().state.give_up("its engine panicked");
            self.0.tell_change();
        }
    }
}
