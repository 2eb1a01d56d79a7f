//! Block attention on local memory.
//!
//! A kernel computes the attention of some query rows to some key rows, forward and backward, and adds it to running state.
//! It knows nothing of ranks: which rows meet, and at which global positions they stand, is said by numbers. The seam to the
//! devices is the trait [`Kernels`], generic in the kind of memory; [`CpuKernels`] implements it for host memory,
//! and, with the feature `cube`, `CubeKernels` for that of GPUs.
//!
//! # Glossary
//!
//! - **row**: one position of one head: `head_dim` contiguous elements. [`Rows`] is an arithmetic progression of them, with
//!   their local indices and their global positions.
//! - **block**: some query rows times some key rows ([`Block`]); every pair that the mask admits counts once. Blocks may
//!   overlap, and then pairs count several times: the multiplicity `M` of the equations.
//! - **tile**: the piece of a block that is computed at once, in cache. Tiles are internal to a kernel.
//! - **slot**: a buffer of packed key rows and value rows ([`PackedRows`]) that came from another rank, or of their gradients.
//! - **state**: maximum, denominator and unnormalised output of every query row ([`ForwardState`]), f32; what online softmax
//!   carries from block to block and from hop to hop.
//!
//! # Order of calls
//!
//! Forward: [`start`](Kernels::start), [`forward`](Kernels::forward) for each hop, [`finish`](Kernels::finish).
//! Backward: [`delta`](Kernels::delta), [`backward`](Kernels::backward) for each hop, [`round`](Kernels::round).
//! For rows that travel: [`pack`](Kernels::pack) at their owner, [`add_rows`](Kernels::add_rows) when their gradients are
//! back.
//!
//! ```
//! use ring_comm::buffer::{Buffer, DType, HostBuffer};
//! use ring_kernels::{
//!     Block, CpuKernels, HeadBlocks, KernelError, Kernels, KeyValue, Mask, Problem, RowLayout, Rows, Scores, Tensor,
//! };
//!
//! # fn main() -> Result<(), KernelError> {
//! // Causal attention of one head over three positions, with head size 2.
//! let problem = Problem {
//!     batch: 1,
//!     query_heads: 1,
//!     kv_heads: 1,
//!     head_dim: 2,
//!     queries: 3,
//!     keys: 3,
//!     scale: 1.0,
//!     mask: Mask::CAUSAL,
//!     scores: Scores::default(),
//! };
//! let all = Rows { first_row: 0, row_step: 1, count: 3, first_position: 0, position_step: 1 };
//! let block = Block { queries: all, keys: all, branch: 0 };
//! let blocks = [HeadBlocks { entries: vec![0], kv_heads: vec![0], blocks: vec![block] }];
//!
//! let layout = RowLayout::contiguous(1, 3, 2);
//! let zeros = HostBuffer::zeros(DType::F32, 6);
//! let values = HostBuffer::F32(vec![3.0, 0.0, 0.0, 3.0, 3.0, 3.0]);
//! let query = Tensor { data: zeros.view(), layout: &layout };
//! let source = KeyValue::Own { key: query, value: Tensor { data: values.view(), layout: &layout } };
//!
//! let kernels = CpuKernels::new(1)?;
//! let mut state = kernels.start(&problem)?;
//! kernels.forward(&problem, query, &source, &blocks, &mut state)?;
//! let (output, log_sum_exp) = kernels.finish(&problem, state, DType::F32, 1.0)?;
//!
//! // All scores are 0, so every row is the mean of the values up to its position.
//! assert_eq!(output.as_f32().unwrap(), [3.0, 0.0, 1.5, 1.5, 2.0, 2.0]);
//! assert_eq!(log_sum_exp.as_f32().unwrap()[1], 2f32.ln());
//! # Ok(())
//! # }
//! ```

mod block;
mod check;
mod cpu;
#[cfg(feature = "cube")]
mod cube;
mod dropout;
pub mod failing;
mod kernels;

#[cfg(test)]
mod judge;
#[cfg(test)]
mod oracle;

pub use block::*;
pub use cpu::{CpuKernels, INSTRUCTION_SET_VARIABLE, InstructionSet};
#[cfg(feature = "cube")]
pub use cube::{CubeBuffer, CubeDevice, CubeKernels, CubeView};
/// CubeCL, of the version whose clients [`CubeDevice`] takes.
#[cfg(feature = "cube")]
pub use cubecl;
pub use dropout::{Dropout, philox};
pub use kernels::*;
