//! The messages on their way from one rank to another.
//!
//! A message is either *sent* and untaken, or *taken* by a posted receive, which keeps it until it is waited for. A
//! receive takes the oldest sent message of its tag when it is posted, or the first one sent later; so there is never a
//! sent message and an open receive with the same tag, and equal tags keep their order on both sides.
//!
//! The memory that a receive brings goes to the sender of what it takes, so both ranks have as many buffers as before.

use std::{collections::VecDeque, mem, time::Instant};

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
    message: Message<B>,
}

/// What a posted receive has.
#[derive(Debug)]
enum Message<B> {
    /// Nothing yet but memory for it.
    Awaited { memory: Option<B> },
    /// The message, since when.
    Arrived { buffer: B, since: Instant },
}

/// A send whose message was taken and that is not yet waited for, with the receiver's memory.
#[derive(Debug)]
struct Taken<B> {
    ticket: Ticket,
    memory: Option<B>,
    since: Instant,
}

#[derive(Debug)]
pub(super) struct Channel<B> {
    sent: VecDeque<Sent<B>>,
    taken: VecDeque<Taken<B>>,
    posted: VecDeque<Posted<B>>,
    next_ticket: Ticket,
}

impl<B> Channel<B> {
    pub(super) fn new() -> Self {
        Self {
            // Which of these a message goes through depends on who is first; so that memory does not, there is room in all.
            sent: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
            taken: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
            posted: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
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
        let open = self
            .posted
            .iter_mut()
            .find_map(|receive| receive.open_for(tag));
        match open {
            Some(message) => {
                let memory = message.arrive(buffer);
                self.taken.push_back(Taken::now(ticket, memory));
            }
            None => self.sent.push_back(Sent {
                ticket,
                tag,
                buffer,
            }),
        }
        ticket
    }

    /// Ends a send whose message was taken, since when is told; yields the receiver's memory. `None` while it is not taken.
    pub(super) fn finish(&mut self, send: Ticket) -> Option<(Option<B>, Instant)> {
        let index = self.taken.iter().position(|taken| taken.ticket == send)?;
        let taken = self.taken.remove(index)?;
        Some((taken.memory, taken.since))
    }

    pub(super) fn post(&mut self, tag: Tag, memory: Option<B>) -> Ticket {
        let ticket = self.issue_ticket();
        let oldest = self.sent.iter().position(|message| message.tag == tag);
        let mut message = Message::Awaited { memory };
        if let Some(sent) = oldest.and_then(|index| self.sent.remove(index)) {
            let memory = message.arrive(sent.buffer);
            self.taken.push_back(Taken::now(sent.ticket, memory));
        }
        self.posted.push_back(Posted {
            ticket,
            tag,
            message,
        });
        ticket
    }

    /// The message of a posted receive, which is over then, and when it arrived; `None` while there is none.
    pub(super) fn collect(&mut self, receive: Ticket) -> Option<(B, Instant)> {
        let arrived = |posted: &Posted<B>| {
            posted.ticket == receive && matches!(posted.message, Message::Arrived { .. })
        };
        let index = self.posted.iter().position(arrived)?;
        match self.posted.remove(index)?.message {
            Message::Arrived { buffer, since } => Some((buffer, since)),
            Message::Awaited { .. } => None,
        }
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
    fn open_for(&mut self, tag: Tag) -> Option<&mut Message<B>> {
        let open = self.tag == tag && matches!(self.message, Message::Awaited { .. });
        open.then_some(&mut self.message)
    }
}

impl<B> Message<B> {
    /// Puts the message in place of the memory brought for it.
    fn arrive(&mut self, buffer: B) -> Option<B> {
        let arrived = Message::Arrived {
            buffer,
            since: Instant::now(),
        };
        match mem::replace(self, arrived) {
            Message::Awaited { memory } => memory,
            Message::Arrived { .. } => None,
        }
    }
}

impl<B> Taken<B> {
    fn now(ticket: Ticket, memory: Option<B>) -> Self {
        Self {
            ticket,
            memory,
            since: Instant::now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::Payload;

    fn tag(step: u32) -> Tag {
        Tag::new(0, step, Payload::Custom(0))
    }

    #[test]
    fn a_message_that_an_open_receive_takes_needs_no_room() {
        let mut channel = Channel::new();
        let receives: Vec<_> = (0..9).map(|step| channel.post(tag(step), None)).collect();
        for (step, receive) in (0..9).zip(receives) {
            let send = channel.send(tag(step), step);
            assert!(channel.finish(send).is_some());
            assert_eq!(channel.collect(receive).unwrap().0, step);
            assert_eq!(channel.collect(receive), None, "the receive is over");
        }
        assert!(channel.has_room());
    }

    #[test]
    fn the_receivers_memory_goes_to_the_sender_whoever_is_first() {
        let mut channel = Channel::new();
        let late = channel.send(tag(0), "first");
        assert!(channel.finish(late).is_none(), "not taken yet");
        channel.post(tag(0), Some("memory for the first"));
        assert_eq!(
            channel.finish(late).unwrap().0,
            Some("memory for the first")
        );

        let receive = channel.post(tag(1), Some("memory for the second"));
        let early = channel.send(tag(1), "second");
        assert_eq!(
            channel.finish(early).unwrap().0,
            Some("memory for the second")
        );
        assert_eq!(channel.collect(receive).unwrap().0, "second");
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
                    receives.push((channel.post(tag(step), None), step, posted[index]));
                    posted[index] += 1;
                } else if channel.has_room() {
                    channel.send(tag(step), (step, sends[index]));
                    sends[index] += 1;
                }
                prop_assert!(channel.untaken().count() <= MAX_OUTSTANDING_SENDS);
            }
            for (ticket, step, number) in receives.into_iter().rev() {
                let expected = (number < sends[step as usize]).then_some((step, number));
                prop_assert_eq!(channel.collect(ticket).map(|(message, _)| message), expected);
            }
        }
    }
}
