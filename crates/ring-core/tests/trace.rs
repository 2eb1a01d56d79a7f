//! What a trace shows of a forward and a backward on four ranks.

use std::{
    collections::BTreeMap,
    env, fs,
    path::PathBuf,
    process::{self, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use ring_comm::{
    Communicator, Loopback, Trace,
    buffer::{Buffer, DType, HostBuffer},
    collective::barrier,
    trace::TRACE_VARIABLE,
};
use ring_core::{
    AttentionSpec, DropoutSeed, Inputs, Pattern, Plan, Saved, Shape, Sharding, backward, forward,
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};
use serde_json::Value;

const RANKS: usize = 4;

/// A file of this test's own, removed when done with.
struct TraceFile(PathBuf);

impl TraceFile {
    fn new(name: &str) -> Self {
        Self(env::temp_dir().join(format!("ring-{name}-{}.json", process::id())))
    }

    fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.0).unwrap();
        let mut file: Value = serde_json::from_str(&text).unwrap();
        serde_json::from_value(file["traceEvents"].take()).unwrap()
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        // A file that is left behind does no harm.
        let _ = fs::remove_file(&self.0);
    }
}

fn spec() -> AttentionSpec {
    let shape = Shape {
        batch: 1,
        query_heads: 2,
        kv_heads: 2,
        head_dim: 16,
    };
    AttentionSpec::new(Pattern::full().causal(), shape, 512)
        .and_then(|spec| spec.sharded(Sharding::Zigzag, RANKS))
        .unwrap()
}

/// A forward and, if `fails` is not set, a backward; a gradient of another size makes the backward fail.
fn attend(communicator: &Communicator<HostBuffer>, fails: bool) {
    let plan = Plan::new(&spec(), communicator.rank()).unwrap();
    let problem = plan.problem();
    let kernels = CpuKernels::new(1).unwrap();
    let buffer = HostBuffer::zeros(DType::F32, 2 * problem.queries * 16);
    let layout = RowLayout::contiguous(2, problem.queries, 16);
    let tensor = || Tensor {
        data: buffer.view(),
        layout: &layout,
    };
    let inputs = || Inputs {
        query: tensor(),
        key: tensor(),
        value: tensor(),
        dropout: DropoutSeed::default(),
    };
    let result = forward(&kernels, communicator, &plan, inputs()).unwrap();
    // Or a rank that fails at once would end the forward of the others.
    barrier(communicator).unwrap();
    let nothing = HostBuffer::zeros(DType::F32, 0);
    let saved = Saved {
        operation: result.operation,
        output: result.output.view(),
        log_sum_exp: result.log_sum_exp.view(),
        grad_output: if fails {
            Tensor {
                data: nothing.view(),
                layout: &layout,
            }
        } else {
            tensor()
        },
        grad_log_sum_exp: None,
    };
    let gradients = backward(&kernels, communicator, &plan, inputs(), saved);
    assert_eq!(gradients.is_err(), fails);
}

fn on_all_ranks(work: impl Fn(Communicator<HostBuffer>) + Sync) {
    let deadline = Duration::from_secs(60);
    let results = Loopback::run(RANKS, deadline, |endpoint| {
        work(Communicator::new(Arc::new(endpoint)));
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

/// From when to when, in microseconds.
type Interval = (f64, f64);

fn overlap(a: Interval, b: Interval) -> bool {
    a.0 < b.1 && b.0 < a.1
}

/// What a rank's thread did, of one category.
fn spans(events: &[Value], rank: usize, category: &str) -> Vec<Interval> {
    of_rank(events, rank)
        .filter(|event| event["ph"] == "X" && event["cat"] == category)
        .map(interval)
        .collect()
}

/// The kernels that compute attention, as against those that pack or add rows.
fn attention_kernels(events: &[Value], rank: usize) -> impl Iterator<Item = &Value> {
    of_rank(events, rank)
        .filter(|event| event["cat"] == "compute")
        .filter(|event| event["name"] == "forward" || event["name"] == "backward")
}

fn interval(event: &Value) -> Interval {
    let (start, length) = (number(event, "ts"), number(event, "dur"));
    (start, start + length)
}

/// A rank's transfers: name, hop, and from when to when.
fn transfers(events: &[Value], rank: usize) -> Vec<(String, u64, Interval)> {
    let mut by_id: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for event in of_rank(events, rank).filter(|event| event["cat"] == "transfer") {
        by_id
            .entry(event["id"].as_u64().unwrap())
            .or_default()
            .push(event);
    }
    let transfer = |events: Vec<&Value>| {
        let [begun, arrived, ended] = events[..] else {
            panic!("not three events: {events:?}")
        };
        let phases = [begun, arrived, ended].map(|event| event["ph"].as_str().unwrap());
        assert_eq!(phases, ["b", "n", "e"]);
        assert!(begun["args"]["bytes"].as_u64().unwrap() > 0);
        assert_ne!(begun["args"]["peer"], rank);
        (
            begun["name"].as_str().unwrap().to_owned(),
            begun["args"]["hop"].as_u64().unwrap(),
            (number(begun, "ts"), number(ended, "ts")),
        )
    };
    by_id.into_values().map(transfer).collect()
}

fn of_rank(events: &[Value], rank: usize) -> impl Iterator<Item = &Value> {
    events
        .iter()
        .filter(move |event| event["pid"] == rank && event["ph"] != "M")
}

fn number(event: &Value, field: &str) -> f64 {
    event[field].as_f64().unwrap()
}

#[test]
fn every_transfer_of_keys_and_values_lies_over_computing() {
    let file = TraceFile::new("overlap");
    let trace = Trace::create(&file.0).unwrap();
    on_all_ranks(|communicator| attend(&communicator.with_trace(&trace), false));
    let events = file.events();
    for rank in 0..RANKS {
        let attending: Vec<Interval> = attention_kernels(&events, rank).map(interval).collect();
        let transfers = transfers(&events, rank);
        for name in [
            "send keys and values",
            "receive keys and values",
            "send gradients",
            "receive gradients",
        ] {
            // Keys and values go round in the forward and in the backward, gradients in the backward.
            let passes = if name.ends_with("values") { 2 } else { 1 };
            for hop in 1..RANKS as u64 {
                let found = transfers.iter().filter(|t| t.0 == name && t.1 == hop);
                assert_eq!(found.count(), passes, "{name}, hop {hop} of rank {rank}");
            }
        }
        for (name, hop, interval) in transfers {
            // After the last hop's block nothing is left to compute while its gradients go home.
            if name.ends_with("gradients") && hop + 1 == RANKS as u64 {
                continue;
            }
            assert!(
                attending.iter().any(|&kernel| overlap(kernel, interval)),
                "{name}, hop {hop} of rank {rank}"
            );
        }
        let on_slots =
            attention_kernels(&events, rank).filter(|event| event["args"]["hop"].is_u64());
        assert_eq!(on_slots.count(), 2 * (RANKS - 1));
    }
}

#[test]
fn each_rank_has_a_row_of_its_name_that_tells_what_it_did_in_order() {
    let file = TraceFile::new("rows");
    let trace = Trace::create(&file.0).unwrap();
    on_all_ranks(|communicator| attend(&communicator.with_trace(&trace), false));
    let events = file.events();
    let mut names: Vec<(u64, &str)> = events
        .iter()
        .filter(|event| event["name"] == "thread_name")
        .map(|event| {
            let name = event["args"]["name"].as_str().unwrap();
            (event["pid"].as_u64().unwrap(), name)
        })
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [(0, "rank 0"), (1, "rank 1"), (2, "rank 2"), (3, "rank 3")]
    );
    for rank in 0..RANKS {
        let moments: Vec<f64> = of_rank(&events, rank)
            .map(|event| number(event, "ts"))
            .collect();
        assert!(moments.is_sorted(), "rank {rank}");

        let passes = spans(&events, rank, "pass");
        assert_eq!(passes.len(), 2);
        let (computing, waiting) = (
            spans(&events, rank, "compute"),
            spans(&events, rank, "wait"),
        );
        // One comparison of plans before each pass, then every request is waited for: two forward, four backward in a hop.
        assert_eq!(waiting.len(), 2 + 6 * (RANKS - 1));
        for (index, &kernel) in computing.iter().enumerate() {
            assert!(passes.iter().any(|&pass| overlap(pass, kernel)));
            let others = waiting.iter().chain(&computing[..index]);
            assert!(others.into_iter().all(|&other| !overlap(other, kernel)));
        }
    }
}

#[test]
fn a_failed_pass_leaves_a_sound_file() {
    let file = TraceFile::new("failed");
    let trace = Trace::create(&file.0).unwrap();
    on_all_ranks(|communicator| attend(&communicator.with_trace(&trace), true));
    let events = file.events();
    for rank in 0..RANKS {
        assert_eq!(spans(&events, rank, "pass").len(), 2);
    }
}

#[test]
fn without_a_trace_nothing_is_recorded() {
    let file = TraceFile::new("off");
    let trace = Trace::create(&file.0).unwrap();
    on_all_ranks(|communicator| {
        // A communicator knows of the trace it was given, not of its clone's.
        drop(communicator.clone().with_trace(&trace));
        assert!(communicator.trace().is_none());
        attend(&communicator, false);
    });
    assert!(file.events().is_empty());
}

/// The variable counts for a whole process, so this test runs itself once more, in a process where it is set.
#[test]
fn the_environment_names_a_file_for_all_ranks_of_a_process() {
    const NAME: &str = "the_environment_names_a_file_for_all_ranks_of_a_process";
    const INNER: &str = "RING_TRACE_TEST_INNER";
    if env::var_os(INNER).is_some() {
        on_all_ranks(|communicator| attend(&communicator, false));
        return;
    }
    let file = TraceFile::new("%p");
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(TRACE_VARIABLE, &file.0)
        .env(INNER, "yes")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    let name = file
        .0
        .to_str()
        .unwrap()
        .replace("%p", &child.id().to_string());
    let events = TraceFile(name.into()).events();
    for rank in 0..RANKS {
        assert_eq!(spans(&events, rank, "pass").len(), 2);
    }
}
