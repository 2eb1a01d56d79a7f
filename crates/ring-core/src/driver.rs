//! The loop that walks a plan: [`forward`] and [`backward`].
//!
//! One loop for every pattern, sharding and rank count; what differs is in the plan. In each step: post the receive, post the
//! send, compute the current block, wait. State is f32 through every hop and rounded once at the end. Own keys and values, and
//! those of a slot, are used where they lie; the memory of a slot that is done with serves for the messages after it.

use ring_comm::{
    Communicator,
    buffer::{Buffer, DType},
    trace::{Activity, Details},
};
use ring_kernels::{
    BackwardInputs, Dropout, ForwardState, Kernels, KeyValue, KeyValueGradient, Problem, RowLayout,
    Tensor,
};

use crate::{
    error::Error,
    exchange::{Exchanger, InFlight, Pass, check_plan},
    plan::{Plan, Source},
    schedule::{Schedule, ScheduledExchange, ScheduledStep},
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
    fn shorten<'short>(self) -> Inputs<'short, B>
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
struct Run<'a, B: Buffer, K> {
    kernels: &'a K,
    exchanger: Exchanger<'a, B, K>,
    plan: &'a Plan,
    schedule: &'a Schedule,
}

/// Gradients of a slot, to be sent to the slot's owner, and those of own rows, to be received from who used them.
struct GradientHop<'p, B> {
    exchange: &'p ScheduledExchange,
    outgoing: Option<B>,
}

/// Gradients of own rows on their way home.
type Homecoming<'p, B> = (&'p ScheduledExchange, InFlight<B>);

impl<'a, B: Buffer, K: Kernels<B>> Run<'a, B, K> {
    /// A backward pass has the number of its forward's operation; a forward pass gets one.
    fn new(
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
        let mut problem = plan.problem();
        if spec.dropout > 0.0 {
            let DropoutSeed { seed, first_entry } = dropout;
            problem.scores.dropout = Some(Dropout::new(spec.dropout, seed, first_entry));
        }
        Ok(Self {
            kernels,
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
            schedule: plan.schedule(),
        })
    }

    /// Records the whole pass, and leaves a trace that is complete so far.
    fn traced<T>(&self, pass: impl FnOnce(&Self) -> Result<T, Error>) -> Result<T, Error> {
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

    fn forward(&self, inputs: Inputs<'_, B>) -> Result<Output<B>, Error> {
        self.check_dtypes(inputs)?;
        let exchanger = &self.exchanger;
        let mut state = exchanger.compute("start", None, || {
            self.kernels.start(&self.exchanger.problem)
        })?;
        let mut slot = None;
        let mut filled_by = None;
        for step in &self.schedule.steps {
            let in_flight = self.post(step, inputs)?;
            let layout = slot_layout(filled_by);
            if let Some(source) = key_value(step, inputs.shorten(), slot.as_ref(), layout) {
                self.step_forward(step, filled_by, inputs, &source, &mut state)?;
            }
            exchanger.give(slot.take());
            slot = self.wait(in_flight)?;
            filled_by = step.exchange.as_ref();
        }
        exchanger.give(slot);
        let spec = self.plan.spec();
        let scale = spec.output_scale();
        let (output, log_sum_exp) = exchanger.compute("finish", None, || {
            self.kernels
                .finish(&self.exchanger.problem, state, spec.dtype, scale)
        })?;
        Ok(Output {
            output,
            log_sum_exp,
            operation: exchanger.operation,
        })
    }

    fn backward(&self, inputs: Inputs<'_, B>, saved: Saved<'_, B>) -> Result<Gradients<B>, Error> {
        self.check_dtypes(inputs)?;
        let exchanger = &self.exchanger;
        let delta = self.delta(&saved)?;
        let from_forward = BackwardInputs {
            query: inputs.query.shorten(),
            grad_output: saved.grad_output.shorten(),
            log_sum_exp: B::shorten(saved.log_sum_exp),
            delta: &delta,
        };
        let mut gradients = self.zero_gradients()?;
        let mut slot = None;
        let mut filled_by = None;
        let mut pending: Option<GradientHop<'_, B>> = None;
        for step in &self.schedule.steps {
            let in_flight = self.post(step, inputs)?;
            let homecoming = self.post_gradients(pending.take())?;
            let layout = slot_layout(filled_by);
            let outgoing = match key_value(step, inputs.shorten(), slot.as_ref(), layout) {
                Some(source) => {
                    self.step_gradients(step, filled_by, &from_forward, &source, &mut gradients)?
                }
                None => None,
            };
            exchanger.give(slot.take());
            self.take_home(homecoming, &mut gradients)?;
            if let Some(exchange) = filled_by {
                let hop = GradientHop { exchange, outgoing };
                if is_next_hop(step, exchange) {
                    pending = Some(hop);
                } else {
                    let homecoming = self.post_gradients(Some(hop))?;
                    self.take_home(homecoming, &mut gradients)?;
                }
            }
            slot = self.wait(in_flight)?;
            filled_by = step.exchange.as_ref();
        }
        // The last exchange only sent, or there would be a step for what it brought.
        let left_over = filled_by.map(|exchange| GradientHop {
            exchange,
            outgoing: None,
        });
        for hop in [pending, left_over] {
            let homecoming = self.post_gradients(hop)?;
            self.take_home(homecoming, &mut gradients)?;
        }
        self.rounded(gradients)
    }

    fn check_dtypes(&self, inputs: Inputs<'_, B>) -> Result<(), Error> {
        let expected = self.plan.spec().dtype;
        for (what, view) in [
            ("query", inputs.query.data),
            ("key", inputs.key.data),
            ("value", inputs.value.data),
        ] {
            let got = self.kernels.dtype(view);
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
            self.kernels.delta(
                &self.exchanger.problem,
                saved.output,
                saved.grad_output,
                saved.log_sum_exp,
                saved.grad_log_sum_exp,
            )
        })
    }

    fn zero_gradients(&self) -> Result<Gradients<B>, Error> {
        let Problem {
            batch,
            query_heads,
            kv_heads,
            head_dim,
            queries,
            keys,
            ..
        } = self.exchanger.problem;
        let zeros = |rows: usize| {
            let len = batch * rows * head_dim;
            self.exchanger.compute("allocate", None, || {
                self.kernels.allocate(DType::F32, len, None)
            })
        };
        Ok(Gradients {
            query: zeros(query_heads * queries)?,
            key: zeros(kv_heads * keys)?,
            value: zeros(kv_heads * keys)?,
        })
    }

    fn step_forward(
        &self,
        step: &ScheduledStep,
        filled_by: Option<&ScheduledExchange>,
        inputs: Inputs<'_, B>,
        source: &KeyValue<'_, B>,
        state: &mut ForwardState<B>,
    ) -> Result<(), Error> {
        self.exchanger.compute("forward", distance(filled_by), || {
            self.kernels.forward(
                &self.exchanger.problem,
                inputs.query,
                source,
                &step.blocks,
                state,
            )
        })
    }

    /// Gradients of a step's blocks: those of own rows are added, those of a slot returned, to be sent home.
    fn step_gradients(
        &self,
        step: &ScheduledStep,
        filled_by: Option<&ScheduledExchange>,
        from_forward: &BackwardInputs<'_, B>,
        source: &KeyValue<'_, B>,
        gradients: &mut Gradients<B>,
    ) -> Result<Option<B>, Error> {
        let received = filled_by.and_then(|exchange| exchange.receive.as_ref());
        let mut slot_gradient = match received {
            Some(parcel) => Some(self.zero_message(parcel.rows.len)?),
            None => None,
        };
        let target = match (&mut slot_gradient, received) {
            (Some(slot), Some(parcel)) => KeyValueGradient::Slot {
                slot,
                layout: &parcel.rows.layout,
            },
            _ => KeyValueGradient::Own {
                key: &mut gradients.key,
                value: &mut gradients.value,
            },
        };
        self.exchanger
            .compute("backward", distance(filled_by), || {
                self.kernels.backward(
                    &self.exchanger.problem,
                    from_forward,
                    source,
                    &step.blocks,
                    self.plan.spec().output_scale(),
                    &mut gradients.query,
                    target,
                )
            })?;
        Ok(slot_gradient)
    }

    fn zero_message(&self, len: usize) -> Result<B, Error> {
        let memory = self.exchanger.memory(DType::F32)?;
        self.exchanger.compute("allocate", None, || {
            self.kernels.allocate(DType::F32, len, Some(memory))
        })
    }

    fn post(
        &self,
        step: &ScheduledStep,
        inputs: Inputs<'_, B>,
    ) -> Result<Option<InFlight<B>>, Error> {
        let exchange = step.exchange.as_ref();
        exchange
            .map(|exchange| self.exchanger.post(exchange, inputs))
            .transpose()
    }

    fn wait(&self, in_flight: Option<InFlight<B>>) -> Result<Option<B>, Error> {
        match in_flight {
            Some(in_flight) => self.exchanger.wait(in_flight),
            None => Ok(None),
        }
    }

    fn post_gradients<'p>(
        &self,
        hop: Option<GradientHop<'p, B>>,
    ) -> Result<Option<Homecoming<'p, B>>, Error> {
        let Some(GradientHop { exchange, outgoing }) = hop else {
            return Ok(None);
        };
        let in_flight = self.exchanger.post_gradients(exchange, outgoing)?;
        Ok(Some((exchange, in_flight)))
    }

    /// Waits for gradients of own rows and adds them.
    fn take_home(
        &self,
        homecoming: Option<Homecoming<'_, B>>,
        gradients: &mut Gradients<B>,
    ) -> Result<(), Error> {
        let Some((exchange, in_flight)) = homecoming else {
            return Ok(());
        };
        let arrived = self.exchanger.wait(in_flight)?;
        if let (Some(slot), Some(parcel)) = (&arrived, &exchange.send) {
            self.exchanger
                .compute("add rows", Some(exchange.distance), || {
                    self.kernels.add_rows(
                        &self.exchanger.problem,
                        slot,
                        &parcel.rows,
                        &mut gradients.key,
                        &mut gradients.value,
                    )
                })?;
        }
        self.exchanger.give(arrived);
        Ok(())
    }

    fn rounded(&self, gradients: Gradients<B>) -> Result<Gradients<B>, Error> {
        let dtype = self.plan.spec().dtype;
        let round = |sums: B| {
            self.exchanger
                .compute("round", None, || self.kernels.round(sums, dtype))
        };
        Ok(Gradients {
            query: round(gradients.query)?,
            key: round(gradients.key)?,
            value: round(gradients.value)?,
        })
    }
}

/// Whether the exchange under way in `step` is the hop right after `done`.
///
/// Then the gradients of `done` may travel during the next step. After a gap they must go at once: a rank that waited for a
/// far hop first could hold up peers whose nearer hops that far hop depends on. With this rule, waits can be ordered: keys and
/// values of hop `d` depend on hops below `d` alone, gradients of hop `d` on keys and values up to `d + 1` and gradients below
/// `d`; so no cycle of ranks can wait for each other.
fn is_next_hop(step: &ScheduledStep, done: &ScheduledExchange) -> bool {
    step.exchange
        .as_ref()
        .is_some_and(|next| next.distance == done.distance + 1)
}

/// The hop whose slot a step computes on; `None` for own rows.
fn distance(filled_by: Option<&ScheduledExchange>) -> Option<usize> {
    filled_by.map(|exchange| exchange.distance)
}

/// How the slot is laid out that an exchange filled, if it filled one.
fn slot_layout(filled_by: Option<&ScheduledExchange>) -> Option<&RowLayout> {
    let parcel = filled_by?.receive.as_ref()?;
    Some(&parcel.rows.layout)
}

/// The keys and values of a step, where they lie; `None` if it has none.
fn key_value<'a, B: Buffer>(
    step: &ScheduledStep,
    inputs: Inputs<'a, B>,
    slot: Option<&'a B>,
    layout: Option<&'a RowLayout>,
) -> Option<KeyValue<'a, B>> {
    match (step.source, slot, layout) {
        (Source::Own, ..) => Some(KeyValue::Own {
            key: inputs.key,
            value: inputs.value,
        }),
        (Source::Slot(_), Some(slot), Some(layout)) => Some(KeyValue::Slot { slot, layout }),
        _ => None,
    }
}
