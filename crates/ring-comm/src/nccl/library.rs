//! NCCL's library: found when it is needed, with what is used of it.
//!
//! `cudarc` has bindings for all of NCCL, but looks for a library called `libnccl.so` only, which packages without headers do not
//! have, and panics without; and it reads results as an enum, which newer versions of NCCL may add to. So its types are used here,
//! and the functions are looked up.

use std::{
    env,
    error::Error,
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    sync::Arc,
};

use cudarc::nccl::sys;
use libloading::Library as Dynamic;
use serde::{Deserialize, Serialize};

use super::error::NcclError;

/// The environment variable that can name the file of NCCL's library.
pub const LIBRARY_VARIABLE: &str = "RING_NCCL_LIBRARY";

/// What the library is called, the usual name first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// What a function of NCCL returns.
pub(super) type Code = c_int;
pub(super) type Communicator = sys::ncclComm_t;
/// A stream as NCCL's functions take it.
pub(super) type Stream = *mut c_void;

pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;
/// Elements of one byte.
pub(super) const BYTES: c_int = sys::ncclDataType_t::ncclUint8 as c_int;

/// Declares the functions that are used, and how to find them.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used, as `nccl.h` declares them.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn find(dynamic: &Dynamic) -> Result<Self, &'static str> {
                // SAFETY: each function has had this type in every version of NCCL since the oldest that is accepted. The
                // pointers are used only while the library, which is never unloaded, is there.
                unsafe {
                    Ok(Self {
                        $($field: *dynamic
                            .get(concat!(stringify!($symbol), "\0"))
                            .map_err(|_| stringify!($symbol))?,)*
                    })
                }
            }
        }
    };
}

functions! {
    get_version = ncclGetVersion(*mut c_int) -> Code;
    get_unique_id = ncclGetUniqueId(*mut sys::ncclUniqueId) -> Code;
    get_error_string = ncclGetErrorString(Code) -> *const c_char;
    get_last_error = ncclGetLastError(Communicator) -> *const c_char;
    init_rank_config = ncclCommInitRankConfig(*mut Communicator, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> Code;
    get_async_error = ncclCommGetAsyncError(Communicator, *mut Code) -> Code;
    finalize = ncclCommFinalize(Communicator) -> Code;
    destroy = ncclCommDestroy(Communicator) -> Code;
    abort = ncclCommAbort(Communicator) -> Code;
    group_start = ncclGroupStart() -> Code;
    group_end = ncclGroupEnd() -> Code;
    send = ncclSend(*const c_void, usize, c_int, c_int, Communicator, Stream) -> Code;
    receive = ncclRecv(*mut c_void, usize, c_int, c_int, Communicator, Stream) -> Code;
}

/// NCCL, loaded and found to be recent enough. Needs no GPU.
#[derive(Clone)]
pub struct NcclLibrary {
    functions: Arc<Functions>,
    name: String,
    version: Version,
}

/// A version of NCCL, as it counts itself: 23004 is 2.30.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version(i32);

/// What the ranks of a communicator find one another by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UniqueId(Vec<u8>);

/// Bytes of a [`UniqueId`].
const UNIQUE_ID_BYTES: usize = 128;

impl NcclLibrary {
    /// Loads NCCL: the file that [`LIBRARY_VARIABLE`] names, or else `libnccl.so.2` or `libnccl.so` where the system looks for libraries.
    ///
    /// # Errors
    /// [`NcclError::LibraryMissing`], [`NcclError::SymbolMissing`] or [`NcclError::TooOld`].
    pub fn load() -> Result<Self, NcclError> {
        match env::var(LIBRARY_VARIABLE) {
            Ok(path) if !path.is_empty() => Self::load_from(&[path]),
            _ => Self::load_from(&NAMES.map(str::to_owned)),
        }
    }

    /// Loads the first of these names or paths that is there.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_from(names: &[String]) -> Result<Self, NcclError> {
        let mut reason = "no name to look for".to_owned();
        for name in names {
            // SAFETY: what loading it runs is up to whoever names the library, or installs one with NCCL's name.
            match unsafe { Dynamic::new(name) } {
                Ok(dynamic) => return Self::of(dynamic, name),
                Err(error) => {
                    reason = error
                        .source()
                        .map_or(error.to_string(), ToString::to_string)
                }
            }
        }
        Err(NcclError::LibraryMissing {
            searched: names.to_vec(),
            reason,
        })
    }

    fn of(dynamic: Dynamic, name: &str) -> Result<Self, NcclError> {
        let functions = Functions::find(&dynamic).map_err(|symbol| NcclError::SymbolMissing {
            library: name.to_owned(),
            symbol,
        })?;
        // NCCL has threads of its own, so it stays for as long as the process.
        std::mem::forget(dynamic);
        let mut library = Self {
            functions: Arc::new(functions),
            name: name.to_owned(),
            version: Version(0),
        };
        let mut version = 0;
        // SAFETY: the pointer is valid for the call.
        let code = unsafe { (library.functions.get_version)(&mut version) };
        library.check("ncclGetVersion", code, None)?;
        library.version = Version(version);
        if library.version < Version::OLDEST {
            return Err(NcclError::TooOld {
                version: library.version,
            });
        }
        Ok(library)
    }

    /// The version of the library that was found.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The name or path by which it was found.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes an id for a new communicator, and begins to listen for its ranks.
    ///
    /// # Errors
    /// [`NcclError::Call`], for instance if this machine has no network to listen on.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = sys::ncclUniqueId {
            internal: [0; UNIQUE_ID_BYTES],
        };
        // SAFETY: the pointer is valid for the call.
        let code = unsafe { (self.functions.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", code, None)?;
        Ok(UniqueId(id.internal.map(|byte| byte as u8).to_vec()))
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The error that a code stands for, if it is one. What is in progress is none.
    pub(super) fn check(
        &self,
        call: &'static str,
        code: Code,
        communicator: Option<Communicator>,
    ) -> Result<(), NcclError> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: NCCL takes any code, and no communicator or one that is valid; both texts are its own, end with a zero, and are
        // copied before anything else is called.
        let (result, last) = unsafe {
            let result = text((self.functions.get_error_string)(code));
            let communicator = communicator.unwrap_or(std::ptr::null_mut());
            (result, text((self.functions.get_last_error)(communicator)))
        };
        let mut reason = format!("{} ({code})", result.trim());
        if !last.trim().is_empty() {
            reason = format!("{reason}: {}", last.trim());
        }
        Err(NcclError::Call { call, reason })
    }
}

/// # Safety
/// The pointer is null or points to a text that ends with a zero.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(pointer) }
        .to_string_lossy()
        .into_owned()
}

impl fmt::Debug for NcclLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclLibrary")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl Version {
    /// The oldest version that will do: the first that works on all transfers of a group at once, wherever their peers are. (And before 2.19
    /// an abort must be on the thread that began what it ends.)
    pub const OLDEST: Version = Version(22200);

    /// The first version with several ranks on one GPU.
    pub const MULTI_RANK: Version = Version(23000);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}.{}",
            self.0 / 10_000,
            self.0 / 100 % 100,
            self.0 % 100
        )
    }
}

impl UniqueId {
    #[cfg(test)]
    pub(super) fn from_bytes(bytes: [u8; UNIQUE_ID_BYTES]) -> Self {
        Self(bytes.to_vec())
    }

    /// As NCCL takes it; what came over the network with another length is no id.
    pub(super) fn to_nccl(&self) -> Option<sys::ncclUniqueId> {
        let bytes: [u8; UNIQUE_ID_BYTES] = self.0.as_slice().try_into().ok()?;
        Some(sys::ncclUniqueId {
            internal: bytes.map(|byte| byte as c_char),
        })
    }
}

impl fmt::Debug for UniqueId {
    /// Whoever knows the id can join, so it is not printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_named() {
        let names = [
            "libring-nowhere.so.2".to_owned(),
            "/nowhere/libnccl.so".to_owned(),
        ];
        let error = NcclLibrary::load_from(&names).unwrap_err();
        assert!(matches!(&error, NcclError::LibraryMissing { searched, .. } if *searched == names));
        assert!(
            error
                .to_string()
                .contains("libring-nowhere.so.2, /nowhere/libnccl.so"),
            "{error}"
        );
    }

    #[test]
    fn another_library_is_not_taken_for_nccl() {
        let error = NcclLibrary::load_from(&["libc.so.6".to_owned()]).unwrap_err();
        let library = "libc.so.6".to_owned();
        let symbol = "ncclGetVersion";
        assert_eq!(error, NcclError::SymbolMissing { library, symbol });
    }

    #[test]
    fn versions_are_shown_as_nccl_writes_them() {
        assert_eq!(Version(22105).to_string(), "2.21.5");
    }
}
