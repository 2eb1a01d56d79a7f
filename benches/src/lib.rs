//! What the benchmarks and measurements of this workspace have in common.
//!
//! - [`work`]: what is to be computed, as this workspace and PyTorch both understand it;
//! - [`workload`]: random shards of one attention, and the drivers over loopback ranks;
//! - [`module`]: the Burn module around them;
//! - [`compare`]: side-by-side runs against PyTorch, and of this workspace against itself;
//! - [`overlap`]: what a shift costs that goes on under a computation;
//! - [`processes`]: ranks that are processes, started from here, and the report on them;
//! - [`timeline`]: a trace as a picture;
//! - [`machine`]: the machine that measures;
//! - [`heap`]: a counting allocator, and what one thread held at most;
//! - [`metered`]: a transport that charges every message to the rank that holds it;
//! - [`hilbert`]: grids by the order of their cells: distances, neighbours;
//! - [`masks`]: windows, documents and scores: time, bytes, balance;
//! - [`memory`]: bytes per rank, measured and estimated.

pub mod compare;
pub mod heap;
pub mod hilbert;
pub mod machine;
pub mod masks;
pub mod memory;
pub mod metered;
pub mod module;
pub mod overlap;
pub mod processes;
pub mod timeline;
pub mod work;
pub mod workload;
