//! How long the start of NCCL may take.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::error::NcclError;

/// Between two looks.
const BREAK: Duration = Duration::from_micros(100);

/// A deadline, and when it passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    deadline: Duration,
    /// A deadline too far away for the clock is none.
    expiry: Option<Instant>,
}

impl Deadline {
    pub(super) fn after(deadline: Duration) -> Self {
        Self {
            deadline,
            expiry: Instant::now().checked_add(deadline),
        }
    }

    /// An error that says `what` was waited for, if the deadline has passed.
    pub(super) fn check(self, what: impl FnOnce() -> String) -> Result<(), NcclError> {
        match self.expiry {
            Some(expiry) if Instant::now() >= expiry => Err(NcclError::Deadline {
                what: what(),
                deadline: self.deadline,
            }),
            _ => Ok(()),
        }
    }

    /// The time that is left.
    pub(super) fn remaining(self) -> Duration {
        match self.expiry {
            Some(expiry) => expiry.saturating_duration_since(Instant::now()),
            None => self.deadline,
        }
    }

    /// How long it was at first.
    pub(super) fn duration(self) -> Duration {
        self.deadline
    }

    /// When it passes; in a day, which is as good as never, if that is too far away for the clock.
    pub(super) fn instant(self) -> Instant {
        self.expiry
            .unwrap_or_else(|| Instant::now() + Duration::from_hours(24))
    }

    /// Waits a moment before the next look.
    pub(super) fn pause(self) {
        thread::sleep(BREAK);
    }
}
