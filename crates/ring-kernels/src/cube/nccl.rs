//! Buffers of NVIDIA GPUs between ranks, by NCCL.

use std::ffi::c_void;

use cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use ring_comm::Expected;
use ring_comm::buffer::Buffer;
use ring_comm::nccl::{DeviceMemory, NcclError};

use super::buffer::{CubeBuffer, CubeDevice};

// SAFETY: CubeCL keeps the memory of a handle where it is for as long as there is a handle, on the GPU of its client, whose primary
// context it uses. What has been launched on it is over when `stream` returns, so that the default stream, on which nothing is,
// says when it may be used. CubeCL uses memory that was given back after what was launched before, which is over by then too.
unsafe impl DeviceMemory for CubeBuffer {
    type Allocator = CubeDevice;

    /// Null if there is no room for any element, or the memory is not that of an NVIDIA GPU, or lost.
    fn device_pointer(&self) -> u64 {
        if self.capacity() == 0 {
            return 0;
        }
        let client = self.device().client();
        client
            .get_resource::<<CudaRuntime as Runtime>::Server>(self.handle().clone())
            .map_or(0, |managed| managed.resource().ptr)
    }

    /// The default stream, once the GPU has done what this thread has told it: CubeCL does not say what its streams are. What the
    /// caller launches afterwards is not waited for.
    fn stream(&self) -> *mut c_void {
        // If the GPU has failed the next copy tells.
        let _ = self.device().synchronise();
        std::ptr::null_mut()
    }

    fn with_room(
        allocator: &CubeDevice,
        expected: Expected,
        memory: Option<Self>,
    ) -> Result<Self, NcclError> {
        let Expected { dtype, len } = expected;
        Self::room(allocator, dtype, len, memory).map_err(|error| NcclError::Call {
            call: "allocation of a message's memory",
            reason: error.to_string(),
        })
    }
}
