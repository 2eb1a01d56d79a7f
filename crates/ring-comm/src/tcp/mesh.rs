//! How every rank comes to a connection with every other.
//!
//! Every rank listens on a free port of the address with which it has reached the store, tells the others through the store
//! where, connects to all ranks before it, and lets in all after it. On every connection both sides prove that they know the
//! job's token, in the way of the store, with the *pass* of the one that lets in as job id: it names the job, that rank and
//! the epoch, a random number which rank 0 draws anew for every store. When all are connected, nobody listens any more.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{TcpError, door::Door};
use crate::{
    launch::{
        Launch,
        store::{
            Membership, Store, StoreError,
            connection::{self, Keepalive, Timed, after},
            handshake::{self, AskError, Protocol, Verdict},
        },
    },
    transport::Rank,
};

/// What is spoken between ranks until they know each other.
pub(super) const PROTOCOL: Protocol = Protocol {
    magic: *b"ringmesh",
    version: 1,
    heads: [b"asks", b"host"],
};

/// The names of the store's gather and barrier.
const ADDRESSES: &str = "tcp addresses";
const CONNECTED: &str = "tcp connected";

/// Pauses between attempts to connect, the first and the longest.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];

/// Bounds of the time after which a silent host is given up.
const SILENCE: [Duration; 2] = [Duration::from_secs(4), Duration::from_hours(2)];

/// One rank's connections to all others, none of which blocks.
pub(super) struct Mesh {
    pub(super) rank: Rank,
    /// By rank; none to this rank itself.
    pub(super) streams: Vec<Option<TcpStream>>,
}

/// What a rank tells the others.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Introduction {
    address: SocketAddr,
    /// That of rank 0 counts.
    epoch: [u8; 16],
}

/// What one rank knows while it connects.
pub(super) struct Meeting<'a> {
    pub(super) launch: &'a Launch,
    pub(super) store: &'a Store,
    pub(super) epoch: [u8; 16],
    pub(super) until: Instant,
}

impl Mesh {
    /// Of a single rank.
    pub(super) fn alone() -> Self {
        Self {
            rank: 0,
            streams: vec![None],
        }
    }

    /// Connects this rank with all others of its job, by the deadline of `launch`.
    pub(super) fn connect(launch: &Launch) -> Result<Self, TcpError> {
        let until = after(launch.deadline.value);
        Self::connect_over(&launch.open_store()?, launch, until)
    }

    /// As [`connect`](Self::connect), over a store that is open.
    pub(super) fn connect_over(
        store: &Store,
        launch: &Launch,
        until: Instant,
    ) -> Result<Self, TcpError> {
        let streams = connect_all(launch, store, until).and_then(|streams| {
            // Rank 0 must not leave before all are connected.
            store.barrier(CONNECTED, remaining(until))?;
            Ok(streams)
        });
        let streams = streams.map_err(|error| {
            let error = named(error, launch);
            store.abort(&error.to_string());
            error
        })?;
        for stream in streams.iter().flatten() {
            connection::watch(stream, keepalive(launch.deadline.value))
                .and_then(|()| stream.set_nonblocking(true))
                .map_err(TcpError::system("settings of a connection"))?;
        }
        let rank = launch.rank.value;
        Ok(Self { rank, streams })
    }
}

/// A deadline in which the store tells who was missing is told as one of this transport.
fn named(error: TcpError, launch: &Launch) -> TcpError {
    match error {
        TcpError::Store(StoreError::Deadline { rank, missing, .. }) if !missing.is_empty() => {
            TcpError::Absent {
                rank,
                missing,
                deadline: launch.deadline.value,
            }
        }
        error => error,
    }
}

fn connect_all(
    launch: &Launch,
    store: &Store,
    until: Instant,
) -> Result<Vec<Option<TcpStream>>, TcpError> {
    let rank = launch.rank.value;
    let (listener, address) = listen(store)?;
    let mut epoch = [0; 16];
    getrandom::fill(&mut epoch).map_err(|error| TcpError::System {
        what: "random numbers",
        reason: error.to_string(),
    })?;
    let own = Introduction { address, epoch };
    let own = postcard::to_allocvec(&own).map_err(|_| TcpError::BadAddress { rank, peer: rank })?;
    let told = store.all_gather(ADDRESSES, own, remaining(until))?;
    let read = |(peer, bytes): (Rank, &Vec<u8>)| {
        postcard::from_bytes(bytes).map_err(|_| TcpError::BadAddress { rank, peer })
    };
    let peers: Vec<Introduction> = told
        .iter()
        .enumerate()
        .map(read)
        .collect::<Result<_, _>>()?;

    let meeting = Meeting {
        launch,
        store,
        epoch: peers[0].epoch,
        until,
    };
    let door = Door::new(&meeting, &listener);
    thread::scope(|scope| {
        let host = thread::Builder::new().name("ring-tcp-accept".to_owned());
        let host = host.spawn_scoped(scope, || door.let_all_in());
        let host = host.map_err(TcpError::system("a thread"))?;
        let before = (0..rank).map(|peer| meeting.join(peer, peers[peer].address).map(Some));
        let before: Result<Vec<_>, TcpError> = before.collect();
        if before.is_err() {
            door.close();
        }
        // A panic of that thread is one of this call.
        let behind = host
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let mut streams = before?;
        streams.push(None);
        streams.extend(behind?.into_iter().map(Some));
        Ok(streams)
    })
}

/// Listens on a free port where the store shows that this host can be reached.
fn listen(store: &Store) -> Result<(TcpListener, SocketAddr), TcpError> {
    let mut address = store.local_address()?;
    address.set_port(0);
    let listener = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    listener.map_err(|error| TcpError::CannotListen {
        rank: store.rank(),
        address,
        reason: error.to_string(),
    })
}

impl Meeting<'_> {
    /// As who this rank asks `host` to let it in, or lets others in if it is the host.
    pub(super) fn membership(&self, host: Rank) -> Membership {
        self.launch.membership().job_id(&self.pass(host))
    }

    /// What must be known, beside the token, to come to `host`.
    pub(super) fn pass(&self, host: Rank) -> String {
        let epoch = u128::from_le_bytes(self.epoch);
        let job_id = self.launch.job_id.as_ref();
        let job_id = job_id.map_or("", |job_id| &job_id.value);
        format!("{epoch:032x} {host} {job_id}")
    }

    /// Whether to go on: the time is not over, and no rank has failed.
    pub(super) fn check(&self) -> Result<bool, TcpError> {
        match self.store.failure() {
            Some(failure) => Err(StoreError::Failed(failure).into()),
            None => Ok(Instant::now() < self.until),
        }
    }

    /// Connects to `peer`.
    fn join(&self, peer: Rank, told: SocketAddr) -> Result<TcpStream, TcpError> {
        let rank = self.launch.rank.value;
        let address = self.seen_from_here(told);
        let [mut pause, longest] = RETRY_PAUSES;
        loop {
            let last = match self.try_to_join(peer, address) {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let reason = last.to_string();
            let may_succeed_yet = matches!(
                last,
                AskError::Connection(_) | AskError::Refused(Verdict::Closing)
            );
            if !may_succeed_yet {
                return Err(TcpError::Refused {
                    rank,
                    peer,
                    address,
                    reason,
                });
            }
            if !self.check()? {
                return Err(TcpError::Unreachable {
                    rank,
                    peer,
                    address,
                    deadline: self.launch.deadline.value,
                    last: reason,
                });
            }
            thread::sleep(pause.min(remaining(self.until)));
            pause = (pause * 2).min(longest);
        }
    }

    fn try_to_join(&self, peer: Rank, address: SocketAddr) -> Result<TcpStream, AskError> {
        let stream = connection::connect(address, self.until)?;
        let mut timed = Timed::new(&stream, self.until);
        handshake::ask(&mut timed, &PROTOCOL, &self.membership(peer))?;
        Ok(stream)
    }

    /// Rank 0 may listen everywhere; then it is reached where its store was. And the number of an interface is another on
    /// every host.
    fn seen_from_here(&self, told: SocketAddr) -> SocketAddr {
        let mut address = told;
        let store = self.store.address();
        if told.ip().is_unspecified() {
            address = store;
            address.set_port(told.port());
        }
        if let (SocketAddr::V6(address), SocketAddr::V6(store)) = (&mut address, store)
            && address.ip().is_unicast_link_local()
        {
            address.set_scope_id(store.scope_id());
        }
        address
    }
}

fn remaining(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// A host that is silent for the deadline, and a quarter, is lost. The deadline itself shall pass first.
fn keepalive(deadline: Duration) -> Keepalive {
    const RETRIES: u32 = 3;
    let [shortest, longest] = SILENCE;
    let part = deadline.clamp(shortest, longest) / 4;
    Keepalive {
        time: part * 2,
        interval: part,
        retries: RETRIES,
    }
}
