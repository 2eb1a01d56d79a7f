//! One rank's part of a scenario.

use std::{
    panic::resume_unwind,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ring_comm::{
    CommError, Communicator, Expected, Payload, Rank, Tag, Transport,
    buffer::{DType, HostBuffer},
    collective::{all_reduce_sum, all_reduce_sum_f64, barrier},
};
use serde::{Deserialize, Serialize};

use super::{Fault, Scenario, Step};

/// How long a slow rank waits for the others to lose their patience.
const LONGEST_DELAY: Duration = Duration::from_secs(40);

type Outcome = Result<(), CommError>;

/// What a rank came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Ending {
    /// The end of the program.
    Completed,
    /// It has left on purpose.
    Left,
    Failed(CommError),
    /// With this message.
    Panicked(String),
}

/// One rank of a scenario.
pub(crate) struct Player<'a> {
    scenario: &'a Scenario,
    communicator: Communicator<HostBuffer>,
}

impl<'a> Player<'a> {
    pub(crate) fn new(
        scenario: &'a Scenario,
        endpoint: impl Transport<HostBuffer> + 'static,
    ) -> Self {
        Self {
            scenario,
            communicator: Communicator::new(Arc::new(endpoint)),
        }
    }

    /// Performs the program, with its fault. Panics if that is the fault, or if a result is wrong.
    pub(crate) fn play(&self) -> Ending {
        let ending = match self.perform() {
            Ok(true) => Ending::Completed,
            Ok(false) => Ending::Left,
            Err(error) => Ending::Failed(error),
        };
        if let Ending::Failed(error) = &ending {
            assert_eq!(error.rank, self.rank());
            assert_eq!(error.history().map(|own| own.rank), Some(self.rank()));
        }
        ending
    }

    /// Whether this rank has come to the end.
    fn perform(&self) -> Result<bool, CommError> {
        for (number, step) in self.scenario.program.iter().enumerate() {
            if number == self.scenario.at && !self.fail()? {
                return Ok(false);
            }
            self.take(step)?;
        }
        Ok(true)
    }

    fn rank(&self) -> Rank {
        self.communicator.rank()
    }

    fn is_culprit(&self) -> bool {
        self.rank() == self.scenario.culprit
    }

    /// Does what goes wrong; whether the rank goes on.
    fn fail(&self) -> Result<bool, CommError> {
        let fails_too = self.rank() == self.scenario.accomplice;
        match self.scenario.fault {
            Fault::WrongSize | Fault::WrongDType | Fault::WrongTag => self.shift_wrongly()?,
            Fault::WrongTerms => self.agree(if self.is_culprit() { "wrong" } else { "right" })?,
            Fault::TwoAborts if fails_too => self.communicator.abort("staged"),
            // Without the message that a panic prints.
            Fault::TwoPanics if fails_too => resume_unwind(Box::new("staged")),
            fault if self.is_culprit() => return self.fail_alone(fault),
            _ => {}
        }
        Ok(true)
    }

    fn fail_alone(&self, fault: Fault) -> Result<bool, CommError> {
        let peer = self.scenario.after(self.rank());
        let tag = Tag::new(1 << 40, 0, Payload::Custom(7));
        let transport = self.communicator.transport();
        match fault {
            Fault::Panic | Fault::TwoPanics => resume_unwind(Box::new("staged")),
            Fault::PanicWithRequest => {
                let _open = transport.isend(peer, tag, HostBuffer::F32(vec![0.0]))?;
                resume_unwind(Box::new("staged"))
            }
            Fault::Departure => return Ok(false),
            Fault::Abort | Fault::TwoAborts => self.communicator.abort("staged"),
            Fault::DroppedSend => drop(transport.isend(peer, tag, HostBuffer::F32(vec![0.0]))?),
            Fault::DroppedReceive => drop(transport.irecv(peer, tag, expected(DType::F32, 1))?),
            Fault::Slow => self.await_failure(),
            _ => {}
        }
        Ok(true)
    }

    /// Does nothing until another rank has failed.
    fn await_failure(&self) {
        let expiry = Instant::now() + LONGEST_DELAY;
        while self.communicator.transport().poisoned().is_none() {
            assert!(Instant::now() < expiry, "nobody has failed");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A shift by one in which the culprit's message is not what its receiver expects.
    fn shift_wrongly(&self) -> Outcome {
        let (mut dtype, mut len, mut step) = (DType::F16, 3, 0);
        if self.is_culprit() {
            match self.scenario.fault {
                Fault::WrongSize => len = 4,
                Fault::WrongDType => dtype = DType::BF16,
                _ => step = 1,
            }
        }
        let operation = self.communicator.next_operation();
        let tag = |step| Tag::new(operation, step, Payload::KeyValue);
        self.exchange(
            1,
            HostBuffer::zeros(dtype, len),
            tag(step),
            expected(DType::F16, 3),
            tag(0),
        )
        .map(drop)
    }

    /// Performs one step.
    pub(crate) fn take(&self, step: &Step) -> Outcome {
        let world_size = self.scenario.world_size;
        match *step {
            Step::Shift {
                distance,
                len,
                dtype,
            } => self.shift(1 + distance % (world_size - 1).max(1), len, dtype),
            Step::Barrier => barrier(&self.communicator),
            Step::Sum(len) => {
                let sum = all_reduce_sum(&self.communicator, vec![self.rank() as f32; len])?;
                let expected = (world_size * (world_size - 1) / 2) as f32;
                assert_eq!(sum, vec![expected; len]);
                Ok(())
            }
            Step::SumOfF64(len) => {
                let sum = all_reduce_sum_f64(&self.communicator, &vec![1.0; len])?;
                assert_eq!(sum, vec![world_size as f64; len]);
                Ok(())
            }
            Step::Agree => self.agree("right"),
            Step::Split => {
                let half = self.communicator.split(Some(self.rank() as u64 % 2), 0)?;
                barrier(&half.expect("every rank has a color"))
            }
        }
    }

    fn agree(&self, value: &str) -> Outcome {
        self.communicator
            .agree("plan", &[("value".to_owned(), value.to_owned())])
    }

    fn shift(&self, distance: usize, len: usize, dtype: DType) -> Outcome {
        let tag = Tag::new(self.communicator.next_operation(), 0, Payload::KeyValue);
        let own = telling(self.rank(), dtype, len);
        let (previous, received) = self.exchange(distance, own, tag, expected(dtype, len), tag)?;
        assert_eq!(received, telling(previous, dtype, len));
        Ok(())
    }

    /// Yields who sent, and what.
    fn exchange(
        &self,
        distance: usize,
        own: HostBuffer,
        outgoing: Tag,
        expected: Expected,
        incoming: Tag,
    ) -> Result<(Rank, HostBuffer), CommError> {
        let (rank, world_size) = (self.rank(), self.scenario.world_size);
        let previous = (rank + world_size - distance) % world_size;
        let next = (rank + distance) % world_size;
        let transport = self.communicator.transport();
        let receive = transport.irecv(previous, incoming, expected)?;
        let send = transport.isend(next, outgoing, own)?;
        let received = receive.wait()?;
        send.wait()?;
        Ok((previous, received))
    }
}

fn expected(dtype: DType, len: usize) -> Expected {
    Expected { dtype, len }
}

/// A buffer that tells whose it is.
fn telling(rank: Rank, dtype: DType, len: usize) -> HostBuffer {
    let value = rank as f32;
    match dtype {
        DType::F32 => HostBuffer::F32(vec![value; len]),
        DType::F16 => HostBuffer::F16(vec![half::f16::from_f32(value); len]),
        DType::BF16 => HostBuffer::BF16(vec![half::bf16::from_f32(value); len]),
    }
}
