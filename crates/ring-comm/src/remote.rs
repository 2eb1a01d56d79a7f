//! Ranks that are processes: everything about them that does not depend on the network between them.
//!
//! - [`wire`]: what a network must do, as one small trait;
//! - [`frame`]: what ranks tell one another beside their data;
//! - [`state`]: the promises of a transport, as a state machine of one rank without any input or output;
//! - [`session`]: that state with the threads that call and wait;
//! - [`engine`]: the one thread of a rank that owns its wire and brings both together;
//! - [`endpoint`]: the transport that users of the crate see;
//! - [`process`]: whether the process of a peer on the same machine is still alive.
//!
//! A message is a frame that offers it and, on the heels of that, its data. The receiver gives its memory to the wire as soon as a
//! posted receive matches the offer, and tells the sender that the message is taken.
//!
//! Three things are different from loopback, as distance has it. What happens on one rank is known on another only when a
//! frame has told it. Of several failures at once, the ranks agree on one by asking the first rank that is still there
//! ([`state::State::poison`]), so an error may be later than its deadline: by a moment, in which that rank waits for further
//! complaints, or by half a second if that rank itself does not answer, and as much again for the next. And all-gathers to which every rank has contributed succeed on every rank, even if one of them
//! poisons the group at once because of what it got, since that poison brings the parts along.

mod endpoint;
mod engine;
mod frame;
mod process;
mod session;
mod state;
#[cfg(test)]
pub(crate) mod threads;
mod wire;

pub use endpoint::RemoteEndpoint;
pub(crate) use engine::{Engine, StartError};
#[cfg(test)]
pub(crate) use threads::{panics, run_on_threads};
pub(crate) use wire::{End, Event, Wire, host_room_for};
