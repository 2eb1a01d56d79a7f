//! What all ranks do together: all-gather, sums, barrier, agreement.

use std::sync::{
    Barrier,
    atomic::{AtomicUsize, Ordering},
};

use super::{Case, Endpoint, Stage, assert_poisoned, assert_stays_poisoned};
use crate::{
    buffer::HostBuffer,
    collective::{all_reduce_merged, all_reduce_sum, all_reduce_sum_f64, barrier, parent},
    communicator::Communicator,
    error::{CommError, CommErrorKind, Disagreement},
    transport::Rank,
};

pub(super) const CASES: &[Case] = &[
    Case::messages(
        "an all-gather gives all parts in rank order",
        &[1, 2, 3, 7],
        all_gather,
    ),
    Case::common_memory(
        "an all-gather waits no longer than the deadline",
        &[2],
        all_gather_deadline,
    ),
    Case::common_memory(
        "a barrier lets nobody through before the last",
        &[1, 2, 4],
        barrier_holds,
    ),
    Case::messages(
        "a sum of tensors is the sum in rank order, bit by bit",
        &[1, 2, 3, 4, 7],
        tensor_sum,
    ),
    Case::messages(
        "a sum of numbers is the sum in rank order, bit by bit",
        &[1, 2, 3, 7],
        number_sum,
    ),
    Case::messages(
        "tensors of different lengths are not summed",
        &[2],
        tensor_lengths_differ,
    ),
    Case::messages(
        "lists of different lengths are not summed",
        &[3],
        number_counts_differ,
    ),
    Case::messages(
        "different collectives are not mistaken for each other",
        &[3],
        collectives_out_of_step,
    ),
    Case::messages(
        "a reduction merges along its tree, bit by bit the same on all ranks",
        &[1, 2, 3, 4, 6, 7],
        merged,
    ),
    Case::messages(
        "a reduction finds the rank that comes with other terms",
        &[2, 3, 4, 7],
        merged_with_other_terms,
    ),
    Case::messages(
        "a reduction of different lengths is refused",
        &[2, 3],
        merged_lengths_differ,
    ),
    Case::messages("ranks with the same terms agree", &[1, 2, 4], same_terms),
    Case::messages(
        "another value is found, with the rank, the field and both values",
        &[2, 4],
        another_value,
    ),
    Case::messages("a missing field is found", &[2, 4], missing_field),
    Case::messages("another topic is found", &[2, 4], another_topic),
    Case::messages("an agreement is reached once", &[2], agree_once),
];

fn all_gather(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        for operation in 0..50 {
            let part = |rank: Rank| vec![operation as u8; rank * (operation as usize % 3)];
            let parts = endpoint
                .all_gather_bytes(operation, part(endpoint.rank()))
                .unwrap();
            let expected: Vec<_> = (0..endpoint.world_size()).map(part).collect();
            assert_eq!(parts, expected);
        }
    });
}

/// Rank 1 does not join before rank 0 has its error.
fn all_gather_deadline(stage: &Stage<'_>) {
    let rank_0_has_its_error = Barrier::new(2);
    stage.run_impatiently(|endpoint| {
        if endpoint.rank() == 1 {
            rank_0_has_its_error.wait();
            let error = endpoint.all_gather_bytes(0, Vec::new()).unwrap_err();
            return assert_stays_poisoned(&endpoint, &error, 1);
        }
        let result = endpoint.all_gather_bytes(0, Vec::new());
        rank_0_has_its_error.wait();
        let error = result.unwrap_err();
        assert!(
            matches!(error.kind, CommErrorKind::Deadline { .. }),
            "{error}"
        );
        assert_stays_poisoned(&endpoint, &error, 1);
    });
}

fn barrier_holds(stage: &Stage<'_>) {
    let arrived = AtomicUsize::new(0);
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        for round in 1..=20 {
            arrived.fetch_add(1, Ordering::SeqCst);
            barrier(&communicator).unwrap();
            assert!(arrived.load(Ordering::SeqCst) >= round * communicator.world_size());
            barrier(&communicator).unwrap();
        }
    });
}

/// Values whose sum depends on the order of addition.
fn values(rank: Rank, len: usize) -> impl Iterator<Item = f64> {
    (0..len).map(move |index| {
        let sign = if (rank + index).is_multiple_of(2) {
            1.0
        } else {
            -1.0
        };
        sign * (1.0 + index as f64).sqrt() * 10f64.powi((rank * 5 + index) as i32 % 9 - 4)
    })
}

fn tensor_sum(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        for len in [0, 1, 2, 5, 1000] {
            let part = |rank| values(rank, len).map(|value| value as f32);
            let expected =
                (1..communicator.world_size()).fold(part(0).collect::<Vec<_>>(), |sum, rank| {
                    sum.iter()
                        .zip(part(rank))
                        .map(|(sum, value)| sum + value)
                        .collect()
                });
            let sum = all_reduce_sum(&communicator, part(communicator.rank()).collect()).unwrap();
            let bits = |values: &[f32]| {
                values
                    .iter()
                    .map(|value| value.to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(&sum), bits(&expected));
        }
    });
}

fn number_sum(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        for len in [0, 1, 3] {
            let part = |rank| values(rank, len).collect::<Vec<_>>();
            let expected = (1..communicator.world_size()).fold(part(0), |sum, rank| {
                sum.iter()
                    .zip(part(rank))
                    .map(|(sum, value)| sum + value)
                    .collect()
            });
            let sum = all_reduce_sum_f64(&communicator, &part(communicator.rank())).unwrap();
            let bits = |values: &[f64]| {
                values
                    .iter()
                    .map(|value| value.to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(&sum), bits(&expected));
        }
    });
}

/// Neither commutative nor associative: another order or another tree would give other bits.
fn mix(ours: &mut [f32], theirs: &[f32]) {
    let pairs = ours.iter_mut().zip(theirs);
    pairs.for_each(|(ours, theirs)| *ours = 0.75 * *ours + 1.5 * theirs);
}

fn merged(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        for len in [0, 1, 1000] {
            let part = |rank| values(rank, len).map(|value| value as f32);
            let mut expected: Vec<Vec<f32>> = (0..ranks).map(|rank| part(rank).collect()).collect();
            // The definition: ranks in pairs, then pairs in pairs, and so on.
            let mut distance = 1;
            while distance < ranks {
                for lower in (0..ranks - distance).step_by(2 * distance) {
                    let (lowers, uppers) = expected.split_at_mut(lower + distance);
                    mix(&mut lowers[lower], &uppers[0]);
                }
                distance *= 2;
            }
            let before = communicator.traffic().messages_sent;
            let terms = [("length", len as u64), ("seed", u64::MAX - 3)];
            let got = all_reduce_merged(&communicator, &terms, part(rank).collect(), mix).unwrap();
            let bits = |values: &[f32]| {
                let bits = values.iter().map(|value| value.to_bits());
                bits.collect::<Vec<_>>()
            };
            assert_eq!(bits(&got), bits(&expected[0]));
            let sent = communicator.traffic().messages_sent - before;
            assert!(sent <= 1 + u64::from(ranks.next_power_of_two().ilog2()));
        }
    });
}

/// The last rank is one step behind; the rank it reports to finds out.
fn merged_with_other_terms(stage: &Stage<'_>) {
    let last = stage.world_size - 1;
    let kind = CommErrorKind::Disagreement(Box::new(Disagreement {
        reference: parent(last).unwrap(),
        ..disagreement(last, "step", "6", "7")
    }));
    stage.run(|endpoint: Endpoint| {
        let communicator = Communicator::new(endpoint.clone());
        let step = if communicator.rank() == last { 6 } else { 7 };
        let terms = [("shape", 1 << 60), ("step", step)];
        let error = all_reduce_merged(&communicator, &terms, vec![1.0; 5], mix).unwrap_err();
        assert_poisoned(&endpoint, &error, last, &kind);
    });
}

fn merged_lengths_differ(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint.clone());
        let last = communicator.world_size() - 1;
        let len = if communicator.rank() == last { 5 } else { 4 };
        let error = all_reduce_merged(&communicator, &[], vec![1.0; len], mix).unwrap_err();
        let root = error.root();
        let mismatch = matches!(root.kind, CommErrorKind::SizeMismatch { .. });
        assert!(mismatch, "{error}");
        assert_stays_poisoned(&endpoint, &error, root.culprit());
    });
}

fn tensor_lengths_differ(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint.clone());
        let error = all_reduce_sum(&communicator, vec![1.0; 4 + communicator.rank()]).unwrap_err();
        let root = error.root();
        assert!(
            matches!(root.kind, CommErrorKind::SizeMismatch { .. }),
            "{error}"
        );
        assert_stays_poisoned(&endpoint, &error, 1 - root.rank);
    });
}

fn number_counts_differ(stage: &Stage<'_>) {
    expect_disagreement(
        stage,
        disagreement(2, "number of values", "2", "1"),
        |communicator| {
            let len = if communicator.rank() == 2 { 2 } else { 1 };
            all_reduce_sum_f64(communicator, &vec![1.0; len]).map(drop)
        },
    );
}

fn collectives_out_of_step(stage: &Stage<'_>) {
    expect_disagreement(
        stage,
        disagreement(1, "collective", "sum of f64", "barrier"),
        |communicator| match communicator.rank() {
            1 => all_reduce_sum_f64(communicator, &[1.0]).map(drop),
            _ => barrier(communicator),
        },
    );
}

fn same_terms(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        let mut fields = fields(&[("dtype", "f32"), ("heads", "4")]);
        if communicator.rank() % 2 == 1 {
            fields.reverse();
        }
        communicator.agree("forward", &fields).unwrap();
        barrier(&communicator).unwrap();
    });
}

/// The last rank differs in two fields; the first by name counts.
fn another_value(stage: &Stage<'_>) {
    let last = stage.world_size - 1;
    expect_disagreement(
        stage,
        disagreement(last, "heads", "8", "4"),
        |communicator| {
            let differs = communicator.rank() == last;
            let (heads, window) = if differs { ("8", "2") } else { ("4", "1") };
            communicator.agree(
                "forward",
                &fields(&[("dtype", "f32"), ("window", window), ("heads", heads)]),
            )
        },
    );
}

/// All ranks but rank 0 lack the field; the first of them is named.
fn missing_field(stage: &Stage<'_>) {
    expect_disagreement(
        stage,
        disagreement(1, "window", "(absent)", "1"),
        |communicator| {
            let all = fields(&[("dtype", "f32"), ("window", "1")]);
            let count = if communicator.rank() == 0 { 2 } else { 1 };
            communicator.agree("forward", &all[..count])
        },
    );
}

fn another_topic(stage: &Stage<'_>) {
    expect_disagreement(
        stage,
        disagreement(1, "topic", "backward", "forward"),
        |communicator| {
            let topic = if communicator.rank() == 1 {
                "backward"
            } else {
                "forward"
            };
            communicator.agree_once(topic, &[])
        },
    );
}

/// Rank 0 asks more often, which would block it if it asked the others again.
fn agree_once(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        let communicator = Communicator::new(endpoint);
        let repeats = if communicator.rank() == 0 { 5 } else { 1 };
        for _ in 0..repeats {
            communicator
                .agree_once("forward", &fields(&[("heads", "4")]))
                .unwrap();
        }
        barrier(&communicator).unwrap();
    });
}

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
    pairs.iter().map(owned).collect()
}

fn disagreement(culprit: Rank, field: &str, theirs: &str, ours: &str) -> Disagreement {
    Disagreement {
        culprit,
        reference: 0,
        field: field.to_owned(),
        theirs: theirs.to_owned(),
        ours: ours.to_owned(),
    }
}

fn expect_disagreement(
    stage: &Stage<'_>,
    disagreement: Disagreement,
    act: impl Fn(&Communicator<HostBuffer>) -> Result<(), CommError> + Sync,
) {
    let culprit = disagreement.culprit;
    let kind = CommErrorKind::Disagreement(Box::new(disagreement));
    stage.run(|endpoint: Endpoint| {
        let communicator = Communicator::new(endpoint.clone());
        let error = act(&communicator).unwrap_err();
        assert_eq!(error.kind, kind, "every rank reaches the verdict by itself");
        let cause = endpoint.poisoned().expect("a disagreement poisons");
        assert_poisoned(&endpoint, &cause, culprit, &kind);
    });
}
