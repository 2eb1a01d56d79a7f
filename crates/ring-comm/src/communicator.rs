//! A rank's handle on its group, shared by everything on that rank that communicates.
//!
//! The transport moves single messages; the [`Communicator`] keeps the ranks in step. It numbers the operations, so that
//! no two use the same tags, and lets the ranks compare what they are about to do. Both rest on one rule: **every rank
//! calls [`next_operation`](Communicator::next_operation), [`all_gather_bytes`](Communicator::all_gather_bytes),
//! [`agree`](Communicator::agree), [`agree_once`](Communicator::agree_once) and the [collectives](crate::collective) in
//! the same order.** Ranks that break it get an error within the deadline, which names a rank that is out of step.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    agreement::{Terms, first_disagreement, fnv1a},
    buffer::Buffer,
    error::{CommError, CommErrorKind, Disagreement},
    loopback::Loopback,
    transport::{Rank, Traffic, Transport},
};

/// Agreements that [`Communicator::agree_once`] remembers; the oldest is forgotten first, on every rank alike.
pub const REMEMBERED_AGREEMENTS: usize = 64;

/// A transport with what its users share: the number of the next operation, and what was agreed upon.
///
/// A clone is another handle on the same. Make one communicator per endpoint and clone it: two made from the same
/// endpoint would give their operations the same numbers.
pub struct Communicator<B: Buffer> {
    shared: Arc<Shared<B>>,
}

struct Shared<B: Buffer> {
    transport: Arc<dyn Transport<B>>,
    next_operation: AtomicU64,
    /// Hashes of the latest agreements, oldest first.
    agreements: Mutex<VecDeque<u64>>,
}

impl<B: Buffer> Clone for Communicator<B> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<B: Buffer> fmt::Debug for Communicator<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("transport", &self.shared.transport)
            .field("next_operation", &self.shared.next_operation)
            .finish_non_exhaustive()
    }
}

impl<B: Buffer> Communicator<B> {
    /// Communicates over `transport`.
    pub fn new(transport: Arc<dyn Transport<B>>) -> Self {
        Self {
            shared: Arc::new(Shared {
                transport,
                next_operation: AtomicU64::new(0),
                agreements: Mutex::new(VecDeque::new()),
            }),
        }
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
        self.shared.next_operation.fetch_add(1, Ordering::Relaxed)
    }

    /// What this rank has sent and received so far.
    pub fn traffic(&self) -> Traffic {
        self.transport().traffic()
    }

    /// Poisons the group: every rank's pending and later calls return an error that carries `reason` and names this rank.
    pub fn abort(&self, reason: &str) {
        self.transport().abort(reason);
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
        self.compare(&terms, fnv1a(&terms))
    }

    /// As [`agree`](Self::agree), but does not communicate if the ranks have agreed on the very same recently
    /// (among the last [`REMEMBERED_AGREEMENTS`] that differ).
    ///
    /// # Errors
    /// As [`agree`](Self::agree). If one rank comes with something new and another with something known, the other does not
    /// take part in the comparison: then the first rank's error is a [`CommErrorKind::Deadline`] that names it.
    pub fn agree_once(&self, topic: &str, fields: &[(String, String)]) -> Result<(), CommError> {
        let terms = Terms::new(topic, fields).encode();
        let hash = fnv1a(&terms);
        if self.agreements().contains(&hash) {
            return Ok(());
        }
        self.compare(&terms, hash)?;
        self.remember(hash);
        Ok(())
    }

    /// Fails on every rank, with the same verdict, unless all of `values` (one per rank) equal rank 0's.
    pub(crate) fn require_equal(&self, field: &str, values: &[String]) -> Result<(), CommError> {
        match values.iter().position(|value| *value != values[0]) {
            None => Ok(()),
            Some(culprit) => Err(self.disagree(Disagreement {
                culprit,
                field: field.to_owned(),
                theirs: values[culprit].clone(),
                ours: values[0].clone(),
            })),
        }
    }

    fn compare(&self, terms: &[u8], hash: u64) -> Result<(), CommError> {
        let hashes = self.all_gather_bytes("comparison of hashes", &hash.to_le_bytes())?;
        if hashes.iter().all(|other| *other == hashes[0]) {
            return Ok(());
        }
        let terms = self.all_gather_bytes("comparison of fields", terms)?;
        let terms: Vec<_> = terms.iter().map(|bytes| Terms::decode(bytes)).collect();
        match first_disagreement(&terms) {
            None => Ok(()),
            Some(disagreement) => Err(self.disagree(disagreement)),
        }
    }

    /// Every rank reaches the same verdict by itself; the first one poisons the group with it.
    fn disagree(&self, disagreement: Disagreement) -> CommError {
        let error = CommError {
            rank: self.rank(),
            peer: None,
            tag: None,
            kind: CommErrorKind::Disagreement(Box::new(disagreement)),
        };
        self.transport().poison(error.clone());
        error
    }

    fn remember(&self, hash: u64) {
        let mut agreements = self.agreements();
        if agreements.len() == REMEMBERED_AGREEMENTS {
            agreements.pop_front();
        }
        agreements.push_back(hash);
    }

    fn agreements(&self) -> MutexGuard<'_, VecDeque<u64>> {
        self.shared
            .agreements
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
    use crate::buffer::HostBuffer;

    fn fields(value: usize) -> Vec<(String, String)> {
        vec![("value".to_owned(), value.to_string())]
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
        assert!(
            !communicator
                .agreements()
                .contains(&fnv1a(&Terms::new("forward", &fields(0)).encode()))
        );
    }

    #[test]
    fn labels_come_off_again() {
        let labelled = label("sum", &[7, 0, 8]);
        assert_eq!(split_label(labelled), ("sum".to_owned(), vec![7, 0, 8]));
        assert_eq!(split_label(b"none".to_vec()), ("none".to_owned(), vec![]));
    }
}
