//! What loopback's ranks wait with: a lock, a condition, and a clock.
//!
//! Under `--cfg loom` and `--cfg shuttle` a model checker takes the place of the lock and the condition, and decides who goes
//! on when. It knows no time: there a deadline passes when the model says so, for all waits at once
//! ([`LoopbackEndpoint::pass_deadline`](super::LoopbackEndpoint)), and otherwise never.

#[cfg(loom)]
pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(shuttle)]
pub(super) use shuttle::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(any(loom, shuttle)))]
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(any(loom, shuttle))]
pub(super) use modelled::{Clock, Expiry};
#[cfg(not(any(loom, shuttle)))]
pub(super) use real::{Clock, Expiry};

#[cfg(not(any(loom, shuttle)))]
mod real {
    use std::{
        sync::PoisonError,
        time::{Duration, Instant},
    };

    use super::{Condvar, MutexGuard};

    /// The time of the machine.
    #[derive(Debug, Default)]
    pub(in super::super) struct Clock {}

    /// When a wait must end. A deadline too far away for the clock is none.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Expiry(Option<Instant>);

    impl Expiry {
        pub(in super::super) fn after(deadline: Duration) -> Self {
            Self(Instant::now().checked_add(deadline))
        }

        pub(in super::super) fn has_passed(self, _: &Clock) -> bool {
            self.0.is_some_and(|expiry| Instant::now() >= expiry)
        }

        /// Waits for the condition, at most until then.
        pub(in super::super) fn wait<'a, T>(
            self,
            condition: &Condvar,
            guard: MutexGuard<'a, T>,
        ) -> MutexGuard<'a, T> {
            let Some(expiry) = self.0 else {
                return condition
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            let remaining = expiry.saturating_duration_since(Instant::now());
            let woken = condition.wait_timeout(guard, remaining);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
    }
}

#[cfg(any(loom, shuttle))]
mod modelled {
    use std::{sync::PoisonError, time::Duration};

    use super::{Condvar, MutexGuard};

    /// Whether the model says that the deadline has passed.
    #[derive(Debug, Default)]
    pub(in super::super) struct Clock {
        pub(in super::super) deadline_has_passed: bool,
    }

    /// When a wait must end.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Expiry;

    impl Expiry {
        pub(in super::super) fn after(_: Duration) -> Self {
            Self
        }

        pub(in super::super) fn has_passed(self, clock: &Clock) -> bool {
            clock.deadline_has_passed
        }

        /// Waits for the condition; whoever lets the deadline pass notifies it.
        pub(in super::super) fn wait<'a, T>(
            self,
            condition: &Condvar,
            guard: MutexGuard<'a, T>,
        ) -> MutexGuard<'a, T> {
            condition
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner)
        }
    }
}
