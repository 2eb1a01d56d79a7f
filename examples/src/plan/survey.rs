//! Every rank's plan, reduced to its numbers.

use std::{
    io::{IsTerminal, stderr},
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;
use ring_core::{AttentionSpec, CommunicationEstimate, MemoryEstimate, Plan, Span, SpecError};
use ring_kernels::CpuKernels;
use serde::{Deserialize, Serialize};

use super::comparison::{Comparison, over_mean};

/// The numbers of one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankSurvey {
    /// The rank.
    pub rank: usize,
    /// The positions it owns.
    pub spans: Vec<Span>,
    /// How many positions it owns.
    pub tokens: usize,
    /// (Query, key) pairs it computes, over all query heads and batch entries.
    pub pairs: u128,
    /// Bytes it sends and receives.
    pub communication: CommunicationEstimate,
    /// Bytes of memory in a forward pass.
    pub forward_memory: MemoryEstimate,
    /// Bytes of memory in a backward pass.
    pub backward_memory: MemoryEstimate,
}

/// One branch of the pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Positions per segment; absent if the sequence is one segment.
    pub segment_length: Option<usize>,
    /// Distance of selected positions.
    pub dilation_rate: usize,
}

/// Sizes of the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Batch size.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Head size.
    pub head_dim: usize,
}

/// Sums over all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pairs of all ranks.
    pub pairs: u128,
    /// Bytes that travel in a forward pass.
    pub forward_received: u64,
    /// Bytes that travel in a backward pass.
    pub backward_received: u64,
    /// Forward bytes by branch; empty for strategies by which other rows travel than branches want.
    pub received_per_branch: Vec<u64>,
    /// Forward bytes among ranks that divide heads.
    pub forward_regrouped: u64,
}

/// How evenly something is spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Imbalance {
    /// Pairs of the rank with most, over the mean.
    pub pairs: f64,
    /// Forward bytes of the rank that receives most, over the mean.
    pub forward_received: f64,
}

/// A computation and the numbers of its ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Survey {
    /// The pattern, in words.
    pub pattern: String,
    /// Its branches.
    pub branches: Vec<Branch>,
    /// Positions of the sequence.
    pub length: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Who owns what.
    pub sharding: String,
    /// How the ranks divide the computation.
    pub strategy: String,
    /// Sizes of the tensors.
    pub model: Model,
    /// Element type.
    pub dtype: String,
    /// Threads per rank.
    pub threads: usize,
    /// Forward bytes that a rank with a mean share would receive if all keys and values were passed round a ring.
    pub plain_ring_received: u64,
    /// Sums over all ranks; absent if one rank alone was planned.
    pub totals: Option<Totals>,
    /// Slowest rank over mean; absent if one rank alone was planned.
    pub imbalance: Option<Imbalance>,
    /// What every sharding costs; absent if they were not compared.
    pub comparison: Option<Comparison>,
    /// The ranks that were planned.
    pub per_rank: Vec<RankSurvey>,
    /// The whole plan, if one rank alone was planned.
    pub plan: Option<Plan>,
}

impl Survey {
    /// Plans all ranks, as many at a time as there are cores. Plans are dropped as soon as their numbers are taken.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible.
    pub fn of_all(spec: &AttentionSpec, threads: usize) -> Result<Self, SpecError> {
        let progress = Progress::new(spec.world_size);
        let per_rank: Vec<RankSurvey> = (0..spec.world_size)
            .into_par_iter()
            .map(|rank| Ok(RankSurvey::new(&Plan::new(spec, rank)?, threads)))
            .inspect(|_| progress.one_more())
            .collect::<Result<_, SpecError>>()?;
        progress.end();
        let totals = Totals::of(&per_rank);
        let largest =
            |value: fn(&RankSurvey) -> f64| per_rank.iter().map(value).fold(0.0, f64::max);
        let imbalance = Imbalance {
            pairs: over_mean(
                largest(|rank| rank.pairs as f64),
                totals.pairs as f64,
                spec.world_size,
            ),
            forward_received: over_mean(
                largest(|rank| rank.communication.forward_received as f64),
                totals.forward_received as f64,
                spec.world_size,
            ),
        };
        Ok(Self {
            totals: Some(totals),
            imbalance: Some(imbalance),
            per_rank,
            ..Self::header(spec, threads)
        })
    }

    /// With what the other shardings would cost; all ranks must have been planned.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible.
    pub fn compared(self, spec: &AttentionSpec) -> Result<Self, SpecError> {
        Ok(Self {
            comparison: Some(Comparison::new(spec, &self)?),
            ..self
        })
    }

    /// Plans one rank alone.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible or the rank does not exist.
    pub fn of_rank(spec: &AttentionSpec, threads: usize, rank: usize) -> Result<Self, SpecError> {
        let plan = Plan::new(spec, rank)?;
        Ok(Self {
            per_rank: vec![RankSurvey::new(&plan, threads)],
            plan: Some(plan),
            ..Self::header(spec, threads)
        })
    }

    fn header(spec: &AttentionSpec, threads: usize) -> Self {
        let others = spec.key_length - spec.key_length / spec.world_size;
        let heads = (spec.shape.kv_heads * spec.shape.batch) as u64;
        Self {
            pattern: spec.pattern.to_string(),
            branches: spec
                .pattern
                .branches()
                .iter()
                .map(|branch| Branch {
                    segment_length: branch.segment_length,
                    dilation_rate: branch.dilation_rate,
                })
                .collect(),
            length: spec.key_length,
            ranks: spec.world_size,
            sharding: spec.key_sharding.to_string(),
            strategy: spec.strategy.to_string(),
            model: Model {
                batch: spec.shape.batch,
                heads: spec.shape.query_heads,
                kv_heads: spec.shape.kv_heads,
                head_dim: spec.shape.head_dim,
            },
            dtype: spec.dtype.to_string(),
            threads,
            plain_ring_received: others as u64 * heads * spec.row_bytes(),
            totals: None,
            imbalance: None,
            comparison: None,
            per_rank: Vec::new(),
            plan: None,
        }
    }
}

impl RankSurvey {
    fn new(plan: &Plan, threads: usize) -> Self {
        let spec = plan.spec();
        let scratch = CpuKernels::scratch_bytes(spec.shape.head_dim, threads) as u64;
        let spans = spec
            .key_sharding
            .spans(spec.key_length, spec.world_size, plan.rank());
        Self {
            rank: plan.rank(),
            tokens: spans.iter().map(Span::len).sum(),
            spans,
            pairs: plan.pairs(),
            communication: CommunicationEstimate::new(plan),
            forward_memory: MemoryEstimate::forward(plan, scratch),
            backward_memory: MemoryEstimate::backward(plan, scratch),
        }
    }
}

impl Totals {
    fn of(ranks: &[RankSurvey]) -> Self {
        let branches = ranks
            .first()
            .map_or(0, |rank| rank.communication.received_per_branch.len());
        let sum = |value: &dyn Fn(&CommunicationEstimate) -> u64| {
            ranks.iter().map(|rank| value(&rank.communication)).sum()
        };
        Self {
            pairs: ranks.iter().map(|rank| rank.pairs).sum(),
            forward_received: sum(&|bytes| bytes.forward_received),
            backward_received: sum(&|bytes| bytes.backward_received),
            forward_regrouped: sum(&|bytes| bytes.forward_regrouped),
            received_per_branch: (0..branches)
                .map(|branch| sum(&|bytes| bytes.received_per_branch[branch]))
                .collect(),
        }
    }
}

/// A line on the terminal that counts ranks, where there are so many that planning takes a while.
struct Progress {
    ranks: usize,
    done: AtomicUsize,
    shown: bool,
}

impl Progress {
    fn new(ranks: usize) -> Self {
        Self {
            ranks,
            done: AtomicUsize::new(0),
            shown: ranks >= 256 && stderr().is_terminal(),
        }
    }

    fn one_more(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if self.shown && done.is_multiple_of(16) {
            eprint!("\rplanned {done} of {} ranks", self.ranks);
        }
    }

    fn end(&self) {
        if self.shown {
            eprint!("\r{:40}\r", "");
        }
    }
}
