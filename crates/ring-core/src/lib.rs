//! Ring dilated attention, free of any framework: what is computed, who owns and sends what, and the loop that does it.
//!
//! Data flows one way: [`Pattern`] and [`Sharding`] make an [`AttentionSpec`], which gives every rank its [`Plan`]; [`forward`]
//! and [`backward`] walk the plan over any kernels and any transport. A [`KeyValueCache`] goes on from there: [`decode`] attends from a
//! few new tokens to all that came before.
//!
//! # Words
//!
//! - *position*: index in the whole sequence. *Row*: index in a rank's own tensor, or in a slot.
//! - *segment*, *dilation rate*, *offset*, *branch*: LongNet's (arXiv 2307.02486); see [`Pattern`].
//! - *rank*, *world size*: a member of the group, and how many there are. *Shard*: the positions a rank owns.
//! - *hop*: one exchange with one peer on each side. *Slot*: the buffer that holds the rows a hop brought.
//! - *step*: what a rank computes between two exchanges. *Block*: query rows x key rows of a step.

// The property tests share their cases, which know this crate by its name.
#[cfg(test)]
extern crate self as ring_core;

mod cache;
mod cost;
mod decode;
mod documents;
mod driver;
mod error;
mod estimate;
mod exchange;
mod hilbert;
mod memory;
pub mod oracle;
mod pairs;
mod pattern;
mod place;
mod plan;
mod planner;
mod progression;
mod recovery;
mod regroup;
mod schedule;
mod selection;
mod sharding;
mod spec;
mod strategy;
mod walk;

pub use cache::{CacheError, KeyValueCache};
pub use cost::{Auto, Choice, Cost, MachineModel};
pub use decode::{Decoded, NewTokens, decode};
pub use documents::Documents;
pub use driver::{DropoutSeed, Gradients, Inputs, Output, Saved, backward, forward};
pub use error::{Error, Refusal};
pub use estimate::CommunicationEstimate;
pub use hilbert::{GridError, HilbertOrder};
pub use memory::MemoryEstimate;
pub use pattern::{Branch, HeadOffsets, MAX_LENGTH, Mixing, Pattern, PatternError};
pub use plan::{Exchange, HeadWork, Message, Plan, PlannedBlock, Source, Step};
pub use recovery::{Recovery, RecoveryPolicy, RecoveryStatistics};
pub use regroup::{Member, Regroup};
pub use ring_kernels::Mask;
pub use sharding::{Sharding, Span};
pub use spec::{AttentionSpec, Shape, SpecError};
pub use strategy::Strategy;
