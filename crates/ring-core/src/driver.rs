//! The loop that walks a plan: [`forward`] and [`backward`].
//!
//! One loop for every pattern, sharding and rank count; what differs is in the plan. In each step: post the receive, post the
//! send, compute the current block, wait. State is f32 through every hop and rounded once at the end. Only the slot computed
//! on and the slot in flight exist; the memory of a slot that is done with serves for the next message.

use ring_comm::{
    CommError, Communicator, Expected, Payload, RecvRequest, SendRequest, Tag,
    buffer::{Buffer, DType},
};
use ring_kernels::{
    BackwardInputs, ForwardState, KernelError, Kernels, KeyValue, KeyValueGradient, PackedRows,
    Problem, Tensor,
};
use thiserror::Error;

use crate::{
    plan::{Exchange, Message, Plan, Source, Step},
    spec::SpecError,
};

/// A distributed attention that could not be computed.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Error {
    /// The computation is not possible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A kernel failed; all ranks of the group are told.
    #[error("attention kernel failed on rank {rank}: {source}")]
    Kernel {
        /// The rank whose kernel failed.
        rank: usize,
        /// What it said.
        source: KernelError,
    },
    /// The exchange failed.
    #[error("attention exchange failed in {step}: {source}")]
    Comm {
        /// What the rank was about.
        step: String,
        /// Who, with whom, what and why.
        source: CommError,
    },
    /// The plan was made for another rank or another number of ranks.
    #[error(
        "the plan is for rank {plan_rank} of {plan_ranks}, the communicator is rank {rank} of {ranks}"
    )]
    WrongPlan {
        /// Rank of the plan.
        plan_rank: usize,
        /// Ranks of the plan.
        plan_ranks: usize,
        /// Rank of the communicator.
        rank: usize,
        /// Ranks of the communicator.
        ranks: usize,
    },
    /// A tensor has another element type than the plan says.
    #[error("{what} is {got}, the plan is for {expected}")]
    DType {
        /// Which tensor.
        what: &'static str,
        /// Its type.
        got: DType,
        /// The plan's type.
        expected: DType,
    },
}

/// A rank's own tensors, `[batch, heads, rows, head_dim]`.
pub struct Inputs<'a, B: Buffer> {
    /// Queries.
    pub query: Tensor<'a, B>,
    /// Keys.
    pub key: Tensor<'a, B>,
    /// Values.
    pub value: Tensor<'a, B>,
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
    check_plan(communicator, plan)?;
    let run = Run {
        kernels,
        communicator,
        plan,
        problem: plan.problem(),
        operation: communicator.next_operation(),
        pass: Pass::Forward,
    };
    run.forward(inputs)
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
    check_plan(communicator, plan)?;
    let run = Run {
        kernels,
        communicator,
        plan,
        problem: plan.problem(),
        operation: saved.operation,
        pass: Pass::Backward,
    };
    run.backward(inputs, saved)
}

/// One pass of one rank over its plan.
struct Run<'a, B: Buffer, K> {
    kernels: &'a K,
    communicator: &'a Communicator<B>,
    plan: &'a Plan,
    problem: Problem,
    operation: u64,
    pass: Pass,
}

/// Which way a run goes.
#[derive(Clone, Copy, Debug)]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// What key and value rows travel as.
    fn key_value(self) -> Payload {
        match self {
            Pass::Forward => Payload::KeyValue,
            Pass::Backward => Payload::KeyValueAgain,
        }
    }
}

/// Messages under way.
struct InFlight<B> {
    distance: usize,
    send: Option<SendRequest<B>>,
    receive: Option<RecvRequest<B>>,
}

/// Gradients of a slot, to be sent to the slot's owner, and those of own rows, to be received from who used them.
struct GradientHop<'p, B> {
    exchange: &'p Exchange,
    outgoing: Option<B>,
}

impl<'a, B: Buffer, K: Kernels<B>> Run<'a, B, K> {
    fn forward(&self, inputs: Inputs<'_, B>) -> Result<Output<B>, Error> {
        self.check_dtypes(inputs)?;
        let mut state: ForwardState<B> = self.kernel(self.kernels.start(&self.problem))?;
        let mut slot = None;
        let mut spare = None;
        for (index, step) in self.plan.steps().iter().enumerate() {
            let exchange = self.post(step, inputs, &mut spare)?;
            let layout = self.slot_layout(index);
            if let Some(source) = key_value(step, inputs.shorten(), slot.as_ref(), layout.as_ref())
            {
                self.kernel(self.kernels.forward(
                    &self.problem,
                    inputs.query,
                    &source,
                    &step.head_blocks(),
                    &mut state,
                ))?;
            }
            spare = self.keep_if_sending(slot.take(), index + 1);
            slot = self.wait(exchange, &mut spare)?;
        }
        let spec = self.plan.spec();
        let (output, log_sum_exp) = self.kernel(self.kernels.finish(
            &self.problem,
            state,
            spec.dtype,
            spec.pattern.output_scale(),
        ))?;
        Ok(Output {
            output,
            log_sum_exp,
            operation: self.operation,
        })
    }

    fn backward(&self, inputs: Inputs<'_, B>, saved: Saved<'_, B>) -> Result<Gradients<B>, Error> {
        self.check_dtypes(inputs)?;
        let delta = self.kernel(self.kernels.delta(
            &self.problem,
            saved.output,
            saved.grad_output,
            saved.log_sum_exp,
            saved.grad_log_sum_exp,
        ))?;
        let from_forward = BackwardInputs {
            query: inputs.query.shorten(),
            grad_output: saved.grad_output.shorten(),
            log_sum_exp: B::shorten(saved.log_sum_exp),
            delta: &delta,
        };
        let mut gradients = self.zero_gradients()?;
        let (mut slot, mut spare) = (None, None);
        let mut pending: Option<GradientHop<'_, B>> = None;
        for (index, step) in self.plan.steps().iter().enumerate() {
            let exchange = self.post(step, inputs, &mut spare)?;
            let homecoming = self.post_gradients(pending.take())?;
            let layout = self.slot_layout(index);
            let source = key_value(step, inputs.shorten(), slot.as_ref(), layout.as_ref());
            let outgoing = match (source, layout.as_ref()) {
                (Some(source), layout) => {
                    self.step_gradients(step, &from_forward, &source, layout, &mut gradients)?
                }
                (None, _) => None,
            };
            spare = self.keep_if_sending(slot.take(), index + 1);
            self.take_home(homecoming, &mut gradients)?;
            if let Some(done) = self.exchange_before(index) {
                let hop = GradientHop {
                    exchange: done,
                    outgoing,
                };
                if is_next_hop(step, done) {
                    pending = Some(hop);
                } else {
                    let homecoming = self.post_gradients(Some(hop))?;
                    self.take_home(homecoming, &mut gradients)?;
                }
            }
            slot = self.wait(exchange, &mut spare)?;
        }
        let left_over = self
            .plan
            .steps()
            .last()
            .and_then(|step| step.exchange.as_ref())
            .map(|exchange| GradientHop {
                exchange,
                outgoing: None,
            });
        for hop in [pending, left_over] {
            let homecoming = self.post_gradients(hop)?;
            self.take_home(homecoming, &mut gradients)?;
        }
        let dtype = self.plan.spec().dtype;
        Ok(Gradients {
            query: self.kernel(self.kernels.round(gradients.query, dtype))?,
            key: self.kernel(self.kernels.round(gradients.key, dtype))?,
            value: self.kernel(self.kernels.round(gradients.value, dtype))?,
        })
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
                return Err(self.failed(Error::DType {
                    what,
                    got,
                    expected,
                }));
            }
        }
        Ok(())
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
        } = self.problem;
        let zeros = |rows: usize| {
            self.kernel(
                self.kernels
                    .allocate(DType::F32, batch * rows * head_dim, None),
            )
        };
        Ok(Gradients {
            query: zeros(query_heads * queries)?,
            key: zeros(kv_heads * keys)?,
            value: zeros(kv_heads * keys)?,
        })
    }

    /// Gradients of a step's blocks: those of own rows are added, those of a slot returned, to be sent home.
    fn step_gradients(
        &self,
        step: &Step,
        from_forward: &BackwardInputs<'_, B>,
        source: &KeyValue<'_, B>,
        layout: Option<&PackedRows>,
        gradients: &mut Gradients<B>,
    ) -> Result<Option<B>, Error> {
        let mut slot_gradient = match layout {
            Some(rows) => Some(self.kernel(self.kernels.allocate(DType::F32, rows.len, None))?),
            None => None,
        };
        let target = match (&mut slot_gradient, layout) {
            (Some(slot), Some(rows)) => KeyValueGradient::Slot {
                slot,
                layout: &rows.layout,
            },
            _ => KeyValueGradient::Own {
                key: &mut gradients.key,
                value: &mut gradients.value,
            },
        };
        self.kernel(self.kernels.backward(
            &self.problem,
            from_forward,
            source,
            &step.head_blocks(),
            self.plan.spec().pattern.output_scale(),
            &mut gradients.query,
            target,
        ))?;
        Ok(slot_gradient)
    }

    /// A slot that is done with, if its memory serves for what step `index` sends; released otherwise.
    fn keep_if_sending(&self, slot: Option<B>, index: usize) -> Option<B> {
        let step = self.plan.steps().get(index)?;
        slot.filter(|_| {
            step.exchange
                .as_ref()
                .is_some_and(|exchange| exchange.send.is_some())
        })
    }

    /// The exchange that filled the slot of step `index`.
    fn exchange_before(&self, index: usize) -> Option<&'a Exchange> {
        self.plan.steps()[index.checked_sub(1)?].exchange.as_ref()
    }

    /// How the slot of step `index` is laid out; `None` if the step has no slot.
    fn slot_layout(&self, index: usize) -> Option<PackedRows> {
        let message = self.exchange_before(index)?.receive.as_ref()?;
        Some(message.packed(&self.problem))
    }

    /// Posts a step's exchange: the receive first, then the send.
    fn post(
        &self,
        step: &Step,
        inputs: Inputs<'_, B>,
        spare: &mut Option<B>,
    ) -> Result<Option<InFlight<B>>, Error> {
        let Some(exchange) = &step.exchange else {
            return Ok(None);
        };
        let distance = exchange.distance;
        let receive = self.receive(
            exchange.receive.as_ref(),
            distance,
            self.pass.key_value(),
            self.plan.spec().dtype,
        )?;
        let outgoing = match &exchange.send {
            Some(message) => {
                let rows = message.packed(&self.problem);
                Some(self.kernel(self.kernels.pack(
                    &self.problem,
                    inputs.key,
                    inputs.value,
                    &rows,
                    spare.take(),
                ))?)
            }
            None => None,
        };
        let send = self.send(
            exchange.send.as_ref(),
            distance,
            self.pass.key_value(),
            outgoing,
        )?;
        Ok(Some(InFlight {
            distance,
            send,
            receive,
        }))
    }

    /// Posts the gradients of a hop: those of own rows come from the peer the rows went to, those of the slot go to its owner.
    fn post_gradients<'p>(
        &self,
        hop: Option<GradientHop<'p, B>>,
    ) -> Result<Option<(&'p Exchange, InFlight<B>)>, Error> {
        let Some(GradientHop { exchange, outgoing }) = hop else {
            return Ok(None);
        };
        let distance = exchange.distance;
        let payload = Payload::KeyValueGradient;
        let receive = self.receive(exchange.send.as_ref(), distance, payload, DType::F32)?;
        let send = self.send(exchange.receive.as_ref(), distance, payload, outgoing)?;
        let in_flight = InFlight {
            distance,
            send,
            receive,
        };
        Ok(Some((exchange, in_flight)))
    }

    fn receive(
        &self,
        message: Option<&Message>,
        distance: usize,
        payload: Payload,
        dtype: DType,
    ) -> Result<Option<RecvRequest<B>>, Error> {
        let Some(message) = message else {
            return Ok(None);
        };
        let expected = Expected {
            dtype,
            len: message.packed(&self.problem).len,
        };
        self.communicator
            .transport()
            .irecv(message.peer, self.tag(distance, payload), expected)
            .map(Some)
            .map_err(|source| self.comm_error(distance, source))
    }

    fn send(
        &self,
        message: Option<&Message>,
        distance: usize,
        payload: Payload,
        outgoing: Option<B>,
    ) -> Result<Option<SendRequest<B>>, Error> {
        let (Some(message), Some(outgoing)) = (message, outgoing) else {
            return Ok(None);
        };
        self.communicator
            .transport()
            .isend(message.peer, self.tag(distance, payload), outgoing)
            .map(Some)
            .map_err(|source| self.comm_error(distance, source))
    }

    /// Waits for what is under way; yields what arrived, and leaves in `spare` memory that is free again.
    fn wait(
        &self,
        in_flight: Option<InFlight<B>>,
        spare: &mut Option<B>,
    ) -> Result<Option<B>, Error> {
        let Some(in_flight) = in_flight else {
            return Ok(None);
        };
        let failed = |source| self.comm_error(in_flight.distance, source);
        let arrived = match in_flight.receive {
            Some(request) => Some(request.wait().map_err(failed)?),
            None => None,
        };
        if let Some(request) = in_flight.send
            && let Some(buffer) = request.wait().map_err(failed)?
        {
            spare.get_or_insert(buffer);
        }
        Ok(arrived)
    }

    /// Waits for gradients of own rows and adds them.
    fn take_home(
        &self,
        homecoming: Option<(&Exchange, InFlight<B>)>,
        gradients: &mut Gradients<B>,
    ) -> Result<(), Error> {
        let Some((exchange, in_flight)) = homecoming else {
            return Ok(());
        };
        let arrived = self.wait(Some(in_flight), &mut None)?;
        if let (Some(slot), Some(message)) = (arrived, &exchange.send) {
            let rows = message.packed(&self.problem);
            self.kernel(self.kernels.add_rows(
                &self.problem,
                &slot,
                &rows,
                &mut gradients.key,
                &mut gradients.value,
            ))?;
        }
        Ok(())
    }

    fn tag(&self, distance: usize, payload: Payload) -> Tag {
        Tag {
            operation: self.operation,
            step: distance as u32,
            payload,
        }
    }

    fn kernel<T>(&self, result: Result<T, KernelError>) -> Result<T, Error> {
        result.map_err(|source| {
            self.failed(Error::Kernel {
                rank: self.plan.rank(),
                source,
            })
        })
    }

    /// Tells the other ranks that this one failed by itself. At once: dropping the requests under way would tell them less.
    fn failed(&self, error: Error) -> Error {
        tell_others(self.communicator, &error);
        error
    }

    fn comm_error(&self, distance: usize, source: CommError) -> Error {
        Error::Comm {
            step: format!("hop {distance} of the {:?} pass", self.pass).to_lowercase(),
            source,
        }
    }
}

/// Checks that the plan is this rank's and that all ranks are about to do the same.
fn check_plan<B: Buffer>(communicator: &Communicator<B>, plan: &Plan) -> Result<(), Error> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    if (plan.rank(), plan.spec().world_size) != (rank, ranks) {
        let error = Error::WrongPlan {
            plan_rank: plan.rank(),
            plan_ranks: plan.spec().world_size,
            rank,
            ranks,
        };
        tell_others(communicator, &error);
        return Err(error);
    }
    communicator
        .agree_once("attention", &plan.spec().fields())
        .map_err(|source| Error::Comm {
            step: "the comparison of plans".into(),
            source,
        })
}

/// Ends the group because this rank cannot go on: its peers must not wait for it. Alone, nothing is lost by an error.
fn tell_others<B: Buffer>(communicator: &Communicator<B>, error: &Error) {
    if communicator.world_size() > 1 {
        communicator.abort(&error.to_string());
    }
}

/// Whether the exchange under way in `step` is the hop right after `done`.
///
/// Then the gradients of `done` may travel during the next step. After a gap they must go at once: a rank that waited for a
/// far hop first could hold up peers whose nearer hops that far hop depends on. With this rule, waits can be ordered: keys and
/// values of hop `d` depend on hops below `d` alone, gradients of hop `d` on keys and values up to `d + 1` and gradients below
/// `d`; so no cycle of ranks can wait for each other.
fn is_next_hop(step: &Step, done: &Exchange) -> bool {
    step.exchange
        .as_ref()
        .is_some_and(|next| next.distance == done.distance + 1)
}

/// The keys and values of a step; `None` if it has none.
fn key_value<'a, B: Buffer>(
    step: &Step,
    inputs: Inputs<'a, B>,
    slot: Option<&'a B>,
    rows: Option<&'a PackedRows>,
) -> Option<KeyValue<'a, B>> {
    match (step.source, slot, rows) {
        (Source::Own, ..) => Some(KeyValue::Own {
            key: inputs.key,
            value: inputs.value,
        }),
        (Source::Slot(_), Some(slot), Some(rows)) => Some(KeyValue::Slot {
            slot,
            layout: &rows.layout,
        }),
        _ => None,
    }
}
