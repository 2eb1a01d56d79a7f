//! One order for the transfers of all ranks, without a coordinator.
//!
//! NCCL knows no tags: a send blocks the stream of its rank until the peer has issued the receive, and the other way round. So ranks
//! must issue what they have to do with one another in orders that fit together, or they wait for one another in a circle:
//! three ranks of a ring that each issue their send first, for instance.
//!
//! Every transfer gets a [`Position`], the same at both of its ends, and every rank issues its transfers by rising position.
//! Positions are times of a logical clock, made unequal by the numbers of the ranks. The two ends find the time together:
//!
//! 1. The receiver, as soon as it has taken the message and has memory for it, proposes a time later than all it knows of
//!    ([`Order::propose`]).
//! 2. The sender settles on that time, or a later one if it knows of some that is not earlier ([`Order::settle`]), and says so.
//! 3. The receiver notes the time ([`Order::settled`]).
//!
//! That is two small messages for a transfer, both between its ends. It is Skeen's protocol for multicasts in total order (Birman and
//! Joseph, *Reliable communication in the presence of failures*, 1987), with two recipients for every message, one of
//! which speaks for both.
//!
//! **Every rank issues by rising position.** A transfer is only issued while its position is lower than the proposals of this
//! rank that are not settled ([`Order::next`]). Those get no lower by being settled, and whatever else this rank hears of
//! later gets a time later than all that it knew of.
//!
//! **No deadlock.** Nobody waits with steps 1 to 3, so every transfer gets its position. Consider, of all transfers that are not
//! complete, the one with the lowest position. Both of its ends have issued, and completed, all that they have to issue before it. So
//! it is at the head of both streams, and goes on. This holds as well if a rank issues several transfers, next
//! to one another in its order, as a group whose members do not wait for one another: all groups before that of the lowest
//! transfer hold lower ones only, which are complete.

use std::collections::BTreeSet;

use crate::transport::Rank;

/// The place of a transfer in the order of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    /// Time of the logical clock.
    pub(super) time: u64,
    /// The rank that sends.
    pub(super) source: Rank,
    /// The rank that receives.
    pub(super) destination: Rank,
    /// The number that the sender gave the message.
    pub(super) sequence: u64,
}

/// What one rank knows of the order: neither input nor output.
#[derive(Debug)]
pub(super) struct Order {
    rank: Rank,
    /// The latest time that this rank knows of.
    clock: u64,
    /// Receives whose time is proposed and not settled.
    proposed: BTreeSet<Position>,
    /// Transfers that are settled and not issued.
    settled: BTreeSet<Position>,
}

impl Order {
    pub(super) fn new(rank: Rank) -> Self {
        Self {
            rank,
            clock: 0,
            proposed: BTreeSet::new(),
            settled: BTreeSet::new(),
        }
    }

    /// This rank can receive message `sequence` of `source`: the time to propose to it.
    pub(super) fn propose(&mut self, source: Rank, sequence: u64) -> u64 {
        self.clock = self.clock.saturating_add(1);
        let position = self.receive_at(self.clock, source, sequence);
        self.proposed.insert(position);
        self.clock
    }

    /// `destination` proposes a time for message `sequence` of this rank: the time to tell it.
    pub(super) fn settle(&mut self, destination: Rank, sequence: u64, proposed: u64) -> u64 {
        self.clock = self.clock.saturating_add(1).max(proposed);
        self.settled.insert(Position {
            time: self.clock,
            source: self.rank,
            destination,
            sequence,
        });
        self.clock
    }

    /// `source` has settled on `time`. False if it was not asked, or if the time is earlier than what was proposed.
    pub(super) fn settled(&mut self, source: Rank, sequence: u64, time: u64) -> bool {
        let is_it =
            |position: &&Position| (position.source, position.sequence) == (source, sequence);
        let Some(&proposed) = self.proposed.iter().find(is_it) else {
            return false;
        };
        if time < proposed.time {
            return false;
        }
        self.proposed.remove(&proposed);
        self.clock = self.clock.max(time);
        self.settled.insert(Position { time, ..proposed });
        true
    }

    /// The transfer to issue next, if it is certain.
    pub(super) fn next(&self) -> Option<Position> {
        let first = self.settled.first()?;
        let is_certain = self
            .proposed
            .first()
            .is_none_or(|proposed| first < proposed);
        is_certain.then_some(*first)
    }

    /// Whether nothing is proposed or settled that is not issued.
    pub(super) fn is_empty(&self) -> bool {
        self.proposed.is_empty() && self.settled.is_empty()
    }

    /// The transfer is issued.
    pub(super) fn issued(&mut self, position: Position) {
        self.settled.remove(&position);
    }

    fn receive_at(&self, time: u64, source: Rank, sequence: u64) -> Position {
        Position {
            time,
            source,
            destination: self.rank,
            sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    /// What one rank tells another.
    #[derive(Clone, Copy, Debug)]
    enum Message {
        Propose { sequence: u64, time: u64 },
        Settle { sequence: u64, time: u64 },
    }

    /// Ranks whose messages arrive in the order sent between any two of them, and in any order otherwise.
    struct World {
        orders: Vec<Order>,
        lines: HashMap<(Rank, Rank), VecDeque<Message>>,
        issued: Vec<Vec<Position>>,
    }

    impl World {
        fn new(world_size: usize) -> Self {
            Self {
                orders: (0..world_size).map(Order::new).collect(),
                lines: HashMap::new(),
                issued: vec![Vec::new(); world_size],
            }
        }

        fn begin(&mut self, source: Rank, destination: Rank, sequence: u64) {
            let time = self.orders[destination].propose(source, sequence);
            let message = Message::Propose { sequence, time };
            let line = self.lines.entry((destination, source)).or_default();
            line.push_back(message);
        }

        /// Delivers the first message on one of the lines that have some; false if none has.
        fn deliver(&mut self, choice: usize) -> bool {
            let mut busy: Vec<_> = self
                .lines
                .iter()
                .filter(|(_, line)| !line.is_empty())
                .map(|(&line, _)| line)
                .collect();
            busy.sort_unstable();
            if busy.is_empty() {
                return false;
            }
            let (from, to) = busy[choice % busy.len()];
            match self
                .lines
                .get_mut(&(from, to))
                .unwrap()
                .pop_front()
                .unwrap()
            {
                Message::Propose { sequence, time } => {
                    let time = self.orders[to].settle(from, sequence, time);
                    let line = self.lines.entry((to, from)).or_default();
                    line.push_back(Message::Settle { sequence, time });
                }
                Message::Settle { sequence, time } => {
                    assert!(self.orders[to].settled(from, sequence, time));
                }
            }
            true
        }

        fn issue(&mut self, rank: Rank) {
            while let Some(position) = self.orders[rank].next() {
                self.orders[rank].issued(position);
                self.issued[rank].push(position);
            }
        }

        /// Whether the streams run empty, if a transfer goes on only when it is at the head of both.
        fn completes(&self) -> bool {
            let mut streams: Vec<VecDeque<Position>> = self
                .issued
                .iter()
                .map(|issued| issued.iter().copied().collect())
                .collect();
            let runs = |streams: &[VecDeque<Position>]| {
                let mut heads = streams.iter().filter_map(|stream| stream.front());
                let is_at_both = |head: &&Position| {
                    streams[head.source].front() == Some(head)
                        && streams[head.destination].front() == Some(head)
                };
                heads.find(is_at_both).copied()
            };
            while let Some(position) = runs(&streams) {
                streams[position.source].pop_front();
                streams[position.destination].pop_front();
            }
            streams.iter().all(VecDeque::is_empty)
        }
    }

    /// Transfers between different ranks of `world_size`.
    fn transfers() -> impl Strategy<Value = (usize, Vec<(Rank, Rank)>)> {
        (2..6usize).prop_flat_map(|world_size| {
            let pair = (0..world_size, 1..world_size)
                .prop_map(move |(source, distance)| (source, (source + distance) % world_size));
            (Just(world_size), proptest::collection::vec(pair, 0..40))
        })
    }

    proptest! {
        /// Messages arrive, transfers begin and ranks issue in an order drawn at random.
        #[test]
        fn ranks_issue_by_rising_position_and_all_transfers_complete(
            (world_size, transfers) in transfers(),
            choices in proptest::collection::vec(any::<usize>(), 1..300),
        ) {
            let mut world = World::new(world_size);
            let mut rest = transfers.iter().copied().zip(0..);
            for &choice in &choices {
                match choice % 3 {
                    0 => if let Some(((source, destination), sequence)) = rest.next() {
                        world.begin(source, destination, sequence);
                    },
                    1 => world.issue(choice / 3 % world_size),
                    _ => drop(world.deliver(choice / 3)),
                }
            }
            for ((source, destination), sequence) in rest {
                world.begin(source, destination, sequence);
            }
            let mut choices = choices.iter().cycle();
            while world.deliver(*choices.next().unwrap()) {}
            (0..world_size).for_each(|rank| world.issue(rank));

            let count: usize = world.issued.iter().map(Vec::len).sum();
            prop_assert_eq!(count, 2 * transfers.len(), "both ends of every transfer");
            for issued in &world.issued {
                prop_assert!(issued.is_sorted(), "{:?}", issued);
            }
            let mut of_sources: Vec<_> = world.issued.iter().enumerate().flat_map(|(rank, issued)| issued.iter().filter(move |position| position.source == rank)).collect();
            let mut of_destinations: Vec<_> = world.issued.iter().enumerate().flat_map(|(rank, issued)| issued.iter().filter(move |position| position.destination == rank)).collect();
            of_sources.sort_unstable();
            of_destinations.sort_unstable();
            prop_assert_eq!(of_sources, of_destinations, "both ends have the same position");
            prop_assert!(world.completes());
        }
    }

    /// The model of the streams must see what the order prevents.
    #[test]
    fn a_ring_that_sends_first_does_not_complete() {
        let mut world = World::new(3);
        for rank in 0..3 {
            let position = |source| Position {
                time: 0,
                source,
                destination: (source + 1) % 3,
                sequence: 0,
            };
            world.issued[rank] = vec![position(rank), position((rank + 2) % 3)];
        }
        assert!(!world.completes());
    }

    #[test]
    fn what_is_not_settled_holds_up_what_may_come_after_it() {
        let mut order = Order::new(1);
        let proposed = order.propose(0, 7);
        let time = order.settle(2, 0, 1);
        assert!(time > proposed);
        assert_eq!(order.next(), None);
        assert!(order.settled(0, 7, time + 1));
        assert_eq!(order.next().map(|next| next.destination), Some(2));
    }

    #[test]
    fn what_was_not_proposed_is_not_settled() {
        let mut order = Order::new(1);
        order.settle(0, 0, 10);
        let proposed = order.propose(0, 7);
        assert!(!order.settled(0, 8, proposed), "another number");
        assert!(!order.settled(0, 7, proposed - 1), "an earlier time");
        assert!(order.settled(0, 7, proposed));
        assert!(!order.settled(0, 7, proposed), "a second time");
    }
}
