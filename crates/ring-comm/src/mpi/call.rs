//! The MPI functions that are used, each with its return code made an error.

use std::{
    ffi::{c_char, c_int, c_void},
    mem::MaybeUninit,
    ptr,
};

use mpi_sys as ffi;

use super::MpiError;
use crate::transport::Rank;

/// A handle on messages in progress; to be [tested](Self::is_complete) until they are complete.
pub(super) struct Request(ffi::MPI_Request);

/// Makes all processes neighbours of their own: no message of another user of MPI comes in.
#[derive(Clone, Copy)]
pub(super) struct Comm(pub(super) ffi::MPI_Comm);

/// A message that was found and is still to be received.
pub(super) struct Found {
    pub(super) source: Rank,
    pub(super) len: usize,
    message: ffi::MPI_Message,
}

fn check(call: &'static str, code: c_int) -> Result<(), MpiError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the text has the room that MPI asks for; any code is allowed.
    let said = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) };
    let len = usize::try_from(len).unwrap_or_default().min(text.len());
    let reason = match said == ffi::MPI_SUCCESS as c_int {
        true => String::from_utf8_lossy(&text[..len]).into_owned(),
        false => format!("error {code}"),
    };
    Err(MpiError::Call { call, reason })
}

/// Starts MPI for calls from this thread alone; errors are returned instead of ending the process.
pub(super) fn init() -> Result<(), MpiError> {
    let (mut was_started, mut provided): (c_int, c_int) = (0, 0);
    // SAFETY: may be called at any time.
    check("MPI_Initialized", unsafe {
        ffi::MPI_Initialized(&mut was_started)
    })?;
    if was_started != 0 {
        return Err(MpiError::StartedBefore);
    }
    // SAFETY: no arguments are passed on, which MPI allows; MPI was not started before.
    unsafe {
        check(
            "MPI_Init_thread",
            ffi::MPI_Init_thread(
                ptr::null_mut(),
                ptr::null_mut(),
                ffi::RSMPI_THREAD_FUNNELED,
                &mut provided,
            ),
        )?;
        if provided < ffi::RSMPI_THREAD_FUNNELED {
            return Err(MpiError::NoThreads);
        }
        let return_errors = |comm| ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN);
        check(
            "MPI_Comm_set_errhandler",
            return_errors(ffi::RSMPI_COMM_WORLD),
        )?;
        check(
            "MPI_Comm_set_errhandler",
            return_errors(ffi::RSMPI_COMM_SELF),
        )
    }
}

/// Ends MPI; waits for the other processes to do the same.
pub(super) fn finalize() -> Result<(), MpiError> {
    // SAFETY: MPI was started on this thread.
    check("MPI_Finalize", unsafe { ffi::MPI_Finalize() })
}

impl Comm {
    /// A new space for messages between all processes, which all must call.
    pub(super) fn new() -> Result<Self, MpiError> {
        let mut comm = MaybeUninit::uninit();
        // SAFETY: MPI is started, and fills in the handle if it succeeds.
        unsafe {
            let code = ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, comm.as_mut_ptr());
            check("MPI_Comm_dup", code)?;
            Ok(Self(comm.assume_init()))
        }
    }

    pub(super) fn rank(self) -> Result<Rank, MpiError> {
        let mut rank: c_int = 0;
        // SAFETY: the communicator is valid.
        check("MPI_Comm_rank", unsafe {
            ffi::MPI_Comm_rank(self.0, &mut rank)
        })?;
        Ok(rank.unsigned_abs() as usize)
    }

    pub(super) fn size(self) -> Result<usize, MpiError> {
        let mut size: c_int = 0;
        // SAFETY: the communicator is valid.
        check("MPI_Comm_size", unsafe {
            ffi::MPI_Comm_size(self.0, &mut size)
        })?;
        Ok(size.unsigned_abs() as usize)
    }

    /// The largest tag a message may have.
    pub(super) fn largest_tag(self) -> Result<u64, MpiError> {
        /// What the standard guarantees.
        const LEAST: c_int = 32_767;
        let mut value: *mut c_int = ptr::null_mut();
        let mut is_known: c_int = 0;
        // SAFETY: this attribute is a pointer to a number that lives as long as MPI.
        unsafe {
            let key = ffi::MPI_TAG_UB as c_int;
            let at = (&raw mut value).cast::<c_void>();
            check(
                "MPI_Comm_get_attr",
                ffi::MPI_Comm_get_attr(self.0, key, at, &mut is_known),
            )?;
            let largest = if is_known != 0 { *value } else { LEAST };
            Ok(u64::from(largest.unsigned_abs()))
        }
    }

    /// # Safety
    /// The bytes must stay where they are, unchanged, until the request is complete.
    pub(super) unsafe fn send(
        self,
        peer: Rank,
        tag: c_int,
        bytes: &[u8],
    ) -> Result<Request, MpiError> {
        let mut request = MaybeUninit::uninit();
        let (len, peer) = (to_int(bytes.len())?, to_int(peer)?);
        // SAFETY: the memory is valid now, and until the request is complete by the caller's promise.
        unsafe {
            let (start, byte) = (bytes.as_ptr().cast::<c_void>(), ffi::RSMPI_UINT8_T);
            let code = ffi::MPI_Isend(start, len, byte, peer, tag, self.0, request.as_mut_ptr());
            check("MPI_Isend", code)?;
            Ok(Request(request.assume_init()))
        }
    }

    /// # Safety
    /// The memory must stay where it is, and must not be used otherwise, until the request is complete.
    pub(super) unsafe fn receive(
        self,
        peer: Rank,
        tag: c_int,
        bytes: &mut [u8],
    ) -> Result<Request, MpiError> {
        let mut request = MaybeUninit::uninit();
        let (len, peer) = (to_int(bytes.len())?, to_int(peer)?);
        // SAFETY: the memory is valid now, and until the request is complete by the caller's promise.
        unsafe {
            let (start, byte) = (bytes.as_mut_ptr().cast::<c_void>(), ffi::RSMPI_UINT8_T);
            let code = ffi::MPI_Irecv(start, len, byte, peer, tag, self.0, request.as_mut_ptr());
            check("MPI_Irecv", code)?;
            Ok(Request(request.assume_init()))
        }
    }

    /// The next message under `tag` from anybody, if there is one.
    pub(super) fn find(self, tag: c_int) -> Result<Option<Found>, MpiError> {
        let mut is_found: c_int = 0;
        let mut message = MaybeUninit::uninit();
        let mut status = MaybeUninit::<ffi::MPI_Status>::uninit();
        // SAFETY: message and status are filled in if a message was found, and only read then.
        unsafe {
            let code = ffi::MPI_Improbe(
                ffi::RSMPI_ANY_SOURCE,
                tag,
                self.0,
                &mut is_found,
                message.as_mut_ptr(),
                status.as_mut_ptr(),
            );
            check("MPI_Improbe", code)?;
            if is_found == 0 {
                return Ok(None);
            }
            let status = status.assume_init();
            let mut len: c_int = 0;
            check(
                "MPI_Get_count",
                ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len),
            )?;
            Ok(Some(Found {
                source: status.MPI_SOURCE.unsigned_abs() as usize,
                len: len.unsigned_abs() as usize,
                message: message.assume_init(),
            }))
        }
    }
}

impl Found {
    /// # Safety
    /// The memory, of the message's length, must stay where it is, and must not be used otherwise, until the request is complete.
    pub(super) unsafe fn receive(mut self, bytes: &mut [u8]) -> Result<Request, MpiError> {
        let mut request = MaybeUninit::uninit();
        let len = to_int(bytes.len())?;
        // SAFETY: the memory is valid now, and until the request is complete by the caller's promise.
        unsafe {
            let (start, byte) = (bytes.as_mut_ptr().cast::<c_void>(), ffi::RSMPI_UINT8_T);
            let code = ffi::MPI_Imrecv(start, len, byte, &mut self.message, request.as_mut_ptr());
            check("MPI_Imrecv", code)?;
            Ok(Request(request.assume_init()))
        }
    }
}

impl Request {
    /// Whether the message has left, or arrived; looks at the network. Stays true.
    pub(super) fn is_complete(&mut self) -> Result<bool, MpiError> {
        let mut is_complete: c_int = 0;
        // SAFETY: the handle is one of MPI, which replaces it by the null request when it is complete.
        check("MPI_Test", unsafe {
            ffi::MPI_Test(&mut self.0, &mut is_complete, ffi::RSMPI_STATUS_IGNORE)
        })?;
        Ok(is_complete != 0)
    }
}

fn to_int(number: usize) -> Result<c_int, MpiError> {
    c_int::try_from(number).map_err(|_| MpiError::Call {
        call: "the conversion of a size",
        reason: format!("{number} is more than MPI can count"),
    })
}
