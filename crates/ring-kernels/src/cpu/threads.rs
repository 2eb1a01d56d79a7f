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
    /// it asks for scratch memory once, and only if there is a task for it. Nothing is allocated beside that.
    pub(super) fn run<T: Send, S>(
        &self,
        tasks: impl Iterator<Item = T> + Send,
        scratch: impl Fn() -> Result<S, KernelError> + Sync,
        work: impl Fn(&mut S, T) + Sync,
    ) -> Result<(), KernelError> {
        self.run_on(self.count(), tasks, scratch, work)
    }

    /// As [`run`](Self::run), on at most `most` threads at a time.
    pub(super) fn run_on<T: Send, S>(
        &self,
        most: usize,
        tasks: impl Iterator<Item = T> + Send,
        scratch: impl Fn() -> Result<S, KernelError> + Sync,
        work: impl Fn(&mut S, T) + Sync,
    ) -> Result<(), KernelError> {
        let queue = Mutex::new(tasks);
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
            Threads::Pool(pool) => {
                pool.install(|| on_threads(pool.current_num_threads().min(most), &work_off))
            }
        }
    }
}

/// Does `work` `count` times, on as many threads as are free.
fn on_threads(
    count: usize,
    work: &(impl Fn() -> Result<(), KernelError> + Sync),
) -> Result<(), KernelError> {
    if count <= 1 {
        return work();
    }
    let (some, others) = rayon::join(
        || on_threads(count / 2, work),
        || on_threads(count - count / 2, work),
    );
    some.and(others)
}
