//! The line of measurements.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Input, Options, Outcome, Pass};
use crate::{command_line::Failure, placement::Placement};

/// What the JSON line says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Seconds of a forward pass.
    pub forward_s: Times,
    /// Seconds of a backward pass, if there was one.
    pub backward_s: Option<Times>,
    /// Most memory the process ever held, or the sum of that over all processes, in MB of 10^6 bytes; absent where the system does not tell.
    pub peak_rss_mb: Option<f64>,
    /// Size of the whole input, over all ranks, in MB of 10^6 bytes.
    pub input_mb: f64,
    /// Bytes that reached each rank in one forward pass.
    pub bytes_received: Vec<u64>,
    /// Bytes that reached each rank in one backward pass, if there was one.
    pub backward_bytes_received: Option<Vec<u64>>,
    /// Number of ranks.
    pub ranks: usize,
    /// Threads per rank.
    pub threads: usize,
    /// Measured repetitions.
    pub repeat: usize,
    /// The pattern, in words.
    pub pattern: String,
    /// The sharding.
    pub sharding: String,
    /// How the ranks divided the computation.
    pub strategy: String,
    /// Sizes of the tensors.
    pub shape: Sizes,
    /// Factor on the scores.
    pub scale: f32,
    /// Element type.
    pub dtype: String,
    /// How rows travelled.
    pub transport: String,
    /// What computed.
    pub device: String,
    /// Seed of drawn tensors.
    pub seed: Option<u64>,
}

/// Seconds over the repetitions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// The shortest.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
}

/// Sizes of the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Batch size.
    pub batch: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Number of queries.
    pub queries: usize,
    /// Number of keys.
    pub keys: usize,
    /// Head size.
    pub head_dim: usize,
}

impl Measurement {
    /// The measurements of `outcome`.
    pub(super) fn new(
        options: &Options,
        input: &Input,
        outcome: &Outcome,
        peak_rss_mb: Option<f64>,
    ) -> Self {
        let spec = outcome.spec();
        let backward: Vec<&[Pass]> = outcome.backward_passes().collect();
        let backward = input.has_gradient().then_some(backward);
        let forward: Vec<&[Pass]> = outcome.forward_passes().collect();
        Self {
            forward_s: Times::of(&forward),
            backward_s: backward.as_deref().map(Times::of),
            peak_rss_mb,
            input_mb: megabytes(input.elements() as u64 * spec.dtype.size() as u64),
            bytes_received: bytes_received(&forward),
            backward_bytes_received: backward.as_deref().map(bytes_received),
            ranks: spec.world_size,
            threads: options.threads,
            repeat: options.repeat.unwrap_or(1),
            pattern: spec.pattern.to_string(),
            sharding: spec.query_sharding.to_string(),
            strategy: spec.strategy.to_string(),
            shape: Sizes {
                batch: spec.shape.batch,
                query_heads: spec.shape.query_heads,
                kv_heads: spec.shape.kv_heads,
                queries: spec.query_length,
                keys: spec.key_length,
                head_dim: spec.shape.head_dim,
            },
            scale: spec.scale,
            dtype: spec.dtype.to_string(),
            transport: outcome.transport().to_string(),
            device: options.device.to_string(),
            seed: options.random.map(|_| options.seed),
        }
    }
}

impl Times {
    /// Of every rank's passes: a repetition lasts from when the first rank leaves the barrier until the last is done.
    fn of(ranks: &[&[Pass]]) -> Self {
        let repetitions = ranks.first().map_or(0, |passes| passes.len());
        let over_ranks = |repetition: usize, pick: fn(&Pass) -> Duration| {
            ranks.iter().map(move |passes| pick(&passes[repetition]))
        };
        let mut seconds: Vec<f64> = (0..repetitions)
            .filter_map(|repetition| {
                let started = over_ranks(repetition, |pass| pass.started).min()?;
                let ended = over_ranks(repetition, |pass| pass.ended).max()?;
                Some((ended - started).as_secs_f64())
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let middle = seconds.len() / 2;
        let median = if seconds.len() % 2 == 1 {
            seconds[middle]
        } else {
            (seconds[middle - 1] + seconds[middle]) / 2.0
        };
        Self {
            min: seconds[0],
            median,
        }
    }
}

/// The same in every repetition.
fn bytes_received(ranks: &[&[Pass]]) -> Vec<u64> {
    ranks
        .iter()
        .map(|passes| passes.last().map_or(0, |pass| pass.bytes_received))
        .collect()
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// What all processes together have held at most, each at its own time; all of them must ask.
pub(super) fn peak_rss_mb(placement: &Placement) -> Result<Option<f64>, Failure> {
    let own = peak_rss_bytes().map_or(f64::NAN, megabytes);
    let all = placement.of_all_processes("peak memory", own)?;
    let sum: f64 = all.iter().sum();
    Ok((!sum.is_nan()).then_some(sum))
}

/// The high-water mark of this process's memory, where the system keeps one (Linux: `proc(5)`, `VmHWM`).
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
