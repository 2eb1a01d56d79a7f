//! The messages of one pass: posting, waiting, tags, and the memory they lie in.
//!
//! All messages of a group lie in buffers of one capacity, that of its largest message, from the communicator's pool. Every
//! receive brings such a buffer and every send yields one, so a rank has as many after a pass as before, whoever it exchanges
//! how much with; only its first pass allocates. At one time there are, of keys and values, at most the slot computed on, the
//! one arriving and the one leaving, and in a backward as many of gradients.

use std::time::Instant;

use ring_comm::{
    CommError, Communicator, Expected, Payload, Rank, RecvRequest, SendRequest, Tag,
    buffer::{Buffer, DType},
    trace::{Activity, Details, Transfer},
};
use ring_kernels::{KernelError, Kernels, Problem};

use crate::{
    driver::{DropoutSeed, Inputs},
    error::Error,
    plan::Plan,
    schedule::{Parcel, ScheduledExchange},
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
    fn key_value(self) -> Payload {
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

/// Messages under way.
pub(crate) struct InFlight<B: Buffer> {
    send: Option<Posted<SendRequest<B>>>,
    receive: Option<Posted<RecvRequest<B>>>,
}

/// A request under way.
struct Posted<R> {
    request: R,
    letter: Letter,
    /// When it was posted, if anybody wants to know.
    since: Option<Instant>,
}

/// What is written on a message.
#[derive(Clone, Copy)]
struct Letter {
    peer: Rank,
    distance: usize,
    payload: Payload,
    expected: Expected,
}

impl Letter {
    fn new(parcel: &Parcel, distance: usize, payload: Payload, dtype: DType) -> Self {
        Self {
            peer: parcel.peer,
            distance,
            payload,
            expected: Expected {
                dtype,
                len: parcel.rows.len,
            },
        }
    }

    fn pick(self, names: Names) -> &'static str {
        match self.payload {
            Payload::KeyValueGradient => names.gradients,
            _ => names.key_values,
        }
    }
}

/// How a trace names what becomes of messages.
#[derive(Clone, Copy)]
struct Names {
    wait: &'static str,
    key_values: &'static str,
    gradients: &'static str,
}

const RECEIVE: Names = Names {
    wait: "wait to receive",
    key_values: "receive keys and values",
    gradients: "receive gradients",
};

const SEND: Names = Names {
    wait: "wait to send",
    key_values: "send keys and values",
    gradients: "send gradients",
};

impl<B: Buffer, K: Kernels<B>> Exchanger<'_, B, K> {
    /// Posts a hop's keys and values: the receive first, then the send.
    pub(crate) fn post(
        &self,
        exchange: &ScheduledExchange,
        inputs: Inputs<'_, B>,
    ) -> Result<InFlight<B>, Error> {
        let distance = exchange.distance;
        let letter = |parcel| Letter::new(parcel, distance, self.pass.key_value(), self.dtype);
        let receive = exchange.receive.as_ref().map(letter);
        let receive = receive.map(|letter| self.receive(letter)).transpose()?;
        let send = match &exchange.send {
            Some(parcel) => Some(self.send(letter(parcel), self.pack(parcel, distance, inputs)?)?),
            None => None,
        };
        Ok(InFlight { send, receive })
    }

    /// Posts a hop's gradients: those of own rows come from the peer the rows went to, those of the slot go to its owner.
    pub(crate) fn post_gradients(
        &self,
        exchange: &ScheduledExchange,
        outgoing: Option<B>,
    ) -> Result<InFlight<B>, Error> {
        let (distance, payload) = (exchange.distance, Payload::KeyValueGradient);
        let letter = |parcel| Letter::new(parcel, distance, payload, DType::F32);
        let receive = exchange.send.as_ref().map(letter);
        let receive = receive.map(|letter| self.receive(letter)).transpose()?;
        let send = exchange.receive.as_ref().map(letter).zip(outgoing);
        let send = send
            .map(|(letter, gradients)| self.send(letter, gradients))
            .transpose()?;
        Ok(InFlight { send, receive })
    }

    /// Waits for what is under way and yields what arrived.
    pub(crate) fn wait(&self, in_flight: InFlight<B>) -> Result<Option<B>, Error> {
        let arrived = match in_flight.receive {
            Some(posted) => Some(self.finish(posted, RECEIVE, RecvRequest::wait_timed)?),
            None => None,
        };
        if let Some(posted) = in_flight.send {
            self.give(self.finish(posted, SEND, SendRequest::wait_timed)?);
        }
        Ok(arrived)
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

    fn pack(&self, parcel: &Parcel, distance: usize, inputs: Inputs<'_, B>) -> Result<B, Error> {
        let memory = self.memory(self.dtype)?;
        self.compute("pack", Some(distance), || {
            self.kernels.pack(
                &self.problem,
                inputs.key,
                inputs.value,
                &parcel.rows,
                Some(memory),
            )
        })
    }

    fn receive(&self, letter: Letter) -> Result<Posted<RecvRequest<B>>, Error> {
        let memory = self.memory(letter.expected.dtype)?;
        let transport = self.communicator.transport();
        let since = self.now_if_traced();
        let request =
            transport.irecv_into(letter.peer, self.tag(letter), letter.expected, Some(memory));
        self.posted(request, letter, since)
    }

    fn send(&self, letter: Letter, message: B) -> Result<Posted<SendRequest<B>>, Error> {
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
        Error::Comm {
            step: format!("hop {} of the {} pass", letter.distance, self.pass.name()).into(),
            source,
        }
    }
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
    let largest = plan.schedule().largest_message() as u64;
    let (spec, fields) = (plan.spec(), &plan.schedule().fields);
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
