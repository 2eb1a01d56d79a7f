//! Dead processes, as far as MPI knows of them: the ULFM extension, which the MPI library may lack.

use std::ffi::{CStr, c_int};

use mpi_sys as ffi;

use super::call::Comm;
use crate::transport::Rank;

type Acknowledge = unsafe extern "C" fn(ffi::MPI_Comm) -> c_int;
type Acknowledged = unsafe extern "C" fn(ffi::MPI_Comm, *mut ffi::MPI_Group) -> c_int;

/// The functions of the extension, if it is there.
pub(super) struct Failures {
    acknowledge: Acknowledge,
    acknowledged: Acknowledged,
}

impl Failures {
    pub(super) fn find() -> Option<Self> {
        // SAFETY: the two have had these types in every version of the extension.
        unsafe {
            let acknowledge = symbol(c"MPIX_Comm_failure_ack")?;
            let acknowledged = symbol(c"MPIX_Comm_failure_get_acked")?;
            Some(Self {
                acknowledge: std::mem::transmute::<*mut libc::c_void, Acknowledge>(acknowledge),
                acknowledged: std::mem::transmute::<*mut libc::c_void, Acknowledged>(acknowledged),
            })
        }
    }

    /// The ranks that are dead, of `world_size`. From here on their silence is no error of calls that ask for anybody.
    pub(super) fn dead(&self, comm: Comm, world_size: usize) -> Vec<Rank> {
        // SAFETY: a constant of the library.
        let mut dead = unsafe { ffi::RSMPI_GROUP_NULL };
        // SAFETY: the communicator is valid, and so is the group if the call succeeds, which is freed then.
        unsafe {
            let is_known = succeeds((self.acknowledge)(comm.0))
                && succeeds((self.acknowledged)(comm.0, &mut dead));
            if !is_known {
                return Vec::new();
            }
            let ranks = (0..world_size)
                .filter(|&rank| is_in(dead, comm, rank))
                .collect();
            ffi::MPI_Group_free(&mut dead);
            ranks
        }
    }
}

/// # Safety
/// `group` and `comm` are valid.
unsafe fn is_in(group: ffi::MPI_Group, comm: Comm, rank: Rank) -> bool {
    let Ok(rank) = c_int::try_from(rank) else {
        return false;
    };
    let (mut everybody, mut found): (_, c_int) = (group, 0);
    // SAFETY: both groups are valid; the one made here is freed.
    unsafe {
        if !succeeds(ffi::MPI_Comm_group(comm.0, &mut everybody)) {
            return false;
        }
        let code = ffi::MPI_Group_translate_ranks(everybody, 1, &rank, group, &mut found);
        ffi::MPI_Group_free(&mut everybody);
        succeeds(code) && found != ffi::RSMPI_UNDEFINED
    }
}

fn succeeds(code: c_int) -> bool {
    code == ffi::MPI_SUCCESS as c_int
}

/// # Safety
/// What is found must be used as what it is.
unsafe fn symbol(name: &CStr) -> Option<*mut libc::c_void> {
    // SAFETY: the name ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
