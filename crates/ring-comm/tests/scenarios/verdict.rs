//! Whether the ranks of a scenario came to what they must.

use std::collections::BTreeSet;

use ring_comm::{CommError, CommErrorKind, Rank};

use super::{Ending, Fault, Scenario};

/// Every rank has heard of the failure, all of the same, and it is the one that was staged.
///
/// # Panics
/// If that is not so.
pub(crate) fn judge(scenario: &Scenario, endings: &[Ending]) {
    assert_eq!(endings.len(), scenario.world_size);
    let errors: Vec<&CommError> = endings
        .iter()
        .filter_map(|ending| match ending {
            Ending::Failed(error) => Some(error),
            _ => None,
        })
        .collect();
    let panicked = panicked(endings);
    let has_completed = |ending: &&Ending| matches!(ending, Ending::Completed);
    let completed = endings.iter().filter(has_completed).count();
    if scenario.fault == Fault::None {
        assert_eq!(completed, scenario.world_size);
        return;
    }
    assert_eq!(completed, 0, "a rank has not heard of the failure");
    judge_panics(scenario, &panicked);
    let Some(first) = errors.first() else {
        let both = BTreeSet::from([scenario.culprit, scenario.accomplice]);
        assert_eq!(panicked, both);
        return;
    };
    let root = first.root();
    for error in errors {
        if scenario.fault == Fault::WrongTerms {
            // Every rank finds out by itself.
            assert_eq!(error.root().kind, root.kind);
        } else {
            assert_eq!(error.root(), root, "the ranks do not agree on the cause");
        }
    }
    judge_cause(scenario, root);
}

fn panicked(endings: &[Ending]) -> BTreeSet<Rank> {
    let panicked = endings.iter().enumerate().filter_map(|(rank, ending)| {
        let Ending::Panicked(message) = ending else {
            return None;
        };
        assert_eq!(message, "staged", "rank {rank}");
        Some(rank)
    });
    panicked.collect()
}

fn judge_panics(scenario: &Scenario, panicked: &BTreeSet<Rank>) {
    let expected: &[Rank] = match scenario.fault {
        // The second may hear of the first before it comes to its own.
        Fault::TwoPanics => &[scenario.culprit, scenario.accomplice],
        Fault::Panic | Fault::PanicWithRequest => &[scenario.culprit],
        _ => &[],
    };
    assert!(
        panicked.iter().all(|rank| expected.contains(rank)),
        "{panicked:?}"
    );
    assert_eq!(panicked.is_empty(), expected.is_empty());
}

fn judge_cause(scenario: &Scenario, root: &CommError) {
    let culprit = scenario.culprit;
    let right_kind = match (&root.kind, scenario.fault) {
        (CommErrorKind::Panicked { .. }, fault) => {
            matches!(
                fault,
                Fault::Panic | Fault::PanicWithRequest | Fault::TwoPanics
            )
        }
        (CommErrorKind::Departed, fault) => fault == Fault::Departure,
        (CommErrorKind::Aborted { .. }, fault) => {
            matches!(fault, Fault::Abort | Fault::TwoAborts)
        }
        (CommErrorKind::RequestDropped { .. }, fault) => {
            matches!(fault, Fault::DroppedSend | Fault::DroppedReceive)
        }
        (CommErrorKind::SizeMismatch { .. }, fault) => {
            matches!(fault, Fault::WrongSize | Fault::WrongDType)
        }
        (CommErrorKind::Disagreement(_), fault) => fault == Fault::WrongTerms,
        (CommErrorKind::Deadline { .. }, _) => scenario.needs_the_deadline(),
        _ => false,
    };
    assert!(right_kind, "{root:#}");
    let suspects = match scenario.fault {
        Fault::TwoAborts | Fault::TwoPanics => vec![culprit, scenario.accomplice],
        // The ranks are compared with rank 0; if that is the culprit, the next one differs from it.
        Fault::WrongTerms => vec![culprit.max(1)],
        // Sender and receiver wait for each other, and either may be the first to give up.
        Fault::WrongTag if scenario.is_last_step() => vec![culprit, scenario.after(culprit)],
        Fault::Slow if scenario.is_last_step() => vec![culprit],
        // Others wait for ranks that wait, and may be the first to give up.
        Fault::WrongTag | Fault::Slow => (0..scenario.world_size).collect(),
        _ => vec![culprit],
    };
    assert!(
        suspects.contains(&root.culprit()),
        "{suspects:?} suspected: {root:#}"
    );
}
