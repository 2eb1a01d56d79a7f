//! Who does the work: the calling thread, or a pool.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::KernelError;

/// The threads of one rank.
#[derive(Clone, Debug)]
pub(super) enum Threads {
    /// The calling thread alone.
    Caller,
    /// A pool of this rank's own.
    Pool(Arc<ThreadPool>),
}

impl Threads {
    pub(super) fn new(threads: usize) -> Result<Self, KernelError> {
        match threads {
            0 => Err(KernelError::Invalid(
                "0 threads asked for; at least 1 is needed".into(),
            )),
            1 => Ok(Threads::Caller),
            _ => ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("ring-kernels-{index}"))
                .build()
                .map(|pool| Threads::Pool(Arc::new(pool)))
                .map_err(|error| {
                    KernelError::Device(format!("could not start {threads} threads: {error}"))
                }),
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Threads::Caller => 1,
            Threads::Pool(pool) => pool.current_num_threads(),
        }
    }

    /// Does every task once. A thread takes the next task when it is done with the last, so that unequal tasks even out;
    /// it makes its scratch memory once, and only if there is a task for it.
    pub(super) fn run<T: Send, S>(
        &self,
        tasks: Vec<T>,
        scratch: impl Fn() -> Result<S, KernelError> + Sync,
        work: impl Fn(&mut S, T) + Sync,
    ) -> Result<(), KernelError> {
        let queue = Mutex::new(tasks.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work_off = || {
            let Some(first) = next() else { return Ok(()) };
            let mut scratch = scratch()?;
            work(&mut scratch, first);
            while let Some(task) = next() {
                work(&mut scratch, task);
            }
            Ok(())
        };
        match self {
            Threads::Caller => work_off(),
            Threads::Pool(pool) => pool.broadcast(|_| work_off()).into_iter().collect(),
        }
    }
}
