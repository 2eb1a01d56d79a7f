//! The ranks: each takes its rows, walks its plan, and hands back its rows of the results.

use std::{borrow::Cow, fmt, sync::Arc, time::Instant};

use ring_comm::{
    CommError, Communicator, Loopback, RankPanic,
    buffer::{Buffer, DType, HostBuffer},
    collective::barrier,
};
use ring_core::{
    AttentionSpec, Error, Gradients, Inputs, Output, Plan, Saved, Sharding, Span, backward, forward,
};
use ring_kernels::{CpuKernels, RowLayout, Tensor};
use safetensors::{Dtype, View};

use super::{Input, Options, input::InputTensor};
use crate::command_line::Failure;

/// One pass of one rank.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// When the rank left the barrier before it.
    pub started: Instant,
    /// When the rank was done.
    pub ended: Instant,
    /// Bytes that reached the rank meanwhile.
    pub bytes_received: u64,
}

/// What one rank ends with.
struct RankOutcome {
    /// Forward and backward passes, without the warm-up.
    forward: Vec<Pass>,
    backward: Vec<Pass>,
    /// Results of the last repetition, if anybody wants them.
    results: Option<Results>,
}

struct Results {
    output: Output<HostBuffer>,
    gradients: Option<Gradients<HostBuffer>>,
}

/// Results of all ranks.
pub struct Outcome {
    spec: AttentionSpec,
    ranks: Vec<RankOutcome>,
}

/// A result of all ranks together; its rows are put in order only when they are asked for.
pub struct GatheredTensor<'a> {
    parts: Vec<&'a HostBuffer>,
    shape: Vec<usize>,
    length: usize,
    sharding: Sharding,
}

/// A rank that failed by itself or heard of another's failure.
enum RankError {
    Attention(Error),
    Tensor(String),
}

/// Runs the computation on as many threads as there are ranks.
pub(super) fn compute(options: &Options, input: &Input) -> Result<Outcome, Failure> {
    let spec = options.spec(input)?;
    let results = Loopback::run(spec.world_size, options.deadline, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let result = RankRun::new(options, input, &spec, &communicator)
            .and_then(|run| run.repetitions(options));
        if let Err(RankError::Tensor(reason)) = &result {
            communicator.abort(reason);
        }
        result
    });
    match first_cause(&results) {
        Some(failure) => Err(failure),
        None => Ok(Outcome {
            ranks: results.into_iter().flatten().flatten().collect(),
            spec,
        }),
    }
}

/// One rank's tensors and means.
struct RankRun<'a> {
    communicator: &'a Communicator<HostBuffer>,
    kernels: CpuKernels,
    plan: Plan,
    query: HostBuffer,
    key: HostBuffer,
    value: HostBuffer,
    grad_output: Option<HostBuffer>,
    query_layout: RowLayout,
    key_layout: RowLayout,
}

impl<'a> RankRun<'a> {
    fn new(
        options: &Options,
        input: &Input,
        spec: &AttentionSpec,
        communicator: &'a Communicator<HostBuffer>,
    ) -> Result<Self, RankError> {
        let rank = communicator.rank();
        let kernels = CpuKernels::new(options.threads)
            .map_err(|error| RankError::Tensor(error.to_string()))?;
        let plan = Plan::new(spec, rank)?;
        let problem = plan.problem();
        let ranks = spec.world_size;
        let queries = spec.query_sharding.spans(spec.query_length, ranks, rank);
        let keys = spec.key_sharding.spans(spec.key_length, ranks, rank);
        let shard = |tensor, spans: &[Span]| {
            input
                .shard(tensor, spans, spec.dtype)
                .map_err(RankError::Tensor)
        };
        Ok(Self {
            communicator,
            kernels,
            query: shard(InputTensor::Query, &queries)?,
            key: shard(InputTensor::Key, &keys)?,
            value: shard(InputTensor::Value, &keys)?,
            grad_output: match input.has_gradient() {
                true => Some(shard(InputTensor::GradOutput, &queries)?),
                false => None,
            },
            query_layout: RowLayout::contiguous(
                problem.query_heads,
                problem.queries,
                problem.head_dim,
            ),
            key_layout: RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim),
            plan,
        })
    }

    /// Computes once, or, to measure, once to warm up and then as often as asked for.
    fn repetitions(&self, options: &Options) -> Result<RankOutcome, RankError> {
        let warm_up = usize::from(options.measures());
        let repetitions = warm_up + options.repeat.unwrap_or(1);
        let mut outcome = RankOutcome {
            forward: Vec::new(),
            backward: Vec::new(),
            results: None,
        };
        for repetition in 0..repetitions {
            // The results of the repetition before would count as memory of this one.
            outcome.results = None;
            let (output, forward_pass) = self.timed(|| self.forward())?;
            let backward = self
                .grad_output
                .as_ref()
                .map(|grad_output| self.timed(|| self.backward(&output, grad_output)))
                .transpose()?;
            let (gradients, backward_pass) = backward.unzip();
            if repetition >= warm_up {
                outcome.forward.push(forward_pass);
                outcome.backward.extend(backward_pass);
            }
            if options.random.is_none() || options.output.is_some() {
                outcome.results = Some(Results { output, gradients });
            }
        }
        Ok(outcome)
    }

    /// Times a pass that all ranks begin together.
    fn timed<T>(&self, pass: impl FnOnce() -> Result<T, Error>) -> Result<(T, Pass), RankError> {
        barrier(self.communicator).map_err(RankError::from)?;
        let before = self.communicator.traffic().bytes_received;
        let started = Instant::now();
        let result = pass()?;
        let ended = Instant::now();
        let bytes_received = self.communicator.traffic().bytes_received - before;
        Ok((
            result,
            Pass {
                started,
                ended,
                bytes_received,
            },
        ))
    }

    fn inputs(&self) -> Inputs<'_, HostBuffer> {
        Inputs {
            query: Tensor {
                data: self.query.view(),
                layout: &self.query_layout,
            },
            key: Tensor {
                data: self.key.view(),
                layout: &self.key_layout,
            },
            value: Tensor {
                data: self.value.view(),
                layout: &self.key_layout,
            },
        }
    }

    fn forward(&self) -> Result<Output<HostBuffer>, Error> {
        forward(&self.kernels, self.communicator, &self.plan, self.inputs())
    }

    fn backward(
        &self,
        output: &Output<HostBuffer>,
        grad_output: &HostBuffer,
    ) -> Result<Gradients<HostBuffer>, Error> {
        let saved = Saved {
            operation: output.operation,
            output: output.output.view(),
            log_sum_exp: output.log_sum_exp.view(),
            grad_output: Tensor {
                data: grad_output.view(),
                layout: &self.query_layout,
            },
            grad_log_sum_exp: None,
        };
        backward(
            &self.kernels,
            self.communicator,
            &self.plan,
            self.inputs(),
            saved,
        )
    }
}

/// The failure of the rank where the trouble started, if any rank failed.
fn first_cause(results: &[Result<Result<RankOutcome, RankError>, RankPanic>]) -> Option<Failure> {
    let failure = |rank: usize, why: &dyn fmt::Display| {
        Some(Failure::Run(format!("rank {rank} failed: {why}")))
    };
    let mut heard_of = None;
    for (rank, result) in results.iter().enumerate() {
        match result {
            Ok(Ok(_)) => {}
            Err(panic) => return failure(rank, panic),
            Ok(Err(RankError::Tensor(reason))) => return failure(rank, reason),
            Ok(Err(RankError::Attention(Error::Comm { step, source }))) => {
                // The same on all ranks: whoever failed first.
                let why = format!("in {step}: {}", source.root());
                heard_of = heard_of.or_else(|| failure(source.culprit(), &why));
            }
            Ok(Err(RankError::Attention(error))) => return failure(rank, error),
        }
    }
    heard_of
}

impl Outcome {
    /// The computation.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// Every rank's forward passes.
    pub fn forward_passes(&self) -> impl Iterator<Item = &[Pass]> {
        self.ranks.iter().map(|rank| rank.forward.as_slice())
    }

    /// Every rank's backward passes; empty without gradients.
    pub fn backward_passes(&self) -> impl Iterator<Item = &[Pass]> {
        self.ranks.iter().map(|rank| rank.backward.as_slice())
    }

    /// The results, by the names they have in files; none if they were not kept.
    pub fn tensors(&self) -> Vec<(&'static str, GatheredTensor<'_>)> {
        let spec = &self.spec;
        let shape = spec.shape;
        let (batch, dim) = (shape.batch, shape.head_dim);
        let query = vec![batch, shape.query_heads, spec.query_length, dim];
        let key = vec![batch, shape.kv_heads, spec.key_length, dim];
        let rows = query[..3].to_vec();
        [
            self.gather("out", query.clone(), |results| Some(&results.output.output)),
            self.gather("lse", rows, |results| Some(&results.output.log_sum_exp)),
            self.gather("grad_q", query, |results| {
                results.gradients.as_ref().map(|gradients| &gradients.query)
            }),
            self.gather("grad_k", key.clone(), |results| {
                results.gradients.as_ref().map(|gradients| &gradients.key)
            }),
            self.gather("grad_v", key, |results| {
                results.gradients.as_ref().map(|gradients| &gradients.value)
            }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn gather<'a>(
        &'a self,
        name: &'static str,
        shape: Vec<usize>,
        pick: impl Fn(&'a Results) -> Option<&'a HostBuffer>,
    ) -> Option<(&'static str, GatheredTensor<'a>)> {
        let parts = self
            .ranks
            .iter()
            .map(|rank| rank.results.as_ref().and_then(&pick))
            .collect::<Option<Vec<_>>>()?;
        let of_keys = matches!(name, "grad_k" | "grad_v");
        let tensor = GatheredTensor {
            parts,
            length: shape[2],
            shape,
            sharding: if of_keys {
                self.spec.key_sharding
            } else {
                self.spec.query_sharding
            },
        };
        Some((name, tensor))
    }
}

impl GatheredTensor<'_> {
    /// The elements in the order of the whole tensor.
    pub fn values(&self) -> Vec<f32> {
        let mut whole = vec![0.0; self.shape.iter().product()];
        let heads = self.shape[0] * self.shape[1];
        let row = self.shape.get(3).copied().unwrap_or(1);
        for (rank, part) in self.parts.iter().enumerate() {
            let spans = self.sharding.spans(self.length, self.parts.len(), rank);
            let mut from = 0;
            for head in 0..heads {
                for span in &spans {
                    let to = (head * self.length + span.start) * row;
                    let len = span.len() * row;
                    copy_f32(part, from, &mut whole[to..to + len]);
                    from += len;
                }
            }
        }
        whole
    }
}

/// Elements of `part` from `first` on, widened.
fn copy_f32(part: &HostBuffer, first: usize, target: &mut [f32]) {
    let range = first..first + target.len();
    match part {
        HostBuffer::F32(values) => target.copy_from_slice(&values[range]),
        HostBuffer::F16(values) => {
            for (target, value) in target.iter_mut().zip(&values[range]) {
                *target = value.to_f32();
            }
        }
        HostBuffer::BF16(values) => {
            for (target, value) in target.iter_mut().zip(&values[range]) {
                *target = value.to_f32();
            }
        }
    }
}

impl View for GatheredTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes: Vec<u8> = self
            .values()
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * DType::F32.size()
    }
}

impl From<Error> for RankError {
    fn from(error: Error) -> Self {
        RankError::Attention(error)
    }
}

impl From<ring_core::SpecError> for RankError {
    fn from(error: ring_core::SpecError) -> Self {
        RankError::Attention(error.into())
    }
}

impl From<CommError> for RankError {
    fn from(source: CommError) -> Self {
        RankError::Attention(Error::Comm {
            step: "the barrier before a pass".into(),
            source,
        })
    }
}
