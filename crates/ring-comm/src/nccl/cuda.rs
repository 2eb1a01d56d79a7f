//! What is used of CUDA's driver: one GPU, streams and events.

use std::{ffi::c_int, fmt, ptr, sync::Arc};

use cudarc::driver::{
    DriverError,
    result::{ctx, device, event, primary_ctx, stream},
    sys,
};

use super::error::NcclError;

/// The oldest driver that will do, as CUDA counts versions: the first in which everything used here is settled.
const OLDEST_DRIVER: c_int = 11_040;

/// A GPU as this process uses it. A clone is another handle on the same.
///
/// It has a stream on which memory of messages is allocated, freed and copied.
#[derive(Clone)]
pub struct CudaDevice(Arc<Inner>);

struct Inner {
    number: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: CUDA's handles can be used from every thread in which the context is current, as it is made for every use.
unsafe impl Send for Inner {}
// SAFETY: as above; the handles do not change.
unsafe impl Sync for Inner {}

impl CudaDevice {
    /// The GPU of this number, as CUDA counts those that the process may see (`CUDA_VISIBLE_DEVICES`).
    ///
    /// # Errors
    /// [`NcclError`] if there is no driver or one too old, no GPU or none of that number, or CUDA fails.
    pub fn open(number: usize) -> Result<Self, NcclError> {
        let count = Self::count()?;
        if number >= count {
            return Err(NcclError::DeviceOutOfRange {
                device: number,
                count,
            });
        }
        let ordinal = c_int::try_from(number).unwrap_or(c_int::MAX);
        let device = device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device is one that CUDA has just named.
        let pools = unsafe { device::get_attribute(device, MEMORY_POOLS) };
        if pools.map_err(failed("cuDeviceGetAttribute"))? == 0 {
            return Err(NcclError::NoMemoryPools { device: number });
        }
        // SAFETY: as above; released when dropped.
        let context =
            unsafe { primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // From here on dropping releases what there is.
        let mut inner = Inner {
            number,
            device,
            context,
            stream: ptr::null_mut(),
        };
        let current = Current::new(context)?;
        inner.stream =
            stream::create(stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        drop(current);
        Ok(Self(Arc::new(inner)))
    }

    /// Number of GPUs that the process may see; at least one.
    ///
    /// # Errors
    /// [`NcclError`] if there is no driver or one too old, or no GPU.
    pub fn count() -> Result<usize, NcclError> {
        // SAFETY: loads the driver's library, as every program with CUDA does.
        if !unsafe { sys::is_culib_present() } {
            return Err(NcclError::DriverMissing);
        }
        let mut version: c_int = 0;
        // SAFETY: the pointer is valid for the call, which needs no context.
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        asked.map_err(failed("cuDriverGetVersion"))?;
        if version < OLDEST_DRIVER {
            return Err(NcclError::DriverTooOld {
                version: format!("{}.{}", version / 1000, version / 10 % 100),
                needed: "11.4",
            });
        }
        match cudarc::driver::result::init() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Err(NcclError::NoDevice);
            }
            Err(error) => return Err(failed("cuInit")(error)),
        }
        let count = device::get_count().map_err(failed("cuDeviceGetCount"))?;
        match usize::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(NcclError::NoDevice),
        }
    }

    /// The number by which it was opened.
    pub fn number(&self) -> usize {
        self.0.number
    }

    /// The stream on which memory is allocated, freed and copied.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.0.stream
    }

    /// Makes this the GPU of the calling thread, until what is returned is dropped.
    pub(super) fn make_current(&self) -> Result<Current, NcclError> {
        Current::new(self.0.context)
    }

    /// Makes this the GPU of the calling thread, for as long as the thread lives.
    pub(super) fn keep_current(&self) -> Result<(), NcclError> {
        // SAFETY: the context is retained by this device, which whoever calls this keeps.
        unsafe { ctx::set_current(self.0.context) }.map_err(failed("cuCtxSetCurrent"))
    }
}

const MEMORY_POOLS: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CudaDevice").field(&self.0.number).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handles any more. If CUDA fails there is nothing left to do about it.
        unsafe {
            if !self.stream.is_null() {
                let _current = Current::new(self.context);
                let _ = stream::destroy(self.stream);
            }
            let _ = primary_ctx::release(self.device);
        }
    }
}

/// A context that is the thread's current one until this is dropped; then it is the one before.
pub(super) struct Current(());

impl Current {
    fn new(context: sys::CUcontext) -> Result<Self, NcclError> {
        // SAFETY: the context is retained by the device that asks for this.
        let pushed = unsafe { sys::cuCtxPushCurrent_v2(context) }.result();
        pushed.map_err(failed("cuCtxPushCurrent"))?;
        Ok(Self(()))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: pops what was pushed; the pointer is valid for the call.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}

/// A stream that goes before others where it can. Made and used while its GPU is current.
pub(super) struct OwnStream(sys::CUstream);

impl OwnStream {
    pub(super) fn new() -> Result<Self, NcclError> {
        let (_, first) =
            stream::get_priority_range().map_err(failed("cuCtxGetStreamPriorityRange"))?;
        let stream = stream::create_with_priority(stream::StreamKind::NonBlocking, first);
        stream
            .map(Self)
            .map_err(failed("cuStreamCreateWithPriority"))
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.0
    }

    /// What is put on the stream from now on waits for the event.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), NcclError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are there.
        unsafe { stream::wait_event(self.0, event.0, flags) }.map_err(failed("cuStreamWaitEvent"))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. What is on it goes on; CUDA destroys it then.
        let _ = unsafe { stream::destroy(self.0) };
    }
}

/// A point on a stream, to wait for or to ask whether it is reached. Made while its GPU is current.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: events can be used from every thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// The point that the stream has come to now.
    ///
    /// # Safety
    /// The stream is null, which is CUDA's default stream, or one of the current GPU that is there.
    pub(super) unsafe fn record(stream: sys::CUstream) -> Result<Self, NcclError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = Self(event::create(flags).map_err(failed("cuEventCreate"))?);
        // SAFETY: the event is there, and the stream by what was promised.
        unsafe { event::record(event.0, stream) }.map_err(failed("cuEventRecord"))?;
        Ok(event)
    }

    /// Whether the stream has done all that was on it before this point.
    pub(super) fn is_reached(&self) -> Result<bool, NcclError> {
        // SAFETY: the event is there.
        match unsafe { event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(failed("cuEventQuery")(error)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody else has it; CUDA keeps it until whoever waits for it has gone on.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// Makes an error of a call that failed.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> NcclError {
    move |error| NcclError::Driver {
        call,
        reason: match (error.error_name(), error.error_string()) {
            (Ok(name), Ok(text)) => {
                format!("{}: {}", name.to_string_lossy(), text.to_string_lossy())
            }
            _ => format!("CUDA error {}", error.0 as u32),
        },
    }
}
