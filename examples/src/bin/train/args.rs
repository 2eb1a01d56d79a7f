//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use ring_burn::Sharding;
use ring_comm::TransportKind;
use ring_examples::{
    command_line::Failure,
    device::Device,
    model_options::ModelOptions,
    placement::{MAX_RANKS, Placement, Wishes},
    strategy_option::StrategyOption,
};

/// Ranks of each group that are threads, if nobody says.
const DEFAULT_RANKS: usize = 4;

/// Train a byte-level LongNet language model, its sequence sharded over several ranks.
///
/// Each rank, a thread or a process, holds its own slice of every sequence, and the key and value rows that others' queries
/// see travel while the block at hand is computed. The last 5% of the text are held out and
/// scored at the end, every byte. The run's artifacts (checkpoints, losses.csv, loss.svg, logs) go to one directory.
#[derive(Parser, Debug)]
#[command(name = "train", version, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Text to train on, any bytes [default: the King James Bible, shipped with the program]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,

    /// Ranks that share each sequence [default: 4 threads, or all processes of a group]
    #[arg(long)]
    pub(crate) ranks: Option<usize>,

    /// Groups of ranks that divide the sequences of each step among themselves; every group has `--ranks` ranks
    #[arg(long, default_value_t = 1, value_name = "GROUPS")]
    pub(crate) data_parallel: usize,

    /// How ranks exchange rows: loopback (ranks are threads of this process), tcp (processes that are told where
    /// to meet, by torchrun say), mpi (processes under mpirun or srun), nccl [default: loopback, or what fits how the process was started]
    #[arg(long)]
    pub(crate) transport: Option<TransportKind>,

    /// What computes: cpu; or a GPU by cuda, rocm, metal, vulkan or wgpu, whichever are compiled in. A number may follow (cuda:1);
    /// without one, the ranks of a machine take its CUDA or ROCm GPUs in turn. wgpu:cpu is a GPU in software
    #[arg(long, default_value_t = Device::Cpu)]
    pub(crate) device: Device,

    /// Who owns which positions: contiguous, zigzag, striped, striped:CHUNK_SIZE
    #[arg(long, default_value = "zigzag")]
    pub(crate) sharding: Sharding,

    #[command(flatten)]
    pub(crate) strategy: StrategyOption,

    /// Positions of a sequence, over all ranks
    #[arg(long, default_value_t = 2048)]
    pub(crate) seq_length: usize,

    /// Sequences per step
    #[arg(long, default_value_t = 1)]
    pub(crate) batch: usize,

    /// The model.
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Dropout after attention and feed-forward, in [0, 1)
    #[arg(long, default_value_t = 0.0)]
    pub(crate) dropout: f64,

    /// Dropout of attention weights, in [0, 1)
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub(crate) attention_dropout: f64,

    /// Optimizer steps in all, counted from the beginning also when resuming
    #[arg(long, default_value_t = 1000)]
    pub(crate) steps: usize,

    /// Steps between checkpoints (one "epoch" of the progress display)
    #[arg(long, default_value_t = 200)]
    pub(crate) checkpoint_every: usize,

    /// Continue from this checkpoint of the artifact directory, on any number of ranks; give the options of the model and
    /// --checkpoint-every as in the run that wrote it
    #[arg(long, value_name = "EPOCH")]
    pub(crate) resume: Option<usize>,

    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3)]
    pub(crate) learning_rate: f64,

    /// Seed of parameters, order of samples, dropout and sampling
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,

    /// Kernel threads of each rank [default: cores divided by ranks on the machine]
    #[arg(long)]
    pub(crate) threads: Option<usize>,

    /// Longest wait of a rank for another, in seconds [default: RING_DEADLINE_SECONDS, or 600]
    #[arg(long)]
    pub(crate) deadline: Option<u64>,

    /// Directory for checkpoints, losses and logs
    #[arg(long, default_value = "artifacts")]
    pub(crate) artifacts: PathBuf,

    /// Bytes of text to generate at the end
    #[arg(long, default_value_t = 300)]
    pub(crate) sample_bytes: usize,

    /// Temperature of the generated text
    #[arg(long, default_value_t = 0.8)]
    pub(crate) temperature: f64,

    /// Print lines of progress instead of the dashboard, also on a terminal
    #[arg(long)]
    pub(crate) plain: bool,
}

const EXAMPLES: &str = "\
Examples:
  train                                        the defaults: 4 ranks, about three minutes on two cores
  train --data book.txt --ranks 2 --steps 300  another text, fewer ranks
  train --segment-lengths 2048 --dilation-rates 1 --window 255,0 --alibi
                                               a sliding window of 256 positions, with ALiBi
  train --resume 3 --ranks 8                   go on from the third checkpoint, on more ranks
  train --ranks 2 --data-parallel 2 --batch 4  two groups of two ranks, each with two sequences of every step
  mpirun -n 4 train                            ranks are processes; on several hosts, give all the same text
  train --seq-length 16384 --segment-lengths 2048,8192,16384 --dilation-rates 1,4,8 --heads 8";

impl Args {
    /// Checks what no type checks.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("--ranks", self.ranks.unwrap_or(1)),
            ("--data-parallel", self.data_parallel),
            ("--seq-length", self.seq_length),
            ("--batch", self.batch),
            ("--steps", self.steps),
            ("--checkpoint-every", self.checkpoint_every),
            ("--threads", self.threads.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(format!("{name} must be at least 1"));
            }
        }
        let ranks = self.ranks.unwrap_or(DEFAULT_RANKS);
        if ranks
            .checked_mul(self.data_parallel)
            .is_none_or(|ranks| ranks > MAX_RANKS)
        {
            return Err(format!("more than {MAX_RANKS} ranks are a mistake"));
        }
        if self.batch < self.data_parallel {
            return Err(format!(
                "--batch {} cannot be divided among --data-parallel {} groups: give every group a sequence",
                self.batch, self.data_parallel
            ));
        }
        self.model.check().map_err(|failure| match failure {
            Failure::Input(text) | Failure::Unsupported(text) | Failure::Run(text) => text,
        })?;
        if !(0.0..1.0).contains(&self.attention_dropout) {
            return Err(format!(
                "--attention-dropout is {}, must be in [0, 1)",
                self.attention_dropout
            ));
        }
        if !(self.learning_rate > 0.0 && self.learning_rate <= 1.0) {
            return Err(format!(
                "--learning-rate is {}, must be above 0 and at most 1",
                self.learning_rate
            ));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(format!(
                "--temperature is {}, must be positive",
                self.temperature
            ));
        }
        if self.deadline == Some(0) {
            return Err("--deadline must be at least 1 second".into());
        }
        if self.resume.is_some_and(|epoch| epoch >= self.epochs()) {
            return Err(format!(
                "nothing is left to train after checkpoint {}: raise --steps",
                self.resume.unwrap_or_default()
            ));
        }
        Ok(())
    }

    /// The ranks, and the number of them that share a sequence.
    pub(crate) fn placement(&self) -> Result<(Placement, usize), Failure> {
        let groups = self.data_parallel;
        let placement = Placement::join(&Wishes {
            transport: self.transport,
            ranks: self.ranks.map(|ranks| ranks * groups),
            threads: DEFAULT_RANKS * groups,
            deadline: self.deadline.map(Duration::from_secs),
        })?;
        let ranks = placement.world_size();
        if !ranks.is_multiple_of(groups) {
            return Err(Failure::Input(format!(
                "{ranks} processes cannot be divided into --data-parallel {groups} groups of one size"
            )));
        }
        Ok((placement, ranks / groups))
    }

    /// What no rank can see of another while they train, or too late, but must be the same on all.
    pub(crate) fn unseen(&self) -> Vec<(&'static str, String)> {
        vec![
            ("--data-parallel", self.data_parallel.to_string()),
            ("--window", format!("{:?}", self.model.bounds())),
            ("--softcap", format!("{:?}", self.model.softcap)),
            ("--alibi", self.model.alibi.to_string()),
            ("--dropout", self.dropout.to_string()),
            ("--attention-dropout", self.attention_dropout.to_string()),
            ("--steps", self.steps.to_string()),
            ("--checkpoint-every", self.checkpoint_every.to_string()),
            ("--resume", format!("{:?}", self.resume)),
            ("--learning-rate", self.learning_rate.to_string()),
        ]
    }

    /// Checkpoint intervals in all; the last may be shorter.
    pub(crate) fn epochs(&self) -> usize {
        self.steps.div_ceil(self.checkpoint_every)
    }

    /// The first step of this run.
    pub(crate) fn first_step(&self) -> usize {
        self.resume.unwrap_or(0) * self.checkpoint_every
    }
}
