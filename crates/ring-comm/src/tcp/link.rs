//! The connection to one peer.

use std::{
    io::{ErrorKind, Read},
    net::{Shutdown, TcpStream},
};

use super::{
    incoming::{Arrival, Incoming, ReadError, Rest},
    outgoing::{Departure, Outgoing},
    record::{MAX_FRAME_BYTES, MAX_PIECE_BYTES},
};
use crate::{buffer::HostBuffer, remote::Event, transport::Rank};

/// Bytes that are read or written at one look, about: other peers must not wait for more.
const BUDGET: usize = 4 * MAX_PIECE_BYTES;

/// A connection that neither reading nor writing waits for.
pub(super) struct Link {
    peer: Rank,
    stream: TcpStream,
    incoming: Incoming,
    outgoing: Outgoing,
    /// Why nothing can be written any more. What the peer has said before may still be read.
    broken: Option<String>,
    arrivals: Vec<Arrival>,
    departures: Vec<Departure>,
}

impl Link {
    /// On a stream that does not block.
    pub(super) fn new(peer: Rank, stream: TcpStream) -> Self {
        Self {
            peer,
            stream,
            incoming: Incoming::new(),
            outgoing: Outgoing::new(MAX_PIECE_BYTES),
            broken: None,
            arrivals: Vec::new(),
            departures: Vec::new(),
        }
    }

    pub(super) fn send_frame(&mut self, bytes: Vec<u8>) {
        if bytes.len() > MAX_FRAME_BYTES {
            let reason = format!(
                "a frame to it has {} bytes, where at most {MAX_FRAME_BYTES} are allowed",
                bytes.len()
            );
            return self.give_up(reason);
        }
        self.outgoing.frame(bytes);
        self.write();
    }

    pub(super) fn send_data(&mut self, sequence: u64, buffer: HostBuffer) {
        self.outgoing.data(sequence, buffer);
    }

    pub(super) fn receive_data(&mut self, sequence: u64, buffer: HostBuffer) {
        self.incoming.expect(sequence, buffer);
        self.outgoing.ask(sequence);
        self.write();
    }

    /// Reads and writes what is possible now; the reason if the peer is lost.
    pub(super) fn poll(&mut self, events: &mut Vec<Event<HostBuffer>>) -> Result<(), String> {
        let read = self
            .incoming
            .read(&mut &self.stream, BUDGET, &mut self.arrivals);
        for arrival in self.arrivals.drain(..) {
            let peer = self.peer;
            events.push(match arrival {
                Arrival::Asked { sequence } => {
                    self.outgoing.asked_for(sequence);
                    continue;
                }
                Arrival::Frame(bytes) => Event::Frame { peer, bytes },
                Arrival::Data { sequence, buffer } => Event::Received {
                    peer,
                    sequence,
                    buffer,
                },
            });
        }
        self.write();
        let peer = self.peer;
        let departed = self.departures.drain(..);
        events.extend(departed.map(|Departure { sequence, buffer }| Event::Sent {
            peer,
            sequence,
            buffer,
        }));
        match (read, &self.broken) {
            (Ok(Rest::Nothing), Some(reason)) => Err(reason.clone()),
            (Ok(_), _) => Ok(()),
            (Err(error), _) => Err(error.to_string()),
        }
    }

    fn write(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let written = self
            .outgoing
            .write(&mut &self.stream, BUDGET, &mut self.departures);
        if let Err(error) = written {
            self.give_up(ReadError::from(error).to_string());
        }
    }

    fn give_up(&mut self, reason: String) {
        self.broken.get_or_insert(reason);
        self.outgoing = Outgoing::new(MAX_PIECE_BYTES);
    }

    #[cfg(test)]
    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Whether data is here that is to leave, or memory for data that is to come.
    pub(super) fn is_busy(&self) -> bool {
        self.outgoing.has_data() || self.incoming.is_expecting()
    }

    pub(super) fn abandon(&mut self) {
        self.outgoing.abandon();
        self.incoming.abandon();
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.outgoing.is_flushed()
    }

    /// Says that nothing will be sent any more.
    pub(super) fn finish(&self) {
        // Fails only if the connection has ended already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Reads some of what still comes and drops it; whether there may be more.
    pub(super) fn drain(&self) -> bool {
        let mut bytes = [0; 64 << 10];
        match (&self.stream).read(&mut bytes) {
            Ok(len) => len > 0,
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}
