//! The whole path without a device: engines, states, order and wire over the [fake](super::fake).

use std::{
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use super::{
    deadline::Deadline,
    device::{Device, Direction, Half},
    fake::Fabric,
    library::UniqueId,
    wire::{LARGEST_GROUP, NcclWire},
};
use crate::{
    buffer::{DType, HostBuffer},
    conformance::{self, Backend, RankBody, Staging},
    error::CommErrorKind,
    loopback::RankPanic,
    remote::{
        Engine, RemoteEndpoint, panics, run_on_threads,
        threads::{Behaviour, Net, PATIENT, ThreadWire, join},
    },
    transport::{Expected, Payload, Rank, Tag, Transport},
};

/// Ranks as threads, whose data goes over a fake of NCCL.
struct Fake {
    control: Behaviour,
    steps_per_look: usize,
    room: usize,
}

/// What the ranks of one world share.
struct World {
    net: Arc<Net>,
    fabric: Arc<Fabric>,
}

const PROMPT: Fake = Fake {
    control: Behaviour::Prompt,
    steps_per_look: usize::MAX,
    room: 0,
};
const TARDY: Fake = Fake {
    control: Behaviour::Tardy,
    steps_per_look: 1,
    room: 0,
};
/// Sends do not wait for their receives.
const EAGER: Fake = Fake { room: 2, ..TARDY };

fn first_id() -> UniqueId {
    UniqueId::from_bytes([200; 128])
}

impl Fake {
    fn world(&self, world_size: usize) -> World {
        World {
            net: Net::new(world_size, self.control),
            fabric: Fabric::new(world_size, self.steps_per_look, self.room),
        }
    }
}

impl World {
    fn engine(&self, rank: Rank) -> Arc<Engine> {
        self.engine_within(rank, PATIENT)
    }

    /// An engine that leaves within `deadline`.
    fn engine_within(&self, rank: Rank, deadline: Duration) -> Arc<Engine> {
        let control = ThreadWire::new(Arc::clone(&self.net), rank);
        let device = self.fabric.device(rank);
        let make_wire = move || {
            NcclWire::start(
                control,
                device,
                &first_id(),
                Vec::new(),
                Deadline::after(PATIENT),
            )
        };
        let engine = Engine::start(deadline, make_wire);
        Arc::new(engine.ok().expect("a thread, and no failure"))
    }

    /// Runs `body` on every rank, with its engine.
    fn run(&self, world_size: usize, body: impl Fn(Rank, &Arc<Engine>) + Sync) {
        thread::scope(|scope| {
            for rank in 0..world_size {
                let body = &body;
                scope.spawn(move || body(rank, &self.engine(rank)));
            }
        });
    }
}

impl Backend for Fake {
    fn run(&self, world_size: usize, deadline: Duration, body: &RankBody<'_>) -> Vec<RankPanic> {
        let world = self.world(world_size);
        let run = |endpoint: RemoteEndpoint| body(Arc::new(endpoint));
        panics(run_on_threads(
            world_size,
            |rank| world.engine(rank),
            deadline,
            run,
        ))
    }

    fn max_world_size(&self) -> usize {
        usize::MAX
    }

    fn staging(&self) -> Staging {
        Staging::CommonMemory
    }
}

#[test]
fn nccl_conforms() {
    conformance::run_all(&PROMPT);
}

#[test]
fn nccl_conforms_when_everything_is_slow() {
    conformance::run_all(&TARDY);
}

#[test]
fn nccl_conforms_when_sends_are_eager() {
    conformance::run_all(&EAGER);
}

mod failures;
mod streams;
mod transfers;
