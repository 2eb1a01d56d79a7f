//! What can be known of NCCL on this machine: without its library that its absence is a clear error, with it all but the transfers, with GPUs those.
//!
//! The ranks are started one by one, with torchrun's variables. What is not run here, and why, is said first.

mod gpus;
#[path = "../processes/mod.rs"]
mod processes;
mod start;

use std::{
    net::SocketAddr,
    process::{Command, ExitCode},
};

use processes::{Test, launch::this_program};
use ring_comm::nccl::NcclLibrary;
use socket2::{Domain, Socket, Type};

fn main() -> ExitCode {
    processes::main(perform, tests)
}

/// What one rank does.
fn perform(task: &str) {
    match task {
        start::INIT | start::RENDEZVOUS => start::perform(task),
        task => gpus::perform(task),
    }
}

fn tests() -> Vec<Test> {
    let mut tests = start::tests_without_library();
    match NcclLibrary::load() {
        Err(error) => println!("not run: all that needs NCCL, because: {error}"),
        Ok(library) => {
            println!("found NCCL {} as {}", library.version(), library.name());
            tests.extend(start::tests_with_library());
            tests.extend(gpus::tests(library.version()));
        }
    }
    tests
}

/// The ranks of a job that meet at a port of their own.
fn ranks(world_size: usize) -> Vec<Command> {
    // Nobody else gets the port as long as this has it, and rank 0 can listen there.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&anywhere.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    // It stays bound until this process ends.
    std::mem::forget(socket);
    let rank = |rank: usize| {
        let mut command = this_program();
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world_size.to_string())
            .env("MASTER_ADDR", address.ip().to_string())
            .env("MASTER_PORT", address.port().to_string())
            .env("RING_JOB_TOKEN", "sesame")
            .env("RING_DEADLINE_SECONDS", "60");
        command
    };
    (0..world_size).map(rank).collect()
}
