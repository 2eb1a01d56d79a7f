//! Ranks on several machines: a link is cut, and the bytes on the wire are counted.
//!
//! These tests need a network that may be tampered with. `RING_TEST_LINKS` names the interfaces, as the launching process sees them,
//! behind which the ranks live, in their order; each rank has the network to itself, as `eth0`. `.ci/hosts` makes one.

use std::{
    env, fs,
    process::Command,
    time::{Duration, Instant},
};

use ring_comm::{
    CommError, CommErrorKind, Expected, Mpi, Payload, Rank, RemoteEndpoint, Tag, Transport,
    buffer::{DType, HostBuffer},
};
use serde::{Deserialize, Serialize};

use crate::{
    launch, launch_and,
    processes::{
        PATIENT, Test,
        faults::{note_fault_in, since_fault, wait_until},
        launch::{folder, report},
    },
};

const DEADLINE: Duration = Duration::from_secs(2);
/// How far behind the deadline an error may be: half a second if the first rank, which is asked for its verdict, is cut off; and room for
/// a busy machine.
const LATE: Duration = Duration::from_millis(1500);
/// Of the messages that go round while a link is cut: so many elements that one is always on its way.
const LEN: usize = 1 << 18;
/// Bytes per second that a limited link lets through, each way.
const LIMIT: u64 = 25_000_000;
/// Hops of the ring whose bytes are counted.
const HOPS: u32 = 24;
/// What Ethernet, IP and TCP with time stamps put before each packet, in bytes.
const HEADERS: u64 = 14 + 20 + 32;

pub(crate) fn tests() -> Vec<Test> {
    let Ok(links) = env::var("RING_TEST_LINKS") else {
        return Vec::new();
    };
    let links: Vec<String> = links.split_whitespace().map(str::to_owned).collect();
    let cut = links.iter().enumerate().map(|(victim, link)| {
        let (ranks, link) = (links.len(), link.clone());
        let name = format!("hosts: the link of rank {victim} is cut");
        Test::new(name, move || expect_cut(ranks, victim, &link))
    });
    let mut tests: Vec<Test> = cut.collect();
    tests.push(Test::new("hosts: bytes on a limited wire", move || {
        expect_traffic(&links);
    }));
    tests
}

/// What a rank found when the link was cut.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    error: CommError,
    after: Duration,
}

fn expect_cut(ranks: usize, victim: Rank, link: &str) {
    let outcome = launch_and(&format!("cut-{victim}"), ranks, |folder| {
        let all =
            |name: &str| (0..ranks).all(|rank| folder.join(format!("{name}-{rank}")).exists());
        wait_until(|| all("busy"));
        note_fault_in(folder);
        set_link(link, "down");
        wait_until(|| all("rank"));
        // The launcher has a connection to its processes too, over which it ends them.
        set_link(link, "up");
    });
    for rank in 0..ranks {
        let Found { error, after } = serde_json::from_str(outcome.finding(rank)).unwrap();
        println!("    after {after:?}, rank {rank} found: {error}");
        let root = error.root();
        assert!(
            matches!(root.kind, CommErrorKind::Deadline { .. }),
            "{error}"
        );
        // The victim cannot know that it is the one.
        assert_eq!(error.culprit() == victim, rank != victim, "{error}");
        // They may have begun to wait a little before.
        assert!(
            DEADLINE / 2 <= after && after < DEADLINE + LATE,
            "{after:?}"
        );
    }
}

fn set_link(link: &str, state: &str) {
    perform_command("ip", &format!("link set {link} {state}"));
}

/// What goes through the link towards its rank is limited from now on.
fn limit(link: &str) {
    let rate = format!("rate {}bit burst 64kb latency 400ms", 8 * LIMIT);
    perform_command("tc", &format!("qdisc add dev {link} root tbf {rate}"));
}

fn unlimit(link: &str) {
    perform_command("tc", &format!("qdisc delete dev {link} root"));
}

fn perform_command(program: &str, words: &str) {
    let status = Command::new(program).args(words.split(' ')).status();
    assert!(status.unwrap().success(), "{program} {words}");
}

/// Goes round until the link is cut.
pub(crate) fn cut() {
    let mpi = Mpi::init(PATIENT).unwrap();
    let endpoint = mpi.group_within(PATIENT, DEADLINE).unwrap();
    let error = (0..).find_map(|hop| {
        if hop == 5 {
            fs::write(folder().join(format!("busy-{}", mpi.rank())), "").unwrap();
        }
        shift(&endpoint, hop, LEN).err()
    });
    let (error, after) = (error.expect("the hops have no end"), since_fault());
    let found = Found { error, after };
    report(mpi.rank(), &serde_json::to_string(&found).unwrap());
}

fn shift(endpoint: &RemoteEndpoint, hop: u32, len: usize) -> Result<(), CommError> {
    let (rank, world_size) = (endpoint.rank(), endpoint.world_size());
    let expected = Expected {
        dtype: DType::F32,
        len,
    };
    let tag = Tag::new(0, hop, Payload::KeyValue);
    let incoming = endpoint.irecv((rank + world_size - 1) % world_size, tag, expected)?;
    let message = HostBuffer::F32(vec![hop as f32; len]);
    let outgoing = endpoint.isend((rank + 1) % world_size, tag, message)?;
    assert_eq!(
        incoming.wait()?.as_f32().and_then(|values| values.last()),
        Some(&(hop as f32))
    );
    outgoing.wait()?;
    Ok(())
}

/// What an interface has sent and received.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Counted {
    bytes_received: u64,
    packets_received: u64,
    bytes_sent: u64,
    packets_sent: u64,
}

impl Counted {
    /// By the only interface that a rank has.
    fn now() -> Self {
        let table = fs::read_to_string("/proc/self/net/dev").unwrap();
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"));
        let numbers = line
            .expect("a rank on a machine of its own")
            .split_whitespace();
        let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
        Self {
            bytes_received: numbers[0],
            packets_received: numbers[1],
            bytes_sent: numbers[8],
            packets_sent: numbers[9],
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            bytes_received: self.bytes_received - earlier.bytes_received,
            packets_received: self.packets_received - earlier.packets_received,
            bytes_sent: self.bytes_sent - earlier.bytes_sent,
            packets_sent: self.packets_sent - earlier.packets_sent,
        }
    }
}

/// What a rank has counted, and what its transport says.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    counted: Counted,
    bytes_sent: u64,
    bytes_received: u64,
    took: Duration,
}

/// What the transport says is what the wire carries, but for what TCP, MPI and the ranks' frames add: at most 5%.
fn expect_traffic(links: &[String]) {
    links.iter().for_each(|link| limit(link));
    let outcome = launch("traffic", links.len());
    for rank in 0..links.len() {
        let measured: Measured = serde_json::from_str(outcome.finding(rank)).unwrap();
        let Measured {
            counted,
            bytes_sent,
            bytes_received,
            took,
        } = measured;
        assert_eq!(bytes_sent, u64::from(HOPS) * 4 * LEN as u64);
        let on_wire = [
            (counted.bytes_sent, counted.packets_sent, bytes_sent),
            (
                counted.bytes_received,
                counted.packets_received,
                bytes_received,
            ),
        ];
        for (bytes, packets, payload) in on_wire {
            let without_headers = bytes - packets * HEADERS;
            let more = without_headers as f64 / payload as f64 - 1.0;
            println!(
                "    rank {rank}: {bytes} bytes in {packets} packets for {payload} of payload, {:.2}% more beside headers",
                100.0 * more
            );
            assert!((0.0..0.05).contains(&more), "{counted:?}");
        }
        let least = Duration::from_secs_f64(bytes_received as f64 / LIMIT as f64);
        println!("    rank {rank}: {took:?}, at least {least:?}");
        assert!(
            least.mul_f64(0.95) <= took && took <= least * 2,
            "the limit does not hold"
        );
    }
    outcome.expect_success();
    links.iter().for_each(|link| unlimit(link));
}

/// Goes round, and counts.
pub(crate) fn traffic() {
    let mpi = Mpi::init(PATIENT).unwrap();
    let endpoint = mpi.group(PATIENT).unwrap();
    endpoint.all_gather_bytes(0, Vec::new()).unwrap();
    let (before, start) = (Counted::now(), Instant::now());
    (0..HOPS).for_each(|hop| shift(&endpoint, hop, LEN).unwrap());
    endpoint.all_gather_bytes(1, Vec::new()).unwrap();
    let (took, traffic) = (start.elapsed(), endpoint.traffic());
    let measured = Measured {
        counted: Counted::now().since(before),
        bytes_sent: traffic.bytes_sent,
        bytes_received: traffic.bytes_received,
        took,
    };
    report(mpi.rank(), &serde_json::to_string(&measured).unwrap());
}
