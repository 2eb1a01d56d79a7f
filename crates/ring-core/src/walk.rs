//! The loop that walks a plan: [`Walk`].
//!
//! One loop for every pattern, sharding and rank count; what differs is in the plan. In each step: post the receives, post the
//! sends, compute the current blocks, wait. State is f32 through every hop and rounded once at the end. Own keys and values, and
//! those of a slot, are used where they lie; the memory of a slot that is done with serves for the messages after it.

use std::collections::VecDeque;

use ring_comm::buffer::{Buffer, DType};
use ring_kernels::{
    BackwardInputs, ForwardState, Kernels, KeyValue, KeyValueGradient, Problem, RowLayout, Tensor,
};

use crate::{
    driver::{Gradients, Inputs},
    error::Error,
    exchange::{Arrived, Exchanger, GradientsInFlight, Guests, Homeward, InFlight},
    plan::{Plan, Source},
    schedule::{QueryParcel, Schedule, ScheduledExchange, ScheduledStep},
};

/// One pass of one rank over the steps of its plan.
pub(crate) struct Walk<'a, B: Buffer, K> {
    exchanger: &'a Exchanger<'a, B, K>,
    plan: &'a Plan,
    schedule: &'a Schedule,
}

/// Exchanges of the steps ahead.
struct Ahead<'s, B: Buffer> {
    steps: &'s [ScheduledStep],
    posted: usize,
    in_flight: VecDeque<Option<InFlight<B>>>,
}

/// Gradients of what a hop brought, to be sent home, and those to be received from where own rows went to.
struct GradientHop<'p, B> {
    exchange: &'p ScheduledExchange,
    outgoing: Homeward<B>,
}

/// Gradients of own rows on their way home.
type Homecoming<'p, B> = (&'p ScheduledExchange, GradientsInFlight<B>);

impl<'a, B: Buffer, K: Kernels<B>> Walk<'a, B, K> {
    pub(crate) fn new(exchanger: &'a Exchanger<'a, B, K>, plan: &'a Plan) -> Self {
        Self {
            exchanger,
            plan,
            schedule: plan.schedule(),
        }
    }

    /// Output and log-sum-exp.
    pub(crate) fn forward(&self, inputs: Inputs<'_, B>) -> Result<(B, B), Error> {
        let exchanger = self.exchanger;
        if self.has_no_heads() {
            return Ok((self.empty(exchanger.dtype)?, self.empty(DType::F32)?));
        }
        let mut state = exchanger.compute("start", None, || {
            exchanger.kernels.start(&exchanger.problem)
        })?;
        let steps = &self.schedule.steps;
        let mut ahead = Ahead::new(steps);
        let mut slot = None;
        let mut filled_by = None;
        for step in steps {
            self.post(&mut ahead, inputs, None)?;
            let layout = slot_layout(filled_by);
            if let Some(source) = key_value(step, inputs.shorten(), slot.as_ref(), layout) {
                self.step_forward(step, filled_by, inputs, &source, &mut state)?;
            }
            exchanger.give(slot.take());
            slot = self.wait(&mut ahead)?.key_value;
            filled_by = step.exchange.as_ref();
        }
        exchanger.give(slot);
        let spec = self.plan.spec();
        let scale = spec.output_scale();
        exchanger.compute("finish", None, || {
            exchanger
                .kernels
                .finish(&exchanger.problem, state, spec.dtype, scale)
        })
    }

    /// Gradients, in the type of the inputs.
    pub(crate) fn backward(
        &self,
        inputs: Inputs<'_, B>,
        of_queries: &BackwardInputs<'_, B>,
    ) -> Result<Gradients<B>, Error> {
        let exchanger = self.exchanger;
        let mut gradients = self.zero_gradients()?;
        if self.has_no_heads() {
            return self.rounded(gradients);
        }
        let steps = self.schedule.backward();
        let mut ahead = Ahead::new(steps);
        let mut arrived = Arrived::default();
        let mut filled_by = None;
        let mut pending: Option<GradientHop<'_, B>> = None;
        for step in steps {
            self.post(&mut ahead, inputs, Some(of_queries))?;
            let homecoming = self.post_gradients(pending.take())?;
            let outgoing = self.step_backward(
                step,
                filled_by,
                inputs,
                of_queries,
                &arrived,
                &mut gradients,
            )?;
            let Arrived { key_value, guests } = arrived;
            exchanger.give(key_value);
            exchanger.give(guests.map(|guests| guests.rows));
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
            arrived = self.wait(&mut ahead)?;
            filled_by = step.exchange.as_ref();
        }
        // The last exchange only sent, or there would be a step for what it brought.
        let left_over = filled_by.map(|exchange| GradientHop {
            exchange,
            outgoing: Homeward::default(),
        });
        for hop in [pending, left_over] {
            let homecoming = self.post_gradients(hop)?;
            self.take_home(homecoming, &mut gradients)?;
        }
        self.rounded(gradients)
    }

    fn zero_gradients(&self) -> Result<Gradients<B>, Error> {
        let problem = &self.exchanger.problem;
        let (queries, keys) = (problem.query_shape(), problem.key_shape());
        Ok(Gradients {
            query: self.zeros(queries.elements())?,
            key: self.zeros(keys.elements())?,
            value: self.zeros(keys.elements())?,
        })
    }

    fn zeros(&self, len: usize) -> Result<B, Error> {
        self.exchanger.compute("allocate", None, || {
            self.exchanger.kernels.allocate(DType::F32, len, None)
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
            self.exchanger.kernels.forward(
                &self.exchanger.problem,
                inputs.query,
                source,
                &step.blocks,
                state,
            )
        })
    }

    /// Whether this rank leaves all heads to others, and has nothing to compute.
    fn has_no_heads(&self) -> bool {
        self.exchanger.problem.kv_heads == 0
    }

    fn empty(&self, dtype: DType) -> Result<B, Error> {
        self.exchanger.compute("allocate", None, || {
            self.exchanger.kernels.allocate(dtype, 0, None)
        })
    }

    /// Gradients of a step's blocks: those of own rows are added, those of rows from elsewhere returned, to be sent home.
    fn step_backward(
        &self,
        step: &ScheduledStep,
        filled_by: Option<&ScheduledExchange>,
        inputs: Inputs<'_, B>,
        of_queries: &BackwardInputs<'_, B>,
        arrived: &Arrived<B>,
        gradients: &mut Gradients<B>,
    ) -> Result<Homeward<B>, Error> {
        let mut outgoing = Homeward::default();
        let layout = slot_layout(filled_by);
        let slot = arrived.key_value.as_ref();
        if let Some(source) = key_value(step, inputs.shorten(), slot, layout) {
            outgoing.key_value =
                self.step_gradients(step, filled_by, of_queries, &source, gradients)?;
        }
        let parcel = filled_by.and_then(|exchange| exchange.receive_queries.as_ref());
        if let (Some(parcel), Some(guests)) = (parcel, &arrived.guests) {
            let distance = distance(filled_by);
            let message =
                self.guest_gradients(step, distance, parcel, guests, inputs, gradients)?;
            outgoing.query = Some(message);
        }
        Ok(outgoing)
    }

    /// Gradients of blocks of own queries.
    fn step_gradients(
        &self,
        step: &ScheduledStep,
        filled_by: Option<&ScheduledExchange>,
        of_queries: &BackwardInputs<'_, B>,
        source: &KeyValue<'_, B>,
        gradients: &mut Gradients<B>,
    ) -> Result<Option<B>, Error> {
        let received = filled_by.and_then(|exchange| exchange.receive.as_ref());
        let mut slot_gradient = match received {
            Some(parcel) => Some(self.zero_message(parcel.rows.len())?),
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
                self.exchanger.kernels.backward(
                    &self.exchanger.problem,
                    of_queries,
                    source,
                    &step.blocks,
                    self.plan.spec().output_scale(),
                    &mut gradients.query,
                    target,
                )
            })?;
        Ok(slot_gradient)
    }

    /// Gradients of blocks of queries that came from elsewhere, and own keys; those of the queries as they travel home.
    fn guest_gradients(
        &self,
        step: &ScheduledStep,
        distance: Option<usize>,
        parcel: &QueryParcel,
        guests: &Guests<B>,
        inputs: Inputs<'_, B>,
        gradients: &mut Gradients<B>,
    ) -> Result<B, Error> {
        let exchanger = self.exchanger;
        let kernels = exchanger.kernels;
        let problem = Problem {
            queries: parcel.shape.rows,
            ..exchanger.problem.clone()
        };
        let numbers = parcel.statistic_shape();
        let (mut log_sum_exp, mut delta) = (
            self.zeros(numbers.elements())?,
            self.zeros(numbers.elements())?,
        );
        exchanger.compute("place rows", distance, || {
            let targets = &mut [&mut log_sum_exp, &mut delta];
            kernels.place_rows(numbers, &guests.statistics, &parcel.statistics, targets)
        })?;
        let of_guests = BackwardInputs {
            query: Tensor {
                data: guests.rows.view(),
                layout: &parcel.rows.layout,
            },
            grad_output: Tensor {
                data: guests.rows.view(),
                layout: &parcel.grad_output_layout,
            },
            log_sum_exp: log_sum_exp.view(),
            delta: &delta,
        };
        let source = KeyValue::Own {
            key: inputs.key,
            value: inputs.value,
        };
        // There is room for all heads. If queries of few of them came that is more than any message, and not kept with these.
        let elements = parcel.shape.elements();
        let is_kept = elements <= exchanger.capacity;
        let mut grad_query = match is_kept {
            true => self.zero_message(elements)?,
            false => self.zeros(elements)?,
        };
        exchanger.compute("backward", distance, || {
            let target = KeyValueGradient::Own {
                key: &mut gradients.key,
                value: &mut gradients.value,
            };
            kernels.backward(
                &problem,
                &of_guests,
                &source,
                &step.guests,
                self.plan.spec().output_scale(),
                &mut grad_query,
                target,
            )
        })?;
        let memory = exchanger.memory(DType::F32)?;
        let layout = parcel.shape.contiguous();
        let tensor = Tensor {
            data: grad_query.view(),
            layout: &layout,
        };
        let message = exchanger.compute("pack", distance, || {
            kernels.pack(parcel.shape, &[tensor], &parcel.gradients, Some(memory))
        })?;
        exchanger.give(Some(grad_query).filter(|_| is_kept));
        Ok(message)
    }

    fn zero_message(&self, len: usize) -> Result<B, Error> {
        let memory = self.exchanger.memory(DType::F32)?;
        self.exchanger.compute("allocate", None, || {
            self.exchanger
                .kernels
                .allocate(DType::F32, len, Some(memory))
        })
    }

    /// Posts the exchanges of the steps ahead, as far as the plan looks.
    fn post(
        &self,
        ahead: &mut Ahead<'_, B>,
        inputs: Inputs<'_, B>,
        of_queries: Option<&BackwardInputs<'_, B>>,
    ) -> Result<(), Error> {
        while ahead.in_flight.len() < self.plan.lookahead() {
            let Some(step) = ahead.steps.get(ahead.posted) else {
                break;
            };
            let exchange = step.exchange.as_ref();
            let in_flight = exchange
                .map(|exchange| self.exchanger.post(exchange, inputs, of_queries))
                .transpose()?;
            ahead.in_flight.push_back(in_flight);
            ahead.posted += 1;
        }
        Ok(())
    }

    /// What the exchange of the current step brought.
    fn wait(&self, ahead: &mut Ahead<'_, B>) -> Result<Arrived<B>, Error> {
        match ahead.in_flight.pop_front().flatten() {
            Some(in_flight) => self.exchanger.wait(in_flight),
            None => Ok(Arrived::default()),
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
        let exchanger = self.exchanger;
        let home = exchanger.wait_gradients(in_flight)?;
        let distance = Some(exchange.distance);
        if let (Some(message), Some(parcel)) = (&home.key_value, &exchange.send) {
            exchanger.compute("add rows", distance, || {
                let shape = exchanger.problem.key_shape();
                let targets = &mut [&mut gradients.key, &mut gradients.value];
                exchanger
                    .kernels
                    .add_rows(shape, message, &parcel.rows, targets)
            })?;
        }
        if let (Some(message), Some(parcel)) = (&home.query, &exchange.send_queries) {
            exchanger.compute("add rows", distance, || {
                let targets = &mut [&mut gradients.query];
                exchanger
                    .kernels
                    .add_rows(parcel.shape, message, &parcel.gradients, targets)
            })?;
        }
        exchanger.give(home.key_value);
        exchanger.give(home.query);
        Ok(())
    }

    fn rounded(&self, gradients: Gradients<B>) -> Result<Gradients<B>, Error> {
        let dtype = self.plan.spec().dtype;
        let exchanger = self.exchanger;
        let round =
            |sums: B| exchanger.compute("round", None, || exchanger.kernels.round(sums, dtype));
        Ok(Gradients {
            query: round(gradients.query)?,
            key: round(gradients.key)?,
            value: round(gradients.value)?,
        })
    }
}

impl<'s, B: Buffer> Ahead<'s, B> {
    fn new(steps: &'s [ScheduledStep]) -> Self {
        Self {
            steps,
            posted: 0,
            in_flight: VecDeque::new(),
        }
    }
}

/// Whether the exchange under way in `step` is the hop right after `done`.
///
/// Then the gradients of `done` may travel during the next step. After a gap they must go at once: a rank that waited for a
/// far hop first could hold up peers whose nearer hops that far hop depends on. With this rule, waits can be ordered: keys and
/// values of hop `d` depend on hops below `d` alone, gradients of hop `d` on keys and values up to `d + 1` and gradients below
/// `d`; so no cycle of ranks can wait for each other.
pub(crate) fn is_next_hop(step: &ScheduledStep, done: &ScheduledExchange) -> bool {
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
