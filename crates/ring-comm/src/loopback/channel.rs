//! The messages on their way from one rank to another.
//!
//! A message is either *sent* and untaken, or *taken* by a posted receive, which keeps it until it is waited for. A
//! receive takes the oldest sent message of its tag when it is posted, or the first one sent later; so there is never a
//! sent message and an open receive with the same tag, and equal tags keep their order on both sides.
//!
//! The memory that a receive brings goes to the sender of what it takes, so both ranks have as many buffers as before.

use std::{collections::VecDeque, mem, time::Instant};

use crate::{
    recorder::RecordNumber,
    transport::{MAX_OUTSTANDING_SENDS, Tag},
};

/// Names one request among those of its rank: the number under which it is recorded.
pub(super) type Ticket = RecordNumber;

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
}

impl<B> Channel<B> {
    pub(super) fn new() -> Self {
        Self {
            // Which of these a message goes through depends on who is first; so that memory does not, there is room in all.
            sent: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
            taken: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
            posted: VecDeque::with_capacity(MAX_OUTSTANDING_SENDS),
        }
    }

    /// Whether another message can be sent. Not even an open receive lifts the limit: on a network the sender cannot know
    /// of it, and what works here should work there.
    pub(super) fn has_room(&self) -> bool {
        self.sent.len() < MAX_OUTSTANDING_SENDS
    }

    /// Yields the receive that has taken the message, if one has.
    pub(super) fn send(&mut self, ticket: Ticket, tag: Tag, buffer: B) -> Option<Ticket> {
        let is_open = |receive: &&mut Posted<B>| receive.is_open_for(tag);
        match self.posted.iter_mut().find(is_open) {
            Some(receive) => {
                let memory = receive.message.arrive(buffer);
                self.taken.push_back(Taken::now(ticket, memory));
                Some(receive.ticket)
            }
            None => {
                self.sent.push_back(Sent {
                    ticket,
                    tag,
                    buffer,
                });
                None
            }
        }
    }

    /// Ends a send whose message was taken, since when is told; yields the receiver's memory. `None` while it is not taken.
    pub(super) fn finish(&mut self, send: Ticket) -> Option<(Option<B>, Instant)> {
        let index = self.taken.iter().position(|taken| taken.ticket == send)?;
        let taken = self.taken.remove(index)?;
        Some((taken.memory, taken.since))
    }

    /// Yields the send whose message the receive has taken, if there was one.
    pub(super) fn post(&mut self, ticket: Ticket, tag: Tag, memory: Option<B>) -> Option<Ticket> {
        let oldest = self.sent.iter().position(|message| message.tag == tag);
        let sent = oldest.and_then(|index| self.sent.remove(index));
        let taken = sent.as_ref().map(|sent| sent.ticket);
        let mut message = Message::Awaited { memory };
        if let Some(sent) = sent {
            let memory = message.arrive(sent.buffer);
            self.taken.push_back(Taken::now(sent.ticket, memory));
        }
        self.posted.push_back(Posted {
            ticket,
            tag,
            message,
        });
        taken
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
}

impl<B> Posted<B> {
    fn is_open_for(&self, tag: Tag) -> bool {
        self.tag == tag && matches!(self.message, Message::Awaited { .. })
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
        for step in 0..9 {
            assert_eq!(channel.post(step, tag(step as u32), None), None);
        }
        for step in 0..9 {
            let send = 100 + step;
            assert_eq!(channel.send(send, tag(step as u32), step), Some(step));
            assert!(channel.finish(send).is_some());
            assert_eq!(channel.collect(step).unwrap().0, step);
            assert_eq!(channel.collect(step), None, "the receive is over");
        }
        assert!(channel.has_room());
    }

    #[test]
    fn the_receivers_memory_goes_to_the_sender_whoever_is_first() {
        let [late, early, receive, other] = [1, 2, 3, 4];
        let mut channel = Channel::new();
        assert_eq!(channel.send(late, tag(0), "first"), None);
        assert!(channel.finish(late).is_none(), "not taken yet");
        let taken = channel.post(other, tag(0), Some("memory for the first"));
        assert_eq!(taken, Some(late));
        assert_eq!(
            channel.finish(late).unwrap().0,
            Some("memory for the first")
        );

        channel.post(receive, tag(1), Some("memory for the second"));
        assert_eq!(channel.send(early, tag(1), "second"), Some(receive));
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
            for (ticket, (is_send, step)) in (0..).zip(actions) {
                let index = step as usize;
                if !is_send {
                    channel.post(ticket, tag(step), None);
                    receives.push((ticket, step, posted[index]));
                    posted[index] += 1;
                } else if channel.has_room() {
                    channel.send(ticket, tag(step), (step, sends[index]));
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
