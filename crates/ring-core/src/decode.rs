//! Attention of a few new tokens to a sharded cache: [`decode`].
//!
//! All ranks have the new queries; each attends to the keys that it holds, and the partial results, with their log-sum-exp, are
//! merged in one reduction over the ranks (tree attention, arXiv 2408.04093): what travels does not depend on the length of the
//! sequence. A rank that holds nothing visible contributes nothing.

mod merge;

use ring_comm::{
    Communicator,
    buffer::{DType, HostBuffer},
    collective::all_reduce_merged,
    trace::{Activity, Details},
};
use ring_kernels::{KernelError, Kernels, Tensor};

use crate::{
    cache::{CacheError, KeyValueCache},
    error::Error,
    exchange::tell_others,
    pattern::MAX_LENGTH,
    spec::SpecError,
};

/// Queries, keys and values of the next tokens, `[batch, heads, count, head_dim]`; the same on all ranks.
#[derive(Clone, Copy)]
pub struct NewTokens<'a> {
    /// How many tokens.
    pub count: usize,
    /// Queries.
    pub query: Tensor<'a, HostBuffer>,
    /// Keys.
    pub key: Tensor<'a, HostBuffer>,
    /// Values.
    pub value: Tensor<'a, HostBuffer>,
}

/// Results of [`decode`], contiguous, the same bits on all ranks.
#[derive(Debug)]
pub struct Decoded {
    /// `[batch, query_heads, count, head_dim]`, in the type of the inputs.
    pub output: HostBuffer,
    /// `[batch, query_heads, count]`, f32: log-sum-exp over all keys on all ranks; `-inf` where nothing is visible.
    pub log_sum_exp: Vec<f32>,
}

/// Appends tokens to the cache and yields their attention to the whole sequence, themselves among it: what attention of the whole
/// sequence would give at their positions, to rounding. All ranks call it, with the same tokens.
///
/// With the partial results travel the number of positions in the cache, a checksum of the computation, and the caller's
/// [note](KeyValueCache::note). Ranks whose numbers differ are told so at once; a rank that calls decode less often than the others, or begins
/// with a cache of another prompt while they go on with theirs, holds them up until the deadline.
///
/// # Errors
/// [`enum@Error`]; when one rank fails, every rank of the group gets an error that names it, within the deadline, and the caches are
/// not to be used any more ([`CacheError::Failed`]).
pub fn decode(
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    cache: &mut KeyValueCache,
    tokens: NewTokens<'_>,
) -> Result<Decoded, Error> {
    let details = Details::default();
    let result = communicator.timed(Activity::Pass, "decode", details, || {
        run(kernels, communicator, cache, tokens)
    });
    if let Some(trace) = communicator.trace() {
        trace.flush();
    }
    result
}

fn run(
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    cache: &mut KeyValueCache,
    tokens: NewTokens<'_>,
) -> Result<Decoded, Error> {
    let failed = |error: &Error| tell_others(communicator, error);
    check(communicator, cache, &tokens).inspect_err(failed)?;
    cache.begin().map_err(Error::from).inspect_err(failed)?;
    let comm = |step: &str, source| Error::Comm {
        step: step.into(),
        source,
    };
    let agreed = cache.agree(communicator);
    agreed.map_err(|source| comm("the comparison of decodings", source))?;
    let terms = cache.terms();
    let part = partial(kernels, communicator, cache, &tokens).inspect_err(failed)?;
    let head_dim = cache.problem().head_dim;
    let details = Details::default();
    let whole = communicator
        .timed(Activity::Wait, "merge", details, || {
            all_reduce_merged(communicator, &terms, part, |ours, theirs| {
                merge::merge(head_dim, ours, theirs);
            })
        })
        .map_err(|source| comm("the reduction of a decoding", source))?;
    let decoded = rounded(kernels, cache, whole).inspect_err(failed)?;
    cache.end();
    Ok(decoded)
}

/// Refuses what does not fit the cache, before anything is done.
fn check(
    communicator: &Communicator<HostBuffer>,
    cache: &KeyValueCache,
    tokens: &NewTokens<'_>,
) -> Result<(), Error> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let (cache_rank, cache_ranks) = (cache.rank(), cache.spec().world_size);
    if (cache_rank, cache_ranks) != (rank, ranks) {
        return Err(CacheError::Place {
            cache_rank,
            cache_ranks,
            rank,
            ranks,
        }
        .into());
    }
    if tokens.count == 0 {
        let what = "the number of new tokens";
        return Err(SpecError::Zero { what }.into());
    }
    let length = cache.length().saturating_add(tokens.count);
    if length > MAX_LENGTH {
        let (what, value) = ("the number of keys", length);
        return Err(SpecError::TooLong { what, value }.into());
    }
    let (got, expected) = (tokens.query.data.dtype(), cache.spec().dtype);
    if got != expected {
        let what = "query";
        return Err(Error::DType {
            what,
            got,
            expected,
        });
    }
    cache.check_tensor("key", tokens.key, tokens.count)?;
    cache.check_tensor("value", tokens.value, tokens.count)
}

/// What this rank's keys contribute: outputs, then log-sum-exps.
fn partial(
    kernels: &impl Kernels<HostBuffer>,
    communicator: &Communicator<HostBuffer>,
    cache: &mut KeyValueCache,
    tokens: &NewTokens<'_>,
) -> Result<Vec<f32>, Error> {
    cache.append(kernels, tokens.key, tokens.value, tokens.count)?;
    let details = Details::default();
    let (output, log_sum_exp) = communicator
        .timed(Activity::Compute, "attend", details, || {
            attend(kernels, cache, tokens.query)
        })
        .map_err(|source| kernel_error(cache, source))?;
    match (output, log_sum_exp) {
        (HostBuffer::F32(mut part), HostBuffer::F32(log_sum_exp)) => {
            part.extend_from_slice(&log_sum_exp);
            Ok(part)
        }
        _ => unreachable!("kernels finish in the type that they are asked for"),
    }
}

/// Normalised output, scaled as the pattern says, and log-sum-exp. A weighted mean of scaled parts is the scaled mean, so the scale is
/// applied here, and not again.
fn attend(
    kernels: &impl Kernels<HostBuffer>,
    cache: &KeyValueCache,
    query: Tensor<'_, HostBuffer>,
) -> Result<(HostBuffer, HostBuffer), KernelError> {
    let problem = cache.problem();
    let mut state = kernels.start(problem)?;
    if cache.work().iter().any(|work| !work.blocks.is_empty()) {
        kernels.forward(problem, query, &cache.source(), cache.work(), &mut state)?;
    }
    kernels.finish(problem, state, DType::F32, cache.spec().output_scale())
}

/// The merged result in the type of the inputs.
fn rounded(
    kernels: &impl Kernels<HostBuffer>,
    cache: &KeyValueCache,
    mut whole: Vec<f32>,
) -> Result<Decoded, Error> {
    let rows = whole.len() / (cache.problem().head_dim + 1);
    let log_sum_exp = whole.split_off(whole.len() - rows);
    let output = kernels
        .round(HostBuffer::F32(whole), cache.spec().dtype)
        .map_err(|source| kernel_error(cache, source))?;
    Ok(Decoded {
        output,
        log_sum_exp,
    })
}

fn kernel_error(cache: &KeyValueCache, source: KernelError) -> Error {
    let rank = cache.rank();
    Error::Kernel { rank, source }
}
