//! `RING_FLIGHT_RECORD` has the records of a group that fails written to files, and a communicator writes its own on demand.

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use ring_comm::{
    CommError, Communicator, Expected, Loopback, LoopbackEndpoint, Payload, Tag,
    buffer::{DType, HostBuffer},
    collective::barrier,
    recorder::FLIGHT_RECORD_VARIABLE,
};
use serde_json::Value;

const RANKS: usize = 3;
const TAG: Tag = Tag::new(7, 2, Payload::KeyValue);

/// Rank 0 aborts while the others wait for its message.
fn fail() -> Vec<CommError> {
    let results = Loopback::run(
        RANKS,
        Duration::from_secs(60),
        |endpoint: LoopbackEndpoint<HostBuffer>| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let expected = Expected {
                dtype: DType::F32,
                len: 1,
            };
            if communicator.rank() == 0 {
                barrier(&communicator).unwrap();
                communicator.abort("staged");
                return barrier(&communicator).unwrap_err();
            }
            let receive = communicator.transport().irecv(0, TAG, expected).unwrap();
            barrier(&communicator).unwrap();
            receive.wait().unwrap_err()
        },
    );
    results.into_iter().map(|result| result.unwrap()).collect()
}

/// The lines of each rank in a file, which must be complete.
fn lines_of_ranks(path: &Path) -> BTreeMap<u64, Vec<Value>> {
    let text = fs::read_to_string(path).unwrap();
    let mut ranks: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        ranks
            .entry(line["rank"].as_u64().unwrap())
            .or_default()
            .push(line);
    }
    ranks
}

fn assert_tells_the_failure(rank: u64, lines: &[Value]) {
    let error = lines[0]["error"].as_str().unwrap();
    assert!(error.contains("rank 0 aborted: staged"), "{error}");
    let calls: Vec<&str> = lines[1..]
        .iter()
        .map(|line| line["call"].as_str().unwrap())
        .collect();
    let expected: &[&str] = if rank == 0 {
        &["all_gather", "poison"]
    } else {
        &["receive", "all_gather"]
    };
    assert!(calls.starts_with(expected), "{calls:?}");
    if rank != 0 {
        let receive = &lines[1];
        assert_eq!(
            (&receive["peer"], &receive["tag"]["operation"]),
            (&0.into(), &7.into())
        );
        assert_eq!(receive["bytes"], 4);
    }
}

/// Waits for a child in time, or ends it.
fn succeeds(mut child: Child) -> bool {
    let (killer, killed) = mpsc::channel::<()>();
    let id = child.id();
    let watchdog = thread::spawn(move || {
        if killed.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").arg(id.to_string()).status();
        }
    });
    let status = child.wait().unwrap();
    drop(killer);
    watchdog.join().unwrap();
    status.success()
}

/// This test is run again as a process of its own, with the variable set.
#[test]
fn a_failure_writes_the_records_of_all_ranks() {
    if env::var_os(FLIGHT_RECORD_VARIABLE).is_some() {
        fail();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, files) in [("all-%p", 1), ("rank-%r-of-%p", RANKS)] {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_failure_writes_the_records_of_all_ranks"])
            .env(FLIGHT_RECORD_VARIABLE, folder.path().join(name))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = child.id();
        assert!(succeeds(child));
        let mut ranks = BTreeMap::new();
        for number in 0..files {
            let name = name
                .replace("%p", &process.to_string())
                .replace("%r", &number.to_string());
            ranks.extend(lines_of_ranks(&folder.path().join(name)));
        }
        assert_eq!(ranks.len(), RANKS);
        for (&rank, lines) in &ranks {
            assert_tells_the_failure(rank, lines);
        }
    }
}

#[test]
fn an_error_shows_its_history_on_demand() {
    let errors = fail();
    for (rank, error) in errors.iter().enumerate() {
        assert!(!error.to_string().contains('\n'), "{error}");
        let long = format!("{error:#}");
        assert!(
            long.contains(&format!("operations of rank {rank},")),
            "{long}"
        );
        assert!(long.contains("operations of rank 0,"), "{long}");
    }
    let long = format!("{:#}", errors[1]);
    let receive = long.lines().find(|line| line.contains("receive")).unwrap();
    assert!(
        receive.contains(&TAG.to_string()) && receive.contains("failed"),
        "{long}"
    );
}

#[test]
fn a_communicator_writes_its_record_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("record.json");
    let communicator = Communicator::<HostBuffer>::single();
    barrier(&communicator).unwrap();
    communicator.dump_flight_record(&path).unwrap();
    let lines = &lines_of_ranks(&path)[&0];
    assert_eq!(lines[0]["error"], Value::Null);
    assert_eq!(
        (&lines[1]["call"], &lines[1]["progress"]),
        (&"all_gather".into(), &"ended".into())
    );
    assert_eq!(lines.len(), 2);
    assert_eq!(communicator.flight_record().records.len(), 1);

    let nowhere = folder.path().join("absent").join("record.json");
    assert!(communicator.dump_flight_record(&nowhere).is_err());
}
