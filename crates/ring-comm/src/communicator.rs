//! A rank's handle on its group, shared by everything on that rank that communicates.
//!
//! The transport moves single messages; the [`Communicator`] keeps the ranks in step. It numbers the operations, so that
//! no two use the same tags, and lets the ranks compare what they are about to do. Both rest on one rule: **every rank
//! calls [`next_operation`](Communicator::next_operation), [`all_gather_bytes`](Communicator::all_gather_bytes),
//! [`agree`](Communicator::agree), [`agree_once`](Communicator::agree_once) and the [collectives](crate::collective) in
//! the same order.** Ranks that break it get an error within the deadline, which names a rank that is out of step.

use std::{
    collections::VecDeque,
    fmt, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    agreement::{Terms, first_disagreement},
    buffer::{Buffer, HostBuffer},
    checksum::Fnv1a,
    error::{CommError, CommErrorKind, Disagreement},
    loopback::Loopback,
    pool::BufferPool,
    recorder::FlightRecord,
    staged::{Staged, Staging},
    subgroup::SubGroup,
    trace::{Activity, Details, RankTrace, Trace},
    transport::{GroupId, Rank, Traffic, Transport},
};

/// Agreements that [`Communicator::agree_once`] remembers; the oldest is forgotten first, on every rank alike.
pub const REMEMBERED_AGREEMENTS: usize = 64;

/// A transport with what its users share: the number of the next operation, what was agreed upon, memory for messages.
///
/// A clone is another handle on the same. Make one communicator per endpoint and clone it: two made from the same
/// endpoint would give their operations the same numbers.
pub struct Communicator<B: Buffer> {
    shared: Arc<Shared<B>>,
    trace: Option<Arc<RankTrace>>,
    ranks_on_this_machine: usize,
}

struct Shared<B: Buffer> {
    transport: Arc<dyn Transport<B>>,
    order: Arc<Order>,
    buffers: BufferPool<B>,
}

/// What keeps the ranks in step, whatever the buffers are.
#[derive(Default)]
struct Order {
    next_operation: AtomicU64,
    /// The latest agreements, oldest first.
    agreements: Mutex<VecDeque<Agreement>>,
}

/// The hash of the terms, and the largest of the values that came with them.
#[derive(Clone, Copy)]
struct Agreement {
    hash: u64,
    largest: u64,
}

impl<B: Buffer> Clone for Communicator<B> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            trace: self.trace.clone(),
            ranks_on_this_machine: self.ranks_on_this_machine,
        }
    }
}

impl<B: Buffer> fmt::Debug for Communicator<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("transport", &self.shared.transport)
            .field("next_operation", &self.shared.order.next_operation)
            .finish_non_exhaustive()
    }
}

impl<B: Buffer> Communicator<B> {
    /// Communicates over `transport`; traced if the environment says so (see [`trace`](crate::trace)).
    pub fn new(transport: Arc<dyn Transport<B>>) -> Self {
        let rank = transport.global_rank(transport.rank());
        Self {
            trace: Trace::of_this_process().map(|trace| Arc::new(trace.of_rank(rank))),
            ranks_on_this_machine: transport.world_size(),
            shared: Arc::new(Shared {
                transport,
                order: Arc::default(),
                buffers: BufferPool::default(),
            }),
        }
    }

    /// The same communicator, knowing how many of all ranks run on this machine.
    pub(crate) fn with_ranks_on_this_machine(self, ranks: usize) -> Self {
        Self {
            ranks_on_this_machine: ranks,
            ..self
        }
    }

    /// Number of ranks that share this machine's processors, this one among them, also those of other groups that
    /// were split off the same whole. Ranks that their launcher has confined to other processors are not counted.
    pub fn ranks_on_this_machine(&self) -> usize {
        self.ranks_on_this_machine
    }

    /// The same communicator, traced to `trace`; clones made before are not.
    #[must_use]
    pub fn with_trace(self, trace: &Trace) -> Self {
        let rank = self.transport().global_rank(self.rank());
        let trace = Arc::new(trace.of_rank(rank));
        Self {
            trace: Some(trace),
            ..self
        }
    }

    /// This rank's part of the trace, if there is one.
    pub fn trace(&self) -> Option<&RankTrace> {
        self.trace.as_deref()
    }

    /// Does `work`, and records it if there is a trace.
    pub fn timed<T>(
        &self,
        activity: Activity,
        name: &'static str,
        details: Details,
        work: impl FnOnce() -> T,
    ) -> T {
        match &self.trace {
            Some(trace) => trace.time(activity, name, details, work),
            None => work(),
        }
    }

    /// Memory for messages, kept between calls.
    pub fn buffers(&self) -> &BufferPool<B> {
        &self.shared.buffers
    }

    /// A group of this rank alone, in which nothing is ever sent or waited for.
    pub fn single() -> Self {
        let [alone] = Loopback::group(1, Duration::ZERO)
            .try_into()
            .expect("a group of one has one endpoint");
        Self::new(Arc::new(alone))
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.transport().rank()
    }

    /// Number of ranks in the group.
    pub fn world_size(&self) -> usize {
        self.transport().world_size()
    }

    /// The endpoint, for messages tagged with an operation from [`next_operation`](Self::next_operation).
    pub fn transport(&self) -> &dyn Transport<B> {
        self.shared.transport.as_ref()
    }

    /// Takes the number of the next operation.
    pub fn next_operation(&self) -> u64 {
        self.shared
            .order
            .next_operation
            .fetch_add(1, Ordering::Relaxed)
    }

    /// What this rank has sent and received so far.
    pub fn traffic(&self) -> Traffic {
        self.transport().traffic()
    }

    /// The last operations of this rank, in all groups it is in.
    pub fn flight_record(&self) -> FlightRecord {
        self.transport().flight_record()
    }

    /// Writes [`flight_record`](Self::flight_record) to a file as lines of JSON, as [`FlightRecord::write_to`] does.
    ///
    /// # Errors
    /// What the operating system says if the file cannot be written.
    pub fn dump_flight_record(&self, path: &Path) -> io::Result<()> {
        let cause = self.transport().poisoned();
        self.flight_record().write_to(path, cause.as_ref())
    }

    /// Poisons the group: every rank's pending and later calls return an error that carries `reason` and names this rank.
    pub fn abort(&self, reason: &str) {
        self.transport().abort(reason);
    }

    /// Splits the group: ranks that give the same `color` form a group of their own, ordered by `key`, and by rank among
    /// equal keys. `None` for a rank without a color.
    ///
    /// All ranks must call it. The new group counts operations of its own; its messages go over the same transport, so what
    /// poisons it poisons the whole, and its errors call the ranks by their numbers in the whole.
    ///
    /// # Errors
    /// As [`all_gather_bytes`](Self::all_gather_bytes).
    pub fn split(&self, color: Option<u64>, key: i64) -> Result<Option<Self>, CommError> {
        let place = Place { color, key };
        let operation = self.shared.order.next_operation.load(Ordering::Relaxed);
        let places = self.all_gather_bytes("split", &place.encode())?;
        let places: Vec<Place> = places.iter().map(|bytes| Place::decode(bytes)).collect();
        let Some(color) = color else { return Ok(None) };

        let mut members: Vec<Rank> = (0..places.len())
            .filter(|&rank| places[rank].color == Some(color))
            .collect();
        members.sort_by_key(|&rank| places[rank].key);
        let rank = members.iter().position(|&rank| rank == self.rank());
        let group = SubGroup::new(
            Arc::clone(&self.shared.transport),
            GroupId::split_off(operation, color),
            members,
            rank.expect("this rank gave this color"),
        );
        Ok(Some(Self {
            trace: self.trace.clone(),
            ranks_on_this_machine: self.ranks_on_this_machine,
            ..Self::new(Arc::new(group))
        }))
    }

    /// Gives every rank's `bytes` to every rank, in rank order, after comparing what for: `purpose` (without a zero
    /// byte) travels along, so that a rank in another collective is found out instead of its bytes being mistaken.
    ///
    /// # Errors
    /// [`CommErrorKind::Disagreement`] on the field `collective` if the purposes differ; else what
    /// [`Transport::all_gather_bytes`] returns.
    pub fn all_gather_bytes(&self, purpose: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let labelled = label(purpose, bytes);
        let parts = self
            .transport()
            .all_gather_bytes(self.next_operation(), labelled)?;
        let (purposes, parts): (Vec<_>, Vec<_>) = parts.into_iter().map(split_label).unzip();
        self.require_equal("collective", &purposes)?;
        Ok(parts)
    }

    /// Checks that all ranks have the same `topic` and `fields` (in any order, each name once). They compare a hash of
    /// them, and only if it differs the fields themselves.
    ///
    /// # Errors
    /// [`CommErrorKind::Disagreement`] on every rank, naming the first rank that differs from rank 0 and the first field
    /// in which it does (`topic`, then the fields by name); this poisons the group. Otherwise as
    /// [`Transport::all_gather_bytes`].
    pub fn agree(&self, topic: &str, fields: &[(String, String)]) -> Result<(), CommError> {
        let terms = Terms::new(topic, fields).encode();
        self.compare(&terms, Fnv1a::of(&terms), 0).map(drop)
    }

    /// As [`agree`](Self::agree), but does not communicate if the ranks have agreed on the very same recently
    /// (among the last [`REMEMBERED_AGREEMENTS`] that differ).
    ///
    /// # Errors
    /// As [`agree`](Self::agree). If one rank comes with something new and another with something known, the other does not
    /// take part in the comparison: then the first rank's error is a [`CommErrorKind::Deadline`] that names it.
    pub fn agree_once(&self, topic: &str, fields: &[(String, String)]) -> Result<(), CommError> {
        self.agree_once_on_largest(topic, fields, 0).map(drop)
    }

    /// As [`agree_once`](Self::agree_once), and yields the largest of the `value`s that the ranks came with when they agreed.
    /// The values may differ from rank to rank; a rank's own must follow from `topic` and `fields`.
    ///
    /// # Errors
    /// As [`agree_once`](Self::agree_once).
    pub fn agree_once_on_largest(
        &self,
        topic: &str,
        fields: &[(String, String)],
        value: u64,
    ) -> Result<u64, CommError> {
        let terms = Terms::new(topic, fields).encode();
        let hash = Fnv1a::of(&terms);
        if let Some(known) = self.agreement(hash) {
            return Ok(known.largest);
        }
        let largest = self.compare(&terms, hash, value)?;
        self.remember(Agreement { hash, largest });
        Ok(largest)
    }

    /// As [`agree_once_on_largest`](Self::agree_once_on_largest), but compares even what the ranks agreed on before, and `of_call`
    /// with it (under names of its own), which is not remembered: for what may differ from call to call, where a rank that is a call behind would come
    /// with something that was right then.
    ///
    /// # Errors
    /// As [`agree_once`](Self::agree_once).
    pub fn agree_anew_on_largest(
        &self,
        topic: &str,
        fields: &[(String, String)],
        of_call: &[(String, String)],
        value: u64,
    ) -> Result<u64, CommError> {
        let terms = Terms::new(topic, &[fields, of_call].concat()).encode();
        let largest = self.compare(&terms, Fnv1a::of(&terms), value)?;
        let hash = Fnv1a::of(&Terms::new(topic, fields).encode());
        if self.agreement(hash).is_none() {
            self.remember(Agreement { hash, largest });
        }
        Ok(largest)
    }

    /// Fails on every rank, with the same verdict, unless all of `values` (one per rank) equal rank 0's.
    pub(crate) fn require_equal(&self, field: &str, values: &[String]) -> Result<(), CommError> {
        match values.iter().position(|value| *value != values[0]) {
            None => Ok(()),
            Some(culprit) => Err(self.disagree(Disagreement {
                culprit,
                reference: 0,
                field: field.to_owned(),
                theirs: values[culprit].clone(),
                ours: values[0].clone(),
            })),
        }
    }

    /// Compares the terms of all ranks; yields the largest value.
    fn compare(&self, terms: &[u8], hash: u64, value: u64) -> Result<u64, CommError> {
        let own = [hash.to_le_bytes(), value.to_le_bytes()].concat();
        let all = self.all_gather_bytes("comparison of hashes", &own)?;
        let pairs: Vec<(u64, u64)> = all.iter().map(|bytes| hash_and_value(bytes)).collect();
        let largest = pairs.iter().map(|&(_, value)| value).max().unwrap_or(value);
        if pairs.iter().all(|&(hash, _)| hash == pairs[0].0) {
            return Ok(largest);
        }
        let terms = self.all_gather_bytes("comparison of fields", terms)?;
        let terms: Vec<_> = terms.iter().map(|bytes| Terms::decode(bytes)).collect();
        match first_disagreement(&terms) {
            None => Ok(largest),
            Some(disagreement) => Err(self.disagree(disagreement)),
        }
    }

    /// Every rank reaches the same verdict by itself; the first one poisons the group with it.
    pub(crate) fn disagree(&self, mut disagreement: Disagreement) -> CommError {
        let global = |rank| self.transport().global_rank(rank);
        disagreement.culprit = global(disagreement.culprit);
        disagreement.reference = global(disagreement.reference);
        let kind = CommErrorKind::Disagreement(Box::new(disagreement));
        let error = CommError::new(global(self.rank()), None, None, kind)
            .with_history(self.flight_record());
        self.transport().poison(error.clone());
        error
    }

    fn agreement(&self, hash: u64) -> Option<Agreement> {
        let agreements = self.agreements();
        agreements.iter().find(|known| known.hash == hash).copied()
    }

    fn remember(&self, agreement: Agreement) {
        let mut agreements = self.agreements();
        if agreements.len() == REMEMBERED_AGREEMENTS {
            agreements.pop_front();
        }
        agreements.push_back(agreement);
    }

    fn agreements(&self) -> MutexGuard<'_, VecDeque<Agreement>> {
        self.shared
            .order
            .agreements
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator<HostBuffer> {
    /// The same group for buffers of a device, whose messages are copied to host memory and from there ([`Staged`]).
    ///
    /// Both count the same operations, so they may be used in turn; ranks whose buffers lie elsewhere do so in the same order.
    pub fn staged<B: Staging>(&self, device: B::Device) -> Communicator<B> {
        let staged = Staged::new(Arc::clone(&self.shared.transport), device);
        Communicator {
            shared: Arc::new(Shared {
                transport: Arc::new(staged),
                order: Arc::clone(&self.shared.order),
                buffers: BufferPool::default(),
            }),
            trace: self.trace.clone(),
            ranks_on_this_machine: self.ranks_on_this_machine,
        }
    }
}

/// What the ranks exchange to compare; bytes of another length come from a rank that does something else, and differ.
fn hash_and_value(bytes: &[u8]) -> (u64, u64) {
    match bytes.as_chunks() {
        ([hash, value], []) => (u64::from_le_bytes(*hash), u64::from_le_bytes(*value)),
        _ => (Fnv1a::of(bytes), 0),
    }
}

/// Where a rank goes when its group splits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    color: Option<u64>,
    key: i64,
}

impl Place {
    fn encode(self) -> Vec<u8> {
        let color = self.color.unwrap_or_default().to_le_bytes();
        let flag = [u8::from(self.color.is_some())];
        [&flag[..], &color, &self.key.to_le_bytes()].concat()
    }

    /// Bytes of another length cannot come: the ranks compared what for they are first.
    fn decode(bytes: &[u8]) -> Self {
        let number = |at: usize| {
            bytes
                .get(at..at + 8)?
                .try_into()
                .ok()
                .map(u64::from_le_bytes)
        };
        Self {
            color: number(1).filter(|_| bytes[0] == 1),
            key: number(9).unwrap_or_default().cast_signed(),
        }
    }
}

/// Stands between a purpose and the bytes it labels.
const END_OF_LABEL: u8 = 0;

fn label(purpose: &str, bytes: &[u8]) -> Vec<u8> {
    [purpose.as_bytes(), &[END_OF_LABEL], bytes].concat()
}

fn split_label(labelled: Vec<u8>) -> (String, Vec<u8>) {
    let mut pieces = labelled.splitn(2, |&byte| byte == END_OF_LABEL);
    let purpose = pieces.next().unwrap_or_default();
    let bytes = pieces.next().unwrap_or_default();
    (
        String::from_utf8_lossy(purpose).into_owned(),
        bytes.to_vec(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: usize) -> Vec<(String, String)> {
        vec![("value".to_owned(), value.to_string())]
    }

    fn seed(value: usize) -> Vec<(String, String)> {
        vec![("seed".to_owned(), value.to_string())]
    }

    #[test]
    fn clones_count_the_same_operations() {
        let communicator = Communicator::<HostBuffer>::single();
        assert_eq!(communicator.next_operation(), 0);
        assert_eq!(communicator.clone().next_operation(), 1);
        assert_eq!(communicator.next_operation(), 2);
    }

    #[test]
    fn a_single_rank_agrees_with_itself_without_waiting() {
        let communicator = Communicator::<HostBuffer>::single();
        assert_eq!((communicator.rank(), communicator.world_size()), (0, 1));
        communicator.agree("forward", &fields(1)).unwrap();
        assert_eq!(communicator.traffic(), Traffic::default());
    }

    #[test]
    fn known_agreements_cost_no_operation_and_the_oldest_is_forgotten() {
        let communicator = Communicator::<HostBuffer>::single();
        for value in 0..REMEMBERED_AGREEMENTS {
            communicator.agree_once("forward", &fields(value)).unwrap();
        }
        let before = communicator.next_operation();
        communicator.agree_once("forward", &fields(0)).unwrap();
        assert_eq!(communicator.next_operation(), before + 1, "known");

        communicator
            .agree_once("forward", &fields(REMEMBERED_AGREEMENTS))
            .unwrap();
        assert_eq!(communicator.agreements().len(), REMEMBERED_AGREEMENTS);
        let oldest = Fnv1a::of(&Terms::new("forward", &fields(0)).encode());
        assert!(communicator.agreement(oldest).is_none());
    }

    #[test]
    fn ranks_agree_on_the_largest_value_and_remember_it() {
        let results = Loopback::run::<HostBuffer, _>(3, Duration::from_secs(30), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let value = 10 + communicator.rank() as u64;
            let agree = |value| communicator.agree_once_on_largest("forward", &fields(1), value);
            (agree(value).unwrap(), agree(0).unwrap())
        });
        assert!(results.into_iter().all(|largest| largest == Ok((12, 12))));
    }

    #[test]
    fn what_is_agreed_on_anew_is_compared_each_time() {
        let results = Loopback::run::<HostBuffer, _>(3, Duration::from_secs(30), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let value = 10 + communicator.rank() as u64;
            let anew = |batch, of_call: usize, value| {
                communicator.agree_anew_on_largest("forward", &fields(batch), &seed(of_call), value)
            };
            assert_eq!(anew(1, 5, value), Ok(12));
            assert_eq!(anew(1, 6, value), Ok(12), "what is of the call may change");
            assert_eq!(anew(2, 6, value), Ok(12));
            let known = communicator.agree_once_on_largest("forward", &fields(2), 0);
            assert_eq!(known, Ok(12), "remembered without what is of the call");
            // Both were right before.
            let behind = communicator.rank() == 1;
            let error = anew(if behind { 1 } else { 2 }, 6, value).unwrap_err();
            error.culprit()
        });
        assert!(results.into_iter().all(|culprit| culprit == Ok(1)));
    }

    #[test]
    fn ranks_that_differ_in_what_is_of_a_call_are_told() {
        let results = Loopback::run::<HostBuffer, _>(2, Duration::from_secs(30), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let seed = seed(communicator.rank());
            let error = communicator.agree_anew_on_largest("forward", &fields(1), &seed, 0);
            error.unwrap_err().culprit()
        });
        assert!(results.into_iter().all(|culprit| culprit == Ok(1)));
    }

    #[test]
    fn labels_come_off_again() {
        let labelled = label("sum", &[7, 0, 8]);
        assert_eq!(split_label(labelled), ("sum".to_owned(), vec![7, 0, 8]));
        assert_eq!(split_label(b"none".to_vec()), ("none".to_owned(), vec![]));
    }
}
