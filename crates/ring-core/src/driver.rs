//! What a rank calls: [`forward`] and [`backward`].
//!
//! If heads are divided, rows go first to who computes with them, and results go back; between, and otherwise at once, the steps
//! of the plan are walked ([`Walk`]).

use ring_comm::{
    Communicator, Payload,
    buffer::{Buffer, DType},
    trace::{Activity, Details},
};
use ring_kernels::{BackwardInputs, Dropout, Kernels, Problem, RowLayout, Tensor};

use crate::{
    error::Error,
    exchange::{Exchanger, Pass, check_plan},
    place::Place,
    plan::Plan,
    regroup::{Cargo, Direction, Kind, Regroup, Regrouping},
    walk::Walk,
};

/// A rank's own tensors, `[batch, heads, rows, head_dim]`.
pub struct Inputs<'a, B: Buffer> {
    /// Queries.
    pub query: Tensor<'a, B>,
    /// Keys.
    pub key: Tensor<'a, B>,
    /// Values.
    pub value: Tensor<'a, B>,
    /// Chooses what dropout drops; the backward needs that of the forward. Without dropout it is not used.
    pub dropout: DropoutSeed,
}

/// What chooses the weights that dropout drops, beside heads and global positions. All ranks must give the same; they compare it
/// in every forward pass that drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropoutSeed {
    /// The seed: another one for every training step, and every layer.
    pub seed: u64,
    /// What the first batch entry counts as, if batches are parts of a larger one.
    pub first_entry: u32,
}

impl DropoutSeed {
    /// What ranks compare.
    pub(crate) fn fields(self) -> Vec<(String, String)> {
        [
            ("dropout seed", self.seed.to_string()),
            ("first batch entry", self.first_entry.to_string()),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .to_vec()
    }
}

impl<B: Buffer> Clone for Inputs<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Buffer> Copy for Inputs<'_, B> {}

impl<'a, B: Buffer> Inputs<'a, B> {
    pub(crate) fn shorten<'short>(self) -> Inputs<'short, B>
    where
        'a: 'short,
    {
        Inputs {
            query: self.query.shorten(),
            key: self.key.shorten(),
            value: self.value.shorten(),
            dropout: self.dropout,
        }
    }
}

/// Results of [`forward`], contiguous.
#[derive(Debug)]
pub struct Output<B> {
    /// `[batch, query_heads, queries, head_dim]`, in the type of the inputs.
    pub output: B,
    /// `[batch, query_heads, queries]`, f32: log-sum-exp over all keys on all ranks; `-inf` where nothing is visible.
    pub log_sum_exp: B,
    /// Number of this operation in its group. The backward's messages bear it too, so that ranks that run the backwards of
    /// several attentions in different order get an error, never each other's rows.
    pub operation: u64,
}

/// What [`backward`] needs beside the inputs.
pub struct Saved<'a, B: Buffer> {
    /// What [`forward`] returned.
    pub operation: u64,
    /// What [`forward`] returned, contiguous.
    pub output: B::View<'a>,
    /// What [`forward`] returned, contiguous.
    pub log_sum_exp: B::View<'a>,
    /// Gradient that reaches the output.
    pub grad_output: Tensor<'a, B>,
    /// Gradient that reaches the log-sum-exp, f32, contiguous; zero if absent.
    pub grad_log_sum_exp: Option<B::View<'a>>,
}

/// Results of [`backward`], contiguous, in the type of the inputs.
#[derive(Debug)]
pub struct Gradients<B> {
    /// `[batch, query_heads, queries, head_dim]`
    pub query: B,
    /// `[batch, kv_heads, keys, head_dim]`
    pub key: B,
    /// `[batch, kv_heads, keys, head_dim]`
    pub value: B,
}

/// Attention of this rank's queries to all keys of the group. Every rank calls it with its own plan.
///
/// # Errors
/// [`enum@Error`]; when one rank fails, every rank of the group gets an error that names it, within the deadline.
pub fn forward<B: Buffer, K: Kernels<B>>(
    kernels: &K,
    communicator: &Communicator<B>,
    plan: &Plan,
    inputs: Inputs<'_, B>,
) -> Result<Output<B>, Error> {
    Run::new(kernels, communicator, plan, inputs.dropout, None)?.traced(|run| run.forward(inputs))
}

/// Gradients of this rank's queries, keys and values. Every rank calls it with its own plan.
///
/// # Errors
/// [`enum@Error`]; when one rank fails, every rank of the group gets an error that names it, within the deadline.
pub fn backward<B: Buffer, K: Kernels<B>>(
    kernels: &K,
    communicator: &Communicator<B>,
    plan: &Plan,
    inputs: Inputs<'_, B>,
    saved: Saved<'_, B>,
) -> Result<Gradients<B>, Error> {
    let operation = Some(saved.operation);
    Run::new(kernels, communicator, plan, inputs.dropout, operation)?
        .traced(|run| run.backward(inputs, saved))
}

/// One pass of one rank over its plan.
pub(crate) struct Run<'a, B: Buffer, K> {
    pub(crate) exchanger: Exchanger<'a, B, K>,
    pub(crate) plan: &'a Plan,
    /// The sizes of the rank's own tensors.
    pub(crate) own: Problem,
}

impl<'a, B: Buffer, K: Kernels<B>> Run<'a, B, K> {
    /// A backward pass has the number of its forward's operation; a forward pass gets one.
    pub(crate) fn new(
        kernels: &'a K,
        communicator: &'a Communicator<B>,
        plan: &'a Plan,
        dropout: DropoutSeed,
        of_forward: Option<u64>,
    ) -> Result<Self, Error> {
        let pass = match of_forward {
            None => Pass::Forward,
            Some(_) => Pass::Backward,
        };
        let capacity = check_plan(communicator, plan, pass, dropout)?;
        let operation = of_forward.unwrap_or_else(|| communicator.next_operation());
        communicator.buffers().begin();
        let spec = plan.spec();
        let mut problem = plan.ring_problem();
        if spec.dropout > 0.0 {
            let DropoutSeed { seed, first_entry } = dropout;
            let group = spec.shape.query_heads / spec.shape.kv_heads;
            let first = Place::of(spec, plan.rank()).kv_heads(spec).start * group;
            let dropout = Dropout::new(spec.dropout, seed, first_entry)
                .of_heads(first as u32, spec.shape.query_heads as u32);
            problem.scores.dropout = Some(dropout);
        }
        Ok(Self {
            exchanger: Exchanger {
                kernels,
                communicator,
                problem,
                pass,
                operation,
                dtype: spec.dtype,
                capacity,
            },
            plan,
            own: plan.problem(),
        })
    }

    /// Records the whole pass, and leaves a trace that is complete so far.
    pub(crate) fn traced<T>(
        &self,
        pass: impl FnOnce(&Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Exchanger {
            communicator,
            operation,
            pass: direction,
            ..
        } = self.exchanger;
        let details = Details {
            operation,
            ..Details::default()
        };
        let result = communicator.timed(Activity::Pass, direction.name(), details, || pass(self));
        if let Some(trace) = communicator.trace() {
            trace.flush();
        }
        result
    }

    pub(crate) fn forward(&self, inputs: Inputs<'_, B>) -> Result<Output<B>, Error> {
        self.check_dtypes(inputs)?;
        let (output, log_sum_exp) = match self.plan.regroup() {
            None => self.walk().forward(inputs)?,
            Some(regroup) => self.divided_forward(regroup, inputs)?,
        };
        Ok(Output {
            output,
            log_sum_exp,
            operation: self.exchanger.operation,
        })
    }

    pub(crate) fn backward(
        &self,
        inputs: Inputs<'_, B>,
        saved: Saved<'_, B>,
    ) -> Result<Gradients<B>, Error> {
        self.check_dtypes(inputs)?;
        let delta = self.delta(&saved)?;
        let of_queries = BackwardInputs {
            query: inputs.query.shorten(),
            grad_output: saved.grad_output.shorten(),
            log_sum_exp: B::shorten(saved.log_sum_exp),
            delta: &delta,
        };
        match self.plan.regroup() {
            None => self.walk().backward(inputs, &of_queries),
            Some(regroup) => self.divided_backward(regroup, inputs, &of_queries),
        }
    }

    fn walk(&self) -> Walk<'_, B, K> {
        Walk::new(&self.exchanger, self.plan)
    }

    fn check_dtypes(&self, inputs: Inputs<'_, B>) -> Result<(), Error> {
        let expected = self.plan.spec().dtype;
        for (what, view) in [
            ("query", inputs.query.data),
            ("key", inputs.key.data),
            ("value", inputs.value.data),
        ] {
            let got = self.exchanger.kernels.dtype(view);
            if got != expected {
                return Err(self.exchanger.failed(Error::DType {
                    what,
                    got,
                    expected,
                }));
            }
        }
        Ok(())
    }

    fn delta(&self, saved: &Saved<'_, B>) -> Result<B, Error> {
        self.exchanger.compute("delta", None, || {
            self.exchanger.kernels.delta(
                &self.own,
                saved.output,
                saved.grad_output,
                saved.log_sum_exp,
                saved.grad_log_sum_exp,
            )
        })
    }

    /// A forward pass of this rank's part of the heads, for all rows of its place.
    fn divided_forward(&self, regroup: &Regroup, inputs: Inputs<'_, B>) -> Result<(B, B), Error> {
        let dtype = self.plan.spec().dtype;
        let there = [
            cargo(Payload::Query, dtype, Kind::Queries, [inputs.query]),
            cargo(
                Payload::KeyValue,
                dtype,
                Kind::Keys,
                [inputs.key, inputs.value],
            ),
        ];
        let regrouping = self.regrouping(regroup);
        let mut arrived = regrouping.exchange(Direction::There, &there)?;
        let [key, value] = two(arrived.pop());
        let query = one(arrived.pop());

        let layouts = Layouts::of(&self.exchanger.problem);
        let inputs = Inputs {
            query: layouts.queries(&query),
            key: layouts.keys(&key),
            value: layouts.keys(&value),
            dropout: inputs.dropout,
        };
        let (output, log_sum_exp) = self.walk().forward(inputs)?;
        drop((query, key, value));

        let output = [layouts.queries(&output)];
        let numbers = [layouts.statistics(&log_sum_exp)];
        let back = [
            cargo(Payload::Output, dtype, Kind::Queries, output),
            cargo(Payload::Statistics, DType::F32, Kind::Statistics, numbers),
        ];
        let mut home = regrouping.exchange(Direction::Back, &back)?;
        let log_sum_exp = one(home.pop());
        Ok((one(home.pop()), log_sum_exp))
    }

    /// A backward pass of this rank's part of the heads, for all rows of its place.
    fn divided_backward(
        &self,
        regroup: &Regroup,
        inputs: Inputs<'_, B>,
        of_queries: &BackwardInputs<'_, B>,
    ) -> Result<Gradients<B>, Error> {
        let dtype = self.plan.spec().dtype;
        let queries = [of_queries.query.shorten(), of_queries.grad_output.shorten()];
        let keys = [inputs.key.shorten(), inputs.value.shorten()];
        let own = Layouts::of(&self.own);
        let log_sum_exp = Tensor {
            data: B::shorten(of_queries.log_sum_exp),
            layout: &own.statistics,
        };
        let numbers = [log_sum_exp, own.statistics(of_queries.delta)];
        let there = [
            cargo(Payload::Query, dtype, Kind::Queries, queries),
            cargo(Payload::KeyValueAgain, dtype, Kind::Keys, keys),
            cargo(Payload::Statistics, DType::F32, Kind::Statistics, numbers),
        ];
        let regrouping = self.regrouping(regroup);
        let mut arrived = regrouping.exchange(Direction::There, &there)?;
        let [log_sum_exp, delta] = two(arrived.pop());
        let [key, value] = two(arrived.pop());
        let [query, grad_output] = two(arrived.pop());

        let layouts = Layouts::of(&self.exchanger.problem);
        let divided = Inputs {
            query: layouts.queries(&query),
            key: layouts.keys(&key),
            value: layouts.keys(&value),
            dropout: inputs.dropout,
        };
        let of_queries = BackwardInputs {
            query: layouts.queries(&query),
            grad_output: layouts.queries(&grad_output),
            log_sum_exp: log_sum_exp.view(),
            delta: &delta,
        };
        let gradients = self.walk().backward(divided, &of_queries)?;
        drop((query, grad_output, key, value, log_sum_exp, delta));

        let of_queries = [layouts.queries(&gradients.query)];
        let of_keys = [layouts.keys(&gradients.key), layouts.keys(&gradients.value)];
        let back = [
            cargo(Payload::QueryGradient, dtype, Kind::Queries, of_queries),
            cargo(Payload::KeyValueGradient, dtype, Kind::Keys, of_keys),
        ];
        let mut home = regrouping.exchange(Direction::Back, &back)?;
        let [key, value] = two(home.pop());
        Ok(Gradients {
            query: one(home.pop()),
            key,
            value,
        })
    }

    fn regrouping<'r>(&'r self, regroup: &'r Regroup) -> Regrouping<'r, B, K> {
        Regrouping {
            regroup,
            exchanger: &self.exchanger,
            own: &self.own,
        }
    }
}

/// How contiguous tensors of a problem lie in memory.
struct Layouts {
    queries: RowLayout,
    keys: RowLayout,
    statistics: RowLayout,
}

impl Layouts {
    fn of(problem: &Problem) -> Self {
        Self {
            queries: problem.query_shape().contiguous(),
            keys: problem.key_shape().contiguous(),
            statistics: problem.statistic_shape().contiguous(),
        }
    }

    fn queries<'a, B: Buffer>(&'a self, buffer: &'a B) -> Tensor<'a, B> {
        let (data, layout) = (buffer.view(), &self.queries);
        Tensor { data, layout }
    }

    fn keys<'a, B: Buffer>(&'a self, buffer: &'a B) -> Tensor<'a, B> {
        let (data, layout) = (buffer.view(), &self.keys);
        Tensor { data, layout }
    }

    fn statistics<'a, B: Buffer>(&'a self, buffer: &'a B) -> Tensor<'a, B> {
        let (data, layout) = (buffer.view(), &self.statistics);
        Tensor { data, layout }
    }
}

fn cargo<'a, B: Buffer>(
    payload: Payload,
    dtype: DType,
    kind: Kind,
    tensors: impl Into<Vec<Tensor<'a, B>>>,
) -> Cargo<'a, B> {
    Cargo {
        payload,
        dtype,
        kind,
        tensors: tensors.into(),
    }
}

/// The buffer of a cargo of one tensor.
fn one<B>(arrived: Option<Vec<B>>) -> B {
    let only = arrived.and_then(|mut buffers| buffers.pop());
    only.expect("every tensor of a cargo arrives in a buffer")
}

/// The buffers of a cargo of two tensors.
fn two<B>(arrived: Option<Vec<B>>) -> [B; 2] {
    let both = arrived.and_then(|buffers| buffers.try_into().ok());
    both.expect("every tensor of a cargo arrives in a buffer")
}
