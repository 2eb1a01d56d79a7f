//! A communicator of NCCL that never blocks its caller.

use std::{
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use cudarc::nccl::sys;

use super::{
    cuda::CudaDevice,
    error::NcclError,
    library::{self, BYTES, Code, IN_PROGRESS, NcclLibrary, SUCCESS, Stream, UniqueId},
};
use crate::transport::Rank;

/// Begins every configuration.
const MAGIC: u32 = 0xcafe_beef;
/// What NCCL shall choose itself.
const UNDEFINED: i32 = i32::MIN;
/// The version of NCCL for which the configuration is written.
const CONFIGURED_FOR: u32 = 23_000;

/// A communicator, on the way to be one or complete. It must be [aborted](Self::abort) or [left](Self::destroy).
pub(super) struct Communicator {
    raw: library::Communicator,
    library: NcclLibrary,
}

// SAFETY: NCCL's communicators may be used by one thread at a time, whichever.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Begins to join the communicator `id` on the current GPU.
    pub(super) fn begin(
        library: &NcclLibrary,
        id: &UniqueId,
        rank: Rank,
        world_size: usize,
    ) -> Result<Self, NcclError> {
        let invalid = |reason: &str| NcclError::Call {
            call: "ncclCommInitRankConfig",
            reason: reason.to_owned(),
        };
        let id = id.to_nccl().ok_or_else(|| invalid("no id"))?;
        let count = |number: usize| i32::try_from(number).map_err(|_| invalid("too many ranks"));
        let (rank, world_size) = (count(rank)?, count(world_size)?);
        let mut config = configuration();
        let mut raw = ptr::null_mut();
        // SAFETY: the pointers are valid for the call; NCCL copies the configuration.
        let code = unsafe {
            (library.functions().init_rank_config)(&mut raw, world_size, id, rank, &mut config)
        };
        let communicator = Self {
            raw,
            library: library.clone(),
        };
        match library.check("ncclCommInitRankConfig", code, None) {
            Ok(()) => Ok(communicator),
            Err(error) => {
                // In what is not even begun there is nothing to abort.
                if !raw.is_null() {
                    communicator.abort_now();
                }
                Err(error)
            }
        }
    }

    /// Whether everything that was begun on it is done or enqueued.
    pub(super) fn is_settled(&self) -> Result<bool, NcclError> {
        let mut code: Code = SUCCESS;
        // SAFETY: the communicator is there, and the pointer valid for the call.
        let asked = unsafe { (self.library.functions().get_async_error)(self.raw, &mut code) };
        self.check("ncclCommGetAsyncError", asked)?;
        // What NCCL calls an asynchronous error may be one of any call before.
        self.check("a call of NCCL before", code)?;
        Ok(code != IN_PROGRESS)
    }

    /// Runs `add`, which adds halves, and puts them on their stream together.
    pub(super) fn group(
        &self,
        add: impl FnOnce(&Self) -> Result<(), NcclError>,
    ) -> Result<(), NcclError> {
        // SAFETY: needs nothing.
        let code = unsafe { (self.library.functions().group_start)() };
        self.check("ncclGroupStart", code)?;
        let added = add(self);
        // SAFETY: a group was started.
        let code = unsafe { (self.library.functions().group_end)() };
        added.and(self.check("ncclGroupEnd", code))
    }

    /// # Safety
    /// The bytes lie on the communicator's GPU and stay there, unchanged, until the stream has done this. The stream is there.
    pub(super) unsafe fn send(
        &self,
        peer: Rank,
        pointer: u64,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), NcclError> {
        // SAFETY: as promised; the peer is a rank of the communicator.
        let code = unsafe {
            (self.library.functions().send)(
                pointer as *const _,
                bytes,
                BYTES,
                peer as i32,
                self.raw,
                stream,
            )
        };
        self.check("ncclSend", code)
    }

    /// # Safety
    /// The bytes lie on the communicator's GPU and stay there, used by nobody, until the stream has done this. The stream is there.
    pub(super) unsafe fn receive(
        &self,
        peer: Rank,
        pointer: u64,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), NcclError> {
        // SAFETY: as promised; the peer is a rank of the communicator.
        let code = unsafe {
            (self.library.functions().receive)(
                pointer as *mut _,
                bytes,
                BYTES,
                peer as i32,
                self.raw,
                stream,
            )
        };
        self.check("ncclRecv", code)
    }

    /// Begins to leave, which all ranks must do; over when it [is settled](Self::is_settled).
    pub(super) fn finalize(&self) -> Result<(), NcclError> {
        // SAFETY: the communicator is there.
        let code = unsafe { (self.library.functions().finalize)(self.raw) };
        self.check("ncclCommFinalize", code)
    }

    /// Frees a communicator that is finalised, on a thread of its own: NCCL waits for the others on this machine to let go of it, without a
    /// deadline. True when that is over.
    pub(super) fn destroy(self, device: &CudaDevice) -> Arc<AtomicBool> {
        self.end(device, Self::destroy_now)
    }

    /// Gives it up on a thread of its own, since that may take a while: what is on its stream ends. True when that is over.
    pub(super) fn abort(self, device: &CudaDevice) -> Arc<AtomicBool> {
        self.end(device, Self::abort_now)
    }

    fn end(self, device: &CudaDevice, how: fn(&Self)) -> Arc<AtomicBool> {
        let is_over = Arc::new(AtomicBool::new(false));
        let place = Arc::new(Mutex::new(Some(self)));
        let run = {
            let (device, is_over, place) =
                (device.clone(), Arc::clone(&is_over), Arc::clone(&place));
            move || {
                // Without it NCCL chooses the GPU itself.
                let _ = device.keep_current();
                end_in(&place, how);
                is_over.store(true, Ordering::Release);
            }
        };
        let thread = thread::Builder::new().name("ring-nccl-end".to_owned());
        if thread.spawn(run).is_err() {
            // So it must happen here.
            end_in(&place, how);
            is_over.store(true, Ordering::Release);
        }
        is_over
    }

    fn destroy_now(&self) {
        // SAFETY: the communicator is there, and nobody uses it any more. If it fails there is nothing left to do.
        let _ = unsafe { (self.library.functions().destroy)(self.raw) };
    }

    fn abort_now(&self) {
        // SAFETY: the communicator is there, and nobody uses it any more.
        let _ = unsafe { (self.library.functions().abort)(self.raw) };
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), NcclError> {
        self.library.check(call, code, Some(self.raw))
    }
}

fn end_in(place: &Mutex<Option<Communicator>>, how: fn(&Communicator)) {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(communicator) = place.take() {
        how(&communicator);
    }
}

/// Calls that do not block; everything else as NCCL likes it.
fn configuration() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: CONFIGURED_FOR,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Without a driver NCCL's own error comes back, with its words; on a machine without the library there is nothing to see.
    #[test]
    fn without_a_gpu_joining_fails() {
        let Ok(library) = NcclLibrary::load() else {
            return println!("not run: no NCCL");
        };
        if CudaDevice::count().is_ok() {
            return println!("not run: there is a GPU");
        }
        let id = library.unique_id().unwrap();
        let joined = Communicator::begin(&library, &id, 0, 1).and_then(|communicator| {
            let expiry = Instant::now() + Duration::from_secs(30);
            let settled = loop {
                match communicator.is_settled() {
                    Ok(false) if Instant::now() < expiry => thread::yield_now(),
                    settled => break settled,
                }
            };
            communicator.abort_now();
            settled
        });
        let error = joined.unwrap_err();
        println!("{error}");
        assert!(matches!(error, NcclError::Call { .. }), "{error}");
    }
}
