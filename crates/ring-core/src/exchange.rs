//! The messages of one pass: posting, waiting, tags, and the memory they lie in.
//!
//! All messages of a group lie in buffers of one capacity, that of its largest message, from the communicator's pool. Every
//! receive brings such a buffer and every send yields one, so a rank has as many after a pass as before, whoever it exchanges
//! how much with; only its first pass allocates. At one time there are, of keys and values, at most the slot computed on, the
//! one arriving and the one leaving, and in a backward as many of gradients; of queries that travel as many again. Not so where
//! all exchanges are under way at once (all-gather): what of their buffers is more than the pool keeps, every pass allocates.
//! Numbers that go along with queries, and what ranks that divide heads exchange, lie in memory of their own.

use std::time::Instant;

use ring_comm::{
    CommError, Communicator, Expected, Payload, Rank, RecvRequest, SendRequest, Tag,
    buffer::{Buffer, DType},
    trace::{Activity, Details, Transfer},
};
use ring_kernels::{BackwardInputs, KernelError, Kernels, Problem, Tensor};

use crate::{
    driver::{DropoutSeed, Inputs},
    error::Error,
    plan::Plan,
    schedule::{Parcel, QueryParcel, Schedule, ScheduledExchange},
};

/// Which way a pass goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pass {
    Forward,
    Backward,
}

impl Pass {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
        }
    }

    /// What key and value rows travel as.
    pub(crate) fn key_value(self) -> Payload {
        match self {
            Pass::Forward => Payload::KeyValue,
            Pass::Backward => Payload::KeyValueAgain,
        }
    }
}

/// What one pass of one rank exchanges messages with.
pub(crate) struct Exchanger<'a, B: Buffer, K> {
    pub(crate) kernels: &'a K,
    pub(crate) communicator: &'a Communicator<B>,
    pub(crate) problem: Problem,
    pub(crate) pass: Pass,
    pub(crate) operation: u64,
    /// Type of keys and values on their way; gradients travel in f32.
    pub(crate) dtype: DType,
    /// Elements of the largest message of the group.
    pub(crate) capacity: usize,
}

/// Messages of a hop under way: rows on their way to who computes with them.
pub(crate) struct InFlight<B: Buffer> {
    key_value: Option<Posted<RecvRequest<B>>>,
    guests: Option<Guests<Posted<RecvRequest<B>>>>,
    /// Keys and values, queries, what goes along with these.
    sends: [Option<Posted<SendRequest<B>>>; 3],
}

/// Rows that a hop brought.
pub(crate) struct Arrived<B> {
    /// Keys and values, for own queries.
    pub(crate) key_value: Option<B>,
    /// Queries, for own keys.
    pub(crate) guests: Option<Guests<B>>,
}

impl<B> Default for Arrived<B> {
    fn default() -> Self {
        Self {
            key_value: None,
            guests: None,
        }
    }
}

/// Queries that visit another rank's keys.
pub(crate) struct Guests<T> {
    /// Queries and gradients of their outputs.
    pub(crate) rows: T,
    /// Their log-sum-exp and delta.
    pub(crate) statistics: T,
}

/// Gradients of a hop: on their way home.
pub(crate) struct Homeward<T> {
    /// Of keys and values.
    pub(crate) key_value: Option<T>,
    /// Of queries.
    pub(crate) query: Option<T>,
}

impl<T> Default for Homeward<T> {
    fn default() -> Self {
        Self {
            key_value: None,
            query: None,
        }
    }
}

/// Gradients of a hop under way.
pub(crate) struct GradientsInFlight<B: Buffer> {
    receives: Homeward<Posted<RecvRequest<B>>>,
    sends: Homeward<Posted<SendRequest<B>>>,
}

/// A request under way.
pub(crate) struct Posted<R> {
    request: R,
    letter: Letter,
    /// When it was posted, if anybody wants to know.
    since: Option<Instant>,
}

/// What is written on a message.
#[derive(Clone, Copy)]
pub(crate) struct Letter {
    peer: Rank,
    /// The hop; 0 among ranks that divide the heads.
    distance: usize,
    payload: Payload,
    expected: Expected,
}

impl Letter {
    pub(crate) fn new(
        peer: Rank,
        distance: usize,
        payload: Payload,
        dtype: DType,
        len: usize,
    ) -> Self {
        Self {
            peer,
            distance,
            payload,
            expected: Expected { dtype, len },
        }
    }

    fn pick(self, names: Names) -> &'static str {
        match self.payload {
            Payload::KeyValueGradient | Payload::QueryGradient => names.gradients,
            Payload::KeyValue | Payload::KeyValueAgain => names.key_values,
            Payload::Output => names.outputs,
            _ => names.queries,
        }
    }
}

/// How a trace names what becomes of messages.
#[derive(Clone, Copy)]
struct Names {
    wait: &'static str,
    key_values: &'static str,
    queries: &'static str,
    gradients: &'static str,
    outputs: &'static str,
}

const RECEIVE: Names = Names {
    wait: "wait to receive",
    key_values: "receive keys and values",
    queries: "receive queries",
    gradients: "receive gradients",
    outputs: "receive outputs",
};

const SEND: Names = Names {
    wait: "wait to send",
    key_values: "send keys and values",
    queries: "send queries",
    gradients: "send gradients",
    outputs: "send outputs",
};

impl<B: Buffer, K: Kernels<B>> Exchanger<'_, B, K> {
    /// Posts a hop's rows: the receives first, then the sends. `of_queries` is what queries travel with.
    pub(crate) fn post(
        &self,
        exchange: &ScheduledExchange,
        inputs: Inputs<'_, B>,
        of_queries: Option<&BackwardInputs<'_, B>>,
    ) -> Result<InFlight<B>, Error> {
        let key_value = exchange.receive.as_ref();
        let key_value = key_value
            .map(|parcel| self.receive(self.of_keys(exchange, parcel)))
            .transpose()?;
        let guests = match &exchange.receive_queries {
            Some(parcel) => Some(Guests {
                rows: self.receive(self.of_queries(exchange, parcel))?,
                statistics: self.receive_into(of_statistics(exchange, parcel), None)?,
            }),
            None => None,
        };
        let mut sends = [None, None, None];
        if let Some(parcel) = &exchange.send {
            let message = self.pack_keys(parcel, exchange.distance, inputs)?;
            sends[0] = Some(self.send(self.of_keys(exchange, parcel), message)?);
        }
        if let (Some(parcel), Some(of_queries)) = (&exchange.send_queries, of_queries) {
            let guests = self.pack_queries(parcel, exchange.distance, of_queries)?;
            sends[1] = Some(self.send(self.of_queries(exchange, parcel), guests.rows)?);
            let letter = of_statistics(exchange, parcel);
            sends[2] = Some(self.send(letter, guests.statistics)?);
        }
        Ok(InFlight {
            key_value,
            guests,
            sends,
        })
    }

    /// Posts a hop's gradients: each comes from where the rows went to, and goes to where they came from.
    pub(crate) fn post_gradients(
        &self,
        exchange: &ScheduledExchange,
        outgoing: Homeward<B>,
    ) -> Result<GradientsInFlight<B>, Error> {
        let of_keys = |parcel: &Parcel| {
            let payload = Payload::KeyValueGradient;
            let (peer, len) = (parcel.peer, parcel.rows.len());
            Letter::new(peer, exchange.distance, payload, DType::F32, len)
        };
        let of_queries = |parcel: &QueryParcel| {
            let payload = Payload::QueryGradient;
            let (peer, len) = (parcel.peer, parcel.gradients.len());
            Letter::new(peer, exchange.distance, payload, DType::F32, len)
        };
        let receive = |letter: Option<Letter>| letter.map(|letter| self.receive(letter));
        let receives = Homeward {
            key_value: receive(exchange.send.as_ref().map(of_keys)).transpose()?,
            query: receive(exchange.send_queries.as_ref().map(of_queries)).transpose()?,
        };
        let send = |letter: Option<Letter>, gradients: Option<B>| {
            let message = letter.zip(gradients);
            message.map(|(letter, gradients)| self.send(letter, gradients))
        };
        let (keys, queries) = (&exchange.receive, &exchange.receive_queries);
        let sends = Homeward {
            key_value: send(keys.as_ref().map(of_keys), outgoing.key_value).transpose()?,
            query: send(queries.as_ref().map(of_queries), outgoing.query).transpose()?,
        };
        Ok(GradientsInFlight { receives, sends })
    }

    /// Waits for rows under way and yields what arrived.
    pub(crate) fn wait(&self, in_flight: InFlight<B>) -> Result<Arrived<B>, Error> {
        let received = |posted: Option<_>| posted.map(|posted| self.received(posted)).transpose();
        let key_value = received(in_flight.key_value)?;
        let guests = match in_flight.guests {
            Some(guests) => Some(Guests {
                rows: self.received(guests.rows)?,
                statistics: self.received(guests.statistics)?,
            }),
            None => None,
        };
        let [key_values, queries, statistics] = in_flight.sends;
        for posted in [key_values, queries].into_iter().flatten() {
            self.give(self.sent(posted)?);
        }
        if let Some(posted) = statistics {
            self.sent(posted)?;
        }
        Ok(Arrived { key_value, guests })
    }

    /// Waits for gradients under way and yields what came home.
    pub(crate) fn wait_gradients(
        &self,
        in_flight: GradientsInFlight<B>,
    ) -> Result<Homeward<B>, Error> {
        let GradientsInFlight { receives, sends } = in_flight;
        let received = |posted: Option<_>| posted.map(|posted| self.received(posted)).transpose();
        let home = Homeward {
            key_value: received(receives.key_value)?,
            query: received(receives.query)?,
        };
        for posted in [sends.key_value, sends.query].into_iter().flatten() {
            self.give(self.sent(posted)?);
        }
        Ok(home)
    }

    /// Waits for a message.
    pub(crate) fn received(&self, posted: Posted<RecvRequest<B>>) -> Result<B, Error> {
        self.finish(posted, RECEIVE, RecvRequest::wait_timed)
    }

    /// Waits until a message is taken; yields the memory that came for it.
    pub(crate) fn sent(&self, posted: Posted<SendRequest<B>>) -> Result<Option<B>, Error> {
        self.finish(posted, SEND, SendRequest::wait_timed)
    }

    /// Memory for a message.
    pub(crate) fn memory(&self, dtype: DType) -> Result<B, Error> {
        match self.communicator.buffers().take(dtype, self.capacity) {
            Some(buffer) => Ok(buffer),
            None => self.compute("allocate", None, || {
                self.kernels.allocate(dtype, self.capacity, None)
            }),
        }
    }

    /// Takes back the memory of a message that is done with.
    pub(crate) fn give(&self, memory: Option<B>) {
        if let Some(memory) = memory {
            self.communicator.buffers().give(memory);
        }
    }

    /// Runs a kernel, as part of the hop of `distance` if of any.
    pub(crate) fn compute<T>(
        &self,
        name: &'static str,
        distance: Option<usize>,
        kernel: impl FnOnce() -> Result<T, KernelError>,
    ) -> Result<T, Error> {
        let details = Details {
            operation: self.operation,
            hop: distance,
            ..Details::default()
        };
        self.communicator
            .timed(Activity::Compute, name, details, kernel)
            .map_err(|source| {
                self.failed(Error::Kernel {
                    rank: self.communicator.rank(),
                    source,
                })
            })
    }

    /// Tells the other ranks that this one failed by itself. At once: dropping the requests under way would tell them less.
    pub(crate) fn failed(&self, error: Error) -> Error {
        tell_others(self.communicator, &error);
        error
    }

    fn of_keys(&self, exchange: &ScheduledExchange, parcel: &Parcel) -> Letter {
        let (peer, len) = (parcel.peer, parcel.rows.len());
        let payload = self.pass.key_value();
        Letter::new(peer, exchange.distance, payload, self.dtype, len)
    }

    fn of_queries(&self, exchange: &ScheduledExchange, parcel: &QueryParcel) -> Letter {
        let (peer, len) = (parcel.peer, parcel.rows.len());
        Letter::new(peer, exchange.distance, Payload::Query, self.dtype, len)
    }

    fn pack_keys(
        &self,
        parcel: &Parcel,
        distance: usize,
        inputs: Inputs<'_, B>,
    ) -> Result<B, Error> {
        let memory = self.memory(self.dtype)?;
        let tensors = [inputs.key, inputs.value];
        self.compute("pack", Some(distance), || {
            let shape = self.problem.key_shape();
            self.kernels
                .pack(shape, &tensors, &parcel.rows, Some(memory))
        })
    }

    fn pack_queries(
        &self,
        parcel: &QueryParcel,
        distance: usize,
        of_queries: &BackwardInputs<'_, B>,
    ) -> Result<Guests<B>, Error> {
        let memory = self.memory(self.dtype)?;
        let tensors = [of_queries.query, of_queries.grad_output];
        let rows = self.compute("pack", Some(distance), || {
            self.kernels
                .pack(parcel.shape, &tensors, &parcel.rows, Some(memory))
        })?;
        let layout = self.problem.statistic_shape().contiguous();
        let log_sum_exp = B::shorten(of_queries.log_sum_exp);
        let numbers = [log_sum_exp, of_queries.delta.view()].map(|data| Tensor {
            data,
            layout: &layout,
        });
        let statistics = self.compute("pack", Some(distance), || {
            let shape = parcel.statistic_shape();
            self.kernels.pack(shape, &numbers, &parcel.statistics, None)
        })?;
        Ok(Guests { rows, statistics })
    }

    fn receive(&self, letter: Letter) -> Result<Posted<RecvRequest<B>>, Error> {
        let memory = self.memory(letter.expected.dtype)?;
        self.receive_into(letter, Some(memory))
    }

    /// Posts a receive, which may bring memory.
    pub(crate) fn receive_into(
        &self,
        letter: Letter,
        memory: Option<B>,
    ) -> Result<Posted<RecvRequest<B>>, Error> {
        let transport = self.communicator.transport();
        let since = self.now_if_traced();
        let request = transport.irecv_into(letter.peer, self.tag(letter), letter.expected, memory);
        self.posted(request, letter, since)
    }

    /// Posts a send.
    pub(crate) fn send(&self, letter: Letter, message: B) -> Result<Posted<SendRequest<B>>, Error> {
        let transport = self.communicator.transport();
        let since = self.now_if_traced();
        let request = transport.isend(letter.peer, self.tag(letter), message);
        self.posted(request, letter, since)
    }

    fn posted<R>(
        &self,
        request: Result<R, CommError>,
        letter: Letter,
        since: Option<Instant>,
    ) -> Result<Posted<R>, Error> {
        let request = request.map_err(|source| self.comm_error(letter, source))?;
        Ok(Posted {
            request,
            letter,
            since,
        })
    }

    /// Waits for one request.
    fn finish<R, T>(
        &self,
        posted: Posted<R>,
        names: Names,
        wait: impl FnOnce(R) -> Result<(T, Instant), CommError>,
    ) -> Result<T, Error> {
        let letter = posted.letter;
        let details = self.details(letter);
        let (value, completed) = self
            .communicator
            .timed(Activity::Wait, names.wait, details, || wait(posted.request))
            .map_err(|source| self.comm_error(letter, source))?;
        if let (Some(trace), Some(since)) = (self.communicator.trace(), posted.since) {
            let transfer = Transfer {
                name: letter.pick(names),
                posted: since,
                completed,
                ended: Instant::now(),
            };
            trace.record_transfer(transfer, details);
        }
        Ok(value)
    }

    fn now_if_traced(&self) -> Option<Instant> {
        self.communicator.trace().map(|_| Instant::now())
    }

    fn details(&self, letter: Letter) -> Details {
        Details {
            operation: self.operation,
            hop: Some(letter.distance),
            peer: Some(letter.peer),
            bytes: Some(letter.expected.len * letter.expected.dtype.size()),
        }
    }

    fn tag(&self, letter: Letter) -> Tag {
        Tag::new(self.operation, letter.distance as u32, letter.payload)
    }

    fn comm_error(&self, letter: Letter, source: CommError) -> Error {
        let pass = self.pass.name();
        let step = match letter.distance {
            0 => format!("the division of heads of the {pass} pass"),
            distance => format!("hop {distance} of the {pass} pass"),
        };
        Error::Comm {
            step: step.into(),
            source,
        }
    }
}

fn of_statistics(exchange: &ScheduledExchange, parcel: &QueryParcel) -> Letter {
    let (peer, len) = (parcel.peer, parcel.statistics.len());
    let payload = Payload::Statistics;
    Letter::new(peer, exchange.distance, payload, DType::F32, len)
}

/// Checks that the plan is this rank's and that all ranks are about to do the same; yields the elements of the largest message
/// of the group.
pub(crate) fn check_plan<B: Buffer>(
    communicator: &Communicator<B>,
    plan: &Plan,
    pass: Pass,
    dropout: DropoutSeed,
) -> Result<usize, Error> {
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
    let schedule: &Schedule = plan.schedule();
    let largest = schedule.largest_message() as u64;
    let (spec, fields) = (plan.spec(), &schedule.fields);
    spec.check_first_entry(dropout.first_entry as usize)
        .map_err(Error::from)
        .inspect_err(|error| tell_others(communicator, error))?;
    // What may be another in every call is compared in every call.
    let of_call = match spec.dropout {
        0.0 => Vec::new(),
        _ => dropout.fields(),
    };
    let anew = spec.is_of_one_batch() || !of_call.is_empty();
    let details = Details::default();
    communicator
        .timed(Activity::Wait, "compare plans", details, || match pass {
            Pass::Forward if anew => {
                communicator.agree_anew_on_largest("attention", fields, &of_call, largest)
            }
            _ => communicator.agree_once_on_largest("attention", fields, largest),
        })
        .map(|largest| largest as usize)
        .map_err(|source| Error::Comm {
            step: "the comparison of plans".into(),
            source,
        })
}

/// Ends the group because this rank cannot go on: its peers must not wait for it. Alone, nothing is lost by an error.
pub(crate) fn tell_others<B: Buffer>(communicator: &Communicator<B>, error: &Error) {
    if communicator.world_size() > 1 {
        communicator.abort(&error.to_string());
    }
}
