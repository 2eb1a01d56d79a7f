//! A contender, ready to run.

use std::{cell::RefCell, path::PathBuf, rc::Rc, time::Instant};

use crate::{
    compare::{
        CompareError, Contender, Unit, fma, footprint, ranks::LoopbackRanks, stage::Stage,
        worker::Workers,
    },
    module::Module,
    work::Work,
};

/// One side of a pair.
pub enum Side {
    /// The drivers of this workspace.
    Ranks(LoopbackRanks),
    /// The Burn module.
    Module(Box<Module>),
    /// Multiply-adds in registers.
    FmaChains,
    /// PyTorch.
    Torch(Rc<RefCell<Workers>>),
    /// The drivers of this workspace, in a fresh process for each run.
    FreshRanks {
        /// The program that answers `--probe`.
        program: PathBuf,
        /// What to run in it.
        probe: footprint::Probe,
    },
    /// PyTorch, in a fresh process for each run.
    FreshTorch {
        /// The interpreter.
        python: PathBuf,
        /// What to compute.
        work: Work,
        /// On how many threads.
        threads: usize,
    },
}

impl Side {
    /// Tensors drawn, threads and processes started, one run done; where bytes are counted, only what does not count.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn ready(
        contender: &Contender,
        unit: Unit,
        stage: &mut Stage,
    ) -> Result<Self, CompareError> {
        match unit {
            Unit::Bytes => Self::fresh(contender, stage),
            Unit::Flops | Unit::Tokens => {
                let mut side = Self::waiting(contender, stage)?;
                side.warm_up()?;
                Ok(side)
            }
        }
    }

    fn waiting(contender: &Contender, stage: &mut Stage) -> Result<Self, CompareError> {
        Ok(match contender {
            Contender::Ranks {
                work,
                ranks,
                threads,
            } => Side::Ranks(LoopbackRanks::new(work, *ranks, *threads)?),
            Contender::Module { work, threads } => {
                Side::Module(Box::new(Module::new(work, *threads)))
            }
            Contender::FmaChains => Side::FmaChains,
            Contender::Torch { work, threads } => Self::torch(stage, work, 1, *threads)?,
            Contender::TorchRing { work, ranks } => Self::torch(stage, work, *ranks, 1)?,
        })
    }

    fn torch(
        stage: &mut Stage,
        work: &Work,
        world_size: usize,
        threads: usize,
    ) -> Result<Self, CompareError> {
        let workers = stage.workers(world_size, threads)?;
        workers.borrow_mut().prepare(work)?;
        Ok(Side::Torch(workers))
    }

    /// Bytes are counted of the drivers and of PyTorch in one process; the rest has nothing to compare them with.
    fn fresh(contender: &Contender, stage: &Stage) -> Result<Self, CompareError> {
        Ok(match contender {
            Contender::Torch { work, threads } => Side::FreshTorch {
                python: stage.python()?.to_path_buf(),
                work: work.clone(),
                threads: *threads,
            },
            Contender::Ranks {
                work,
                ranks,
                threads,
            } => Side::FreshRanks {
                program: stage.probe().to_path_buf(),
                probe: footprint::Probe {
                    work: work.clone(),
                    ranks: *ranks,
                    threads: *threads,
                },
            },
            other => unreachable!("no case counts the bytes of {other:?}"),
        })
    }

    fn warm_up(&mut self) -> Result<(), CompareError> {
        match self {
            Side::Torch(workers) => workers.borrow_mut().warm_up(),
            _ => self.run().map(drop),
        }
    }

    /// One run: seconds, or bytes.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn run(&mut self) -> Result<f64, CompareError> {
        match self {
            Side::Ranks(ranks) => ranks.run(),
            Side::Module(module) => {
                let start = Instant::now();
                module.run();
                Ok(start.elapsed().as_secs_f64())
            }
            Side::FmaChains => Ok(fma::run()),
            Side::Torch(workers) => workers.borrow_mut().time(),
            Side::FreshRanks { program, probe } => footprint::of_program(program, probe),
            Side::FreshTorch {
                python,
                work,
                threads,
            } => {
                let mut workers = Workers::start(python, 1, *threads)?;
                workers.prepare(work)?;
                workers.peak().map(|bytes| bytes as f64)
            }
        }
    }
}
