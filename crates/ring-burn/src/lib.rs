//! Ring dilated attention for [Burn](https://burn.dev).
//!
//! [`RingAttention`] and [`DilatedAttention`] are Burn modules with a hand-written backward. On one device they are a trainable
//! flash attention with O(N) memory; over several ranks every rank owns a slice of the sequence, and only the rows its queries
//! can see travel to it. Results and gradients are exact, whatever the number of ranks.
//!
//! # On one device
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use ring_burn::{Ring, RingAttentionConfig};
//!
//! let device = Device::flex().autodiff();
//! let draw = || Tensor::<4>::random([1, 2, 512, 32], Distribution::Default, &device).require_grad();
//! let (query, key, value) = (draw(), draw(), draw());
//! let output = RingAttentionConfig::new()
//!     .with_causal(true)
//!     .init()
//!     .forward(query.clone(), key, value, &Ring::single(512)?);
//! let gradients = output.mean().backward();
//! assert!(query.grad(&gradients).is_some());
//! # Ok::<(), ring_burn::RingError>(())
//! ```
//!
//! # Over several ranks
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use burn::tensor::{Device, Distribution, Tensor};
//! use ring_burn::{Communicator, DilatedAttentionConfig, HostBuffer, Loopback, Ring, Sharding};
//!
//! let lengths = Loopback::run::<HostBuffer, _>(4, Duration::from_secs(60), |endpoint| {
//!     let ring = Ring::new(Communicator::new(Arc::new(endpoint)), Sharding::Zigzag, 1000).unwrap();
//!     let shape = [1, 4, ring.shard_len(), 16]; // this rank's part of 1000 positions
//!     let draw = || Tensor::<4>::random(shape, Distribution::Default, &Device::flex());
//!     let attention = DilatedAttentionConfig::new(vec![128, 1024], vec![1, 4]).init();
//!     attention.forward(draw(), draw(), draw(), &ring).dims()[2]
//! });
//! assert_eq!(lengths.into_iter().map(Result::unwrap).sum::<usize>(), 1000);
//! ```
//!
//! In training, let a rank's loss be the sum over its own labels divided by the global number of labels, and sum the gradients
//! with [`sum_gradients`]; the `train` feature has a burn-train strategy that does so ([`RingStrategy`]).

mod attention;
mod cache;
mod computation;
mod error;
mod gradient;
mod hilbert;
mod op;
mod ring;
mod scores;
mod shard;
#[cfg(feature = "train")]
mod strategy;

pub use attention::{
    AttentionOutput, DilatedAttention, DilatedAttentionConfig, RingAttention, RingAttentionConfig,
};
pub use cache::KeyValueCache;
pub use error::RingError;
pub use gradient::{parameter_checksum, sum_gradients};
pub use hilbert::{from_hilbert_order, shard_cells, to_hilbert_order};
pub use ring::Ring;
pub use ring_comm::{
    CommError, Communicator, ConnectError, Loopback, Transport, TransportKind, buffer::HostBuffer,
    checksum::Fnv1a, collective, launch,
};
#[cfg(feature = "mpi")]
pub use ring_comm::{Mpi, MpiError};
pub use ring_core::{
    Auto, Choice, Cost, Documents, GridError, HeadOffsets, HilbertOrder, MachineModel, Mask,
    Mixing, Pattern, PatternError, Recovery, RecoveryPolicy, RecoveryStatistics, Shape, Sharding,
    Span, SpecError, Strategy,
};
/// The generator behind all dropout.
pub use ring_kernels::philox;
#[cfg(feature = "cube")]
pub use ring_kernels::{CubeBuffer, CubeDevice};
pub use scores::alibi_slopes;
pub use shard::{next_token_shard, positions_tensor, shard_slice, shard_tensor};
#[cfg(feature = "train")]
pub use strategy::{DataGroup, RingStrategy, SequenceItem};
