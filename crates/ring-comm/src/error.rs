//! Errors that say who, with whom, about what, and why.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    buffer::DType,
    recorder::FlightRecord,
    transport::{Rank, Tag},
};

/// A failed communication, seen from one rank. Ranks are those of the whole, also if it happened in a group split off.
///
/// `Clone`, because the error that poisons a group is returned to every rank and from every later call. Errors are equal if
/// they say the same, whatever led to them: their histories are not compared. `{}` shows one line, `{:#}` the histories too.
#[derive(Clone, Debug, Error, Serialize, Deserialize)]
pub struct CommError {
    /// The rank that reports the error.
    pub rank: Rank,
    /// The other end, if there is one.
    pub peer: Option<Rank>,
    /// The message concerned, if there is one.
    pub tag: Option<Tag>,
    /// What went wrong.
    pub kind: CommErrorKind,
    /// Stays in its process: a rank that hears of an error from another has a history of its own.
    #[serde(skip)]
    history: Option<Arc<FlightRecord>>,
}

impl PartialEq for CommError {
    fn eq(&self, other: &Self) -> bool {
        let told = |error: &Self| (error.rank, error.peer, error.tag);
        told(self) == told(other) && self.kind == other.kind
    }
}

impl fmt::Display for CommError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peer = context("peer", &self.peer);
        let message = context("message", &self.tag);
        write!(f, "rank {}{peer}{message}: {}", self.rank, self.kind)?;
        if !f.alternate() {
            return Ok(());
        }
        if let Some(history) = &self.history {
            write!(f, "\n{history}")?;
        }
        match self.root() {
            root if std::ptr::eq(root, self) => Ok(()),
            root => root
                .history()
                .map_or(Ok(()), |history| write!(f, "\n{history}")),
        }
    }
}

fn context<T: std::fmt::Display>(name: &str, value: &Option<T>) -> String {
    value
        .as_ref()
        .map(|value| format!(", {name} {value}"))
        .unwrap_or_default()
}

/// What went wrong in a communication.
#[derive(Clone, Debug, PartialEq, Error, Serialize, Deserialize)]
pub enum CommErrorKind {
    /// The peer did not answer in time.
    #[error("nothing within the deadline of {deadline:?}{}", sent_instead(.pending))]
    Deadline {
        /// The time waited.
        deadline: Duration,
        /// What that peer has sent instead and nobody took: the sign of ranks that are out of step.
        pending: Vec<Tag>,
    },
    /// The message has another size or element type than expected.
    #[error("expected {expected_len} elements of {expected_dtype}, got {got_len} of {got_dtype}")]
    SizeMismatch {
        /// Number of elements expected.
        expected_len: usize,
        /// Element type expected.
        expected_dtype: DType,
        /// Number of elements sent.
        got_len: usize,
        /// Element type sent.
        got_dtype: DType,
    },
    /// The peer dropped its endpoint while something was still expected of it.
    #[error("the peer has left the group")]
    Departed,
    /// The peer cannot be reached any more: its process has ended, or the network to it has failed.
    #[error("the peer is lost: {reason}")]
    PeerLost {
        /// What is known of it.
        reason: String,
    },
    /// A rank panicked.
    #[error("rank {culprit} panicked")]
    Panicked {
        /// The rank that panicked.
        culprit: Rank,
    },
    /// A rank called `abort`.
    #[error("rank {culprit} aborted: {reason}")]
    Aborted {
        /// The rank that aborted.
        culprit: Rank,
        /// Why.
        reason: String,
    },
    /// A request was dropped before it was complete.
    #[error("rank {culprit} dropped an unfinished request")]
    RequestDropped {
        /// The rank that dropped it.
        culprit: Rank,
    },
    /// Another rank failed first; this is its error.
    #[error("the group failed at {0}")]
    Poisoned(Box<CommError>),
    /// The ranks do not agree on what they are about to do.
    #[error("{0}")]
    Disagreement(Box<Disagreement>),
    /// The request names a rank that does not exist, or this rank itself.
    #[error("rank {0} is not a valid peer")]
    InvalidPeer(Rank),
}

/// What ranks disagree on.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("rank {culprit} has {field} = {theirs}, rank {reference} has {ours}")]
pub struct Disagreement {
    /// The first rank that differs from the one it is compared with.
    pub culprit: Rank,
    /// The rank it is compared with: the first of the group (rank 0, unless it was split off), or where the values of a
    /// [reduction](crate::collective::all_reduce_merged) met.
    pub reference: Rank,
    /// The field in which it differs.
    pub field: String,
    /// Its value there.
    pub theirs: String,
    /// The value on the rank it is compared with.
    pub ours: String,
}

fn sent_instead(tags: &[Tag]) -> String {
    if tags.is_empty() {
        return String::new();
    }
    let tags: Vec<String> = tags.iter().map(Tag::to_string).collect();
    format!("; it has sent instead: {}", tags.join(", "))
}

impl CommError {
    /// An error without a history.
    pub fn new(rank: Rank, peer: Option<Rank>, tag: Option<Tag>, kind: CommErrorKind) -> Self {
        Self {
            rank,
            peer,
            tag,
            kind,
            history: None,
        }
    }

    /// The same error with what its rank did before; nothing changes if it has a history.
    #[must_use]
    pub fn with_history(mut self, history: FlightRecord) -> Self {
        self.history.get_or_insert_with(|| Arc::new(history));
        self
    }

    /// The last operations of the reporting rank at the moment of the failure, if its transport records them. Those of the
    /// rank that failed first are the history of [`root`](Self::root).
    pub fn history(&self) -> Option<&FlightRecord> {
        self.history.as_deref()
    }

    /// The original error: what poisoned the group if this rank only heard of it, otherwise this error itself.
    pub fn root(&self) -> &CommError {
        match &self.kind {
            CommErrorKind::Poisoned(cause) => cause.root(),
            _ => self,
        }
    }

    /// The rank where the trouble started: the one to look at first.
    pub fn culprit(&self) -> Rank {
        match &self.kind {
            CommErrorKind::Panicked { culprit }
            | CommErrorKind::Aborted { culprit, .. }
            | CommErrorKind::RequestDropped { culprit } => *culprit,
            CommErrorKind::Disagreement(disagreement) => disagreement.culprit,
            CommErrorKind::Poisoned(cause) => cause.culprit(),
            CommErrorKind::Deadline { .. }
            | CommErrorKind::Departed
            | CommErrorKind::PeerLost { .. }
            | CommErrorKind::SizeMismatch { .. } => self.peer.unwrap_or(self.rank),
            CommErrorKind::InvalidPeer(_) => self.rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{recorder::FlightRecorder, transport::Payload};

    fn deadline_error() -> CommError {
        let tag = |step| Tag::new(4, step, Payload::KeyValue);
        let kind = CommErrorKind::Deadline {
            deadline: Duration::from_secs(3),
            pending: vec![tag(1), tag(2)],
        };
        CommError::new(1, Some(2), Some(tag(0)), kind)
    }

    #[test]
    fn message_tells_who_with_whom_about_what_and_why() {
        assert_eq!(
            deadline_error().to_string(),
            "rank 1, peer 2, message KeyValue of operation 4 step 0: nothing within the deadline of 3s; \
             it has sent instead: KeyValue of operation 4 step 1, KeyValue of operation 4 step 2"
        );
    }

    #[test]
    fn root_and_culprit_look_through_poison() {
        let heard = CommError::new(
            0,
            None,
            None,
            CommErrorKind::Poisoned(Box::new(deadline_error())),
        );
        assert_eq!(heard.root(), &deadline_error());
        assert_eq!(heard.culprit(), 2);
    }

    #[test]
    fn histories_show_on_demand_and_do_not_tell_errors_apart() {
        let record = |rank| FlightRecorder::new(rank).snapshot();
        let cause = deadline_error().with_history(record(1));
        assert_eq!(cause, deadline_error());
        assert_eq!(cause.to_string(), deadline_error().to_string());

        let kind = CommErrorKind::Poisoned(Box::new(cause));
        let heard = CommError::new(0, None, None, kind).with_history(record(0));
        let text = format!("{heard:#}");
        let [own, first] =
            ["rank 0,", "rank 1,"].map(|rank| text.find(&format!("operations of {rank}")));
        assert!(own.is_some() && own < first, "{text}");
        assert_eq!(heard.with_history(record(7)).history().unwrap().rank, 0);
    }
}
