//! The side of rank 0: one thread that accepts connections, and two for each of them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    Membership,
    connection::{self, Timed},
    error::StoreError,
    handshake::{self, STORE, Verdict},
    hub::{Hub, Next},
    wire::{FrameError, MAX_FRAME, read_frame, write_frame, write_queue},
};
use crate::transport::Rank;

/// How long a connection may take to prove that it belongs to the job.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// How long rank 0 waits at the end for the others to take what was sent to them.
const CLOSING_GRACE: Duration = Duration::from_secs(2);

/// Pauses between looks for connections: the shortest and the longest before all ranks have joined, and afterwards.
const PAUSES: [Duration; 3] = [
    Duration::from_micros(500),
    Duration::from_millis(20),
    Duration::from_millis(200),
];

/// The store itself. Dropping it says farewell to all ranks.
#[derive(Debug)]
pub(super) struct Server {
    hub: Arc<Hub>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn bind(address: &str, membership: Membership) -> Result<Self, StoreError> {
        let listener = listen(address)?;
        let cannot_listen = |error: io::Error| cannot_listen(address, &error);
        listener.set_nonblocking(true).map_err(cannot_listen)?;
        let local = listener.local_addr().map_err(cannot_listen)?;
        let hub = Arc::new(Hub::new(membership));
        let acceptor = thread::Builder::new()
            .name("ring-store-accept".to_owned())
            .spawn({
                let hub = Arc::clone(&hub);
                move || accept(&hub, listener)
            })
            .map_err(|error| StoreError::System {
                what: "a thread",
                reason: error.to_string(),
            })?;
        Ok(Self {
            hub,
            address: local,
            acceptor: Some(acceptor),
        })
    }

    pub(super) fn listens_at(&self) -> SocketAddr {
        self.address
    }

    /// Where rank 0 reaches itself: not at the unspecified address, at which it listens for everybody.
    pub(super) fn reachable_at(&self) -> SocketAddr {
        let mut address = self.address;
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.hub.close();
        if let Some(acceptor) = self.acceptor.take() {
            // Fails only if it panicked, which it has said already.
            let _ = acceptor.join();
        }
    }
}

/// Listens at the first address of that name that this host has.
fn listen(address: &str) -> Result<TcpListener, StoreError> {
    let addresses = address
        .to_socket_addrs()
        .map_err(|error| cannot_listen(address, &error))?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        match TcpListener::bind(candidate) {
            Ok(listener) => return Ok(listener),
            // The others will come to this address, not to the next.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                last = error;
                break;
            }
            Err(error) => last = error,
        }
    }
    Err(cannot_listen(address, &last))
}

fn cannot_listen(address: &str, error: &io::Error) -> StoreError {
    let address = address.to_owned();
    match error.kind() {
        io::ErrorKind::AddrInUse => StoreError::AddressInUse { address },
        _ => StoreError::CannotListen {
            address,
            reason: error.to_string(),
        },
    }
}

/// Accepts connections until the hub closes, then waits for their end.
///
/// It looks for them in intervals, because nothing portable wakes a thread that waits in `accept`.
fn accept(hub: &Arc<Hub>, listener: TcpListener) {
    let [shortest, longest, complete] = PAUSES;
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut pause = shortest;
    loop {
        if let Ok((stream, _)) = listener.accept() {
            threads.retain(|thread| !thread.is_finished());
            threads.extend(serve(hub, stream));
            pause = shortest;
            continue;
        }
        let at_most = if hub.is_complete() { complete } else { longest };
        if hub.pause(pause.min(at_most)) {
            break;
        }
        pause = (pause * 2).min(at_most);
    }
    drop(listener);
    hub.end_connections(CLOSING_GRACE);
    for thread in threads {
        // Fails only if it panicked, which it has said already.
        let _ = thread.join();
    }
}

/// Starts a thread for a connection; nothing if there is no room for it, or the system has no more threads.
fn serve(hub: &Arc<Hub>, stream: TcpStream) -> Option<JoinHandle<()>> {
    let stream = Arc::new(stream);
    let connection = hub.connect(Arc::clone(&stream))?;
    let thread = thread::Builder::new()
        .name("ring-store-serve".to_owned())
        .spawn({
            let hub = Arc::clone(hub);
            move || {
                // A connection that fails before it belongs to a rank concerns nobody.
                let _ = serve_stranger(&hub, connection, &stream);
                hub.disconnect(connection);
            }
        });
    if thread.is_err() {
        hub.disconnect(connection);
    }
    thread.ok()
}

/// Takes a connection through the handshake and, if it is that of a rank, serves it to its end.
fn serve_stranger(hub: &Hub, connection: u64, stream: &TcpStream) -> Result<(), FrameError> {
    // Some systems pass this on from the listener.
    stream.set_nonblocking(false)?;
    connection::prepare(stream)?;
    let mut timed = Timed::new(stream, Instant::now() + HANDSHAKE_DEADLINE);
    let Some((rank, welcome)) = handshake::examine(&mut timed, &STORE, hub.membership())? else {
        return Ok(());
    };
    let answers = match hub.admit(connection, rank) {
        Ok(answers) => answers,
        Err(refusal) => return Ok(write_frame(&mut timed, &refusal)?),
    };
    if let Err(error) = let_in(stream, &mut timed, &welcome) {
        hub.lose(rank, &error.to_string());
        return Ok(());
    }
    thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("ring-store-answer".to_owned())
            .spawn_scoped(scope, || write_queue(stream, answers));
        match writer {
            Ok(_) => serve_rank(hub, rank, stream),
            Err(error) => hub.lose(rank, &error.to_string()),
        }
    });
    Ok(())
}

fn let_in(stream: &TcpStream, timed: &mut Timed<'_>, welcome: &Verdict) -> io::Result<()> {
    write_frame(timed, welcome)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}

/// Does what a rank asks for until it leaves or its connection ends.
fn serve_rank(hub: &Hub, rank: Rank, mut stream: &TcpStream) {
    loop {
        match read_frame(&mut stream, MAX_FRAME) {
            Ok(request) => {
                if hub.handle(rank, request) == Next::Leave {
                    return;
                }
            }
            Err(error) => {
                hub.lose(rank, &error.to_string());
                return;
            }
        }
    }
}
