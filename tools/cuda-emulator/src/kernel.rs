//! A kernel that is loaded, and its launches.

use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::compile::{self, Source};
use crate::error::EmulatorError;
use crate::memory::GuardedMemory;
use crate::order::Order;
use crate::runtime::{RawLaunch, RawWorkspace, Runtime};

/// Bytes of the message that tells what went wrong in a block.
const MESSAGE: usize = 512;

/// A kernel that is loaded.
pub(crate) struct Kernel {
    name: String,
    entry: unsafe extern "C" fn(*mut *mut c_void),
    /// Bytes of every argument.
    arguments: Vec<usize>,
    dimensions: [u32; 3],
    shared_bytes: usize,
    // The functions above are its.
    _library: Library,
}

/// A grid of blocks to run.
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) order: Order,
}

/// An argument: where its bytes are, and how many.
#[derive(Clone, Copy)]
pub(crate) struct Argument {
    pub(crate) address: *mut c_void,
    pub(crate) bytes: usize,
}

impl Kernel {
    /// Compiles and loads a kernel, for blocks of the given dimensions.
    pub(crate) fn load(source: &Source<'_>, dimensions: [u32; 3]) -> Result<Self, EmulatorError> {
        Runtime::get()?;
        let path = compile::kernel(source)?;
        let failed = |source| EmulatorError::Load {
            path: path.clone(),
            source,
        };
        // SAFETY: a kernel has no initialisers.
        let library =
            unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }.map_err(failed)?;
        // SAFETY: `CUDA_EMULATOR_ENTRY` defines both with these signatures.
        let (entry, size) = unsafe {
            (
                *library
                    .get::<unsafe extern "C" fn(*mut *mut c_void)>(b"cuda_emulator_entry")
                    .map_err(failed)?,
                *library
                    .get::<unsafe extern "C" fn(usize) -> usize>(b"cuda_emulator_argument")
                    .map_err(failed)?,
            )
        };
        // SAFETY: any index may be asked for.
        let arguments = (0..)
            .map(|index| unsafe { size(index) })
            .take_while(|&bytes| bytes > 0)
            .collect();
        Ok(Self {
            name: source.name.to_string(),
            entry,
            arguments,
            dimensions,
            shared_bytes: source.shared_bytes,
            _library: library,
        })
    }

    /// Runs a grid. Arguments beyond those of the kernel are left out.
    ///
    /// # Safety
    /// The arguments must point to what the kernel takes them for.
    pub(crate) unsafe fn launch(
        &self,
        grid: &Grid,
        arguments: &[Argument],
    ) -> Result<(), EmulatorError> {
        let fits = self.arguments.len() <= arguments.len()
            && self
                .arguments
                .iter()
                .zip(arguments)
                .all(|(&bytes, argument)| bytes <= argument.bytes);
        if !fits {
            return Err(EmulatorError::Launch(format!(
                "kernel `{}` takes arguments of {:?} bytes, given are {:?}",
                self.name,
                self.arguments,
                arguments
                    .iter()
                    .map(|argument| argument.bytes)
                    .collect::<Vec<_>>(),
            )));
        }
        let addresses: Vec<_> = arguments.iter().map(|argument| argument.address).collect();
        let total = grid
            .blocks
            .iter()
            .map(|&blocks| u64::from(blocks))
            .product();
        let run = Run {
            kernel: self,
            grid,
            addresses: &addresses,
            total,
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = workers.min(usize::try_from(total).unwrap_or(usize::MAX));
        if workers <= 1 {
            run.work();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..workers {
                    scope.spawn(|| run.work());
                }
            });
        }
        let failure = run.failure.into_inner();
        match failure.unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// A launch under way, on several threads.
struct Run<'a> {
    kernel: &'a Kernel,
    grid: &'a Grid,
    addresses: &'a [*mut c_void],
    total: u64,
    next: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<EmulatorError>>,
}

// SAFETY: the addresses are only read; what they point to is for the kernel to share, as on a GPU.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    /// Runs blocks that no other thread has taken, until none is left.
    fn work(&self) {
        if let Err(error) = self.blocks() {
            self.stop.store(true, Ordering::Relaxed);
            let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
            failure.get_or_insert(error);
        }
    }

    fn blocks(&self) -> Result<(), EmulatorError> {
        let runtime = Runtime::get()?;
        let kernel = self.kernel;
        let workspace = Workspace::new(runtime, kernel.dimensions.iter().product())?;
        let shared = GuardedMemory::new(kernel.shared_bytes)
            .map_err(|_| EmulatorError::Launch("no memory for shared memory".to_string()))?;
        let mut addresses = self.addresses.to_vec();
        let (order, seed) = self.grid.order.code();
        let launch = RawLaunch {
            entry: kernel.entry,
            arguments: addresses.as_mut_ptr(),
            grid: self.grid.blocks,
            dimensions: kernel.dimensions,
            shared: shared.start(),
            shared_bytes: shared.len() as u32,
            order,
            seed,
        };
        while !self.stop.load(Ordering::Relaxed) {
            let block = self.next.fetch_add(1, Ordering::Relaxed);
            if block >= self.total {
                break;
            }
            shared.refill();
            let mut message = [0 as c_char; MESSAGE];
            // SAFETY: the launch, its arguments and the workspace outlive the call; the workspace is this thread's own.
            let failed = unsafe {
                (runtime.run_block)(
                    workspace.raw.as_ptr(),
                    &launch,
                    &self.index(block),
                    message.as_mut_ptr(),
                    MESSAGE,
                )
            };
            if failed != 0 {
                // SAFETY: the runtime ends the message with a zero.
                let message = unsafe { CStr::from_ptr(message.as_ptr()) };
                return Err(EmulatorError::Kernel {
                    kernel: kernel.name.clone(),
                    message: message.to_string_lossy().into_owned(),
                });
            }
        }
        Ok(())
    }

    fn index(&self, block: u64) -> [u32; 3] {
        let [x, y, _] = self.grid.blocks.map(u64::from);
        // Each is less than the number of blocks along its axis.
        [block % x, block / x % y, block / x / y].map(|part| part as u32)
    }
}

/// Stacks and records of a thread.
struct Workspace {
    runtime: &'static Runtime,
    raw: NonNull<RawWorkspace>,
}

impl Workspace {
    fn new(runtime: &'static Runtime, threads: u32) -> Result<Self, EmulatorError> {
        // SAFETY: any number of threads may be asked for.
        let raw = NonNull::new(unsafe { (runtime.new_workspace)(threads) });
        let raw = raw.ok_or_else(|| EmulatorError::Launch("no memory for stacks".to_string()))?;
        Ok(Self { runtime, raw })
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // SAFETY: made by the runtime, and not used any more.
        unsafe { (self.runtime.free_workspace)(self.raw.as_ptr()) }
    }
}
