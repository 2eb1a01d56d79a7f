//! What a shift costs that goes on under a computation: each rank sends a buffer to the next and receives one from the rank before.

use std::{
    mem,
    time::{Duration, Instant},
};

use ring_comm::{
    CommError, Communicator, Expected, Payload, Tag,
    buffer::{Buffer, DType, HostBuffer},
    collective::barrier,
};
use ring_core::{AttentionSpec, Pattern, Shape};
use ring_kernels::{CpuKernels, Kernels};
use serde::{Deserialize, Serialize};

use crate::workload::Rank;

/// Bytes of the buffer that every rank sends.
pub const SHIFT_BYTES: usize = 64 << 20;

/// Some work of one thread, always the same: the attention of a small sequence, over and over.
pub struct Computation {
    rank: Rank,
    repetitions: usize,
}

impl Computation {
    /// Work that takes one thread of this machine about `duration` when nothing else runs.
    ///
    /// # Panics
    /// If threads cannot be started.
    pub fn lasting(duration: Duration) -> Self {
        let shape = Shape {
            batch: 1,
            query_heads: 2,
            kv_heads: 2,
            head_dim: 64,
        };
        let spec = AttentionSpec::new(Pattern::full(), shape, 1024).expect("sizes that fit");
        let rank = Rank::of(&spec, Communicator::single(), 1);
        let mut computation = Self {
            rank,
            repetitions: 4,
        };
        computation.run();
        let probes: Vec<Duration> = (0..5)
            .map(|_| {
                let started = Instant::now();
                computation.run();
                started.elapsed()
            })
            .collect();
        let shortest = probes.into_iter().min().unwrap_or_default();
        let one = shortest.as_secs_f64() / computation.repetitions as f64;
        computation.repetitions = (duration.as_secs_f64() / one).ceil() as usize;
        computation
    }

    /// The same number of repetitions on all ranks: that of the rank that can do the most in the time.
    ///
    /// # Errors
    /// [`CommError`] if the ranks cannot be reached.
    pub fn agreed(mut self, communicator: &Communicator<HostBuffer>) -> Result<Self, CommError> {
        let own = (self.repetitions as u64).to_le_bytes();
        let all = communicator.all_gather_bytes("repetitions", &own)?;
        let read = |bytes: Vec<u8>| bytes.try_into().map_or(0, u64::from_le_bytes);
        let most = all.into_iter().map(read).max().unwrap_or_default();
        self.repetitions = most as usize;
        Ok(self)
    }

    /// Does it.
    ///
    /// # Panics
    /// If the kernels fail.
    pub fn run(&self) {
        for _ in 0..self.repetitions {
            self.rank.forward().expect("nothing is communicated");
        }
    }
}

/// Seconds of one repetition, each from a barrier until the last rank is done.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Times {
    /// The computation alone.
    pub computation: f64,
    /// The shift alone.
    pub shift: f64,
    /// The computation, with the shift going on meanwhile.
    pub both: f64,
}

/// Times computation, shift, and both, in turn.
///
/// # Errors
/// [`CommError`] if the shift fails.
pub fn measure(
    communicator: &Communicator<HostBuffer>,
    computation: &Computation,
    repetitions: usize,
) -> Result<Vec<Times>, CommError> {
    let mut shift = Shift::new();
    // The first is to warm up: memory is touched, requests are made.
    let times: Result<Vec<Times>, CommError> = (0..=repetitions)
        .map(|_| {
            Ok(Times {
                computation: timed(communicator, || {
                    computation.run();
                    Ok(())
                })?,
                shift: timed(communicator, || shift.run(communicator, || {}))?,
                both: timed(communicator, || {
                    shift.run(communicator, || computation.run())
                })?,
            })
        })
        .collect();
    times.map(|mut times| times.split_off(1))
}

/// Two buffers, one that is sent and one that is received into; they change places.
struct Shift {
    outgoing: HostBuffer,
    memory: Option<HostBuffer>,
}

impl Shift {
    /// Memory of the kernels, as all messages of the driver have.
    fn new() -> Self {
        let kernels = CpuKernels::new(1).expect("threads can be started");
        let len = SHIFT_BYTES / DType::F32.size();
        let buffer = || kernels.allocate(DType::F32, len, None);
        Self {
            outgoing: buffer().expect("memory for a message"),
            memory: Some(buffer().expect("memory for a message")),
        }
    }

    /// Sends to the next rank and receives from the one before, while `meanwhile` is done.
    fn run(
        &mut self,
        communicator: &Communicator<HostBuffer>,
        meanwhile: impl FnOnce(),
    ) -> Result<(), CommError> {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        let (next, before) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        let tag = Tag::new(communicator.next_operation(), 0, Payload::KeyValue);
        let outgoing = mem::replace(&mut self.outgoing, HostBuffer::F32(Vec::new()));
        let expected = Expected {
            dtype: outgoing.dtype(),
            len: outgoing.len(),
        };
        let transport = communicator.transport();
        let receive = transport.irecv_into(before, tag, expected, self.memory.take())?;
        let send = transport.isend(next, tag, outgoing)?;
        meanwhile();
        self.outgoing = receive.wait()?;
        self.memory = send.wait()?;
        Ok(())
    }
}

/// The seconds that `work` takes on the rank where it takes longest; all begin together.
///
/// # Errors
/// That of `work`, or of the exchange.
pub fn timed<E: From<CommError>>(
    communicator: &Communicator<HostBuffer>,
    work: impl FnOnce() -> Result<(), E>,
) -> Result<f64, E> {
    barrier(communicator)?;
    let started = Instant::now();
    work()?;
    let own = started.elapsed().as_secs_f64().to_le_bytes();
    let all = communicator.all_gather_bytes("time", &own)?;
    let read = |bytes: Vec<u8>| bytes.try_into().map_or(f64::NAN, f64::from_le_bytes);
    Ok(all.into_iter().map(read).fold(0.0, f64::max))
}
