//! Groups split off the whole: who is in them, that they do not hear one another, and that they fail together.

use super::{Case, Endpoint, Stage, drop_request, f32s, meet, receive, send, tag, telling};
use crate::{
    buffer::HostBuffer,
    collective::{all_reduce_sum, all_reduce_sum_f64},
    communicator::Communicator,
    error::{CommError, CommErrorKind},
    transport::Rank,
};

pub(super) const CASES: &[Case] = &[
    Case::messages(
        "a split group numbers its ranks by key, then by rank",
        &[1, 2, 3, 4, 6],
        numbered_by_key,
    ),
    Case::messages(
        "equal tags of two groups do not mix",
        &[2, 3],
        equal_tags_in_two_groups,
    ),
    Case::messages("groups gather apart", &[2, 4, 6], groups_gather_apart),
    Case::messages(
        "a mesh sums along both of its sides",
        &[4, 6],
        mesh_sums_both_ways,
    ),
    Case::messages("a group of a group is a group", &[4, 6], nested_groups),
    Case::messages(
        "a group's errors number the ranks as the whole does",
        &[4],
        errors_name_ranks_of_the_whole,
    ),
    Case::messages(
        "what poisons a group poisons the whole",
        &[3, 4],
        poison_reaches_the_whole,
    ),
    Case::messages(
        "no peer of a group is outside of it",
        &[4],
        peers_are_members,
    ),
];

fn split(endpoint: &Endpoint, color: u64, key: i64) -> Result<Communicator<HostBuffer>, CommError> {
    let group = Communicator::new(endpoint.clone()).split(Some(color), key)?;
    Ok(group.expect("a rank with a color is in a group"))
}

fn numbered_by_key(stage: &Stage<'_>) {
    let world_size = stage.world_size;
    stage.run(|endpoint| {
        let rank = endpoint.rank();
        let whole = Communicator::new(endpoint.clone());
        // Equal keys: the order stays. Falling keys: it is reversed.
        let same = whole.split(Some(5), 0).unwrap().unwrap();
        assert_eq!((same.rank(), same.world_size()), (rank, world_size));
        let reversed = whole.split(Some(5), -(rank as i64)).unwrap().unwrap();
        assert_eq!(reversed.rank(), world_size - 1 - rank);
        assert_eq!(reversed.transport().global_rank(0), world_size - 1);
        // Nobody but rank 0 has a color.
        let color = (rank == 0).then_some(u64::MAX);
        let alone = whole.split(color, 0).unwrap();
        assert_eq!(alone.map(|group| group.world_size()), color.map(|_| 1));
    });
}

/// Two messages under the same tag, received in the other order than sent.
fn equal_tags_in_two_groups(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let group = split(&endpoint, 0, 0).unwrap();
        match endpoint.rank() {
            0 => {
                let whole = endpoint.isend(1, tag(0), telling(1)).unwrap();
                let part = group.transport().isend(1, tag(0), telling(2)).unwrap();
                whole.wait().unwrap();
                part.wait().unwrap();
            }
            1 => {
                let part = group.transport().irecv(0, tag(0), f32s(1)).unwrap();
                assert_eq!(part.wait().unwrap(), telling(2));
                assert_eq!(receive(&endpoint, 0, 0).unwrap(), telling(1));
            }
            _ => {}
        }
        meet(&endpoint, 0).unwrap();
    });
}

fn groups_gather_apart(stage: &Stage<'_>) {
    let world_size = stage.world_size;
    stage.run(|endpoint| {
        let rank = endpoint.rank();
        let group = split(&endpoint, rank as u64 % 2, 0).unwrap();
        // One group gathers more often than the other.
        for _ in 0..=rank % 2 {
            let parts = group.all_gather_bytes("rank", &[rank as u8]).unwrap();
            let members = (rank % 2..world_size).step_by(2);
            let expected: Vec<_> = members.map(|member| vec![member as u8]).collect();
            assert_eq!(parts, expected);
        }
        meet(&endpoint, 0).unwrap();
    });
}

fn mesh_sums_both_ways(stage: &Stage<'_>) {
    let columns = stage.world_size / 2;
    stage.run(|endpoint| {
        let (row, column) = (endpoint.rank() / columns, endpoint.rank() % columns);
        let whole = Communicator::new(endpoint.clone());
        let along_row = whole.split(Some(row as u64), 0).unwrap().unwrap();
        let along_column = whole.split(Some(column as u64), 0).unwrap().unwrap();
        assert_eq!(
            (along_row.rank(), along_row.world_size()),
            (column, columns)
        );
        assert_eq!((along_column.rank(), along_column.world_size()), (row, 2));

        // Several elements, so that messages go, and both groups use the same operation numbers.
        let values = vec![endpoint.rank() as f32; 5];
        let first = (row * columns) as f32;
        let sum: f32 = (0..columns).map(|column| first + column as f32).sum();
        assert_eq!(
            all_reduce_sum(&along_row, values.clone()).unwrap(),
            [sum; 5]
        );
        let sum = (2 * column + columns) as f32;
        assert_eq!(all_reduce_sum(&along_column, values).unwrap(), [sum; 5]);
    });
}

fn nested_groups(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let rank = endpoint.rank();
        let half = split(&endpoint, rank as u64 / 2, -(rank as i64)).unwrap();
        // The same split, in every half: each rank alone, then both again.
        let alone = half.split(Some(half.rank() as u64), 0).unwrap().unwrap();
        assert_eq!(
            all_reduce_sum_f64(&alone, &[rank as f64]).unwrap(),
            [rank as f64]
        );
        let both = half.split(Some(0), -(half.rank() as i64)).unwrap().unwrap();
        assert_eq!(both.rank(), rank % 2, "reversed twice");
        assert_eq!(both.transport().global_rank(both.rank()), rank);
        let sum = all_reduce_sum_f64(&both, &[rank as f64]).unwrap();
        assert_eq!(sum, [(rank / 2 * 4 + 1) as f64]);
    });
}

/// Ranks 1 and 3 disagree; ranks 0 and 2 learn of it by name.
fn errors_name_ranks_of_the_whole(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let rank = endpoint.rank();
        let group = split(&endpoint, rank as u64 % 2, 0).unwrap();
        let error = if rank % 2 == 1 {
            let fields = [("rows".to_owned(), rank.to_string())];
            group.agree("forward", &fields).unwrap_err()
        } else {
            receive(&endpoint, rank ^ 2, 0).unwrap_err()
        };
        let CommErrorKind::Disagreement(found) = &error.root().kind else {
            panic!("{error}");
        };
        assert_eq!((found.culprit, found.reference), (3, 1));
        assert_eq!((error.rank, error.culprit()), (rank, 3));
    });
}

fn poison_reaches_the_whole(stage: &Stage<'_>) {
    let last: Rank = stage.world_size - 1;
    stage.run(|endpoint| {
        let rank = endpoint.rank();
        let group = split(&endpoint, u64::from(rank == last), 0).unwrap();
        if rank == last {
            group.abort("enough");
        }
        let error = match rank {
            0 => receive(&endpoint, 1, 0).unwrap_err(),
            // Those of the other group wait for rank 0, which never comes.
            _ => group.all_gather_bytes("again", &[]).unwrap_err(),
        };
        let reason = "enough".to_owned();
        let kind = CommErrorKind::Aborted {
            culprit: last,
            reason,
        };
        assert_eq!(error.root().kind, kind);
        assert_eq!(error.rank, rank);
    });
}

fn peers_are_members(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let group = split(&endpoint, endpoint.rank() as u64 / 2, 0).unwrap();
        for peer in [group.rank(), 2, 3] {
            let error = group
                .transport()
                .isend(peer, tag(0), telling(0))
                .map(drop_request)
                .unwrap_err();
            assert_eq!(error.kind, CommErrorKind::InvalidPeer(peer));
            assert_eq!(error.rank, endpoint.rank());
        }
        // Nothing was harmed by asking.
        if endpoint.rank() % 2 == 0 {
            send(&endpoint, endpoint.rank() + 1, 0, 7).unwrap();
        } else {
            assert_eq!(
                receive(&endpoint, endpoint.rank() - 1, 0).unwrap(),
                telling(7)
            );
        }
    });
}
