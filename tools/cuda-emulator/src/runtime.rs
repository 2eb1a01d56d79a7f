//! The C++ runtime (`cuda/runtime.cpp`): compiled once, loaded before all kernels.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::compile;
use crate::error::EmulatorError;

/// Stacks and records for the threads of one block after the other.
#[repr(C)]
pub(crate) struct RawWorkspace {
    _private: [u8; 0],
}

/// A launch, as the runtime reads it.
#[repr(C)]
pub(crate) struct RawLaunch {
    pub(crate) entry: unsafe extern "C" fn(*mut *mut c_void),
    pub(crate) arguments: *mut *mut c_void,
    pub(crate) grid: [u32; 3],
    pub(crate) dimensions: [u32; 3],
    pub(crate) shared: *mut u8,
    pub(crate) shared_bytes: u32,
    pub(crate) order: u32,
    pub(crate) seed: u64,
}

type NewWorkspace = unsafe extern "C" fn(u32) -> *mut RawWorkspace;
type FreeWorkspace = unsafe extern "C" fn(*mut RawWorkspace);
type RunBlock = unsafe extern "C" fn(
    *mut RawWorkspace,
    *const RawLaunch,
    *const [u32; 3],
    *mut c_char,
    usize,
) -> c_int;

/// The functions of the runtime.
pub(crate) struct Runtime {
    pub(crate) new_workspace: NewWorkspace,
    pub(crate) free_workspace: FreeWorkspace,
    pub(crate) run_block: RunBlock,
}

impl Runtime {
    /// The runtime, compiled and loaded the first time.
    pub(crate) fn get() -> Result<&'static Self, EmulatorError> {
        static RUNTIME: OnceLock<Runtime> = OnceLock::new();
        if let Some(runtime) = RUNTIME.get() {
            return Ok(runtime);
        }
        let runtime = Self::load()?;
        Ok(RUNTIME.get_or_init(|| runtime))
    }

    fn load() -> Result<Self, EmulatorError> {
        let path = compile::runtime()?;
        let failed = |source| EmulatorError::Load {
            path: path.clone(),
            source,
        };
        // SAFETY: loading runs nothing but the C++ library's own initialisers.
        let library =
            unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(failed)?;
        // SAFETY: `runtime.cpp` defines the functions with these signatures.
        let runtime = unsafe {
            Self {
                new_workspace: *library.get(b"cuda_emulator_workspace").map_err(failed)?,
                free_workspace: *library
                    .get(b"cuda_emulator_free_workspace")
                    .map_err(failed)?,
                run_block: *library.get(b"cuda_emulator_run_block").map_err(failed)?,
            }
        };
        // Kernels that were loaded refer to it for as long as the process lives.
        std::mem::forget(library);
        Ok(runtime)
    }
}
