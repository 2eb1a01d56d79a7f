//! TCP connections to all peers as a [`Wire`].
//!
//! Data leaves when the peer has asked for it, that is when it has memory for it. That costs a round trip per message, but data
//! never waits in a connection: frames pass at any time, nothing has to be kept that nobody has made room for, and what is
//! abandoned before it is asked for needs nothing of the peer.

use std::{
    convert::Infallible,
    mem, thread,
    time::{Duration, Instant},
};

use super::{link::Link, mesh::Mesh};
use crate::{
    buffer::HostBuffer,
    remote::{End, Event, Wire, host_room_for},
    transport::{Expected, Rank},
};

/// How long a rank that leaves alone waits for the others to hear what it has said last.
const LINGER: Duration = Duration::from_millis(500);
/// Between two looks meanwhile.
const PAUSE: Duration = Duration::from_micros(200);

/// One rank's connections to all others.
pub(crate) struct TcpWire {
    rank: Rank,
    /// By rank; none to this rank itself, and to those that are lost.
    links: Vec<Option<Link>>,
}

impl TcpWire {
    pub(super) fn new(mesh: Mesh) -> Result<Self, Infallible> {
        let link = |(peer, stream): (Rank, Option<_>)| Some(Link::new(peer, stream?));
        Ok(Self {
            rank: mesh.rank,
            links: mesh.streams.into_iter().enumerate().map(link).collect(),
        })
    }

    /// Of a single rank.
    #[cfg(feature = "nccl")]
    pub(crate) fn alone() -> Self {
        Self {
            rank: 0,
            links: vec![None],
        }
    }

    /// The connection to a peer that is not lost.
    fn link(&mut self, peer: Rank) -> Option<&mut Link> {
        self.links.get_mut(peer)?.as_mut()
    }

    fn open(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().flatten()
    }
}

impl Wire<HostBuffer> for TcpWire {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn send_frame(&mut self, peer: Rank, frame: Vec<u8>) {
        if let Some(link) = self.link(peer) {
            link.send_frame(frame);
        }
    }

    fn room_for(
        &mut self,
        expected: Expected,
        memory: Option<HostBuffer>,
    ) -> Result<HostBuffer, String> {
        host_room_for(expected, memory)
    }

    fn send_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        if let Some(link) = self.link(peer) {
            link.send_data(sequence, buffer);
        }
    }

    fn receive_data(&mut self, peer: Rank, sequence: u64, buffer: HostBuffer) {
        if let Some(link) = self.link(peer) {
            link.receive_data(sequence, buffer);
        }
    }

    fn poll(&mut self, events: &mut Vec<Event<HostBuffer>>) {
        for (peer, place) in self.links.iter_mut().enumerate() {
            let polled = place.as_mut().map(|link| link.poll(events));
            if let Some(Err(reason)) = polled {
                *place = None;
                events.push(Event::Lost { peer, reason });
            }
        }
    }

    fn is_busy(&self) -> bool {
        self.open().any(Link::is_busy)
    }

    fn abandon(&mut self) {
        self.links.iter_mut().flatten().for_each(Link::abandon);
    }

    fn is_flushed(&self) -> bool {
        self.open().all(Link::is_flushed)
    }

    /// A connection that is closed before everything that came over it was read takes with it what is on its way to the peer. So
    /// a rank that leaves alone, to which the others may still be sending, reads on for a moment, until they have heard of it.
    fn close(&mut self, end: End) {
        let links = mem::take(&mut self.links);
        let mut open: Vec<Link> = links.into_iter().flatten().collect();
        open.iter().for_each(Link::finish);
        let expiry = Instant::now() + LINGER;
        while end == End::Alone && !open.is_empty() && Instant::now() < expiry {
            open.retain(Link::drain);
            thread::sleep(PAUSE);
        }
    }
}
