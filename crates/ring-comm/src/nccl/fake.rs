//! A device that is none, and behaves like NCCL as far as ranks can tell: for tests.
//!
//! Every rank has a stream, which works on one group after the other. A group first connects all pairs of ranks that its
//! transfers need and that are not connected, each together with the other rank's group in which the other half is; then its
//! halves go on, each together with the other half, whose group must be at the head of its stream too. What is issued in orders that do not
//! fit together waits for ever. A send may be over before its receive is issued: there is room for some between connected ranks. There
//! are no tags: a half goes on with the first that fits in the peer's group, whatever was meant.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use super::{
    device::{Device, Direction, Half, Status},
    error::NcclError,
    library::UniqueId,
};
use crate::{
    buffer::HostBuffer,
    remote::host_room_for,
    transport::{Expected, Rank},
};

/// What the devices of all ranks share.
pub(super) struct Fabric {
    state: Mutex<State>,
}

/// Communicator, source, destination.
type Pair = (UniqueId, Rank, Rank);

struct State {
    streams: Vec<Stream>,
    connected: BTreeSet<Pair>,
    /// What is sent and not received, and how many such messages there is room for between two ranks.
    underway: BTreeMap<Pair, VecDeque<Vec<u8>>>,
    room: usize,
    communicators: u8,
    /// Most halves of a group.
    largest_group: usize,
    /// How much happens when somebody looks.
    steps_per_look: usize,
    /// Nothing happens.
    is_held: bool,
}

#[derive(Default)]
struct Stream {
    communicator: Option<UniqueId>,
    groups: VecDeque<Group>,
    finished: VecDeque<Vec<Half<HostBuffer>>>,
    /// Looks until an abort is over.
    aborting: usize,
    failure: Option<&'static str>,
    /// There is no memory but what is brought.
    is_full: bool,
}

struct Group {
    halves: Vec<Half<HostBuffer>>,
    /// Which of them are complete.
    done: Vec<bool>,
}

/// One rank's device.
pub(super) struct FakeDevice {
    fabric: Arc<Fabric>,
    rank: Rank,
}

impl Fabric {
    /// A send needs its receive to go on, unless there is `room` for the message between the two.
    pub(super) fn new(world_size: usize, steps_per_look: usize, room: usize) -> Arc<Self> {
        let state = State {
            streams: (0..world_size).map(|_| Stream::default()).collect(),
            connected: BTreeSet::new(),
            underway: BTreeMap::new(),
            room,
            communicators: 0,
            largest_group: 0,
            steps_per_look,
            is_held: false,
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    pub(super) fn device(self: &Arc<Self>, rank: Rank) -> FakeDevice {
        FakeDevice {
            fabric: Arc::clone(self),
            rank,
        }
    }

    /// From now on the calls of this rank fail.
    pub(super) fn fail(&self, rank: Rank, reason: &'static str) {
        self.lock().streams[rank].failure = Some(reason);
    }

    /// From now on this rank has no memory but what is brought.
    pub(super) fn fill_up(&self, rank: Rank) {
        self.lock().streams[rank].is_full = true;
    }

    /// Lets nothing happen any more on any stream, or lets it go on.
    pub(super) fn hold(&self, is_held: bool) {
        self.lock().is_held = is_held;
    }

    /// Whether something of this rank is issued and not complete.
    pub(super) fn is_running(&self, rank: Rank) -> bool {
        !self.lock().streams[rank].groups.is_empty()
    }

    /// Communicators made so far.
    pub(super) fn communicators(&self) -> usize {
        usize::from(self.lock().communicators)
    }

    /// Halves of the largest group so far.
    pub(super) fn largest_group(&self) -> usize {
        self.lock().largest_group
    }

    /// Lets happen whatever can.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        while state.step() {}
    }

    /// A test that has failed has been reported.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|error| error.into_inner())
    }
}

impl State {
    /// Connects a pair or moves a message, if that is possible anywhere.
    fn step(&mut self) -> bool {
        if self.is_held {
            return false;
        }
        for rank in 0..self.streams.len() {
            let Some(group) = self.streams[rank].groups.front() else {
                continue;
            };
            for index in 0..group.halves.len() {
                if self.connect(rank, index)
                    || self.transfer(rank, index)
                    || self.buffered(rank, index)
                {
                    return true;
                }
            }
        }
        false
    }

    /// The half that fits to one of the head of `rank`'s stream, at the head of its peer's.
    fn counterpart(&self, rank: Rank, index: usize) -> Option<(Rank, usize)> {
        let stream = &self.streams[rank];
        let half = &stream.groups.front()?.halves[index];
        let peer = &self.streams[half.peer];
        if peer.communicator != stream.communicator {
            return None;
        }
        let group = peer.groups.front()?;
        let fits = |&other: &usize| {
            let other_half = &group.halves[other];
            !group.done[other] && other_half.peer == rank && other_half.direction != half.direction
        };
        (0..group.halves.len())
            .find(fits)
            .map(|other| (half.peer, other))
    }

    fn pair(&self, rank: Rank, index: usize) -> Option<Pair> {
        let stream = &self.streams[rank];
        let half = &stream.groups.front()?.halves[index];
        let id = stream.communicator.clone()?;
        Some(match half.direction {
            Direction::Out => (id, rank, half.peer),
            Direction::In => (id, half.peer, rank),
        })
    }

    fn connect(&mut self, rank: Rank, index: usize) -> bool {
        let pair = self.pair(rank, index);
        let is_met = self.counterpart(rank, index).is_some();
        pair.filter(|_| is_met)
            .is_some_and(|pair| self.connected.insert(pair))
    }

    /// Whether the head of the stream has all the connections it needs.
    fn is_launched(&self, rank: Rank) -> bool {
        let halves = self.streams[rank]
            .groups
            .front()
            .map_or(0, |group| group.halves.len());
        (0..halves).all(|index| {
            self.pair(rank, index)
                .is_some_and(|pair| self.connected.contains(&pair))
        })
    }

    fn transfer(&mut self, rank: Rank, index: usize) -> bool {
        let is_out = |half: &Half<HostBuffer>| half.direction == Direction::Out;
        let ready = |state: &Self| {
            let group = state.streams[rank].groups.front()?;
            (!group.done[index] && is_out(&group.halves[index])).then_some(())?;
            let (peer, other) = state.counterpart(rank, index)?;
            (state.is_launched(rank) && state.is_launched(peer)).then_some((peer, other))
        };
        let Some((peer, other)) = ready(self) else {
            return false;
        };
        let pair = self.pair(rank, index);
        if pair.is_some_and(|pair| {
            self.underway
                .get(&pair)
                .is_some_and(|line| !line.is_empty())
        }) {
            // The receive takes what was sent before.
            return false;
        }
        let bytes = self.bytes(rank, index);
        self.fill(peer, other, &bytes);
        self.complete(rank, index);
        self.complete(peer, other);
        true
    }

    /// Sends what there is room for, or receives what was sent so.
    fn buffered(&mut self, rank: Rank, index: usize) -> bool {
        let is_done = |group: &Group| group.done[index];
        if self.streams[rank].groups.front().is_none_or(is_done) || !self.is_launched(rank) {
            return false;
        }
        let Some(pair) = self.pair(rank, index) else {
            return false;
        };
        match self.streams[rank].groups[0].halves[index].direction {
            Direction::Out => {
                let bytes = self.bytes(rank, index);
                let line = self.underway.entry(pair).or_default();
                if line.len() >= self.room {
                    return false;
                }
                line.push_back(bytes);
            }
            Direction::In => {
                let line = self.underway.get_mut(&pair);
                let Some(bytes) = line.and_then(VecDeque::pop_front) else {
                    return false;
                };
                self.fill(rank, index, &bytes);
            }
        }
        self.complete(rank, index);
        true
    }

    fn bytes(&self, rank: Rank, index: usize) -> Vec<u8> {
        let half = &self.streams[rank].groups[0].halves[index];
        half.buffer.as_bytes().to_vec()
    }

    /// As with NCCL, what does not fit is nobody's business.
    fn fill(&mut self, rank: Rank, index: usize, bytes: &[u8]) {
        let half = &mut self.streams[rank].groups[0].halves[index];
        let into = half.buffer.as_bytes_mut();
        let len = bytes.len().min(into.len());
        into[..len].copy_from_slice(&bytes[..len]);
    }

    fn complete(&mut self, rank: Rank, index: usize) {
        let stream = &mut self.streams[rank];
        stream.groups[0].done[index] = true;
        if stream.groups[0].done.iter().all(|&done| done) {
            let group = stream.groups.pop_front();
            stream.finished.extend(group.map(|group| group.halves));
        }
    }
}

impl Device<HostBuffer> for FakeDevice {
    fn room_for(
        &mut self,
        expected: Expected,
        memory: Option<HostBuffer>,
    ) -> Result<HostBuffer, NcclError> {
        if memory.is_none() && self.fabric.lock().streams[self.rank].is_full {
            return Err(NcclError::Driver {
                call: "cuMemAllocAsync",
                reason: "out of memory".to_owned(),
            });
        }
        host_room_for(expected, memory).map_err(|reason| NcclError::Driver {
            call: "cuMemAllocAsync",
            reason,
        })
    }

    fn unique_id(&mut self) -> Result<UniqueId, NcclError> {
        let mut state = self.fabric.lock();
        state.communicators += 1;
        Ok(UniqueId::from_bytes([state.communicators; 128]))
    }

    fn connect(&mut self, id: &UniqueId, _rank: Rank, world_size: usize) -> Result<(), NcclError> {
        let mut state = self.fabric.lock();
        assert_eq!(world_size, state.streams.len());
        assert_eq!(
            state.streams[self.rank].communicator, None,
            "connected twice"
        );
        state.streams[self.rank].communicator = Some(id.clone());
        Ok(())
    }

    fn poll(&mut self) -> Result<Status, NcclError> {
        let mut state = self.fabric.lock();
        if let Some(reason) = state.streams[self.rank].failure {
            return Err(NcclError::Call {
                call: "ncclCommGetAsyncError",
                reason: reason.to_owned(),
            });
        }
        let steps = state.steps_per_look;
        (0..steps).take_while(|_| state.step()).for_each(drop);
        let everybody = state
            .streams
            .iter()
            .all(|stream| stream.communicator.is_some());
        let stream = &mut state.streams[self.rank];
        Ok(match () {
            () if stream.aborting > 0 => {
                stream.aborting -= 1;
                Status::Aborting
            }
            () if stream.communicator.is_none() => Status::Unconnected,
            () if !stream.groups.is_empty() => Status::Running,
            () if !everybody => Status::Connecting,
            () => Status::Idle,
        })
    }

    fn issue(&mut self, group: Vec<Half<HostBuffer>>) -> Result<(), NcclError> {
        let mut state = self.fabric.lock();
        state.largest_group = state.largest_group.max(group.len());
        let stream = &mut state.streams[self.rank];
        let done = vec![false; group.len()];
        stream.groups.push_back(Group {
            halves: group,
            done,
        });
        Ok(())
    }

    fn take_finished(&mut self) -> Option<Vec<Half<HostBuffer>>> {
        self.fabric.lock().streams[self.rank].finished.pop_front()
    }

    fn is_in_use(&self) -> bool {
        let state = self.fabric.lock();
        let stream = &state.streams[self.rank];
        !stream.groups.is_empty() || stream.aborting > 0
    }

    fn abort(&mut self) {
        let mut state = self.fabric.lock();
        let stream = &mut state.streams[self.rank];
        stream.communicator = None;
        stream.groups.clear();
        stream.aborting = 2;
        stream.failure = None;
    }

    fn close(&mut self, in_peace: bool) {
        let state = self.fabric.lock();
        let stream = &state.streams[self.rank];
        assert!(!in_peace || stream.groups.is_empty(), "something is left");
    }
}
