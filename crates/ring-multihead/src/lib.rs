//! Multi-head attention by LongNet's dilated pattern, its factory, and a language model made of it.
//!
//! Everything runs on one rank or on many: pass a [`Ring`](ring_burn::Ring), and the rank's own positions.
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use ring_burn::Ring;
//! use ring_multihead::LongNetConfig;
//!
//! let device = Device::flex();
//! let model = LongNetConfig::new(vec![64, 256], vec![1, 4])
//!     .with_num_layers(2)
//!     .try_init(&device)?;
//! let tokens = Tensor::<2, Int>::zeros([1, 256], &device);
//! assert_eq!(model.forward(tokens, &Ring::single(256)?).dims(), [1, 256, 256]);
//! # Ok::<(), ring_burn::RingError>(())
//! ```

mod block;
mod dropout;
mod factory;
mod generation;
mod language_model;
mod multihead;
mod rotary;
#[cfg(feature = "train")]
mod training;
#[cfg(feature = "weights")]
pub mod weights;

pub use block::{LongNetBlock, LongNetBlockConfig};
pub use dropout::PositionDropout;
pub use factory::{AttentionKind, create_multihead_dilated_attention};
pub use generation::LongNetCache;
pub use language_model::{LongNet, LongNetConfig, next_token_loss};
pub use multihead::{MultiheadDilatedAttention, MultiheadDilatedAttentionConfig};
pub use rotary::Rotary;
#[cfg(feature = "train")]
pub use training::{SequenceLoss, TokenWindows};
#[cfg(feature = "weights")]
pub use weights::{Weights, WeightsError};

/// The examples of the project's README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
