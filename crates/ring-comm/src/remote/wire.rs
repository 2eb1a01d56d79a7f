//! What a network must do for ranks that are processes.

use crate::{
    buffer::HostBuffer,
    transport::{Expected, Rank},
};

/// One rank's access to the network. Lives on one thread, which makes all its calls; none of them blocks, but [`close`](Self::close).
///
/// Frames between two ranks arrive whole, once and in the order sent. Data is matched by peer and sequence number, which
/// is never used twice.
pub(crate) trait Wire {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks on the network.
    fn world_size(&self) -> usize;

    /// Sends a few bytes, which wait at the peer until it polls.
    fn send_frame(&mut self, peer: Rank, frame: Vec<u8>);

    /// Sends the contents of `buffer`; ends with [`Event::Sent`].
    fn send_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer);

    /// Receives into `buffer`, exactly as long as what was sent; ends with [`Event::Received`].
    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer);

    /// Nobody will receive this data, which the peer has sent. A wire on which data stays with the peer until it is received must
    /// receive it all the same; there is no event of that. On other wires, as by default, nothing is to be done.
    fn discard_data(&mut self, peer: Rank, sequence: u64, expected: Expected) {
        let _ = (peer, sequence, expected);
    }

    /// What has happened since the last call.
    fn poll(&mut self, events: &mut Vec<Event>);

    /// Whether data is on its way, to or from this rank.
    fn is_busy(&self) -> bool;

    /// Nobody waits any more for the data that is on its way; its memory is freed when the network is done with it.
    fn abandon(&mut self);

    /// Whether all that was sent has left, so that this rank can go without the others noticing.
    fn is_flushed(&self) -> bool;

    /// The last call: leaves the network, in an orderly way if all ranks do.
    fn close(&mut self, end: End);
}

/// How a rank leaves the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All ranks have said that they leave.
    Together,
    /// Some rank is gone, or has not said that it leaves.
    Alone,
}

/// What a wire reports.
#[derive(Debug)]
pub(crate) enum Event {
    /// A frame has arrived.
    Frame { peer: Rank, bytes: Vec<u8> },
    /// The data has left, and this is its memory.
    Sent {
        peer: Rank,
        sequence: u64,
        buffer: HostBuffer,
    },
    /// The data has arrived.
    Received {
        peer: Rank,
        sequence: u64,
        buffer: HostBuffer,
    },
    /// The peer cannot be reached any more.
    Lost { peer: Rank, reason: String },
}
