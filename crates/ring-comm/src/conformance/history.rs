//! What a rank remembers of its last operations, and that its errors tell it.

use super::{Case, Endpoint, Stage, f32s, meet, receive, send, tag};
use crate::{
    recorder::{Call, Progress, Record},
    transport::Rank,
};

pub(super) const CASES: &[Case] = &[
    Case::messages(
        "an error tells what was pending",
        &[2, 3],
        errors_tell_what_was_pending,
    ),
    Case::messages(
        "a refused call tells what went before",
        &[2],
        refusals_tell_what_went_before,
    ),
    Case::messages(
        "operations are remembered with peer, tag and size",
        &[2, 3],
        operations_are_remembered,
    ),
    Case::messages(
        "the rank that aborts remembers it",
        &[2],
        aborts_are_remembered,
    ),
];

/// The messages of rank 0 never come, because it aborts. One is waited for, one is posted only.
fn errors_tell_what_was_pending(stage: &Stage<'_>) {
    const AWAITED: u32 = 3;
    const POSTED: u32 = 4;
    stage.run(|endpoint| {
        if endpoint.rank() == 0 {
            meet(&endpoint, 0).unwrap();
            return endpoint.abort("staged");
        }
        let posted = endpoint.irecv(0, tag(POSTED), f32s(1)).unwrap();
        meet(&endpoint, 0).unwrap();
        let error = match endpoint.irecv(0, tag(AWAITED), f32s(1)) {
            Ok(awaited) => awaited.wait().unwrap_err(),
            Err(error) => error,
        };
        let history = error.history().expect("every error has a history");
        assert_eq!(history.rank, endpoint.rank());
        let receive_of = |step| {
            let of_step = |record: &&Record| record.tag == Some(tag(step));
            let record = history.records.iter().find(of_step);
            let record = record.unwrap_or_else(|| panic!("step {step} is missing in {history}"));
            assert_eq!((record.call, record.peer), (Call::Receive, Some(0)));
            record.progress
        };
        assert_eq!(receive_of(AWAITED), Progress::Failed);
        assert_eq!(receive_of(POSTED), Progress::Posted);
        let pending: Vec<_> = history.pending().map(|record| record.tag).collect();
        assert_eq!(pending, [Some(tag(POSTED))], "{history}");
        assert!(posted.wait().is_err());
    });
}

fn refusals_tell_what_went_before(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        meet(&endpoint, 0).unwrap();
        let error = endpoint.irecv(99, tag(0), f32s(1)).unwrap_err();
        let history = error.history().expect("every error has a history");
        let calls: Vec<_> = history.records.iter().map(|record| record.call).collect();
        assert_eq!(calls, [Call::AllGather], "{history}");
    });
}

fn operations_are_remembered(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        match endpoint.rank() {
            0 => send(&endpoint, 1, 5, 8).unwrap(),
            1 => drop(receive(&endpoint, 0, 5).unwrap()),
            _ => {}
        }
        meet(&endpoint, 0).unwrap();
        let gathers = ended(&endpoint, Call::AllGather);
        assert_eq!(gathers.len(), 1);
        let expected = |here: Rank, call, peer| {
            let records = ended(&endpoint, call);
            let found: Vec<_> = records
                .iter()
                .map(|record| (record.peer, record.tag, record.bytes))
                .collect();
            if endpoint.rank() == here {
                assert_eq!(found, [(Some(peer), Some(tag(5)), 4)]);
            } else {
                assert_eq!(found, []);
            }
        };
        expected(0, Call::Send, 1);
        expected(1, Call::Receive, 0);
    });
}

fn ended(endpoint: &Endpoint, call: Call) -> Vec<Record> {
    let mut records = endpoint.flight_record().records;
    records.retain(|record| record.call == call && record.progress == Progress::Ended);
    assert!(records.iter().all(|record| record.began <= record.since));
    records
}

fn aborts_are_remembered(stage: &Stage<'_>) {
    stage.run(|endpoint| {
        meet(&endpoint, 0).unwrap();
        if endpoint.rank() == 1 {
            return;
        }
        endpoint.abort("staged");
        let error = meet(&endpoint, 1).unwrap_err();
        let history = error.root().history().expect("every error has a history");
        let last = history.records.last().map(|record| record.call);
        assert_eq!((history.rank, last), (0, Some(Call::Poison)), "{history}");
    });
}
