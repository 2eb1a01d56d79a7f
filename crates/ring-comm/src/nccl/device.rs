//! What the [wire](super::wire) needs of NCCL and its streams, as one small trait.

use super::{error::NcclError, library::UniqueId};
use crate::transport::{Expected, Rank};

/// Which way a half of a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    Out,
    In,
}

/// This rank's part in a transfer.
#[derive(Debug)]
pub(super) struct Half<B> {
    pub(super) peer: Rank,
    pub(super) sequence: u64,
    pub(super) direction: Direction,
    pub(super) buffer: B,
}

/// How it stands with the communicator and its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// There is no communicator, and nothing uses any memory.
    Unconnected,
    /// The ranks are making one.
    Connecting,
    /// There is one, and nothing is issued.
    Idle,
    /// A group is on its way.
    Running,
    /// The communicator is being aborted; memory may still be in use.
    Aborting,
}

/// A device with a communicator on which one group of halves at a time is issued. No call blocks, but [`close`](Self::close).
///
/// The halves of a group do not wait for one another once all the pairs of ranks in it are connected, which the first transfer of each pair
/// does (source and destination make a pair, in this order).
pub(super) trait Device<B> {
    /// Memory for a message, as long as that: what was brought if it will do, or new memory.
    fn room_for(&mut self, expected: Expected, memory: Option<B>) -> Result<B, NcclError>;

    /// Makes what the ranks of a new communicator find one another by; on one rank.
    fn unique_id(&mut self) -> Result<UniqueId, NcclError>;

    /// Begins to make a communicator, with all ranks.
    fn connect(&mut self, id: &UniqueId, rank: Rank, world_size: usize) -> Result<(), NcclError>;

    /// Looks how it stands; after an error it must be [aborted](Self::abort).
    fn poll(&mut self) -> Result<Status, NcclError>;

    /// Issues a group, when the device is idle.
    fn issue(&mut self, group: Vec<Half<B>>) -> Result<(), NcclError>;

    /// The group that was issued, once, when it is complete.
    fn take_finished(&mut self) -> Option<Vec<Half<B>>>;

    /// Whether memory is in use by what is issued, or was.
    fn is_in_use(&self) -> bool;

    /// Gives up the communicator and what is issued on it, whose memory is freed when the device is done with it.
    fn abort(&mut self);

    /// The last call. In peace if all ranks make it and nothing has failed.
    fn close(&mut self, in_peace: bool);
}
