//! NCCL as a [`Wire`](crate::remote::Wire): frames travel on another wire, data on a device's stream, in [one order](super::order).
//!
//! A transfer has its position when both ends are settled on it; then its halves wait until the device has finished the group before,
//! and all that are certain by then make the next group. A shift round a ring is one group as a rule. These limits apply
//! to a group:
//!
//! - It has at most [`LARGEST_GROUP`] halves, and at most one each way with each peer. NCCL works on so many at once; more would
//!   wait for one another within the group.
//! - In a world of more than [`LARGEST_GROUP`] ranks all its transfers go equally far round the ring of ranks. NCCL sorts transfers by that
//!   distance, and those whose distances are not in the same eight may wait for one another, in an order that is not ours.
//! - The first transfer of two ranks with a new communicator is a group of its own. NCCL connects the two with it, and before that does
//!   nothing of a group; if there were others in it, their peers would wait for a rank that they have nothing to do with, and the
//!   argument in [`order`](super::order) would not hold. Both ends know which transfer is the first: they agree on the order.
//!
//! A group that fails leaves the communicator of a rank unusable if something is issued on it and not complete, or is to be issued by
//! what the rank has agreed on with a peer, which may have sent already. So with every group of ranks all
//! tell all, before anything else, which communicator they have; if they do not all have the same, rank 0 makes a new one.

mod grouping;
mod renewal;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
};

use super::{
    deadline::Deadline,
    device::{Device, Direction, Half, Status},
    error::NcclError,
    frame::{self, Incoming, WireFrame},
    library::UniqueId,
    order::Order,
};
use crate::{
    buffer::{Buffer, HostBuffer},
    remote::{End, Event, Wire},
    transport::{Expected, Rank},
};

/// Most halves of transfers in one group: what NCCL gives one block of threads to work on at once.
pub(super) const LARGEST_GROUP: usize = 8;

/// The wire of a rank with a device, whose frames go over `C`.
pub(super) struct NcclWire<B, C, D> {
    control: C,
    device: D,
    stage: Stage,
    /// Number of the present group of ranks.
    epoch: u64,
    /// What the communicator is called, if there is one: the group in which it was made.
    communicator: Option<u64>,
    /// By rank: the groups it has begun, with its communicator.
    begun: Vec<VecDeque<(u64, Option<u64>)>>,
    /// The latest communicator that rank 0 has told of.
    invitation: Option<(u64, UniqueId)>,
    order: Order,
    /// Memory that is handed over and not issued.
    waiting: BTreeMap<(Direction, Rank, u64), B>,
    /// Source and destination of the transfers that the communicator has seen.
    connected: BTreeSet<(Rank, Rank)>,
    /// To be reported.
    news: Vec<Event<B>>,
    heard: Vec<Event<HostBuffer>>,
}

/// How far the wire is with the present group of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It does not know whether all ranks have the same communicator.
    Comparing,
    /// The communicator must go, and a new one be made.
    Replacing,
    Connecting,
    Ready,
    Failed,
}

impl<B: Buffer, C: Wire<HostBuffer>, D: Device<B>> NcclWire<B, C, D> {
    /// Makes the first communicator, with all ranks, which have the same `id`. What has come over the control wire already is in `heard`.
    pub(super) fn start(
        mut control: C,
        mut device: D,
        id: &UniqueId,
        mut heard: Vec<Event<HostBuffer>>,
        deadline: Deadline,
    ) -> Result<Self, NcclError> {
        let (rank, world_size) = (control.rank(), control.world_size());
        let begun = device.connect(id, rank, world_size);
        let connected = begun.and_then(|()| {
            renewal::connect_within(&mut device, &mut control, &mut heard, deadline)
        });
        if let Err(error) = connected {
            device.abort();
            device.close(false);
            control.close(End::Alone);
            return Err(error);
        }
        Ok(Self {
            control,
            device,
            stage: Stage::Ready,
            epoch: 0,
            communicator: Some(0),
            begun: vec![VecDeque::new(); world_size],
            invitation: None,
            order: Order::new(rank),
            waiting: BTreeMap::new(),
            connected: BTreeSet::new(),
            news: Vec::new(),
            heard,
        })
    }

    fn hear(&mut self, peer: Rank, bytes: Vec<u8>) {
        match Incoming::decode(bytes) {
            Some(Incoming::OfGroup(bytes)) => self.news.push(Event::Frame { peer, bytes }),
            Some(Incoming::OfWire(frame)) => self.hear_wire(peer, frame),
            None => self.accuse(peer, "it sent something that is no frame"),
        }
    }

    fn hear_wire(&mut self, peer: Rank, frame: WireFrame) {
        match frame {
            WireFrame::Introduce(_) => self.accuse(peer, "it introduced itself a second time"),
            WireFrame::Begin {
                epoch,
                communicator,
            } => self.begun[peer].push_back((epoch, communicator)),
            WireFrame::Connect { epoch, id } => self.invitation = Some((epoch, id)),
            WireFrame::Propose { sequence, time } => {
                // Else the group has failed here, and the receiver will hear of it.
                if self.waiting.contains_key(&(Direction::Out, peer, sequence)) {
                    let time = self.order.settle(peer, sequence, time);
                    self.tell(peer, &WireFrame::Settle { sequence, time });
                }
            }
            WireFrame::Settle { sequence, time } => {
                let is_awaited = self.waiting.contains_key(&(Direction::In, peer, sequence));
                if is_awaited && !self.order.settled(peer, sequence, time) {
                    self.accuse(peer, "it settled on a time that was not proposed");
                }
            }
        }
    }

    fn accuse(&mut self, peer: Rank, reason: &str) {
        let reason = reason.to_owned();
        self.news.push(Event::Lost { peer, reason });
    }

    fn tell(&mut self, peer: Rank, frame: &WireFrame) {
        self.control.send_frame(peer, frame.encode());
    }

    fn tell_all(&mut self, frame: &WireFrame) {
        let own = self.control.rank();
        let others = (0..self.control.world_size()).filter(|&rank| rank != own);
        others.for_each(|peer| self.tell(peer, frame));
    }

    /// This rank cannot go on with the present group.
    fn break_off(&mut self, error: &NcclError) {
        let reason = error.to_string();
        self.news.push(Event::Failed { reason });
        self.discard();
        self.device.abort();
    }

    /// Nothing more is issued in the present group.
    fn discard(&mut self) {
        self.stage = Stage::Failed;
        self.order = Order::new(self.control.rank());
        self.waiting.clear();
    }

    fn poll_device(&mut self) -> Result<(), NcclError> {
        let mut status = self.device.poll()?;
        for half in self.device.take_finished().into_iter().flatten() {
            self.news.push(half.into_event());
        }
        if self.stage == Stage::Comparing && self.all_have_begun() {
            self.compare();
        }
        if self.stage == Stage::Replacing {
            self.replace(status)?;
            status = self.device.poll()?;
        }
        if self.stage == Stage::Connecting && status == Status::Idle {
            self.stage = Stage::Ready;
        }
        if self.stage == Stage::Ready && status == Status::Idle {
            let group = self.next_group();
            if !group.is_empty() {
                self.device.issue(group)?;
            }
        }
        Ok(())
    }

    fn hand_over(&mut self, half: Half<B>) -> bool {
        if self.stage == Stage::Failed {
            return false;
        }
        if half.buffer.byte_len() == 0 {
            // Both ends know that there is nothing to do.
            self.news.push(half.into_event());
            return false;
        }
        let key = (half.direction, half.peer, half.sequence);
        self.waiting.insert(key, half.buffer);
        true
    }
}

impl<B: Buffer, C: Wire<HostBuffer>, D: Device<B>> Wire<B> for NcclWire<B, C, D> {
    fn rank(&self) -> Rank {
        self.control.rank()
    }

    fn world_size(&self) -> usize {
        self.control.world_size()
    }

    fn begin(&mut self, epoch: u64) {
        self.discard();
        self.epoch = epoch;
        self.stage = Stage::Comparing;
        let communicator = self.communicator;
        self.tell_all(&WireFrame::Begin {
            epoch,
            communicator,
        });
    }

    fn fail(&mut self) {
        if self.stage == Stage::Failed {
            return;
        }
        // A peer may have sent already what this rank has only promised to receive: NCCL would take it for the next message.
        let is_promised = !self.order.is_empty();
        self.discard();
        let is_in_use = !matches!(self.device.poll(), Ok(Status::Idle | Status::Unconnected));
        if is_in_use || is_promised {
            self.communicator = None;
            self.device.abort();
        }
    }

    fn send_frame(&mut self, peer: Rank, frame: Vec<u8>) {
        self.control.send_frame(peer, frame::of_group(frame));
    }

    fn room_for(&mut self, expected: Expected, memory: Option<B>) -> Result<B, String> {
        let room = self.device.room_for(expected, memory);
        room.map_err(|error| error.to_string())
    }

    fn send_data(&mut self, peer: Rank, sequence: u64, buffer: B) {
        self.hand_over(Half {
            peer,
            sequence,
            direction: Direction::Out,
            buffer,
        });
    }

    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: B) {
        let half = Half {
            peer,
            sequence,
            direction: Direction::In,
            buffer,
        };
        if self.hand_over(half) {
            let time = self.order.propose(peer, sequence);
            self.tell(peer, &WireFrame::Propose { sequence, time });
        }
    }

    fn poll(&mut self, events: &mut Vec<Event<B>>) {
        let mut heard = mem::take(&mut self.heard);
        self.control.poll(&mut heard);
        for event in heard.drain(..) {
            match event {
                Event::Frame { peer, bytes } => self.hear(peer, bytes),
                Event::Lost { peer, reason } => self.news.push(Event::Lost { peer, reason }),
                Event::Failed { reason } => self.news.push(Event::Failed { reason }),
                // No data goes over the control wire.
                Event::Sent { .. } | Event::Received { .. } => {}
            }
        }
        self.heard = heard;
        if let Err(error) = self.poll_device() {
            self.communicator = None;
            self.break_off(&error);
        }
        events.append(&mut self.news);
    }

    fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || self.device.is_in_use()
    }

    fn abandon(&mut self) {
        self.fail();
    }

    fn is_flushed(&self) -> bool {
        self.control.is_flushed()
    }

    fn close(&mut self, end: End) {
        let is_sound = self.communicator.is_some() && !self.device.is_in_use();
        self.device.close(end == End::Together && is_sound);
        self.control.close(end);
    }
}

impl<B> Half<B> {
    fn into_event(self) -> Event<B> {
        let Self {
            peer,
            sequence,
            buffer,
            ..
        } = self;
        match self.direction {
            Direction::Out => Event::Sent {
                peer,
                sequence,
                buffer,
            },
            Direction::In => Event::Received {
                peer,
                sequence,
                buffer,
            },
        }
    }
}
