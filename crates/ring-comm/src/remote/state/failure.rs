//! How a group fails: which of several failures it is, and who is told.

use std::time::Instant;

use super::{HEARING, Presence, Proposal, State, Trial, VERDICT_WITHIN};
use crate::{
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    recorder::{self, Call},
    remote::frame::{Failure, Frame},
    transport::Rank,
};

impl<B: Buffer> State<B> {
    /// Records a failure of this rank. The first rank that is there decides which of several failures at once is the
    /// group's; if that is another rank it is asked, and the cause is known when it answers or does not in time.
    pub(in crate::remote) fn poison(&mut self, cause: CommError, now: Instant) {
        if self.cause.is_some() || self.proposal.is_some() || self.has_complained() {
            return;
        }
        let failure = Failure {
            origin: self.rank,
            cause: self.recorded(cause),
            completed: self.completed.iter().cloned().collect(),
            failed: self.joined_in_vain(),
        };
        self.proposal = Some(Proposal {
            failure,
            asked: None,
            silent: None,
            expiry: now + VERDICT_WITHIN,
        });
        self.ask_for_verdict(now);
    }

    /// Fails without telling anybody: there is no wire any more.
    pub(in crate::remote) fn give_up(&mut self, reason: &str) {
        if self.cause.is_none() {
            self.cause = Some(self.recorded(aborted(self.rank, reason)));
        }
    }

    /// The cause with this rank's history, of which it is the last entry; as it is if a call failed that has told all.
    fn recorded(&mut self, cause: CommError) -> CommError {
        if cause.history().is_some() {
            return cause;
        }
        let number = self.recorder.begin(Call::Poison, cause.peer, cause.tag, 0);
        self.recorder.advance(number, recorder::Progress::Ended);
        cause.with_history(self.recorder.snapshot())
    }

    /// Asks another rank if the answer takes too long, and then decides about this rank's failure itself.
    pub(in crate::remote) fn tick(&mut self, now: Instant) {
        if let Some(trial) = self.trial.take_if(|trial| trial.expiry <= now) {
            trial
                .verdict()
                .into_iter()
                .for_each(|failure| self.decide(failure));
        }
        let expired = self.proposal.take_if(|proposal| proposal.expiry <= now);
        let Some(mut proposal) = expired else { return };
        if proposal.silent.is_some() {
            return self.consider(proposal.failure, now);
        }
        proposal.silent = proposal.asked;
        proposal.expiry = now + VERDICT_WITHIN;
        self.proposal = Some(proposal);
        self.ask_for_verdict(now);
    }

    /// The peer cannot be reached any more: a failure, unless it has departed.
    pub(in crate::remote) fn lost(&mut self, peer: Rank, reason: &str, now: Instant) {
        if matches!(
            self.peers[peer].presence,
            Presence::Departed | Presence::Lost
        ) {
            return;
        }
        self.gone(peer, Presence::Lost, now);
        let kind = CommErrorKind::PeerLost {
            reason: reason.to_owned(),
        };
        self.poison(CommError::new(self.rank, Some(peer), None, kind), now);
    }

    /// The wire fails on this rank.
    pub(in crate::remote) fn broken(&mut self, reason: &str, now: Instant) {
        self.poison(aborted(self.rank, reason), now);
    }

    /// Passes this rank's failure, if it has one, to the rank that decides.
    pub(super) fn ask_for_verdict(&mut self, now: Instant) {
        let Some(mut proposal) = self.proposal.take() else {
            return;
        };
        let judge = self.judge(proposal.silent);
        if judge == self.rank {
            return self.consider(proposal.failure, now);
        }
        if proposal.asked != Some(judge) {
            proposal.asked = Some(judge);
            self.tell(judge, Frame::Propose(proposal.failure.clone()));
        }
        self.proposal = Some(proposal);
    }

    /// The first rank that is there; this rank itself in the end. Whom the failure blames does not matter: ranks that blame each other
    /// must ask the same one.
    pub(super) fn judge(&self, silent: Option<Rank>) -> Rank {
        let is_there = |rank: Rank| self.peers[rank].presence == Presence::Present;
        let mut ranks = 0..self.world_size();
        ranks
            .find(|&rank| rank == self.rank || (is_there(rank) && Some(rank) != silent))
            .unwrap_or(self.rank)
    }

    /// Decides about a failure: at once, unless it is a deadline that has passed, which may not be the only one.
    pub(super) fn consider(&mut self, failure: Failure, now: Instant) {
        if !matches!(failure.cause.kind, CommErrorKind::Deadline { .. }) {
            return self.decide(failure);
        }
        let trial = self.trial.get_or_insert_with(|| Trial {
            complaints: Vec::new(),
            expiry: now + HEARING,
        });
        trial.complaints.push(failure);
    }

    /// Whether a failure of this rank is before itself as judge.
    fn has_complained(&self) -> bool {
        let complaints = self.trial.iter().flat_map(|trial| &trial.complaints);
        complaints
            .into_iter()
            .any(|complaint| complaint.origin == self.rank)
    }

    /// The group has failed by this, and everybody is told.
    pub(super) fn decide(&mut self, failure: Failure) {
        self.tell_all(&Frame::Poison(failure.clone()));
        self.accept(failure);
    }

    pub(super) fn accept(&mut self, failure: Failure) {
        if self.cause.is_some() {
            return;
        }
        for completed in failure.completed {
            self.complete_with(completed);
        }
        for key in failure.failed {
            if let Some(gather) = self.gathers.get_mut(&key) {
                gather.parts[failure.origin].clear();
            }
        }
        self.cause = Some(failure.cause);
        self.proposal = None;
        self.trial = None;
    }
}

impl Trial {
    /// The complaint about a rank that does not complain itself, as near to the first as possible; if all complain about one another,
    /// one of them. `None` if there is none.
    fn verdict(mut self) -> Option<Failure> {
        let mut culprit = self.complaints.first()?.origin;
        let mut last = None;
        let by = |complaints: &[Failure], rank| {
            complaints
                .iter()
                .position(|complaint| complaint.origin == rank)
        };
        while let Some(index) = by(&self.complaints, culprit) {
            let complaint = self.complaints.swap_remove(index);
            culprit = complaint.cause.culprit();
            last = Some(complaint);
        }
        last
    }
}

/// What poisons the group of a rank that cannot go on.
fn aborted(culprit: Rank, reason: &str) -> CommError {
    let reason = reason.to_owned();
    let kind = CommErrorKind::Aborted { culprit, reason };
    CommError::new(culprit, None, None, kind)
}
