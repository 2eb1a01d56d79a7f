//! Connections on which no wait is without end.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use socket2::{SockRef, TcpKeepalive};

/// When a silent connection is asked whether its host still lives, how often again, and how many times in vain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keepalive {
    pub(crate) time: Duration,
    pub(crate) interval: Duration,
    pub(crate) retries: u32,
}

impl Keepalive {
    /// Of the connections of a store.
    pub(crate) const STORE: Self = Self {
        time: Duration::from_secs(10),
        interval: Duration::from_secs(2),
        retries: 5,
    };

    /// How long a host may be silent.
    pub(crate) fn total(self) -> Duration {
        self.time
            .saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// A connection on which every wait ends by an instant.
pub(crate) struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl<'a> Timed<'a> {
    pub(crate) fn new(stream: &'a TcpStream, until: Instant) -> Self {
        Self { stream, until }
    }

    fn remaining(&self) -> io::Result<Duration> {
        let remaining = self.until.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(remaining)
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        self.stream.read(bytes)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The end of a wait that begins now; of one that is too long for the clock, in a thousand years.
pub(crate) fn after(deadline: Duration) -> Instant {
    const LONGEST: Duration = Duration::from_hours(1000 * 365 * 24);
    Instant::now() + deadline.min(LONGEST)
}

/// Connects to `address`, by `until`.
pub(crate) fn connect(address: SocketAddr, until: Instant) -> io::Result<TcpStream> {
    let remaining = until.saturating_duration_since(Instant::now());
    if remaining.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::connect_timeout(&address, remaining)?;
    // Where nobody listens, a socket can be given the very port that it connects to, and then meets itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    prepare(&stream)?;
    Ok(stream)
}

/// Has small messages sent at once, and the end of the other host noticed.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    watch(stream, Keepalive::STORE)
}

/// Has the end of the other host noticed, also while something is on its way to it.
pub(crate) fn watch(stream: &TcpStream, keepalive: Keepalive) -> io::Result<()> {
    let socket = SockRef::from(stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(keepalive.total()))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.retries),
    )
}
