//! The TCP backend keeps the promises of a transport with ranks that are processes, and survives what happens to them.
//!
//! The ranks are started one by one, with torchrun's variables.

mod cut;
#[path = "../processes/mod.rs"]
mod processes;
mod repeated;
mod shift;
mod start;

use std::{
    env,
    net::SocketAddr,
    process::{Command, ExitCode},
};

use processes::{
    PATIENT, Test, conform, faults,
    launch::{Outcome, run, this_program},
};
use ring_comm::{Tcp, launch::from_env};
use socket2::{Domain, Socket, Type};

fn main() -> ExitCode {
    processes::main(perform, tests)
}

/// What one rank does.
fn perform(task: &str) {
    match task {
        start::MEET | start::MEET_LATE => return start::perform(task),
        repeated::JOBS => return repeated::many_jobs(),
        _ => {}
    }
    let tcp = Tcp::init(&from_env().unwrap()).unwrap();
    let group = |deadline| tcp.group_within(PATIENT, deadline).unwrap();
    match task {
        "conformance" => conform(tcp.world_size(), &group),
        repeated::GROUPS => repeated::many_groups(&tcp),
        cut::IDLE | cut::BUSY => cut::perform(task, &tcp),
        shift::SHIFT => shift::time(&tcp),
        scenario => faults::perform(scenario, group),
    }
}

fn tests() -> Vec<Test> {
    let conformance = Test::new("tcp conforms with 3 processes", || {
        launch("conformance", 3).expect_success();
    });
    let mut tests = vec![conformance];
    if env::var("RING_TEST_FIGURES").is_ok() {
        tests.push(Test::new("a shift of 64 MiB", shift::report_figure));
    }
    tests.extend(repeated::tests());
    tests.extend(start::tests());
    tests.extend(faults::tests(launch));
    tests.extend(cut::tests());
    tests
}

/// Has `world_size` ranks perform `task`.
fn launch(task: &str, world_size: usize) -> Outcome {
    let port = Port::reserve();
    let ranks = (0..world_size).map(|rank| port.rank(rank, world_size));
    run(ranks.collect(), task, world_size)
}

/// A port of this host that nobody else is given, and that can be listened at.
struct Port(Socket);

impl Port {
    fn reserve() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Then others that say the same can listen there, as long as this does not.
        socket.set_reuse_address(true).unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(&anywhere.into()).unwrap();
        Self(socket)
    }

    /// Keeps everybody else from listening there.
    fn listen(&self) {
        self.0.listen(1).unwrap();
    }

    /// A process that is rank `rank` of a job that meets there.
    fn rank(&self, rank: usize, world_size: usize) -> Command {
        let address = self.0.local_addr().unwrap().as_socket().unwrap();
        let mut command = this_program();
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world_size.to_string())
            .env("MASTER_ADDR", address.ip().to_string())
            .env("MASTER_PORT", address.port().to_string())
            .env("RING_JOB_TOKEN", "sesame");
        command
    }
}
