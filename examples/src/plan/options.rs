//! The command line of `plan`.

use std::path::PathBuf;

use clap::Parser;
use ring_comm::buffer::DType;
use ring_core::{AttentionSpec, Shape, Sharding};

use crate::{
    attend::{in_range, parse_dtype},
    command_line::Failure,
    length::parse_length,
    pattern_options::PatternOptions,
    strategy_option::StrategyOption,
};

/// What every rank would hold, send, receive and compute, without computing anything.
///
/// Plans self-attention over a sequence of any length, exactly as the ranks of `attend` plan it: bytes are exact, memory counts
/// the tensors of one attention computation.
#[derive(Parser, Clone, Debug)]
#[command(name = "plan", version, after_long_help = NOTES_AND_EXAMPLES)]
pub struct Options {
    /// Positions of the sequence: 65536, 64K, 1M, 1e9.
    #[arg(long, value_name = "N", value_parser = parse_length)]
    pub length: usize,

    /// Number of ranks. The time to plan all of them grows with its square.
    #[arg(long, value_name = "P", default_value_t = 8, value_parser = parse_ranks)]
    pub ranks: usize,

    /// Who owns which positions: contiguous, zigzag, striped or striped:SIZE.
    #[arg(long, default_value = "contiguous")]
    pub sharding: Sharding,

    /// Query heads.
    #[arg(long, value_name = "Hq", default_value_t = 32, help_heading = "Model")]
    pub heads: usize,

    /// Key/value heads [default: as many as query heads]
    #[arg(long, value_name = "Hkv", help_heading = "Model")]
    pub kv_heads: Option<usize>,

    /// Head size.
    #[arg(long, value_name = "D", default_value_t = 128, help_heading = "Model")]
    pub head_dim: usize,

    /// Batch size.
    #[arg(long, value_name = "B", default_value_t = 1, help_heading = "Model")]
    pub batch: usize,

    /// Element type of queries, keys, values and outputs.
    #[arg(long, value_name = "f32|bf16|f16", default_value = "f32", value_parser = parse_dtype, help_heading = "Model")]
    pub dtype: DType,

    /// Threads per rank, for the memory of the kernels' tiles.
    #[arg(long, value_name = "T", default_value_t = 1, value_parser = parse_threads, help_heading = "Model")]
    pub threads: usize,

    /// Show this rank alone, with all its steps.
    #[arg(long, value_name = "R", help_heading = "What to show")]
    pub rank: Option<usize>,

    /// Show all ranks, also if there are many.
    #[arg(long, help_heading = "What to show", conflicts_with = "rank")]
    pub all: bool,

    /// Compare the shardings also for more than 64 ranks, which may take minutes; with up to 64 they are always compared.
    #[arg(long, help_heading = "What to show", conflicts_with = "rank")]
    pub compare: bool,

    /// Print all numbers as JSON instead of a table.
    #[arg(long, help_heading = "What to show")]
    pub json: bool,

    /// Draw which positions a rank (--rank, else the middle one) owns, which it attends to and from which ranks they come.
    #[arg(long, value_name = "FILE", help_heading = "What to show")]
    pub svg: Option<PathBuf>,

    /// How ranks divide the computation.
    #[command(flatten)]
    pub strategy: StrategyOption,

    /// The pattern.
    #[command(flatten)]
    pub pattern: PatternOptions,
}

const NOTES_AND_EXAMPLES: &str = "\
Numbers:
  64K is 65,536, 1M is 1,048,576, 1e6 is 1,000,000. Bytes are in KiB, MiB, GiB (2^10, 2^20, 2^30); pairs in k, M, G, T (powers
  of 1,000) count (query, key) pairs over all query heads and batch entries. Of the shardings the best is the one whose slowest
  rank has fewest pairs.
  Backward bytes are the rows once more, and their gradients on the way home: f32, but rounded where heads are divided.
  The picture shows whose positions are attended to; that does not depend on the strategy.

Examples:
  plan --length 64K --ranks 4 --causal --sharding zigzag
  plan --length 64K --ranks 8 --heads 8 --strategy mesh:4
  plan --length 1M --ranks 64 --window 64K,0 --document-lengths 600K,400K,24K
  plan --length 1e9 --ranks 1024 --segment-lengths 2048,64K,2M,64M,1e9 --dilation-rates 1,32,1024,32768,1048576
  plan --length 1M --ranks 16 --segment-lengths 64K,256K,1M --dilation-rates 1,4,16 --svg plan.svg --rank 5";

impl Options {
    /// Whether the shardings are compared.
    pub(super) fn compares(&self) -> bool {
        self.rank.is_none() && (self.compare || (2..=COMPARED_RANKS).contains(&self.ranks))
    }

    /// The computation they describe.
    ///
    /// # Errors
    /// [`Failure`] if it cannot be.
    pub fn spec(&self) -> Result<AttentionSpec, Failure> {
        let shape = Shape {
            batch: self.batch,
            query_heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            head_dim: self.head_dim,
        };
        let sizes = [
            shape.batch,
            shape.query_heads,
            shape.kv_heads,
            shape.head_dim,
        ];
        if let Some(size) = sizes.into_iter().find(|&size| size > MAX_SIZE) {
            return Err(Failure::Input(format!(
                "{size} is more than a model can have: batch, heads and head size are at most {MAX_SIZE}"
            )));
        }
        let pattern = self.pattern.pattern()?;
        let spec = AttentionSpec::new(pattern, shape, self.length)
            .and_then(|spec| spec.sharded(self.sharding, self.ranks))
            .and_then(|spec| self.pattern.masked(spec))
            .map_err(Failure::input)?
            .with_dtype(self.dtype);
        let spec = self.strategy.divide(spec)?;
        match self.rank {
            Some(rank) if rank >= self.ranks => Err(Failure::Input(format!(
                "--rank {rank} does not exist: ranks are 0 to {}",
                self.ranks - 1
            ))),
            _ => Ok(spec),
        }
    }
}

/// Up to so many ranks shardings are compared without being asked for.
const COMPARED_RANKS: usize = 64;

/// Above this, products of sizes could leave 64 bits.
const MAX_SIZE: usize = 1 << 16;

/// A plan of this many ranks still ends within the day.
const MAX_RANKS: usize = 1 << 14;

fn parse_ranks(text: &str) -> Result<usize, String> {
    in_range(text, MAX_RANKS)
}

fn parse_threads(text: &str) -> Result<usize, String> {
    in_range(text, 1024)
}
