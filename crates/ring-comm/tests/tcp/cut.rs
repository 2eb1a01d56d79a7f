//! A link that is cut without a word: two ranks on hosts of their own, which are network namespaces with a bridge in between.
//!
//! Where they are not allowed, or there is no `ip`, this says so and tests nothing.

use std::{
    env, fs,
    process::{self, Command},
    thread,
    time::Duration,
};

use ring_comm::{
    CommError, CommErrorKind, Expected, Payload, RemoteEndpoint, Tag, Tcp, Transport,
    buffer::{DType, HostBuffer},
};

use crate::{
    PATIENT, Test,
    processes::{
        faults::{note_fault, since_fault, wait_until},
        launch::{folder, report, run, this_program},
    },
};

/// A task: nobody sends anything when the link is cut.
pub(crate) const IDLE: &str = "cut-idle";
/// A task: large messages are on their way when it is.
pub(crate) const BUSY: &str = "cut-busy";

/// Of the job; those of the groups do not pass.
const DEADLINE: Duration = Duration::from_secs(4);
/// How far behind it the cut must be known: a quarter, the rhythm in which the system asks, and room for a busy machine.
const LATE: Duration = Duration::from_secs(4);
const ADDRESSES: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
/// The variable that names the namespace of the bridge.
const BRIDGE: &str = "RING_TEST_BRIDGE";

pub(crate) fn tests() -> Vec<Test> {
    let both = || {
        let tests = [IDLE, BUSY].map(|task| thread::spawn(move || expect_cut(task)));
        let results = tests.map(thread::JoinHandle::join);
        assert!(results.iter().all(Result::is_ok));
    };
    vec![Test::new("a cut link is noticed", both)]
}

fn expect_cut(task: &str) {
    let hosts = match Hosts::make(task) {
        Ok(hosts) => hosts,
        Err(reason) => return println!("    not run: no hosts to cut off: {reason}"),
    };
    let ranks = (0..2).map(|rank| hosts.rank(rank)).collect();
    let outcome = run(ranks, task, 2);
    for rank in 0..2 {
        let finding = outcome.finding(rank);
        println!("    {task}, rank {rank} found: {finding}");
        let mut words = finding.split_whitespace();
        assert_eq!(words.next(), Some("lost"), "{finding}");
        assert_eq!(words.next(), Some(&*(1 - rank).to_string()), "{finding}");
        let after = Duration::from_millis(words.next().unwrap().parse().unwrap());
        // The system counts from what it has heard last.
        assert!(
            DEADLINE - DEADLINE / 4 <= after && after <= DEADLINE + LATE,
            "{finding}"
        );
    }
}

/// What one rank does.
pub(crate) fn perform(task: &str, tcp: &Tcp) {
    let endpoint = tcp.group(PATIENT).unwrap();
    endpoint.all_gather_bytes(0, Vec::new()).unwrap();
    let is_there = |rank: usize| folder().join(format!("there-{rank}"));
    let cut = || {
        fs::write(is_there(tcp.rank()), "").unwrap();
        if tcp.rank() == 0 {
            wait_until(|| is_there(1).exists());
            note_fault();
            let bridge = env::var(BRIDGE).unwrap();
            ip(&format!("-n {bridge} link set bridge down")).unwrap();
        }
    };
    if task == BUSY {
        exchange(&endpoint, cut).unwrap_err();
    } else {
        cut();
        wait_until(|| endpoint.poisoned().is_some());
    }
    let after = since_fault().as_millis();
    let cause = endpoint.poisoned().unwrap();
    let kind = match cause.kind {
        CommErrorKind::PeerLost { .. } => "lost",
        _ => "other",
    };
    report(
        tcp.rank(),
        &format!("{kind} {} {after} {cause}", cause.culprit()),
    );
}

/// Large messages both ways, without end; calls `meanwhile` when some are on their way.
fn exchange(endpoint: &RemoteEndpoint, meanwhile: impl Fn()) -> Result<(), CommError> {
    const LEN: usize = 4 << 20;
    let peer = 1 - endpoint.rank();
    let expected = Expected {
        dtype: DType::F32,
        len: LEN,
    };
    for round in 0.. {
        let tag = Tag::new(0, round, Payload::KeyValue);
        let receive = endpoint.irecv(peer, tag, expected)?;
        let send = endpoint.isend(peer, tag, HostBuffer::zeros(DType::F32, LEN))?;
        if round == 5 {
            meanwhile();
        }
        receive.wait()?;
        send.wait()?;
    }
    Ok(())
}

/// Two namespaces that can reach each other over the bridge in a third.
struct Hosts {
    /// Those of the ranks, then that of the bridge.
    names: Vec<String>,
}

impl Hosts {
    fn make(task: &str) -> Result<Self, String> {
        let mut hosts = Self { names: Vec::new() };
        for host in ["zero", "one", "bridge"] {
            let name = format!("ring-{}-{task}-{host}", process::id());
            ip(&format!("netns add {name}"))?;
            hosts.names.push(name);
        }
        let bridge = &hosts.names[2];
        ip(&format!("-n {bridge} link add bridge type bridge"))?;
        ip(&format!("-n {bridge} link set bridge up"))?;
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            let port = format!("port{}", &address[address.len() - 1..]);
            ip(&format!(
                "-n {bridge} link add {port} type veth peer name ring netns {name}"
            ))?;
            ip(&format!("-n {bridge} link set {port} master bridge up"))?;
            ip(&format!("-n {name} address add {address}/24 dev ring"))?;
            ip(&format!("-n {name} link set ring up"))?;
            // Rank 0 is a client of its own store.
            ip(&format!("-n {name} link set lo up"))?;
        }
        let output = hosts.command(0).arg("true").output();
        let output = output.map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(hosts)
    }

    /// What runs a program on a host. With processes of its own, or the ranks would see that they are on one machine, and
    /// whether the process of the other is alive.
    fn command(&self, rank: usize) -> Command {
        let own_processes = "unshare --pid --fork --kill-child --mount-proc";
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.names[rank]])
            .args(own_processes.split(' '));
        command
    }

    fn rank(&self, rank: usize) -> Command {
        let mut command = self.command(rank);
        command
            .arg(this_program().get_program())
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", ADDRESSES[0])
            .env("MASTER_PORT", "29500")
            .env("RING_DEADLINE_SECONDS", DEADLINE.as_secs().to_string())
            .env(BRIDGE, &self.names[2]);
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(reason) = ip(&format!("netns delete {name}")) {
                println!("    {name} is left behind: {reason}");
            }
        }
    }
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
