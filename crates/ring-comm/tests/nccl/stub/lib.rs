//! A library that passes for CUDA's driver and for NCCL, so that all that calls them can run without a GPU: what `.ci/nccl` builds.
//!
//! Device memory is host memory, a stream is a thread that does one thing after the other, and a communicator is a set of
//! sockets between processes. It ends the process with a message where the true libraries would do something undefined: a
//! call without a current context, memory freed twice, a call on a communicator that is busy. Functions have the names and types of the
//! true ones, and are as unsafe.

#![allow(non_snake_case)]

mod cuda;
mod nccl;

/// What a call returns when all is well, in both libraries.
const SUCCESS: i32 = 0;

/// The caller has broken a rule.
fn refuse(what: &str) -> ! {
    eprintln!("stub: {what}");
    std::process::abort();
}
