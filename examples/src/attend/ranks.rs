//! The ranks: each takes its rows, walks its plan, and hands back its rows of the results.

use std::{fmt, sync::Arc, time::Instant};

use ring_comm::{
    CommError, Communicator, Loopback, RankPanic, TransportKind,
    buffer::{Buffer, HostBuffer},
    collective::barrier,
};
use ring_core::{
    AttentionSpec, DropoutSeed, Error, Gradients, Inputs, Output, Plan, Saved, Span, backward,
    forward,
};
#[cfg(feature = "cube")]
use ring_kernels::CubeKernels;
use ring_kernels::{CpuKernels, KernelError, RowLayout, Tensor};

use super::{
    Input, Options, Outcome, Pass,
    computer::Computer,
    gather::gather,
    input::InputTensor,
    outcome::{RankOutcome, Results},
};
use crate::{
    command_line::Failure,
    placement::{Placement, Ranks},
};

/// A rank that failed by itself or heard of another's failure.
pub(super) enum RankError {
    Attention(Error),
    Tensor(String),
}

/// Runs the computation; the outcome of all ranks where rank 0 is.
pub(super) fn compute(
    options: &Options,
    input: &Input,
    placement: &Placement,
) -> Result<Option<Outcome>, Failure> {
    let spec = options.spec(input, placement.world_size())?;
    match &placement.ranks {
        Ranks::Threads(_) => on_threads(options, input, spec, placement).map(Some),
        Ranks::Processes(communicator) => {
            placement.agree("attend", &options.unseen())?;
            let ranks = on_processes(options, input, &spec, placement, communicator)?;
            Ok(ranks.map(|ranks| Outcome {
                ranks,
                spec,
                transport: placement.transport,
            }))
        }
    }
}

fn on_threads(
    options: &Options,
    input: &Input,
    spec: AttentionSpec,
    placement: &Placement,
) -> Result<Outcome, Failure> {
    let start = Some(Instant::now());
    let results = Loopback::run(spec.world_size, placement.deadline, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        run_rank(options, input, &spec, placement, &communicator, start)
    });
    match first_cause(&results) {
        Some(failure) => Err(failure),
        None => Ok(Outcome {
            ranks: results.into_iter().flatten().flatten().collect(),
            spec,
            transport: TransportKind::Loopback,
        }),
    }
}

fn on_processes(
    options: &Options,
    input: &Input,
    spec: &AttentionSpec,
    placement: &Placement,
    communicator: &Communicator<HostBuffer>,
) -> Result<Option<Vec<RankOutcome>>, Failure> {
    run_rank(options, input, spec, placement, communicator, None)
        .and_then(|own| gather(own, communicator))
        .map_err(|error| error.explain(communicator.rank()))
}

/// What one rank does. Clocks of threads have a common `start`, those of processes have not.
fn run_rank(
    options: &Options,
    input: &Input,
    spec: &AttentionSpec,
    placement: &Placement,
    communicator: &Communicator<HostBuffer>,
    start: Option<Instant>,
) -> Result<RankOutcome, RankError> {
    let result = run_rank_on_device(options, input, spec, placement, communicator, start);
    if let Err(RankError::Tensor(reason)) = &result {
        communicator.abort(reason);
    }
    result
}

#[cfg_attr(not(feature = "cube"), expect(unused_variables))]
fn run_rank_on_device(
    options: &Options,
    input: &Input,
    spec: &AttentionSpec,
    placement: &Placement,
    communicator: &Communicator<HostBuffer>,
    start: Option<Instant>,
) -> Result<RankOutcome, RankError> {
    #[cfg(feature = "cube")]
    {
        let gpu = placement.gpu(&options.device, communicator);
        let gpu = gpu.map_err(|failure| RankError::Tensor(failure.to_string()))?;
        if let Some((device, communicator)) = gpu {
            let kernels = CubeKernels::new(device)?;
            let run = RankRun::new(&kernels, options, input, spec, communicator, start)?;
            return run.repetitions(options);
        }
    }
    let kernels = CpuKernels::new(options.threads)?;
    RankRun::new(&kernels, options, input, spec, communicator.clone(), start)?.repetitions(options)
}

/// One rank's tensors and means.
struct RankRun<'a, C: Computer> {
    computer: &'a C,
    communicator: Communicator<C::Buffer>,
    plan: Plan,
    query: C::Buffer,
    key: C::Buffer,
    value: C::Buffer,
    grad_output: Option<C::Buffer>,
    query_layout: RowLayout,
    key_layout: RowLayout,
    dropout: DropoutSeed,
    start: Option<Instant>,
}

impl<'a, C: Computer> RankRun<'a, C> {
    fn new(
        computer: &'a C,
        options: &Options,
        input: &Input,
        spec: &AttentionSpec,
        communicator: Communicator<C::Buffer>,
        start: Option<Instant>,
    ) -> Result<Self, RankError> {
        let rank = communicator.rank();
        let plan = Plan::new(spec, rank)?;
        let problem = plan.problem();
        let ranks = spec.world_size;
        let queries = spec.query_sharding.spans(spec.query_length, ranks, rank);
        let keys = spec.key_sharding.spans(spec.key_length, ranks, rank);
        let shard = |tensor, spans: &[Span]| {
            let host = input.shard(tensor, spans, spec.dtype);
            let host = host.map_err(RankError::Tensor)?;
            computer.upload(host).map_err(RankError::from)
        };
        Ok(Self {
            computer,
            communicator,
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
            dropout: options.scores.seed(),
            plan,
            start,
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
                outcome.results = Some(self.download(output, gradients)?);
            }
        }
        Ok(outcome)
    }

    fn download(
        &self,
        output: Output<C::Buffer>,
        gradients: Option<Gradients<C::Buffer>>,
    ) -> Result<Results, RankError> {
        let download = |buffer| self.computer.download(buffer);
        let gradients = match gradients {
            None => None,
            Some(gradients) => Some([
                download(gradients.query)?,
                download(gradients.key)?,
                download(gradients.value)?,
            ]),
        };
        Ok(Results {
            output: download(output.output)?,
            log_sum_exp: download(output.log_sum_exp)?,
            gradients,
        })
    }

    /// Times a pass that all ranks begin together.
    fn timed<T>(&self, pass: impl FnOnce() -> Result<T, Error>) -> Result<(T, Pass), RankError> {
        barrier(&self.communicator).map_err(RankError::from)?;
        let before = self.communicator.traffic().bytes_received;
        let started = Instant::now();
        let result = pass()?;
        self.computer.finish()?;
        let ended = Instant::now();
        let bytes_received = self.communicator.traffic().bytes_received - before;
        let origin = self.start.unwrap_or(started);
        let pass = Pass {
            started: started - origin,
            ended: ended - origin,
            bytes_received,
        };
        Ok((result, pass))
    }

    fn inputs(&self) -> Inputs<'_, C::Buffer> {
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
            dropout: self.dropout,
        }
    }

    fn forward(&self) -> Result<Output<C::Buffer>, Error> {
        let kernels = self.computer.kernels();
        forward(kernels, &self.communicator, &self.plan, self.inputs())
    }

    fn backward(
        &self,
        output: &Output<C::Buffer>,
        grad_output: &C::Buffer,
    ) -> Result<Gradients<C::Buffer>, Error> {
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
            self.computer.kernels(),
            &self.communicator,
            &self.plan,
            self.inputs(),
            saved,
        )
    }
}

/// The failure of the rank where the trouble started, if any rank failed.
fn first_cause(results: &[Result<Result<RankOutcome, RankError>, RankPanic>]) -> Option<Failure> {
    let mut heard_of = None;
    for (rank, result) in results.iter().enumerate() {
        match result {
            Ok(Ok(_)) => {}
            Err(panic) => return Some(failure(rank, panic)),
            Ok(Err(error)) => match error.culprit() {
                // The same on all ranks: whoever failed first.
                Some(_) => heard_of = heard_of.or_else(|| Some(error.explain(rank))),
                None => return Some(error.explain(rank)),
            },
        }
    }
    heard_of
}

fn failure(rank: usize, why: &dyn fmt::Display) -> Failure {
    Failure::Run(format!("rank {rank} failed: {why}"))
}

impl RankError {
    /// The rank whose failure this rank only heard of.
    fn culprit(&self) -> Option<usize> {
        match self {
            RankError::Attention(Error::Comm { source, .. }) => Some(source.culprit()),
            _ => None,
        }
    }

    /// The failure, as seen from `rank`.
    fn explain(&self, rank: usize) -> Failure {
        match self {
            RankError::Tensor(reason) => failure(rank, reason),
            RankError::Attention(Error::Comm { step, source }) => {
                let why = format!("in {step}: {}", source.root());
                failure(source.culprit(), &why)
            }
            RankError::Attention(error) => failure(rank, error),
        }
    }
}

impl From<KernelError> for RankError {
    fn from(error: KernelError) -> Self {
        RankError::Tensor(error.to_string())
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
            step: "the exchange between passes".into(),
            source,
        })
    }
}
