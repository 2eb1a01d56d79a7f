//! Where contenders run: the [`Stage`] keeps PyTorch's processes from case to case.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    rc::Rc,
};

use crate::compare::{CompareError, worker::Workers};

/// PyTorch's processes that wait, and what fresh ones need.
pub struct Stage {
    python: Option<PathBuf>,
    probe: PathBuf,
    /// By world size and threads.
    workers: BTreeMap<(usize, usize), Rc<RefCell<Workers>>>,
}

impl Stage {
    /// With the interpreter that has PyTorch, if there is one, and the program that answers `--probe`: `compare` itself.
    pub fn new(python: Option<PathBuf>, probe: PathBuf) -> Self {
        Self {
            python,
            probe,
            workers: BTreeMap::new(),
        }
    }

    /// Processes of this kind, started when they are first needed.
    ///
    /// # Errors
    /// [`CompareError::NoTorch`], or that of [`Workers::start`].
    pub fn workers(
        &mut self,
        world_size: usize,
        threads: usize,
    ) -> Result<Rc<RefCell<Workers>>, CompareError> {
        if let Some(workers) = self.workers.get(&(world_size, threads)) {
            return Ok(Rc::clone(workers));
        }
        let workers = Workers::start(self.python()?, world_size, threads)?;
        let workers = Rc::new(RefCell::new(workers));
        self.workers
            .insert((world_size, threads), Rc::clone(&workers));
        Ok(workers)
    }

    /// The interpreter that has PyTorch.
    ///
    /// # Errors
    /// [`CompareError::NoTorch`]
    pub fn python(&self) -> Result<&Path, CompareError> {
        self.python.as_deref().ok_or(CompareError::NoTorch)
    }

    /// The program that answers `--probe`.
    pub fn probe(&self) -> &Path {
        &self.probe
    }

    /// Version of PyTorch, if it was needed.
    pub fn torch_version(&self) -> Option<String> {
        let workers = self.workers.values().next()?;
        Some(workers.borrow().version().to_string())
    }

    /// Processor time that PyTorch's waiting processes have used so far, in ticks of 10 ms.
    pub fn processor_ticks(&self) -> u64 {
        let workers = self.workers.values();
        workers
            .filter_map(|workers| workers.borrow().processor_ticks())
            .sum()
    }
}
