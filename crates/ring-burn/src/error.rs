//! What can go wrong between a Burn model and the group of ranks.

use ring_core::{GridError, PatternError, SpecError};
use thiserror::Error;

/// An attention, or an exchange around it, that could not be done.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum RingError {
    /// A tensor has a shape that does not fit the others, or the shard this rank owns.
    #[error("{what} has shape {got:?}, expected {expected}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        expected: String,
    },
    /// A tensor is on a backend that has no kernels here.
    #[error(
        "ring attention runs on Burn's Flex backend (`Device::flex()`) and, built with the feature of one of them, on its GPU backends \
         (`cuda`, `rocm`, `metal`, `vulkan`, `wgpu`), with or without autodiff; {what} is on {device}"
    )]
    Backend {
        /// Which tensor.
        what: &'static str,
        /// Where it is.
        device: String,
    },
    /// Tensors on different devices.
    #[error("{what} is on {got}, query on {expected}; query, key and value must be on one device")]
    Device {
        /// Which tensor.
        what: &'static str,
        /// Where it is.
        got: String,
        /// Where the query is.
        expected: String,
    },
    /// Tensors of different element types, or of one that has no kernels.
    #[error("{what} is {got}; query, key and value must be of one type: f32, f16 or bf16")]
    DType {
        /// Which tensor.
        what: &'static str,
        /// Its type.
        got: String,
    },
    /// Tensors of which some are on an autodiff device and some are not.
    #[error("query, key and value must all be on an autodiff device, or all on a plain one")]
    MixedAutodiff,
    /// A window with bounds that make no sense.
    #[error(
        "the window is {left},{right}; its bounds are numbers of positions, or -1 for no bound"
    )]
    Window {
        /// How far before the query its first key stands.
        left: i64,
        /// How far after the query its last key stands.
        right: i64,
    },
    /// The configuration is at fault.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A grid without an order.
    #[error(transparent)]
    Grid(#[from] GridError),
    /// The computation is not possible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A kernel or the exchange failed.
    #[error(transparent)]
    Run(#[from] ring_core::Error),
    /// A collective operation failed.
    #[error(transparent)]
    Comm(#[from] ring_comm::CommError),
    /// The kernels could not be set up.
    #[error(transparent)]
    Kernel(#[from] ring_kernels::KernelError),
    /// Any other bad value.
    #[error("{0}")]
    Value(String),
}
