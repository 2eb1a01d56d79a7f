//! The true [`Device`]: NCCL on a stream of a GPU.
//!
//! What is issued waits, on the stream, for what the buffers' own streams had to do when the transport got them ([`Handed`]). It is
//! over when an event after it is reached; that and NCCL's asynchronous errors are looked at in turn, and the deadlines are those of
//! whoever waits. So a peer that is gone holds up nothing but the stream, until the communicator is aborted.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    communicator::Communicator,
    cuda::{CudaDevice, Event, OwnStream},
    device::{Device, Direction, Half, Status},
    error::NcclError,
    handed::Handed,
    library::{NcclLibrary, UniqueId},
    memory::DeviceMemory,
};
use crate::{
    buffer::Buffer,
    transport::{Expected, Rank},
};

/// How long a rank waits, at the end, for its peers to finalise, or for an abort.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks meanwhile.
const PAUSE: Duration = Duration::from_micros(200);

/// A GPU with NCCL.
pub(super) struct Gpu<M: DeviceMemory> {
    library: NcclLibrary,
    communicator: Option<Communicator>,
    progress: Progress<M>,
    finished: Option<Group<M>>,
    allocator: M::Allocator,
    stream: OwnStream,
    /// Dropped last: with it the GPU's context may go, in which everything else is.
    device: CudaDevice,
}

type Group<M> = Vec<Half<Handed<M>>>;

/// How far the communicator is, and what it was given.
enum Progress<M: DeviceMemory> {
    Unconnected,
    Connecting,
    Idle,
    /// NCCL has not put it all on the stream yet.
    Launching(Group<M>),
    /// It is on the stream, before the event.
    Running(Group<M>, Event),
    /// The communicator is being aborted, or freed at the end.
    Aborting {
        is_over: Arc<AtomicBool>,
        /// Comes after all that was on the stream, once the abort is over.
        last: Option<Event>,
        /// In use until then.
        group: Group<M>,
    },
}

impl<M: DeviceMemory> Gpu<M> {
    /// On the thread that makes all calls.
    pub(super) fn new(
        library: NcclLibrary,
        device: CudaDevice,
        allocator: M::Allocator,
    ) -> Result<Self, NcclError> {
        device.keep_current()?;
        Ok(Self {
            library,
            device,
            allocator,
            stream: OwnStream::new()?,
            communicator: None,
            progress: Progress::Unconnected,
            finished: None,
        })
    }

    /// Whether NCCL has done what it was told; an error if something has gone wrong.
    fn is_settled(&self) -> Result<bool, NcclError> {
        self.communicator
            .as_ref()
            .map_or(Ok(true), Communicator::is_settled)
    }

    fn advance(&mut self, progress: Progress<M>) -> (Progress<M>, Result<(), NcclError>) {
        match progress {
            Progress::Connecting => match self.is_settled() {
                Ok(true) => (Progress::Idle, Ok(())),
                Ok(false) => (Progress::Connecting, Ok(())),
                Err(error) => (Progress::Connecting, Err(error)),
            },
            Progress::Launching(group) => match self.launched() {
                Ok(Some(event)) => (Progress::Running(group, event), Ok(())),
                Ok(None) => (Progress::Launching(group), Ok(())),
                Err(error) => (Progress::Launching(group), Err(error)),
            },
            Progress::Running(group, event) => {
                match self.is_settled().and_then(|_| event.is_reached()) {
                    Ok(true) => {
                        self.finished = Some(group);
                        (Progress::Idle, Ok(()))
                    }
                    Ok(false) => (Progress::Running(group, event), Ok(())),
                    Err(error) => (Progress::Running(group, event), Err(error)),
                }
            }
            Progress::Aborting {
                is_over,
                last,
                group,
            } => (self.abort_further(is_over, last, group), Ok(())),
            // What another rank does with a communicator that is not in use is no error here; it will show when it is used.
            Progress::Idle | Progress::Unconnected => (progress, Ok(())),
        }
    }

    /// The end of the group on the stream, if NCCL has put all of it there.
    fn launched(&self) -> Result<Option<Event>, NcclError> {
        if !self.is_settled()? {
            return Ok(None);
        }
        // SAFETY: the stream is there, and its GPU is current on this thread.
        unsafe { Event::record(self.stream.raw()) }.map(Some)
    }

    fn abort_further(
        &self,
        is_over: Arc<AtomicBool>,
        mut last: Option<Event>,
        group: Group<M>,
    ) -> Progress<M> {
        if is_over.load(Ordering::Acquire) && last.is_none() {
            // SAFETY: the stream is there, and its GPU is current on this thread.
            match unsafe { Event::record(self.stream.raw()) } {
                Ok(event) => last = Some(event),
                Err(_) => return lost(group),
            }
        }
        match last.as_ref().map(Event::is_reached) {
            Some(Ok(true)) => Progress::Unconnected,
            Some(Err(_)) => lost(group),
            _ => Progress::Aborting {
                is_over,
                last,
                group,
            },
        }
    }

    /// Puts a group on the stream, as soon as its memory is ready.
    fn put(&self, group: &Group<M>) -> Result<(), NcclError> {
        let Some(communicator) = &self.communicator else {
            return Ok(());
        };
        for half in group {
            self.stream.wait_for(half.buffer.ready())?;
        }
        let stream = self.stream.raw().cast();
        let add = |half: &Half<Handed<M>>| {
            let (pointer, bytes) = (
                half.buffer.memory().device_pointer(),
                half.buffer.byte_len(),
            );
            // SAFETY: the memory is the group's, which is kept until the stream has done this, and `DeviceMemory` promises the rest.
            unsafe {
                match half.direction {
                    Direction::Out => communicator.send(half.peer, pointer, bytes, stream),
                    Direction::In => communicator.receive(half.peer, pointer, bytes, stream),
                }
            }
        };
        communicator.group(|_| group.iter().try_for_each(add))
    }

    /// Leaves with all others.
    fn leave(&mut self) {
        let Some(communicator) = self.communicator.take() else {
            return;
        };
        let expiry = Instant::now() + CLOSE_WITHIN;
        let mut settled = communicator
            .finalize()
            .and_then(|()| communicator.is_settled());
        while settled == Ok(false) && Instant::now() < expiry {
            thread::sleep(PAUSE);
            settled = communicator.is_settled();
        }
        match settled {
            Ok(true) => {
                self.progress = Progress::Aborting {
                    is_over: communicator.destroy(&self.device),
                    last: None,
                    group: Vec::new(),
                };
            }
            _ => {
                self.communicator = Some(communicator);
                self.abort();
            }
        }
    }
}

impl<M: DeviceMemory> Drop for Gpu<M> {
    /// After [`close`](Device::close) nothing is left; if that was not called, what is in use must stay so.
    fn drop(&mut self) {
        self.abort();
        if let Progress::Aborting { group, .. } =
            mem::replace(&mut self.progress, Progress::Unconnected)
        {
            mem::forget(group);
        }
    }
}

/// The GPU does not tell any more whether memory is in use, so it is never freed.
fn lost<M: DeviceMemory>(group: Group<M>) -> Progress<M> {
    mem::forget(group);
    Progress::Unconnected
}

impl<M: DeviceMemory> Device<Handed<M>> for Gpu<M> {
    fn room_for(
        &mut self,
        expected: Expected,
        memory: Option<Handed<M>>,
    ) -> Result<Handed<M>, NcclError> {
        match memory {
            // It may be used once it is ready, and then has this length.
            Some(memory) => memory.with_room(&self.allocator, expected),
            None => Handed::new(M::with_room(&self.allocator, expected, None)?),
        }
    }

    fn unique_id(&mut self) -> Result<UniqueId, NcclError> {
        self.library.unique_id()
    }

    fn connect(&mut self, id: &UniqueId, rank: Rank, world_size: usize) -> Result<(), NcclError> {
        self.communicator = Some(Communicator::begin(&self.library, id, rank, world_size)?);
        self.progress = Progress::Connecting;
        Ok(())
    }

    fn poll(&mut self) -> Result<Status, NcclError> {
        let progress = mem::replace(&mut self.progress, Progress::Unconnected);
        let (progress, result) = self.advance(progress);
        self.progress = progress;
        result.map(|()| match &self.progress {
            Progress::Unconnected => Status::Unconnected,
            Progress::Connecting => Status::Connecting,
            Progress::Idle => Status::Idle,
            Progress::Launching(_) | Progress::Running(..) => Status::Running,
            Progress::Aborting { .. } => Status::Aborting,
        })
    }

    fn issue(&mut self, group: Group<M>) -> Result<(), NcclError> {
        let put = self.put(&group);
        // Also if it fails: part of it may be on the stream.
        self.progress = Progress::Launching(group);
        put
    }

    fn take_finished(&mut self) -> Option<Group<M>> {
        self.finished.take()
    }

    fn is_in_use(&self) -> bool {
        !matches!(
            self.progress,
            Progress::Unconnected | Progress::Connecting | Progress::Idle
        )
    }

    fn abort(&mut self) {
        let Some(communicator) = self.communicator.take() else {
            return;
        };
        let group = match mem::replace(&mut self.progress, Progress::Unconnected) {
            Progress::Launching(group) | Progress::Running(group, _) => group,
            _ => Vec::new(),
        };
        self.progress = Progress::Aborting {
            is_over: communicator.abort(&self.device),
            last: None,
            group,
        };
    }

    fn close(&mut self, in_peace: bool) {
        if in_peace && matches!(self.progress, Progress::Idle) {
            self.leave();
        } else {
            self.abort();
        }
        let expiry = Instant::now() + CLOSE_WITHIN;
        while matches!(self.poll(), Ok(Status::Aborting)) && Instant::now() < expiry {
            thread::sleep(PAUSE);
        }
        // What is in use even now stays so.
        if let Progress::Aborting { group, .. } =
            mem::replace(&mut self.progress, Progress::Unconnected)
        {
            mem::forget(group);
        }
    }
}
