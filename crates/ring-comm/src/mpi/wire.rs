//! MPI as a [`Wire`].
//!
//! Frames and data have a communicator each. Frames are found when they come, whatever their size. The data of a message has
//! its number as MPI tag, and is cut into chunks, because MPI counts with 32 bits; chunks of one message keep their order.
//!
//! Memory of messages in progress belongs to MPI until their requests are complete; it is never freed before, if need be never.

use std::{collections::VecDeque, ffi::c_int, mem};

use super::{
    MpiError,
    call::{self, Comm, Request},
    failures::Failures,
};
use crate::{
    buffer::HostBuffer,
    remote::{End, Event, Wire, host_room_for},
    transport::{Expected, Rank},
};

/// Bytes of the largest piece that MPI is given at once.
pub(super) const LARGEST_CHUNK: usize = 1 << 30;
/// The tag of frames on their communicator.
const FRAME: c_int = 0;

pub(crate) struct MpiWire {
    rank: Rank,
    frames: Comm,
    data: Comm,
    largest_tag: u64,
    largest_chunk: usize,
    frames_out: Vec<FrameInProgress>,
    /// By peer, in the order sent.
    frames_in: Vec<VecDeque<FrameInProgress>>,
    transfers: Vec<Transfer>,
    /// Transfers that nobody waits for any more.
    abandoned: Vec<Transfer>,
    failures: Option<Failures>,
    /// By rank, whether it was reported.
    lost: Vec<bool>,
    /// What went wrong since the last look.
    trouble: Vec<(Rank, MpiError)>,
}

struct FrameInProgress {
    peer: Rank,
    request: Request,
    bytes: Vec<u8>,
}

struct Transfer {
    peer: Rank,
    sequence: u64,
    direction: Direction,
    /// One per chunk that is not complete.
    requests: Vec<Request>,
    buffer: HostBuffer,
}

#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
    /// In, for nobody.
    Discarded,
}

impl MpiWire {
    /// Starts MPI on this thread, which all processes must do.
    pub(super) fn start(largest_chunk: usize) -> Result<Self, MpiError> {
        call::init()?;
        let (frames, data) = (Comm::new()?, Comm::new()?);
        let world_size = frames.size()?;
        Ok(Self {
            rank: frames.rank()?,
            frames,
            data,
            largest_tag: data.largest_tag()?,
            largest_chunk: largest_chunk.clamp(1, LARGEST_CHUNK),
            frames_out: Vec::new(),
            frames_in: (0..world_size).map(|_| VecDeque::new()).collect(),
            transfers: Vec::new(),
            abandoned: Vec::new(),
            failures: Failures::find(),
            lost: vec![false; world_size],
            trouble: Vec::new(),
        })
    }

    /// Tags may come again after many messages, when those before are long over.
    fn tag(&self, sequence: u64) -> c_int {
        let tag = sequence % self.largest_tag.saturating_add(1).max(1);
        c_int::try_from(tag).unwrap_or_default()
    }

    /// Starts one request per chunk. Those that were started before one fails are in progress all the same.
    fn begin(&mut self, mut transfer: Transfer) {
        let (comm, peer, tag) = (self.data, transfer.peer, self.tag(transfer.sequence));
        let bytes = transfer.buffer.as_bytes_mut();
        let starts = (0..bytes.len().max(1)).step_by(self.largest_chunk);
        for start in starts {
            let end = (start + self.largest_chunk).min(bytes.len());
            let chunk = &mut bytes[start..end];
            // SAFETY: the buffer is kept in the transfer until its requests are complete, and not touched; moving the
            // transfer does not move what the buffer points to.
            let request = unsafe {
                match transfer.direction {
                    Direction::Out => comm.send(peer, tag, chunk),
                    Direction::In | Direction::Discarded => comm.receive(peer, tag, chunk),
                }
            };
            match request {
                Ok(request) => transfer.requests.push(request),
                Err(error) => {
                    self.trouble.push((peer, error));
                    return self.abandoned.push(transfer);
                }
            }
        }
        self.transfers.push(transfer);
    }

    fn poll_frames(&mut self, events: &mut Vec<Event<HostBuffer>>) -> Result<(), MpiError> {
        while let Some(found) = self.frames.find(FRAME)? {
            let peer = found.source;
            let mut bytes = vec![0; found.len];
            // SAFETY: the bytes are kept with the request until it is complete, and not touched.
            let request = unsafe { found.receive(&mut bytes)? };
            self.frames_in[peer].push_back(FrameInProgress {
                peer,
                request,
                bytes,
            });
        }
        for queue in &mut self.frames_in {
            while let Some(frame) = queue.front_mut() {
                if !frame.request.is_complete()? {
                    break;
                }
                let frame = queue.pop_front();
                events.extend(
                    frame.map(|FrameInProgress { peer, bytes, .. }| Event::Frame { peer, bytes }),
                );
            }
        }
        Ok(())
    }

    /// MPI reports an error that may have to do with any peer: finds out which are dead.
    fn report_failures(&mut self, error: &MpiError, events: &mut Vec<Event<HostBuffer>>) {
        let world_size = self.lost.len();
        let mut dead: Vec<Rank> = match &self.failures {
            None => (0..world_size).collect(),
            Some(failures) => {
                // The other communicator must be told too, or it goes on to complain.
                let _ = failures.dead(self.data, world_size);
                failures.dead(self.frames, world_size)
            }
        };
        dead.retain(|&rank| rank != self.rank);
        for peer in dead {
            self.report(peer, error.to_string(), events);
        }
    }

    fn poll_transfers(&mut self, events: &mut Vec<Event<HostBuffer>>) {
        let (transfers, mut abandoned) = (
            mem::take(&mut self.transfers),
            mem::take(&mut self.abandoned),
        );
        for mut transfer in transfers {
            match transfer.is_complete() {
                Ok(true) => events.extend(transfer.into_event()),
                Ok(false) => self.transfers.push(transfer),
                Err(error) => {
                    self.report(transfer.peer, error.to_string(), events);
                    abandoned.push(transfer);
                }
            }
        }
        // One that fails is kept, because nobody knows what MPI still does with its memory.
        abandoned.retain_mut(|transfer| !matches!(transfer.is_complete(), Ok(true)));
        self.abandoned = abandoned;
    }

    fn poll_frames_out(&mut self, events: &mut Vec<Event<HostBuffer>>) {
        for mut frame in mem::take(&mut self.frames_out) {
            match frame.request.is_complete() {
                Ok(true) => {}
                Ok(false) => self.frames_out.push(frame),
                Err(error) => {
                    self.report(frame.peer, error.to_string(), events);
                    mem::forget(frame);
                }
            }
        }
    }

    fn report(&mut self, peer: Rank, reason: String, events: &mut Vec<Event<HostBuffer>>) {
        if !mem::replace(&mut self.lost[peer], true) {
            mem::forget(mem::take(&mut self.frames_in[peer]));
            events.push(Event::Lost { peer, reason });
        }
    }
}

impl Wire<HostBuffer> for MpiWire {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.lost.len()
    }

    fn send_frame(&mut self, peer: Rank, bytes: Vec<u8>) {
        // SAFETY: the bytes are kept with the request until it is complete, and not touched.
        match unsafe { self.frames.send(peer, FRAME, &bytes) } {
            Ok(request) => self.frames_out.push(FrameInProgress {
                peer,
                request,
                bytes,
            }),
            Err(error) => self.trouble.push((peer, error)),
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
        self.begin(Transfer::new(peer, sequence, Direction::Out, buffer));
    }

    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        self.begin(Transfer::new(peer, sequence, Direction::In, buffer));
    }

    /// A large message stays with its sender until it is received, and that in the way of the end of MPI.
    fn discard_data(&mut self, peer: Rank, sequence: u64, expected: Expected) {
        if !self.lost[peer] {
            let buffer = HostBuffer::zeros(expected.dtype, expected.len);
            self.begin(Transfer::new(peer, sequence, Direction::Discarded, buffer));
        }
    }

    fn poll(&mut self, events: &mut Vec<Event<HostBuffer>>) {
        for (peer, error) in mem::take(&mut self.trouble) {
            self.report(peer, error.to_string(), events);
        }
        if let Err(error) = self.poll_frames(events) {
            self.report_failures(&error, events);
        }
        self.poll_frames_out(events);
        self.poll_transfers(events);
    }

    fn is_busy(&self) -> bool {
        !self.transfers.is_empty() || !self.abandoned.is_empty()
    }

    fn abandon(&mut self) {
        self.abandoned.append(&mut self.transfers);
    }

    fn is_flushed(&self) -> bool {
        self.frames_out.iter().all(|frame| self.lost[frame.peer])
    }

    fn close(&mut self, end: End) {
        if end == End::Together {
            // If it fails there is nobody left to tell.
            let _ = call::finalize();
        }
    }
}

impl Drop for MpiWire {
    /// MPI may go on to use the memory of what is in progress.
    fn drop(&mut self) {
        mem::forget(mem::take(&mut self.frames_out));
        mem::forget(mem::take(&mut self.frames_in));
        mem::forget(mem::take(&mut self.transfers));
        mem::forget(mem::take(&mut self.abandoned));
    }
}

impl Transfer {
    fn new(peer: Rank, sequence: u64, direction: Direction, buffer: HostBuffer) -> Self {
        Self {
            peer,
            sequence,
            direction,
            requests: Vec::new(),
            buffer,
        }
    }

    fn is_complete(&mut self) -> Result<bool, MpiError> {
        while let Some(request) = self.requests.last_mut() {
            if !request.is_complete()? {
                return Ok(false);
            }
            self.requests.pop();
        }
        Ok(true)
    }

    fn into_event(self) -> Option<Event<HostBuffer>> {
        let Self {
            peer,
            sequence,
            buffer,
            ..
        } = self;
        match self.direction {
            Direction::Out => Some(Event::Sent {
                peer,
                sequence,
                buffer,
            }),
            Direction::In => Some(Event::Received {
                peer,
                sequence,
                buffer,
            }),
            Direction::Discarded => None,
        }
    }
}
