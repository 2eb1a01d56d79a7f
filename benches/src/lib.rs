//! What the benchmarks and measurements of this workspace have in common.
//!
//! - [`heap`]: a counting allocator, and what one thread held at most;
//! - [`metered`]: a transport that charges every message to the rank that holds it;
//! - [`workload`]: random shards of one attention, and the drivers over loopback ranks;
//! - [`memory`]: bytes per rank, measured and estimated.

pub mod heap;
pub mod memory;
pub mod metered;
pub mod workload;
