//! What the calls of all backends have in common: how they and their errors name what they are about.

use crate::{
    error::{CommError, CommErrorKind},
    transport::{GroupId, Payload, Rank, Tag},
};

/// What a call is about: the head of every error it returns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    pub(crate) rank: Rank,
    pub(crate) peer: Option<Rank>,
    pub(crate) tag: Option<Tag>,
}

impl Subject {
    pub(crate) fn error(self, kind: CommErrorKind) -> CommError {
        CommError::new(self.rank, self.peer, self.tag, kind)
    }

    /// How this call tells of the group's failure: the rank where it happened repeats it, the others pass it on.
    pub(crate) fn poisoned_by(self, cause: &CommError) -> CommError {
        if cause.rank == self.rank {
            cause.clone()
        } else {
            self.error(CommErrorKind::Poisoned(Box::new(cause.clone())))
        }
    }
}

/// How errors name an all-gather.
pub(crate) fn gather_tag(group: GroupId, operation: u64) -> Tag {
    Tag {
        group,
        ..Tag::new(operation, 0, Payload::Collective)
    }
}

/// What poisons the group of a rank that panics.
pub(crate) fn panicked(culprit: Rank) -> CommError {
    CommError::new(culprit, None, None, CommErrorKind::Panicked { culprit })
}
