//! Measurements of ranks that are processes: this program starts itself, as torchrun would or under `mpirun`, and the ranks tell
//! what they measured.

use std::{
    env, fmt,
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use ring_comm::{Communicator, Loopback, TransportKind, buffer::HostBuffer, launch};
use ring_core::{AttentionSpec, Pattern, Shape, Sharding};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{
    overlap::{self, Computation, Times},
    workload::Rank,
};

/// The variable that tells a rank what to measure, as JSON.
const TASK: &str = "RING_PROCESSES_MEASURE";
/// What the line with the measurements begins with.
const MEASURED: &str = "measured ";

/// Positions of the ring that is measured: 8 heads of 64, causal, zigzag, f32.
pub const RING_LENGTH: usize = 8192;

/// Why there are no measurements.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// A program does not start.
    #[error("{program} does not start: {error}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        error: std::io::Error,
    },
    /// The ranks failed.
    #[error("the ranks over {0} failed")]
    Ranks(Starter),
    /// What a rank does went wrong.
    #[error("{0}")]
    Task(String),
}

/// Who starts the ranks, and connects them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Threads of this process.
    Loopback,
    /// Processes over TCP.
    Tcp,
    /// Processes under `mpirun`.
    Mpi,
}

/// What a rank measures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// A shift under a computation of so many milliseconds.
    Overlap {
        /// Milliseconds.
        computation: u64,
        /// How often.
        repetitions: usize,
    },
    /// Forward and backward of a causal attention.
    Ring {
        /// Kernel threads of each rank.
        threads: usize,
        /// How often.
        repetitions: usize,
    },
}

impl fmt::Display for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Starter::Loopback => "loopback",
            Starter::Tcp => "tcp",
            Starter::Mpi => "mpi",
        })
    }
}

/// Does what this process was started for, if it was started as a rank.
pub fn perform_as_rank() -> Option<Result<(), MeasureError>> {
    let task = env::var(TASK).ok()?;
    Some(perform(&task))
}

fn perform(task: &str) -> Result<(), MeasureError> {
    let failed = |error: &dyn fmt::Display| MeasureError::Task(error.to_string());
    let task: Task = serde_json::from_str(task).map_err(|error| failed(&error))?;
    let launch = launch::from_env().map_err(|error| failed(&error))?;
    let kind = TransportKind::fitting(&launch);
    let communicator = Communicator::connect(kind, &launch).map_err(|error| failed(&error))?;
    let is_first = communicator.rank() == 0;
    let line = match task {
        Task::Overlap {
            computation,
            repetitions,
        } => serde_json::to_string(&overlap_times(computation, repetitions, &communicator)?),
        Task::Ring {
            threads,
            repetitions,
        } => serde_json::to_string(&ring_seconds(threads, repetitions, &communicator)?),
    };
    if is_first {
        println!("{MEASURED}{}", line.map_err(|error| failed(&error))?);
    }
    Ok(())
}

fn overlap_times(
    computation: u64,
    repetitions: usize,
    communicator: &Communicator<HostBuffer>,
) -> Result<Vec<Times>, MeasureError> {
    Computation::lasting(Duration::from_millis(computation))
        .agreed(communicator)
        .and_then(|computation| overlap::measure(communicator, &computation, repetitions))
        .map_err(|error| MeasureError::Task(error.to_string()))
}

fn ring_seconds(
    threads: usize,
    repetitions: usize,
    communicator: &Communicator<HostBuffer>,
) -> Result<Vec<f64>, MeasureError> {
    let shape = Shape {
        batch: 1,
        query_heads: 8,
        kv_heads: 8,
        head_dim: 64,
    };
    let spec = AttentionSpec::new(Pattern::full().causal(), shape, RING_LENGTH)
        .and_then(|spec| spec.sharded(Sharding::Zigzag, communicator.world_size()))
        .map_err(|error| MeasureError::Task(error.to_string()))?;
    let rank = Rank::of(&spec, communicator.clone(), threads);
    let pass = || -> Result<(), ring_core::Error> {
        let output = rank.forward()?;
        rank.backward(&output).map(drop)
    };
    let seconds: Result<Vec<f64>, RingError> = (0..=repetitions)
        .map(|_| overlap::timed(communicator, || pass().map_err(RingError::Ring)))
        .collect();
    seconds
        .map(|mut seconds| seconds.split_off(1))
        .map_err(|error| MeasureError::Task(error.to_string()))
}

#[derive(Debug, Error)]
enum RingError {
    #[error(transparent)]
    Ring(ring_core::Error),
    #[error(transparent)]
    Comm(#[from] ring_comm::CommError),
}

impl Starter {
    /// Times of [`Task::Overlap`] with two ranks of one thread.
    ///
    /// # Errors
    /// [`MeasureError`] if they fail.
    pub fn overlap(self, computation: u64, repetitions: usize) -> Result<Vec<Times>, MeasureError> {
        if self != Starter::Loopback {
            let task = Task::Overlap {
                computation,
                repetitions,
            };
            return self.measure(2, task, None);
        }
        let results = Loopback::run(2, Duration::from_secs(60), |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            overlap_times(computation, repetitions, &communicator)
        });
        let mut first = Vec::new();
        for result in results.into_iter().rev() {
            first = result.map_err(|panic| MeasureError::Task(panic.to_string()))??;
        }
        Ok(first)
    }

    /// Seconds of [`Task::Ring`] on so many ranks, traced to `trace` (`%p` in its name is the process) if asked for.
    ///
    /// # Errors
    /// [`MeasureError`] if they fail.
    pub fn ring(
        self,
        ranks: usize,
        threads: usize,
        repetitions: usize,
        trace: Option<&Path>,
    ) -> Result<Vec<f64>, MeasureError> {
        let task = Task::Ring {
            threads,
            repetitions,
        };
        self.measure(ranks, task, trace)
    }

    fn measure<T: DeserializeOwned>(
        self,
        ranks: usize,
        task: Task,
        trace: Option<&Path>,
    ) -> Result<T, MeasureError> {
        let task = serde_json::to_string(&task).map_err(|_| MeasureError::Ranks(self))?;
        let mut commands = self.commands(ranks).map_err(|error| MeasureError::Start {
            program: "this program".into(),
            error,
        })?;
        let mut children = Vec::new();
        for command in &mut commands {
            command.env(TASK, &task).stdout(Stdio::piped());
            if let Some(trace) = trace {
                command.env("RING_TRACE", trace);
            }
            children.push(command.spawn().map_err(|error| MeasureError::Start {
                program: command.get_program().to_string_lossy().into_owned(),
                error,
            })?);
        }
        let mut measured = None;
        for child in children {
            let output = child
                .wait_with_output()
                .map_err(|_| MeasureError::Ranks(self))?;
            if !output.status.success() {
                return Err(MeasureError::Ranks(self));
            }
            let text = String::from_utf8_lossy(&output.stdout);
            let line = text.lines().find_map(|line| line.strip_prefix(MEASURED));
            measured = measured.or_else(|| serde_json::from_str(line?).ok());
        }
        measured.ok_or(MeasureError::Ranks(self))
    }

    fn commands(self, ranks: usize) -> std::io::Result<Vec<Command>> {
        let own = env::current_exe()?;
        if self == Starter::Mpi {
            let mut mpirun = Command::new("mpirun");
            mpirun.args([
                "--allow-run-as-root",
                "--oversubscribe",
                "--bind-to",
                "none",
            ]);
            mpirun.args(["-n", &ranks.to_string()]).arg(own);
            return Ok(vec![mpirun]);
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let command = |rank: usize| {
            let mut command = Command::new(&own);
            command
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string());
            command
        };
        Ok((0..ranks).map(command).collect())
    }
}
