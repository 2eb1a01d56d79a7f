//! What a network must do for ranks that are processes.

use crate::{
    buffer::{Buffer, HostBuffer},
    transport::{Expected, Rank},
};

/// One rank's access to the network. Lives on one thread, which makes all its calls; none of them blocks, but [`close`](Self::close).
///
/// Frames between two ranks arrive whole, once and in the order sent. Data is matched by peer and sequence number, which
/// is never used twice.
pub(crate) trait Wire<B: Buffer> {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks on the network.
    fn world_size(&self) -> usize;

    /// A group begins, the one of this number, before anything is sent in it.
    fn begin(&mut self, epoch: u64) {
        let _ = epoch;
    }

    /// The present group has failed: nobody waits any more for data, neither here nor, before long, on any other rank.
    fn fail(&mut self) {}

    /// Sends a few bytes, which wait at the peer until it polls.
    fn send_frame(&mut self, peer: Rank, frame: Vec<u8>);

    /// Memory for a message of what is expected, as long as that, with arbitrary contents: `memory`, which the receive brought, if
    /// it will do, otherwise new memory.
    ///
    /// # Errors
    /// Why there is none.
    fn room_for(&mut self, expected: Expected, memory: Option<B>) -> Result<B, String>;

    /// Sends the contents of `buffer`; ends with [`Event::Sent`].
    fn send_data(&mut self, peer: Rank, sequence: u64, buffer: B);

    /// Receives into `buffer`, exactly as long as what was sent; ends with [`Event::Received`].
    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: B);

    /// Nobody will receive this data, which the peer has sent. A wire on which data stays with the peer until it is received must
    /// receive it all the same; there is no event of that. On other wires, as by default, nothing is to be done.
    fn discard_data(&mut self, peer: Rank, sequence: u64, expected: Expected) {
        let _ = (peer, sequence, expected);
    }

    /// What has happened since the last call.
    fn poll(&mut self, events: &mut Vec<Event<B>>);

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
pub(crate) enum Event<B> {
    /// A frame has arrived.
    Frame { peer: Rank, bytes: Vec<u8> },
    /// The data has left, and this is its memory.
    Sent {
        peer: Rank,
        sequence: u64,
        buffer: B,
    },
    /// The data has arrived.
    Received {
        peer: Rank,
        sequence: u64,
        buffer: B,
    },
    /// The peer cannot be reached any more.
    Lost { peer: Rank, reason: String },
    /// This rank cannot go on; no peer is to blame.
    Failed { reason: String },
}

/// The host memory that was brought, if it is of the right type and large enough, or new memory; with the length of the message.
///
/// # Errors
/// If new memory is refused.
pub(crate) fn host_room_for(
    expected: Expected,
    memory: Option<HostBuffer>,
) -> Result<HostBuffer, String> {
    let will_do =
        |memory: &HostBuffer| memory.dtype() == expected.dtype && memory.capacity() >= expected.len;
    let Some(mut memory) = memory.filter(will_do) else {
        return HostBuffer::try_zeros(expected.dtype, expected.len).ok_or_else(|| {
            let bytes = expected.len.saturating_mul(expected.dtype.size());
            format!("could not allocate {bytes} bytes for a message")
        });
    };
    match &mut memory {
        HostBuffer::F32(values) => values.resize(expected.len, Default::default()),
        HostBuffer::F16(values) => values.resize(expected.len, Default::default()),
        HostBuffer::BF16(values) => values.resize(expected.len, Default::default()),
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::DType;

    #[test]
    fn refused_memory_is_an_error() {
        let expected = |len| Expected {
            dtype: DType::F32,
            len,
        };
        let brought = Some(HostBuffer::zeros(DType::F32, 10));
        assert_eq!(
            host_room_for(expected(8), brought),
            Ok(HostBuffer::zeros(DType::F32, 8))
        );
        let refused = host_room_for(expected(usize::MAX / 8), None).unwrap_err();
        assert!(refused.contains("9223372036854775804 bytes"), "{refused}");
    }
}
