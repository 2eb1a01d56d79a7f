//! The NCCL backend.

mod deadline;
mod device;
mod error;
#[cfg(test)]
mod fake;
mod frame;
mod library;
mod order;
#[cfg(test)]
mod tests;
mod wire;

pub use error::NcclError;
pub use library::{LIBRARY_VARIABLE, NcclLibrary, UniqueId, Version};
