//! The last operations of a rank, so that an error can tell how it came about: [`FlightRecorder`].
//!
//! A backend keeps one recorder for each rank of its process: every send, receive and all-gather is an entry of it, from the
//! call to its end, and so is what ends the group. The memory is allocated once and recording costs no allocation, so it is
//! always on. Every [`CommError`] carries what the recorder of the reporting rank held at that moment
//! ([`CommError::history`]).
//!
//! Set `RING_FLIGHT_RECORD=FILE` to write the records as lines of JSON when a group fails: for every rank a line with the
//! error, then one line for each of its operations, oldest first. `%p` in the name stands for the number of the process, `%r`
//! for that of the rank; ranks that are threads of one process may share a file, processes may not.

use std::{
    collections::BTreeSet,
    env, fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::{
    error::CommError,
    transport::{Rank, Tag},
};

/// Operations that a [`FlightRecorder`] remembers unless told otherwise.
pub const RECORDED_OPERATIONS: usize = 64;

/// Names the file to which the records of a group that fails are written.
pub const FLIGHT_RECORD_VARIABLE: &str = "RING_FLIGHT_RECORD";

/// What a rank did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// It sent a message.
    Send,
    /// It received a message.
    Receive,
    /// It gathered control data of all ranks, or of some.
    AllGather,
    /// It poisoned the group.
    Poison,
    /// It left the group.
    Depart,
}

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// The call has begun: a send waits for room, an all-gather for the other ranks.
    Begun,
    /// The request is posted, and the peer has not met it yet.
    Posted,
    /// The message was taken, or has arrived, and the request is not yet waited for.
    Matched,
    /// It is over, with success.
    Ended,
    /// It has returned an error.
    Failed,
    /// Its request was dropped.
    Dropped,
}

/// Names one operation among those of its rank; they are numbered from 0.
pub type RecordNumber = u64;

/// One operation of a rank. Times are since its group was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// How many operations the rank had begun before.
    pub number: RecordNumber,
    /// What the rank did.
    pub call: Call,
    /// With whom; `None` if with all, or alone.
    pub peer: Option<Rank>,
    /// About which message.
    pub tag: Option<Tag>,
    /// Size of the message in bytes: of a receive what it expects, of an all-gather this rank's part.
    pub bytes: usize,
    /// When the call began.
    #[serde(rename = "began_us", serialize_with = "as_microseconds")]
    pub began: Duration,
    /// How far it has come.
    pub progress: Progress,
    /// When it had come that far.
    #[serde(rename = "since_us", serialize_with = "as_microseconds")]
    pub since: Duration,
}

/// Remembers the last operations of one rank. A backend locks it with whatever it locks its requests.
#[derive(Debug)]
pub struct FlightRecorder {
    rank: Rank,
    started: Instant,
    started_at: SystemTime,
    capacity: usize,
    /// Operation `n` at `n % capacity`.
    records: Vec<Record>,
    next: RecordNumber,
}

/// What a [`FlightRecorder`] held at some moment. Shown as a table, oldest operation first.
#[derive(Clone, PartialEq, Eq)]
pub struct FlightRecord {
    /// Whose operations they are.
    pub rank: Rank,
    /// When the group was made, by the clock of the machine.
    pub started_at: SystemTime,
    /// The moment, since the group was made.
    pub now: Duration,
    /// The last operations, oldest first.
    pub records: Vec<Record>,
}

impl FlightRecorder {
    /// A recorder of `rank`, by its number among all ranks, that remembers [`RECORDED_OPERATIONS`]; time begins now.
    pub fn new(rank: Rank) -> Self {
        Self::with_capacity(rank, RECORDED_OPERATIONS)
    }

    /// As [`new`](Self::new), and remembers `capacity` operations, at least one.
    pub fn with_capacity(rank: Rank, capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            rank,
            started: Instant::now(),
            started_at: SystemTime::now(),
            capacity,
            records: Vec::with_capacity(capacity),
            next: 0,
        }
    }

    /// Records that a call begins; forgets the oldest one if there is no room. `bytes` is the size of its message.
    pub fn begin(
        &mut self,
        call: Call,
        peer: Option<Rank>,
        tag: Option<Tag>,
        bytes: usize,
    ) -> RecordNumber {
        let began = self.started.elapsed();
        let record = Record {
            number: self.next,
            call,
            peer,
            tag,
            bytes,
            began,
            progress: Progress::Begun,
            since: began,
        };
        let index = self.index(record.number);
        match self.records.get_mut(index) {
            Some(oldest) => *oldest = record,
            None => self.records.push(record),
        }
        self.next += 1;
        record.number
    }

    /// Records how far an operation has come. Does nothing if it is over, or forgotten.
    pub fn advance(&mut self, number: RecordNumber, progress: Progress) {
        let since = self.started.elapsed();
        let index = self.index(number);
        if let Some(record) = self.records.get_mut(index)
            && record.number == number
            && record.is_pending()
        {
            record.progress = progress;
            record.since = since;
        }
    }

    /// What it holds now.
    pub fn snapshot(&self) -> FlightRecord {
        let mut records = self.records.clone();
        records.sort_by_key(|record| record.number);
        FlightRecord {
            rank: self.rank,
            started_at: self.started_at,
            now: self.started.elapsed(),
            records,
        }
    }

    fn index(&self, number: RecordNumber) -> usize {
        (number % self.capacity as u64) as usize
    }
}

impl Record {
    /// Whether the operation has neither succeeded nor failed.
    pub fn is_pending(&self) -> bool {
        match self.progress {
            Progress::Begun | Progress::Posted | Progress::Matched => true,
            Progress::Ended | Progress::Failed | Progress::Dropped => false,
        }
    }
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Call::Send => "send",
            Call::Receive => "receive",
            Call::AllGather => "all-gather",
            Call::Poison => "poison",
            Call::Depart => "depart",
        }
    }
}

impl Progress {
    fn name(self, call: Call) -> &'static str {
        match (self, call) {
            (Progress::Begun, _) => "begun",
            (Progress::Posted, _) => "posted",
            (Progress::Matched, Call::Receive) => "arrived",
            (Progress::Matched, _) => "taken",
            (Progress::Ended, _) => "ended",
            (Progress::Failed, _) => "failed",
            (Progress::Dropped, _) => "dropped",
        }
    }
}

impl FlightRecord {
    /// The operations that had neither succeeded nor failed.
    pub fn pending(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|record| record.is_pending())
    }

    /// Writes a line of JSON that says whose record it is and, if the group has failed, why; then one for each operation.
    ///
    /// # Errors
    /// What `output` says if it cannot be written.
    pub fn write_json_lines(
        &self,
        output: &mut impl Write,
        cause: Option<&CommError>,
    ) -> io::Result<()> {
        let started = self.started_at.duration_since(UNIX_EPOCH);
        let head = Head {
            rank: self.rank,
            process: process::id(),
            started_unix_us: started.map_or(0, |since| since.as_micros() as u64),
            now_us: self.now.as_micros() as u64,
            error: cause.map(CommError::to_string),
        };
        write_line(output, &head)?;
        let rank = self.rank;
        let mut lines = self.records.iter().map(|record| Line { rank, record });
        lines.try_for_each(|line| write_line(output, &line))
    }

    /// Writes it to a file, in which `%p` stands for the number of the process and `%r` for that of the rank. The file is
    /// replaced, unless this process has written to it before: then the lines are appended.
    ///
    /// # Errors
    /// What the operating system says if the file cannot be written.
    pub fn write_to(&self, path: &Path, cause: Option<&CommError>) -> io::Result<()> {
        let mut lines = Vec::new();
        self.write_json_lines(&mut lines, cause)?;
        append(&self.expand(path), &lines)
    }

    /// Writes it to the file that [`FLIGHT_RECORD_VARIABLE`] names, if it names one. Backends call it for the ranks of their
    /// process when their group fails; what cannot be written is a warning.
    pub fn report(&self, cause: &CommError) {
        let Some(path) = path_asked_for() else { return };
        if let Err(error) = self.write_to(path, Some(cause)) {
            let path = path.display();
            eprintln!("warning: {FLIGHT_RECORD_VARIABLE}: {path} cannot be written: {error}");
        }
    }

    fn expand(&self, path: &Path) -> PathBuf {
        match path.to_str() {
            None => path.to_owned(),
            Some(name) => name
                .replace("%p", &process::id().to_string())
                .replace("%r", &self.rank.to_string())
                .into(),
        }
    }
}

/// A line of a file, before those of a rank's operations.
#[derive(Serialize)]
struct Head {
    rank: Rank,
    process: u32,
    started_unix_us: u64,
    now_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    rank: Rank,
    #[serde(flatten)]
    record: &'a Record,
}

fn write_line(output: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *output, line)?;
    output.write_all(b"\n")
}

fn as_microseconds<S: serde::Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_micros() as u64)
}

/// The file that the environment names, asked once.
pub(crate) fn path_asked_for() -> Option<&'static Path> {
    static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
    let path = PATH.get_or_init(|| env::var_os(FLIGHT_RECORD_VARIABLE).map(PathBuf::from));
    path.as_deref()
}

/// Replaces the file the first time, and extends it later.
fn append(path: &Path, lines: &[u8]) -> io::Result<()> {
    static WRITTEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut file = if written.contains(path) {
        OpenOptions::new().append(true).create(true).open(path)?
    } else {
        File::create(path)?
    };
    written.insert(path.to_owned());
    file.write_all(lines)
}

/// Short, so that an error printed for debugging stays readable.
impl fmt::Debug for FlightRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlightRecord")
            .field("rank", &self.rank)
            .field("records", &self.records.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for FlightRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, rank, now) = (self.records.len(), self.rank, self.now.as_secs_f64());
        writeln!(
            f,
            "the last {count} operations of rank {rank}, {now:.6} s after its group was made:"
        )?;
        write!(
            f,
            "{:>8} {:>12} {:<10} {:>5} {:>12}  state and message",
            "number", "began", "call", "peer", "bytes"
        )?;
        self.records
            .iter()
            .try_for_each(|record| write!(f, "\n{record}"))
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = self
            .peer
            .map_or_else(|| "-".to_owned(), |peer| peer.to_string());
        write!(
            f,
            "{:>8} {:>10.6} s {:<10} {peer:>5} {:>12}  {} at {:.6} s",
            self.number,
            self.began.as_secs_f64(),
            self.call.name(),
            self.bytes,
            self.progress.name(self.call),
            self.since.as_secs_f64(),
        )?;
        match self.tag {
            None => Ok(()),
            Some(tag) => write!(f, ", {tag}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::CommErrorKind, transport::Payload};

    const TAG: Tag = Tag::new(4, 2, Payload::KeyValue);

    fn recorder() -> FlightRecorder {
        FlightRecorder::with_capacity(1, 3)
    }

    fn send(recorder: &mut FlightRecorder) -> RecordNumber {
        recorder.begin(Call::Send, Some(0), Some(TAG), 12)
    }

    #[test]
    fn the_oldest_operation_is_forgotten_and_the_memory_stays() {
        let mut recorder = recorder();
        let memory = recorder.records.as_ptr();
        let first = send(&mut recorder);
        for _ in 0..4 {
            send(&mut recorder);
        }
        recorder.advance(first, Progress::Ended);
        let record = recorder.snapshot();
        let numbers: Vec<_> = record.records.iter().map(|record| record.number).collect();
        assert_eq!(numbers, [2, 3, 4]);
        assert_eq!(
            record.pending().count(),
            3,
            "the first has no place here any more"
        );
        assert_eq!(recorder.records.as_ptr(), memory);
    }

    #[test]
    fn what_is_over_stays_as_it_ended() {
        let mut recorder = recorder();
        let send = send(&mut recorder);
        recorder.advance(send, Progress::Matched);
        assert_eq!(recorder.snapshot().pending().count(), 1);
        recorder.advance(send, Progress::Failed);
        recorder.advance(send, Progress::Dropped);
        let record = recorder.snapshot();
        assert_eq!(record.records[0].progress, Progress::Failed);
        assert_eq!(record.pending().count(), 0);
    }

    #[test]
    fn the_table_has_a_line_for_each_operation() {
        let mut recorder = recorder();
        send(&mut recorder);
        let gather = recorder.begin(Call::AllGather, None, None, 5);
        recorder.advance(gather, Progress::Ended);
        let table = recorder.snapshot().to_string();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert!(
            lines[0].starts_with("the last 2 operations of rank 1"),
            "{table}"
        );
        assert!(
            lines[2].contains("send") && lines[2].contains(&TAG.to_string()),
            "{table}"
        );
        assert!(
            lines[3].contains("all-gather") && lines[3].contains("ended at"),
            "{table}"
        );
    }

    #[test]
    fn a_file_is_replaced_first_and_extended_then() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("record-%r.json");
        let path = folder.path().join("record-1.json");
        std::fs::write(&path, "of another process\n").unwrap();
        let mut recorder = recorder();
        send(&mut recorder);
        let cause = CommError::new(1, Some(0), Some(TAG), CommErrorKind::Departed);
        recorder.snapshot().write_to(&name, Some(&cause)).unwrap();
        recorder.snapshot().write_to(&name, None).unwrap();

        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!(lines[0]["error"], cause.to_string());
        assert_eq!(lines[2]["error"], serde_json::Value::Null);
        for line in [&lines[1], &lines[3]] {
            assert_eq!(
                (&line["rank"], &line["call"], &line["progress"]),
                (&1.into(), &"send".into(), &"begun".into())
            );
            assert_eq!(line["tag"]["operation"], 4);
        }
    }
}
