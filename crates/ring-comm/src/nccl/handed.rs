//! A buffer in the hands of the transport: the memory, and when it is ready.

use super::{cuda::Event, error::NcclError, memory::DeviceMemory};
use crate::{
    buffer::{Buffer, DType},
    transport::Expected,
};

/// Device memory, and the point on its stream from which on the transport may use it. That point is noted on the thread that hands the
/// buffer over, so that what it puts on the stream afterwards, such as the computation that is to hide the transfer, is not waited for.
#[derive(Debug)]
pub(super) struct Handed<M: DeviceMemory> {
    /// Dropped before the memory, which may keep the GPU's context.
    ready: Event,
    memory: M,
}

impl<M: DeviceMemory> Handed<M> {
    /// Notes where the stream of the memory is now. The GPU must be current.
    pub(super) fn new(memory: M) -> Result<Self, NcclError> {
        // SAFETY: `DeviceMemory` promises that the stream is there, and one of the GPU.
        let ready = unsafe { Event::record(memory.stream().cast()) }?;
        Ok(Self { memory, ready })
    }

    /// The same memory for a message of what is expected, if it will do, or other memory.
    pub(super) fn with_room(
        self,
        allocator: &M::Allocator,
        expected: Expected,
    ) -> Result<Self, NcclError> {
        let Self { memory, ready } = self;
        let pointer = memory.device_pointer();
        let memory = M::with_room(allocator, expected, Some(memory))?;
        if memory.device_pointer() == pointer {
            Ok(Self { memory, ready })
        } else {
            Self::new(memory)
        }
    }

    pub(super) fn memory(&self) -> &M {
        &self.memory
    }

    pub(super) fn into_memory(self) -> M {
        self.memory
    }

    /// From when on the memory may be used.
    pub(super) fn ready(&self) -> &Event {
        &self.ready
    }
}

impl<M: DeviceMemory> Buffer for Handed<M> {
    type View<'a> = M::View<'a>;

    fn dtype(&self) -> DType {
        self.memory.dtype()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn capacity(&self) -> usize {
        self.memory.capacity()
    }

    fn view(&self) -> M::View<'_> {
        self.memory.view()
    }

    fn shorten<'short, 'long: 'short>(view: M::View<'long>) -> M::View<'short> {
        M::shorten(view)
    }
}
