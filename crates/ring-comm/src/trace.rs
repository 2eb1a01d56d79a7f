//! What ranks do when, as a file for `chrome://tracing` or <https://ui.perfetto.dev>: [`Trace`].
//!
//! Every rank is a process of the trace, with one row named after it for what its thread does: passes, and within them
//! computing and waiting. Transfers go on beside that, so they are asynchronous events of the same process, which both viewers
//! draw in rows right under the rank's: from the moment a request is posted to the end of the wait for it, with a mark where
//! the message was taken or had arrived. What lies over computing is hidden by it, what lies over waiting is not.
//!
//! Set `RING_TRACE=FILE` to trace every [`Communicator`](crate::Communicator) of a process; ranks that are threads of it share
//! the file. Of several processes each needs a file of its own: `%p` in the name stands for the number of the process.
//! Groups in one process that have a rank number in common have its row in common. The file is valid JSON after every pass.
//! Without the variable nothing is recorded.

use std::{
    collections::BTreeSet,
    env,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::Path,
    process,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use serde_json::{Value, json};

use crate::transport::Rank;

/// Names the file that every communicator of a process traces to.
pub const TRACE_VARIABLE: &str = "RING_TRACE";

/// A trace file under way. A clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Trace {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    next_transfer: AtomicU64,
    sink: Mutex<Sink>,
}

/// The file, complete but for what ranks have not yet handed over.
#[derive(Debug)]
struct Sink {
    file: File,
    /// Where the next event goes: before the end of the list.
    end: u64,
    is_empty: bool,
    named: BTreeSet<Rank>,
    has_failed: bool,
}

const HEAD: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
const TAIL: &str = "\n]}\n";

/// What a rank's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// A whole forward or backward pass.
    Pass,
    /// A kernel.
    Compute,
    /// Nothing, for want of a message or of somebody to take one.
    Wait,
}

/// Particulars of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Details {
    /// Number of the operation.
    pub operation: u64,
    /// Distance of the hop; 0 for what concerns own rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop: Option<usize>,
    /// The other rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Rank>,
    /// Size of the message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<usize>,
}

/// A message on its way, as one of its ranks sees it.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// What goes where.
    pub name: &'static str,
    /// When the send or receive was posted.
    pub posted: Instant,
    /// When the message was taken or had arrived.
    pub completed: Instant,
    /// When the wait for it was over.
    pub ended: Instant,
}

#[derive(Debug, Serialize)]
struct Event {
    name: &'static str,
    cat: &'static str,
    ph: &'static str,
    /// Microseconds since the trace was begun.
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: Rank,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    args: Details,
}

/// One rank's part of a trace.
#[derive(Debug)]
pub struct RankTrace {
    trace: Trace,
    rank: Rank,
    events: Mutex<Vec<Event>>,
}

impl Trace {
    /// A trace to a new file, which replaces one of the same name.
    ///
    /// # Errors
    /// What the operating system says if the file cannot be written.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        let mut file = File::create(path)?;
        file.write_all(HEAD.as_bytes())?;
        file.write_all(TAIL.as_bytes())?;
        let sink = Sink {
            file,
            end: HEAD.len() as u64,
            is_empty: true,
            named: BTreeSet::new(),
            has_failed: false,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                started: Instant::now(),
                next_transfer: AtomicU64::new(0),
                sink: Mutex::new(sink),
            }),
        })
    }

    /// The trace that [`TRACE_VARIABLE`] asks for, begun when first asked for.
    pub(crate) fn of_this_process() -> Option<&'static Self> {
        static TRACE: OnceLock<Option<Trace>> = OnceLock::new();
        let trace = TRACE.get_or_init(|| {
            let path = env::var(TRACE_VARIABLE).ok()?;
            let path = path.replace("%p", &process::id().to_string());
            let refused = |error: &io::Error| warn(&format!("{path} cannot be written: {error}"));
            Self::create(&path).inspect_err(refused).ok()
        });
        trace.as_ref()
    }

    pub(crate) fn of_rank(&self, rank: Rank) -> RankTrace {
        RankTrace {
            trace: self.clone(),
            rank,
            events: Mutex::default(),
        }
    }

    fn sink(&self) -> MutexGuard<'_, Sink> {
        self.shared
            .sink
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn microseconds(&self, moment: Instant) -> f64 {
        let since = moment.saturating_duration_since(self.shared.started);
        since.as_nanos() as f64 / 1e3
    }
}

impl RankTrace {
    /// Does `work` and records how long it took.
    pub fn time<T>(
        &self,
        activity: Activity,
        name: &'static str,
        details: Details,
        work: impl FnOnce() -> T,
    ) -> T {
        let started = Instant::now();
        let result = work();
        let ended = Instant::now();
        self.record(activity, name, details, started, ended);
        result
    }

    /// Records what the rank's thread did from `started` to `ended`.
    pub fn record(
        &self,
        activity: Activity,
        name: &'static str,
        details: Details,
        started: Instant,
        ended: Instant,
    ) {
        let ts = self.trace.microseconds(started);
        let event = Event {
            name,
            cat: activity.name(),
            ph: "X",
            ts,
            dur: Some(self.trace.microseconds(ended) - ts),
            pid: self.rank,
            tid: 0,
            id: None,
            args: details,
        };
        self.events().push(event);
    }

    /// Records a message that this rank sent or received.
    pub fn record_transfer(&self, transfer: Transfer, details: Details) {
        let id = self
            .trace
            .shared
            .next_transfer
            .fetch_add(1, Ordering::Relaxed);
        let completed = transfer.completed.clamp(transfer.posted, transfer.ended);
        let mut events = self.events();
        for (ph, moment) in [
            ("b", transfer.posted),
            ("n", completed),
            ("e", transfer.ended),
        ] {
            events.push(Event {
                name: transfer.name,
                cat: "transfer",
                ph,
                ts: self.trace.microseconds(moment),
                dur: None,
                pid: self.rank,
                tid: 0,
                id: Some(id),
                args: details,
            });
        }
    }

    /// Writes what was recorded, in the order of time.
    pub fn flush(&self) {
        let mut events = std::mem::take(&mut *self.events());
        events.sort_by(|a, b| a.ts.total_cmp(&b.ts));
        self.trace.sink().write(self.rank, &events);
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RankTrace {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Activity {
    fn name(self) -> &'static str {
        match self {
            Activity::Pass => "pass",
            Activity::Compute => "compute",
            Activity::Wait => "wait",
        }
    }
}

impl Sink {
    /// Appends events; a trace that cannot be written is given up, with one warning, and what it observes goes on.
    fn write(&mut self, rank: Rank, events: &[Event]) {
        if self.has_failed || events.is_empty() {
            return;
        }
        let mut list = Vec::new();
        if self.named.insert(rank) {
            list.extend(names(rank).map(|event| event.to_string()));
        }
        let written = |event| serde_json::to_string(event).expect("an event is plain data");
        list.extend(events.iter().map(written));
        if let Err(error) = self.append(&list.join(",\n")) {
            self.has_failed = true;
            warn(&format!("given up: {error}"));
        }
    }

    fn append(&mut self, events: &str) -> io::Result<()> {
        let separator = if self.is_empty { "" } else { ",\n" };
        let text = format!("{separator}{events}{TAIL}");
        self.file.seek(SeekFrom::Start(self.end))?;
        self.file.write_all(text.as_bytes())?;
        self.end += (text.len() - TAIL.len()) as u64;
        self.is_empty = false;
        Ok(())
    }
}

/// Names a rank's rows, and says when they were begun, so that files of several processes can be put side by side.
fn names(rank: Rank) -> impl Iterator<Item = Value> {
    let name = format!("rank {rank}");
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64);
    [
        ("process_name", json!({ "name": name, "named_at_unix_us": unix })),
        ("process_sort_index", json!({ "sort_index": rank })),
        ("thread_name", json!({ "name": name })),
    ]
    .into_iter()
    .map(move |(what, args)| json!({ "name": what, "ph": "M", "ts": 0, "pid": rank, "tid": 0, "args": args }))
}

fn warn(what: &str) {
    eprintln!("warning: {TRACE_VARIABLE}: {what}");
}
