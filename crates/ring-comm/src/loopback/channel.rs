//! The messages on their way from one rank to another.
//!
//! A message is either *sent* and untaken, or *taken* by a posted receive, which keeps it until it is waited for. A
//! receive takes the oldest sent message of its tag when it is posted, or the first one sent later; so there is never a
//! sent message and an open receive with the same tag, and equal tags keep their order on both sides.

use std::collections::VecDeque;

use crate::transport::{MAX_OUTSTANDING_SENDS, Tag};

/// Names one request within its channel.
pub(super) type Ticket = u64;

#[derive(Debug)]
struct Sent<B> {
    ticket: Ticket,
    tag: Tag,
    buffer: B,
}

#[derive(Debug)]
struct Posted<B> {
    ticket: Ticket,
    tag: Tag,
    buffer: Option<B>,
}

#[derive(Debug)]
pub(super) struct Channel<B> {
    sent: VecDeque<Sent<B>>,
    posted: VecDeque<Posted<B>>,
    next_ticket: Ticket,
}

impl<B> Channel<B> {
    pub(super) fn new() -> Self {
        Self {
            sent: VecDeque::new(),
            posted: VecDeque::new(),
            next_ticket: 0,
        }
    }

    /// Whether another message can be sent. Not even an open receive lifts the limit: on a network the sender cannot know
    /// of it, and what works here should work there.
    pub(super) fn has_room(&self) -> bool {
        self.sent.len() < MAX_OUTSTANDING_SENDS
    }

    pub(super) fn send(&mut self, tag: Tag, buffer: B) -> Ticket {
        let ticket = self.issue_ticket();
        match self
            .posted
            .iter_mut()
            .find(|receive| receive.is_open_for(tag))
        {
            Some(receive) => receive.buffer = Some(buffer),
            None => self.sent.push_back(Sent {
                ticket,
                tag,
                buffer,
            }),
        }
        ticket
    }

    pub(super) fn is_taken(&self, send: Ticket) -> bool {
        self.sent.iter().all(|message| message.ticket != send)
    }

    pub(super) fn post(&mut self, tag: Tag) -> Ticket {
        let ticket = self.issue_ticket();
        let oldest = self.sent.iter().position(|message| message.tag == tag);
        let buffer = oldest
            .and_then(|index| self.sent.remove(index))
            .map(|message| message.buffer);
        self.posted.push_back(Posted {
            ticket,
            tag,
            buffer,
        });
        ticket
    }

    /// The message of a posted receive, which is over then; `None` while there is none.
    pub(super) fn collect(&mut self, receive: Ticket) -> Option<B> {
        let arrived = |posted: &Posted<B>| posted.ticket == receive && posted.buffer.is_some();
        let index = self.posted.iter().position(arrived)?;
        self.posted.remove(index)?.buffer
    }

    pub(super) fn untaken(&self) -> impl Iterator<Item = Tag> {
        self.sent.iter().map(|message| message.tag)
    }

    fn issue_ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        self.next_ticket
    }
}

impl<B> Posted<B> {
    fn is_open_for(&self, tag: Tag) -> bool {
        self.tag == tag && self.buffer.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::Payload;

    fn tag(step: u32) -> Tag {
        Tag {
            operation: 0,
            step,
            payload: Payload::Custom(0),
        }
    }

    #[test]
    fn a_message_that_an_open_receive_takes_needs_no_room() {
        let mut channel = Channel::new();
        let receives: Vec<_> = (0..9).map(|step| channel.post(tag(step))).collect();
        for (step, receive) in (0..9).zip(receives) {
            let send = channel.send(tag(step), step);
            assert!(channel.is_taken(send));
            assert_eq!(channel.collect(receive), Some(step));
            assert_eq!(channel.collect(receive), None, "the receive is over");
        }
        assert!(channel.has_room());
    }

    proptest! {
        /// However sends and receives interleave, the n-th receive of a tag gets the n-th message of that tag.
        #[test]
        fn equal_tags_keep_their_order(actions in prop::collection::vec((any::<bool>(), 0..3u32), 0..60)) {
            let mut channel = Channel::new();
            let mut sends = [0; 3];
            let mut receives = Vec::new();
            let mut posted = [0; 3];
            for (is_send, step) in actions {
                let index = step as usize;
                if !is_send {
                    receives.push((channel.post(tag(step)), step, posted[index]));
                    posted[index] += 1;
                } else if channel.has_room() {
                    channel.send(tag(step), (step, sends[index]));
                    sends[index] += 1;
                }
                prop_assert!(channel.untaken().count() <= MAX_OUTSTANDING_SENDS);
            }
            for (ticket, step, number) in receives.into_iter().rev() {
                let expected = (number < sends[step as usize]).then_some((step, number));
                prop_assert_eq!(channel.collect(ticket), expected);
            }
        }
    }
}
