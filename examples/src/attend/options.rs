//! The command line of `attend`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::Parser;
use ring_comm::{TransportKind, buffer::DType};
use ring_core::{AttentionSpec, Shape, Sharding};

use super::{Input, ScoreOptions};
use crate::{
    command_line::Failure,
    device::Device,
    length::parse_length,
    pattern_options::PatternOptions,
    placement::{MAX_RANKS, Placement, Wishes},
    strategy_option::StrategyOption,
};

/// Attention of tensors on disk, or of random ones, on one or more ranks.
///
/// Computes O = softmax(scale Q K^T) V over the keys that the pattern admits, the log-sum-exp of every row, and the gradients.
/// Every rank, a thread or a process, holds only its own rows of all tensors, and gets the key/value rows it needs from the others.
/// The result does not depend on the number of ranks, the transport or the sharding, but for rounding.
#[derive(Parser, Clone, Debug)]
#[command(name = "attend", version, after_long_help = FILES_AND_EXAMPLES)]
pub struct Options {
    /// Read q, k, v (and grad_out) from this safetensors file.
    #[arg(long, value_name = "FILE", conflicts_with = "random")]
    pub input: Option<PathBuf>,

    /// Write the results to this safetensors file. Optional with --random.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Draw the input instead of reading it, uniform with mean 0 and variance 1: batch, query heads, key/value heads, length,
    /// head size. Prints one JSON line of measurements.
    #[arg(long, value_name = "B,Hq,Hkv,N,D")]
    pub random: Option<RandomShape>,

    /// Seed of --random; the numbers do not depend on the number of ranks.
    #[arg(long, default_value_t = 0, conflicts_with = "input")]
    pub seed: u64,

    /// Compute gradients too: of the file's grad_out, or of a drawn one. Implied by a grad_out in the input file.
    #[arg(long)]
    pub backward: bool,

    /// Factor on the scores [default: 1/sqrt(head size)]
    #[arg(
        long,
        help_heading = "Computation",
        value_name = "X",
        allow_negative_numbers = true
    )]
    pub scale: Option<f32>,

    /// Position of query 0 among the keys [default: Nk - Nq if keys after the query are hidden, else 0]
    #[arg(
        long,
        help_heading = "Computation",
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub query_offset: Option<i64>,

    /// Element type of queries, keys, values and grad_out, which are rounded to it. Sums are f32 whatever it is; results are
    /// rounded to it once, at the end, and written as f32 (the log-sum-exp is not rounded).
    #[arg(long, help_heading = "Computation", value_name = "f32|bf16|f16", default_value = "f32", value_parser = parse_dtype)]
    pub dtype: DType,

    /// Number of ranks [default: 1, or the number of processes]
    #[arg(long, help_heading = "Ranks", value_name = "P", value_parser = parse_ranks)]
    pub ranks: Option<usize>,

    /// Who owns which positions: contiguous, zigzag, striped or striped:SIZE.
    #[arg(long, help_heading = "Ranks", default_value = "contiguous")]
    pub sharding: Sharding,

    /// Who owns which keys and values [default: as --sharding]
    #[arg(long, help_heading = "Ranks", value_name = "SHARDING")]
    pub key_sharding: Option<Sharding>,

    /// Threads that compute, per rank.
    #[arg(long, help_heading = "Ranks", value_name = "T", default_value_t = 1, value_parser = parse_threads)]
    pub threads: usize,

    /// How ranks exchange rows: loopback (ranks are threads of this process), tcp (processes that are told where
    /// to meet, by torchrun say), mpi (processes under mpirun or srun), nccl [default: loopback, or what fits how the process was started]
    #[arg(long, help_heading = "Ranks", value_name = "TRANSPORT")]
    pub transport: Option<TransportKind>,

    /// What computes: cpu; or a GPU by cuda, rocm, metal, vulkan or wgpu, whichever are compiled in. A number may follow (cuda:1);
    /// without one, the ranks of a machine take its CUDA or ROCm GPUs in turn. wgpu:cpu is a GPU in software.
    #[arg(long, help_heading = "Ranks", default_value_t = Device::Cpu)]
    pub device: Device,

    /// Longest time a rank waits for another, in seconds; then the program fails instead of hanging [default:
    /// RING_DEADLINE_SECONDS, or 600]
    #[arg(long, help_heading = "Ranks", value_name = "SECONDS", value_parser = parse_seconds)]
    pub deadline: Option<Duration>,

    /// Compute so often after one warm-up, and print one JSON line of measurements (with --random: always, 1 by default).
    #[arg(long, value_name = "K", value_parser = parse_count)]
    pub repeat: Option<usize>,

    /// How ranks divide the computation.
    #[command(flatten)]
    pub strategy: StrategyOption,

    /// The pattern.
    #[command(flatten)]
    pub pattern: PatternOptions,

    /// What scores go through.
    #[command(flatten)]
    pub scores: ScoreOptions,
}

const FILES_AND_EXAMPLES: &str = "\
Files:
  Input, f32: q [B,Hq,Nq,D], k and v [B,Hkv,Nk,D], optional grad_out [B,Hq,Nq,D], optional alibi_slopes [Hq]. Hq is a multiple
  of Hkv. Query i stands at position i, with --causal (or a window L,0) at position i + Nk - Nq, so that the last query stands at
  the last key; --query-offset says it otherwise. Tensors that bear the names of results are ignored.
  Output, f32: out [B,Hq,Nq,D], lse [B,Hq,Nq] (-inf where a query sees no key), and with grad_out grad_q, grad_k, grad_v.

Measurements (one JSON line):
  forward_s, backward_s: seconds of a repetition, from a barrier over all ranks until the last rank is done; min and median.
  peak_rss_mb: most memory of all ranks together (of the whole process, or the sum over the processes). input_mb: q, k, v and grad_out. MB of 10^6 bytes.
  bytes_received, backward_bytes_received: by each rank in one forward, one backward pass.

Exit status:
  0, or 1 if a rank failed, or 2 if the request makes no sense or is not supported. No output file unless 0.

Processes:
  Under mpirun or srun every process is a rank: start all with the same arguments. Rank 0 writes and prints; the input must
  be readable everywhere.

Examples:
  attend --input in.safetensors --output out.safetensors --causal
  attend --input in.safetensors --output out.safetensors --segment-lengths 2048,4096 --dilation-rates 1,2 --ranks 4
  attend --input in.safetensors --output out.safetensors --window 1023,0 --document-lengths 3000,5000,192
  attend --input in.safetensors --output out.safetensors --ranks 4 --strategy mesh:2
  attend --random 1,8,2,64K,64 --causal --ranks 4 --sharding zigzag --repeat 5 --backward
  mpirun -n 4 attend --input in.safetensors --output out.safetensors --causal";

/// Sizes of drawn tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomShape {
    /// Batch and heads.
    pub shape: Shape,
    /// Number of queries, and of keys.
    pub length: usize,
}

impl Options {
    /// Refuses what does not exist and what contradicts itself.
    ///
    /// # Errors
    /// [`Failure::Unsupported`], [`Failure::Input`].
    pub fn check(&self) -> Result<(), Failure> {
        self.device.check()?;
        self.pattern.pattern()?;
        match (&self.input, self.random, &self.output) {
            (None, None, _) => Err(Failure::Input(
                "one of --input FILE and --random B,Hq,Hkv,N,D is needed; see --help".to_string(),
            )),
            (Some(_), _, None) => Err(Failure::Input(
                "--input needs an --output FILE for the results".to_string(),
            )),
            _ => Ok(()),
        }
    }

    /// The ranks.
    ///
    /// # Errors
    /// As [`Placement::join`].
    pub fn placement(&self) -> Result<Placement, Failure> {
        Placement::join(&Wishes {
            transport: self.transport,
            ranks: self.ranks,
            threads: 1,
            deadline: self.deadline,
        })
    }

    /// The computation, for the sizes of `input`, on so many ranks.
    ///
    /// # Errors
    /// [`Failure::Input`] for sizes that do not fit together, or a strategy that does not fit them.
    pub fn spec(&self, input: &Input, ranks: usize) -> Result<AttentionSpec, Failure> {
        let spec = AttentionSpec::new(self.pattern.pattern()?, input.shape(), 0)
            .and_then(|spec| spec.with_lengths(input.query_length(), input.key_length()))
            .map(|spec| match self.query_offset {
                Some(offset) => spec.with_query_offset(offset),
                None => spec,
            })
            .and_then(|spec| spec.sharded(self.sharding, ranks))
            .and_then(|spec| self.pattern.masked(spec))
            .and_then(|spec| match self.scale {
                Some(scale) => spec.with_scale(scale),
                None => Ok(spec),
            })
            .map_err(Failure::input)?
            .with_key_sharding(self.key_sharding.unwrap_or(self.sharding))
            .with_dtype(self.dtype);
        self.strategy.divide(self.scores.of(spec, input)?)
    }

    /// What no rank can see of another while they compute, but must be the same on all.
    pub(super) fn unseen(&self) -> [(&'static str, String); 4] {
        [
            ("--seed", self.seed.to_string()),
            (
                "--dropout-seed",
                self.scores.dropout_seed.unwrap_or(0).to_string(),
            ),
            ("--output given", self.output.is_some().to_string()),
            ("--repeat", self.repeat.unwrap_or(1).to_string()),
        ]
    }

    /// Whether a line of measurements is wanted.
    pub fn measures(&self) -> bool {
        self.random.is_some() || self.repeat.is_some()
    }
}

impl FromStr for RandomShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split(',')
            .map(parse_length)
            .collect::<Result<Vec<_>, _>>()?;
        let &[batch, query_heads, kv_heads, length, head_dim] = numbers.as_slice() else {
            return Err(format!(
                "{} numbers, but batch, query heads, key/value heads, length and head size are 5",
                numbers.len()
            ));
        };
        Ok(Self {
            shape: Shape {
                batch,
                query_heads,
                kv_heads,
                head_dim,
            },
            length,
        })
    }
}

/// Parses an element type.
pub(crate) fn parse_dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        _ => Err("valid: f32, bf16, f16".to_string()),
    }
}

fn parse_ranks(text: &str) -> Result<usize, String> {
    in_range(text, MAX_RANKS)
}

fn parse_threads(text: &str) -> Result<usize, String> {
    in_range(text, 1024)
}

fn parse_count(text: &str) -> Result<usize, String> {
    in_range(text, 1_000_000)
}

pub(crate) fn in_range(text: &str, max: usize) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|number| (1..=max).contains(number))
        .ok_or_else(|| format!("not a number from 1 to {max}"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "not a positive number of seconds".to_string())
}
