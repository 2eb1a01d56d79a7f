//! The fake must be able to wait for ever: what the order and the limits of a group are for.

use super::*;

/// A half without contents.
fn half(direction: Direction, peer: Rank) -> Half<HostBuffer> {
    Half {
        peer,
        sequence: 0,
        direction,
        buffer: HostBuffer::zeros(DType::F32, 1),
    }
}

use Direction::{In, Out};

const NOBODY: [Rank; 0] = [];

/// Issues the groups of each rank on connected devices; the ranks whose streams do not run empty.
fn stuck(groups: Vec<Vec<Vec<Half<HostBuffer>>>>) -> Vec<Rank> {
    let world_size = groups.len();
    let fabric = Fabric::new(world_size, usize::MAX, 0);
    for (rank, groups) in groups.into_iter().enumerate() {
        let mut device = fabric.device(rank);
        device.connect(&first_id(), rank, world_size).unwrap();
        groups
            .into_iter()
            .for_each(|group| device.issue(group).unwrap());
    }
    fabric.settle();
    (0..world_size)
        .filter(|&rank| fabric.is_running(rank))
        .collect()
}

/// What each rank would do by itself: it sends, then it receives.
#[test]
fn a_ring_in_local_order_waits_for_ever() {
    let next = |rank: Rank| (rank + 1) % 3;
    let previous = |rank: Rank| (rank + 2) % 3;
    let apart = |rank| vec![vec![half(Out, next(rank))], vec![half(In, previous(rank))]];
    assert_eq!(stuck((0..3).map(apart).collect()), [0, 1, 2]);

    let together = |rank| vec![vec![half(Out, next(rank)), half(In, previous(rank))]];
    assert_eq!(stuck((0..3).map(together).collect()), NOBODY);

    let mut ordered: Vec<_> = (0..3).map(apart).collect();
    ordered[0].reverse();
    assert_eq!(stuck(ordered), NOBODY, "0 receives first");
}

/// Rank 0 has two transfers in a group that are not next to each other in the order of all. Once all are connected that does no harm.
#[test]
fn a_first_transfer_in_a_group_may_wait_for_ever() {
    let groups = || {
        vec![
            vec![vec![half(Out, 1), half(Out, 2)]],
            vec![vec![half(In, 0)], vec![half(Out, 2)]],
            vec![vec![half(In, 1)], vec![half(In, 0)]],
        ]
    };
    assert_eq!(stuck(groups()), [0, 1, 2]);

    let mut connected = vec![
        vec![vec![half(Out, 1)], vec![half(Out, 2)]],
        vec![vec![half(In, 0)]],
        vec![vec![half(In, 0)]],
    ];
    for (connected, groups) in connected.iter_mut().zip(groups()) {
        connected.extend(groups);
    }
    assert_eq!(stuck(connected), NOBODY);
}

#[test]
fn a_peer_that_does_nothing_is_waited_for() {
    let groups = vec![vec![vec![half(Out, 1)]], vec![]];
    assert_eq!(stuck(groups), [0]);
}
