//! Wires without engines and threads: whatever is transferred, and whenever who looks, it arrives.

use proptest::prelude::*;

use super::*;
use crate::remote::{Event, Wire};

type TestWire = NcclWire<HostBuffer, ThreadWire, super::super::fake::FakeDevice>;

/// Ranks of one world, driven by hand.
struct Ranks {
    world: World,
    wires: Vec<TestWire>,
    /// What each rank has got: source, number, message.
    received: Vec<Vec<(Rank, u64, HostBuffer)>>,
    sent: Vec<Vec<(Rank, u64)>>,
}

impl Ranks {
    /// Ranks that have begun with a group.
    fn new(world_size: usize, steps_per_look: usize, room: usize) -> Self {
        let fake = Fake {
            control: Behaviour::Tardy,
            steps_per_look,
            room,
        };
        let world = fake.world(world_size);
        let start = |rank: Rank| {
            let control = ThreadWire::new(Arc::clone(&world.net), rank);
            let device = world.fabric.device(rank);
            NcclWire::start(
                control,
                device,
                &first_id(),
                Vec::new(),
                Deadline::after(PATIENT),
            )
            .unwrap()
        };
        let wires = thread::scope(|scope| {
            let start = |rank| scope.spawn(move || start(rank));
            let threads: Vec<_> = (0..world_size).map(start).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let mut ranks = Self {
            world,
            wires,
            received: vec![Vec::new(); world_size],
            sent: vec![Vec::new(); world_size],
        };
        ranks.wires.iter_mut().for_each(|wire| wire.begin(1));
        ranks.look_until_quiet();
        ranks
    }

    fn look(&mut self, rank: Rank) {
        let mut events = Vec::new();
        self.wires[rank].poll(&mut events);
        for event in events {
            match event {
                Event::Received {
                    peer,
                    sequence,
                    buffer,
                } => self.received[rank].push((peer, sequence, buffer)),
                Event::Sent { peer, sequence, .. } => self.sent[rank].push((peer, sequence)),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Everybody looks, until that has not changed anything for a while.
    fn look_until_quiet(&mut self) {
        let done = |ranks: &Self| {
            let counts = ranks
                .received
                .iter()
                .map(Vec::len)
                .chain(ranks.sent.iter().map(Vec::len));
            (counts.sum::<usize>(), ranks.world.net.frames_sent())
        };
        let mut quiet = 0;
        while quiet < 100 {
            let before = done(self);
            (0..self.wires.len()).for_each(|rank| self.look(rank));
            quiet = if done(self) == before { quiet + 1 } else { 0 };
        }
    }

    fn send(&mut self, number: usize, (source, destination, len): Transfer) {
        let sequence = number as u64;
        self.wires[source].send_data(destination, sequence, message(sequence, len));
    }

    fn receive(&mut self, number: usize, (source, destination, len): Transfer) {
        let room = HostBuffer::F32(vec![-1.0; len]);
        self.wires[destination].receive_data(source, number as u64, room);
    }
}

fn message(sequence: u64, len: usize) -> HostBuffer {
    HostBuffer::F32(vec![sequence as f32; len])
}

/// Source, destination and length.
type Transfer = (Rank, Rank, usize);

/// Ranks, and messages between them.
fn transfers() -> impl Strategy<Value = (usize, Vec<Transfer>)> {
    (2..6usize).prop_flat_map(|world_size| {
        let transfer =
            (0..world_size, 1..world_size, 0..3usize).prop_map(move |(source, distance, len)| {
                (source, (source + distance) % world_size, len)
            });
        (Just(world_size), proptest::collection::vec(transfer, 0..60))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Sends begin in a random order, receives later and in another; ranks look and streams go on at random in between.
    #[test]
    fn every_pattern_completes(
        (world_size, transfers) in transfers(),
        choices in proptest::collection::vec(any::<usize>(), 1..200),
        steps_per_look in 1..3usize,
        room in 0..3usize,
    ) {
        let mut ranks = Ranks::new(world_size, steps_per_look, room);
        let before = ranks.world.net.frames_sent();
        let mut begun: Vec<usize> = Vec::new();
        let mut rest = 0..transfers.len();
        for &choice in &choices {
            match choice % 4 {
                0 | 1 => if let Some(number) = rest.next() {
                    ranks.send(number, transfers[number]);
                    begun.push(number);
                },
                2 if !begun.is_empty() => {
                    let number = begun.swap_remove(choice / 4 % begun.len());
                    ranks.receive(number, transfers[number]);
                }
                _ => ranks.look(choice / 4 % world_size),
            }
        }
        for number in rest {
            ranks.send(number, transfers[number]);
            begun.push(number);
        }
        begun.iter().rev().for_each(|&number| ranks.receive(number, transfers[number]));
        ranks.look_until_quiet();

        for (sequence, &(source, destination, len)) in transfers.iter().enumerate() {
            let sequence = sequence as u64;
            prop_assert!(ranks.sent[source].contains(&(destination, sequence)));
            let expected = (source, sequence, message(sequence, len));
            prop_assert!(ranks.received[destination].contains(&expected), "{:?} is missing", expected);
        }
        prop_assert!(ranks.wires.iter().all(|wire| !wire.is_busy()));
        prop_assert!(ranks.world.fabric.largest_group() <= LARGEST_GROUP);
        let with_contents = transfers.iter().filter(|(.., len)| *len > 0).count();
        prop_assert_eq!(ranks.world.net.frames_sent() - before, 2 * with_contents);
    }
}

/// Once all are connected, what a rank sends and what it receives go on together.
#[test]
fn a_shift_is_one_group() {
    const WORLD_SIZE: usize = 4;
    let mut ranks = Ranks::new(WORLD_SIZE, usize::MAX, 0);
    for shift in 0..2 {
        let transfer = |rank: Rank| (rank, (rank + 1) % WORLD_SIZE, 1);
        for rank in 0..WORLD_SIZE {
            ranks.send(shift * WORLD_SIZE + rank, transfer(rank));
        }
        for rank in 0..WORLD_SIZE {
            ranks.receive(shift * WORLD_SIZE + rank, transfer(rank));
        }
        ranks.look_until_quiet();
        assert_eq!(
            ranks.received.iter().map(Vec::len).sum::<usize>(),
            (shift + 1) * WORLD_SIZE
        );
        assert_eq!(ranks.world.fabric.largest_group(), shift + 1);
    }
}

/// More than one group may hold, between the same ranks and between different ones.
#[test]
fn large_patterns_are_cut_into_groups() {
    let peers = LARGEST_GROUP - 1;
    let transfers: Vec<_> = (1..=peers)
        .flat_map(|peer| [(0, peer, 1), (peer, 0, 1)])
        .collect();
    let ranks = exchange_thrice(LARGEST_GROUP, &transfers);
    assert_eq!(ranks.sent[0].len(), 3 * peers);
    assert_eq!(ranks.received[0].len(), 3 * peers);
    assert_eq!(ranks.world.fabric.largest_group(), LARGEST_GROUP);
}

/// NCCL may let transfers of different distances wait for one another if there are many ranks.
#[test]
fn in_a_large_world_distances_do_not_mix() {
    let world_size = 2 * LARGEST_GROUP + 1;
    let scatter: Vec<_> = (1..world_size).map(|peer| (0, peer, 1)).collect();
    let ranks = exchange_thrice(world_size, &scatter);
    assert_eq!(ranks.sent[0].len(), 3 * scatter.len());
    assert_eq!(ranks.world.fabric.largest_group(), 1);
}

/// The first time, all get connected; after that nothing moves until all is handed over.
fn exchange_thrice(world_size: usize, transfers: &[(Rank, Rank, usize)]) -> Ranks {
    let mut ranks = Ranks::new(world_size, usize::MAX, 0);
    for round in 0..3 {
        for (number, &transfer) in transfers.iter().enumerate() {
            ranks.send(round * transfers.len() + number, transfer);
            ranks.receive(round * transfers.len() + number, transfer);
        }
        ranks.look_until_quiet();
        ranks.world.fabric.hold(true);
    }
    ranks.world.fabric.hold(false);
    ranks.look_until_quiet();
    ranks
}

/// Rank 0 has sent, and NCCL has taken it, what rank 1 has promised to receive, when both hear that the group has failed.
#[test]
fn what_was_sent_in_a_group_that_failed_is_not_received_in_the_next() {
    let mut ranks = Ranks::new(2, usize::MAX, 1);
    // The two must be connected.
    ranks.send(0, (0, 1, 1));
    ranks.receive(0, (0, 1, 1));
    ranks.look_until_quiet();
    assert_eq!(ranks.received[1], [(0, 0, message(0, 1))]);

    ranks.send(1, (0, 1, 1));
    ranks.receive(1, (0, 1, 1));
    while ranks.sent[0].len() < 2 {
        ranks.look(0);
    }
    ranks.wires.iter_mut().for_each(Wire::fail);
    ranks.wires.iter_mut().for_each(|wire| wire.begin(2));
    ranks.look_until_quiet();
    assert_eq!(ranks.received[1].len(), 1);

    ranks.send(2, (0, 1, 1));
    ranks.receive(2, (0, 1, 1));
    ranks.look_until_quiet();
    assert_eq!(ranks.received[1][1..], [(0, 2, message(2, 1))]);
}
