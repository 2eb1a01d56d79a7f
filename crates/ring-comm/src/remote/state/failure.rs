//! How a group fails: which of several failures it is, and who is told.

use std::time::Instant;

use super::{Presence, Proposal, State, VERDICT_WITHIN};
use crate::{
    error::{CommError, CommErrorKind},
    recorder::{self, Call},
    remote::frame::{Failure, Frame},
    transport::Rank,
};

impl State {
    /// Records a failure of this rank. The first rank that is there decides which of several failures at once is the
    /// group's; if that is another rank it is asked, and the cause is known when it answers or does not in time.
    pub(in crate::remote) fn poison(&mut self, cause: CommError, now: Instant) {
        if self.cause.is_some() || self.proposal.is_some() {
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
        self.ask_for_verdict();
    }

    /// Fails without telling anybody: there is no wire any more.
    pub(in crate::remote) fn give_up(&mut self, reason: &str) {
        let culprit = self.rank;
        let kind = CommErrorKind::Aborted {
            culprit,
            reason: reason.to_owned(),
        };
        if self.cause.is_none() {
            self.cause = Some(self.recorded(CommError::new(culprit, None, None, kind)));
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
        let expired = self.proposal.take_if(|proposal| proposal.expiry <= now);
        let Some(mut proposal) = expired else { return };
        if proposal.silent.is_some() {
            return self.decide(proposal.failure);
        }
        proposal.silent = proposal.asked;
        proposal.expiry = now + VERDICT_WITHIN;
        self.proposal = Some(proposal);
        self.ask_for_verdict();
    }

    /// The peer cannot be reached any more: a failure, unless it has departed.
    pub(in crate::remote) fn lost(&mut self, peer: Rank, reason: &str, now: Instant) {
        if matches!(
            self.peers[peer].presence,
            Presence::Departed | Presence::Lost
        ) {
            return;
        }
        self.gone(peer, Presence::Lost);
        let kind = CommErrorKind::PeerLost {
            reason: reason.to_owned(),
        };
        self.poison(CommError::new(self.rank, Some(peer), None, kind), now);
    }

    /// Passes this rank's failure, if it has one, to the rank that decides.
    pub(super) fn ask_for_verdict(&mut self) {
        let Some(mut proposal) = self.proposal.take() else {
            return;
        };
        let judge = self.judge(proposal.silent);
        if judge == self.rank {
            return self.decide(proposal.failure);
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
    }
}
