//! Memory of the device: every allocation ends where a page begins that nobody may touch.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// Every allocation begins and ends at a multiple of this many bytes.
pub(crate) const ALIGNMENT: usize = 32;

/// What fresh memory holds: a NaN as f32 and f64, and as two f16 or bf16.
const FRESH: u8 = 0xFF;

/// Memory between two pages that end the program when touched, filled with NaN.
pub(crate) struct GuardedMemory {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    len: usize,
}

/// The operating system has no memory left.
#[derive(Debug)]
pub(crate) struct OutOfMemory;

impl GuardedMemory {
    /// `len` bytes, rounded up to [`ALIGNMENT`].
    pub(crate) fn new(len: usize) -> Result<Self, OutOfMemory> {
        let page = page_size();
        let len = len.checked_next_multiple_of(ALIGNMENT).ok_or(OutOfMemory)?;
        let usable = len.checked_next_multiple_of(page).ok_or(OutOfMemory)?;
        let mapped = usable.checked_add(2 * page).ok_or(OutOfMemory)?;
        // SAFETY: asks for new memory, at no particular place.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(OutOfMemory);
        }
        let mapping = NonNull::new(mapping.cast::<u8>()).ok_or(OutOfMemory)?;
        // SAFETY: the mapping has a page, the usable bytes, and another page.
        let memory = unsafe {
            Self {
                mapping,
                mapped,
                start: mapping.add(page + usable - len),
                len,
            }
        };
        // SAFETY: these are the pages between the first and the last of the mapping.
        let opened = unsafe {
            libc::mprotect(
                mapping.add(page).as_ptr().cast(),
                usable,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        if opened != 0 {
            return Err(OutOfMemory);
        }
        memory.refill();
        Ok(memory)
    }

    /// Fills the memory with NaN again.
    pub(crate) fn refill(&self) {
        // SAFETY: `len` bytes from `start` are readable and writable.
        unsafe { self.start.write_bytes(FRESH, self.len) }
    }

    /// The first byte.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for GuardedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this memory's own.
        unsafe {
            libc::munmap(self.mapping.as_ptr().cast(), self.mapped);
        }
    }
}

impl fmt::Debug for GuardedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuardedMemory({} bytes)", self.len)
    }
}

// SAFETY: it is memory like any other; who touches it when is for its users to order.
unsafe impl Send for GuardedMemory {}
// SAFETY: as above.
unsafe impl Sync for GuardedMemory {}

fn page_size() -> usize {
    // SAFETY: a plain question.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// A part of an allocation, which it keeps.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    memory: Arc<GuardedMemory>,
    offset: usize,
    len: usize,
}

impl Resource {
    /// The bytes from `offset` to `end`, if the memory has them.
    pub(crate) fn new(memory: Arc<GuardedMemory>, offset: usize, end: usize) -> Option<Self> {
        let len = end.checked_sub(offset)?;
        (end <= memory.len()).then_some(Self {
            memory,
            offset,
            len,
        })
    }

    /// The first byte. Kernels that were launched are done.
    pub(crate) fn start(&self) -> *mut u8 {
        self.memory.start().wrapping_add(self.offset)
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A copy of the bytes.
    pub(crate) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `new` checked that the memory has these bytes; the vector is as long.
        unsafe { std::ptr::copy_nonoverlapping(self.start(), bytes.as_mut_ptr(), self.len) }
        bytes
    }

    /// Overwrites the first bytes. False if there are fewer than in `bytes`.
    pub(crate) fn write(&self, bytes: &[u8]) -> bool {
        if bytes.len() > self.len {
            return false;
        }
        // SAFETY: `new` checked that the memory has these bytes, and they are at least as many.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start(), bytes.len()) }
        true
    }
}
