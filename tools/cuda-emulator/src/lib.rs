//! A CubeCL device that runs the CUDA C++ of every kernel on the CPU. For tests: it says nothing about speed.
//!
//! CubeCL's CUDA compiler translates a kernel to CUDA C++, as it would for a GPU of compute capability 9.0. The computer's own
//! C++ compiler (`c++`, or what the variable `CXX` names) compiles that text, against headers of this crate that stand in for
//! CUDA's (`cuda/`), and the device runs the grid, block by block. So kernels are tested in the form in which they reach a GPU,
//! with bf16 and matrix units, where there is none.
//!
//! # What is emulated
//! - Threads of a block are fibers, in warps of 32; blocks run on several threads of the operating system.
//!   `__syncthreads`, `__syncwarp`, shuffles and votes, `mma.sync` m16n8k16 and `wmma` of f16 and bf16 with f32 sums, `ldmatrix`,
//!   `stmatrix`, `cp.async` and barrier objects of a block. A product of matrices adds its terms one after the other in f32.
//! - Numbers as the C++ compiler computes them: no multiply-add is fused that the source does not fuse, the fast functions
//!   (`__expf`, `ex2.approx`) are the accurate ones, subnormal numbers are kept.
//!
//! # What is not
//! Anything else: tensor maps, clusters, wgmma, atomics, 8-bit floats, warp operations of which not all lanes of the warp take part.
//! It is not advertised, and a kernel with it does not compile, or ends with an error; nothing is silently another number.
//!
//! # What becomes an error
//! Threads of a block that do not all reach a barrier or that wait for each other for ever, lanes of a warp at different
//! operations, accesses beyond the end of an allocation (which is a multiple of 32 bytes) or of shared memory, misaligned accesses,
//! more threads or shared memory than an H100 has. As with every CubeCL device, the error belongs to the buffers that the
//! launch should have written: whoever reads, syncs or checks them gets it. Fresh memory, global and shared, is full of NaN.
//!
//! # Variables
//! - `CUDA_EMULATOR_ORDER`: in what order the threads of a block take turns: `ascending` (the default), `descending`, or
//!   `random:SEED`. Results that differ tell of a missing barrier.
//! - `CUDA_EMULATOR_SOURCES`: a folder, into which the CUDA source of every kernel is written.
//! - `CUDA_EMULATOR_CACHE`: a folder for compiled kernels; by default one in the folder for temporary files.
//! - `CXX`: the C++ compiler, GCC 12 or newer.

#![cfg_attr(not(feature = "device"), allow(unused))]

#[cfg(feature = "device")]
mod compile;
#[cfg(feature = "device")]
mod error;
#[cfg(feature = "device")]
mod kernel;
#[cfg(feature = "device")]
mod memory;
#[cfg(feature = "device")]
mod order;
#[cfg(feature = "device")]
mod properties;
#[cfg(feature = "device")]
mod runtime;
#[cfg(feature = "device")]
mod server;
#[cfg(feature = "device")]
mod storage;
#[cfg(feature = "device")]
mod translate;

#[cfg(feature = "device")]
pub use order::Order;

/// A client of the device. There is one such device in a process: all clients are of the same.
#[cfg(feature = "device")]
pub fn client() -> cubecl::client::Client {
    device(order::DEVICE_OF_ENVIRONMENT)
}

/// A client of the device on which threads take turns in this order, whatever the variable says.
#[cfg(feature = "device")]
pub fn client_with_order(order: Order) -> cubecl::client::Client {
    device(order.device())
}

#[cfg(feature = "device")]
fn device(id: cubecl_common::device::DeviceId) -> cubecl::client::Client {
    cubecl::client::Client::load::<server::EmulatorServer>(id)
}
