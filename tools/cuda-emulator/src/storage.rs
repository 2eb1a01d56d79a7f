//! The storage that CubeCL knows: it names the type of a resource. Allocations are the server's.

use std::collections::HashMap;
use std::sync::Arc;

use cubecl_environment::backtrace::BackTrace;
use cubecl_server::server::IoError;
use cubecl_server::storage::{ComputeStorage, StorageHandle, StorageId, StorageUtilization};

use crate::memory::{ALIGNMENT, GuardedMemory, Resource};

/// Guarded memory by its id.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    memories: HashMap<StorageId, Arc<GuardedMemory>>,
}

impl ComputeStorage for Storage {
    type Resource = Resource;

    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn get(&mut self, handle: &StorageHandle) -> Result<Resource, IoError> {
        let offset = handle.offset() as usize;
        let end = offset + handle.size() as usize;
        self.memories
            .get(&handle.id)
            .and_then(|memory| Resource::new(memory.clone(), offset, end))
            .ok_or_else(|| IoError::StorageHandleNotFound {
                reason: "the emulator has no such memory".into(),
                backtrace: BackTrace::capture(),
            })
    }

    fn alloc(&mut self, size: u64) -> Result<StorageHandle, IoError> {
        let memory = GuardedMemory::new(size as usize).map_err(|_| IoError::OutOfMemory {
            size,
            backtrace: BackTrace::capture(),
        })?;
        let id = StorageId::new();
        self.memories.insert(id, Arc::new(memory));
        Ok(StorageHandle::new(
            id,
            StorageUtilization { offset: 0, size },
        ))
    }

    fn dealloc(&mut self, id: StorageId) {
        self.memories.remove(&id);
    }

    fn flush(&mut self) {}

    fn bytes_allocated(&self) -> u64 {
        self.memories
            .values()
            .map(|memory| memory.len() as u64)
            .sum()
    }
}
