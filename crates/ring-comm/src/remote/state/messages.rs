//! Messages: offered, taken, and their data on its way.

use std::{mem, time::Instant};

use super::{Attempt, Offer, Output, Peer, Presence, Progress, Receive, Send, State, Ticket};
use crate::{
    buffer::Buffer,
    error::CommErrorKind,
    recorder,
    remote::frame::Frame,
    transport::{Expected, MAX_OUTSTANDING_SENDS, Rank, Tag},
};

impl<B: Buffer> State<B> {
    /// Sends the buffer, which is taken out of the option, if there is room.
    pub(in crate::remote) fn send(
        &mut self,
        peer: Rank,
        tag: Tag,
        buffer: &mut Option<B>,
    ) -> Attempt<Ticket> {
        let has_room = self.peers[peer].can_take_another();
        let Some(buffer) = buffer.take_if(|_| has_room) else {
            return Attempt::Blocked(peer);
        };
        self.advance(self.current, recorder::Progress::Posted);
        self.traffic.messages_sent += 1;
        self.traffic.bytes_sent += buffer.byte_len() as u64;
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.peers[peer].sends.push(Send {
            sequence,
            record: self.current,
            taken: None,
            buffer: None,
        });
        let offer = Frame::Offer {
            tag,
            dtype: buffer.dtype(),
            len: buffer.len(),
            sequence,
        };
        self.tell(peer, offer);
        self.outputs.push(Output::SendData {
            peer,
            sequence,
            buffer,
        });
        Attempt::Done(sequence)
    }

    /// The memory of a send that was taken, and when it was.
    pub(in crate::remote) fn finish(
        &mut self,
        peer: Rank,
        ticket: Ticket,
    ) -> Attempt<(Option<B>, Instant)> {
        let sends = &mut self.peers[peer].sends;
        let Some(index) = sends.iter().position(|send| send.sequence == ticket) else {
            return Attempt::Blocked(peer);
        };
        match (sends[index].taken, sends[index].buffer.is_some()) {
            (None, _) => Attempt::Blocked(peer),
            (Some(_), false) => Attempt::Underway(peer),
            (Some(taken), true) => {
                let send = sends.swap_remove(index);
                self.advance(send.record, recorder::Progress::Ended);
                Attempt::Done((send.buffer, taken))
            }
        }
    }

    pub(in crate::remote) fn post(
        &mut self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<B>,
    ) -> Ticket {
        self.advance(self.current, recorder::Progress::Posted);
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let offers = &mut self.peers[peer].offers;
        let oldest = offers.iter().position(|offer| offer.tag == tag);
        let mut receive = Receive {
            ticket,
            record: self.current,
            tag,
            expected,
            progress: Progress::Open { memory },
        };
        if let Some(offer) = oldest.and_then(|index| offers.remove(index)) {
            let outputs = receive.take(peer, offer);
            self.outputs.extend(outputs);
        }
        self.peers[peer].receives.push_back(receive);
        ticket
    }

    /// The message of a posted receive, which is over then, and when it arrived.
    pub(in crate::remote) fn collect(
        &mut self,
        peer: Rank,
        ticket: Ticket,
    ) -> Attempt<(B, Instant)> {
        let receives = &mut self.peers[peer].receives;
        let Some(index) = receives.iter().position(|receive| receive.ticket == ticket) else {
            return Attempt::Blocked(peer);
        };
        match &receives[index].progress {
            Progress::Open { .. } => return Attempt::Blocked(peer),
            Progress::Arriving { .. } => return Attempt::Underway(peer),
            &Progress::Refused { dtype, len, .. } => {
                let expected = receives[index].expected;
                return Attempt::Failed(CommErrorKind::SizeMismatch {
                    expected_len: expected.len,
                    expected_dtype: expected.dtype,
                    got_len: len,
                    got_dtype: dtype,
                });
            }
            Progress::Arrived { .. } => {}
        }
        let Some(receive) = receives.remove(index) else {
            return Attempt::Blocked(peer);
        };
        let Progress::Arrived { buffer, since } = receive.progress else {
            return Attempt::Blocked(peer);
        };
        self.advance(receive.record, recorder::Progress::Ended);
        self.traffic.messages_received += 1;
        self.traffic.bytes_received += buffer.byte_len() as u64;
        Attempt::Done((buffer, since))
    }

    pub(in crate::remote) fn sent(&mut self, peer: Rank, sequence: u64, buffer: B) {
        if let Some(send) = self.peers[peer].send_mut(sequence) {
            send.buffer = Some(buffer);
        }
    }

    pub(in crate::remote) fn received(
        &mut self,
        peer: Rank,
        sequence: u64,
        buffer: B,
        since: Instant,
    ) {
        let is_arriving = |receive: &&mut Receive<B>| matches!(receive.progress, Progress::Arriving { sequence: arriving } if arriving == sequence);
        let mut receives = self.peers[peer].receives.iter_mut();
        if let Some(receive) = receives.find(is_arriving) {
            receive.progress = Progress::Arrived { buffer, since };
            let record = receive.record;
            self.advance(record, recorder::Progress::Matched);
        }
    }

    /// What peers have sent and nobody here will receive: peer, number and kind of the data.
    pub(in crate::remote) fn refused_data(
        &self,
    ) -> impl Iterator<Item = (Rank, u64, Expected)> + '_ {
        let of_peer = |(rank, peer): (Rank, &Peer<B>)| {
            let offers = peer.offers.iter().map(|offer| {
                let Offer { dtype, len, .. } = *offer;
                (rank, offer.sequence, Expected { dtype, len })
            });
            let refused = peer.receives.iter().filter_map(|receive| {
                let Progress::Refused {
                    dtype,
                    len,
                    sequence,
                } = receive.progress
                else {
                    return None;
                };
                Some((rank, sequence, Expected { dtype, len }))
            });
            offers.chain(refused).collect::<Vec<_>>()
        };
        self.peers.iter().enumerate().flat_map(of_peer)
    }

    pub(super) fn offered(&mut self, peer: Rank, offer: Offer) {
        let receives = &mut self.peers[peer].receives;
        match receives
            .iter_mut()
            .find(|receive| receive.is_open_for(offer.tag))
        {
            Some(receive) => {
                let outputs = receive.take(peer, offer);
                self.outputs.extend(outputs);
            }
            None => self.peers[peer].offers.push_back(offer),
        }
    }
}

impl<B> Peer<B> {
    /// Not even an open receive lifts the limit: the sender cannot know of it.
    pub(super) fn can_take_another(&self) -> bool {
        let untaken = self.sends.iter().filter(|send| send.taken.is_none());
        self.presence == Presence::Present && untaken.count() < MAX_OUTSTANDING_SENDS
    }

    pub(super) fn send_mut(&mut self, sequence: u64) -> Option<&mut Send<B>> {
        self.sends.iter_mut().find(|send| send.sequence == sequence)
    }
}

impl<B> Receive<B> {
    pub(super) fn is_open_for(&self, tag: Tag) -> bool {
        self.tag == tag && matches!(self.progress, Progress::Open { .. })
    }

    /// Takes the message if it is what is expected: gives the wire the memory that was brought for it, and tells the sender.
    pub(super) fn take(&mut self, peer: Rank, offer: Offer) -> Vec<Output<B>> {
        let Offer {
            dtype,
            len,
            sequence,
            ..
        } = offer;
        if (Expected { dtype, len }) != self.expected {
            self.progress = Progress::Refused {
                dtype,
                len,
                sequence,
            };
            return Vec::new();
        }
        let taken = Progress::Arriving { sequence };
        let memory = match mem::replace(&mut self.progress, taken) {
            Progress::Open { memory } => memory,
            _ => None,
        };
        vec![
            Output::ReceiveData {
                peer,
                sequence,
                expected: self.expected,
                memory,
            },
            Output::Frame {
                peer,
                frame: Frame::Taken { sequence },
            },
        ]
    }
}
