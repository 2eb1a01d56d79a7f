//! How a rank lets in the ranks after it, and nobody else.

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, Scope},
    time::{Duration, Instant},
};

use super::{
    TcpError,
    mesh::{Meeting, PROTOCOL},
};
use crate::{
    launch::store::{
        HANDSHAKE_DEADLINE, MAX_STRANGERS,
        connection::{self, Timed},
        handshake::{self, Verdict},
        wire::write_frame,
    },
    transport::Rank,
};

/// Pauses between looks for connections, the shortest and the longest.
const PAUSES: [Duration; 2] = [Duration::from_micros(200), Duration::from_millis(10)];

/// The place of a rank that is to come.
enum Seat {
    Free,
    /// The rank is being told that it is welcome.
    Reserved,
    Taken(TcpStream),
}

struct State {
    /// Of the ranks after this one.
    seats: Vec<Seat>,
    /// Connections that have not proved anything yet.
    strangers: HashMap<u64, TcpStream>,
    next_stranger: u64,
    is_closed: bool,
}

/// Where one rank listens until all ranks after it have come.
pub(super) struct Door<'a> {
    meeting: &'a Meeting<'a>,
    listener: &'a TcpListener,
    state: Mutex<State>,
}

impl<'a> Door<'a> {
    pub(super) fn new(meeting: &'a Meeting<'a>, listener: &'a TcpListener) -> Self {
        let launch = meeting.launch;
        let after = launch.rank.value + 1..launch.world_size.value;
        Self {
            meeting,
            listener,
            state: Mutex::new(State {
                seats: after.map(|_| Seat::Free).collect(),
                strangers: HashMap::new(),
                next_stranger: 0,
                is_closed: false,
            }),
        }
    }

    /// Nobody is let in any more.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
    }

    /// Waits for all ranks after this one; returns their connections in their order.
    pub(super) fn let_all_in(&self) -> Result<Vec<TcpStream>, TcpError> {
        thread::scope(|scope| {
            let result = self.watch(scope);
            let mut state = self.lock();
            state.is_closed = true;
            for stranger in state.strangers.values() {
                // Fails only if the connection has ended already.
                let _ = stranger.shutdown(Shutdown::Both);
            }
            result
        })?;
        let seats = std::mem::take(&mut self.lock().seats);
        let stream = |seat| match seat {
            Seat::Taken(stream) => Some(stream),
            Seat::Free | Seat::Reserved => None,
        };
        Ok(seats.into_iter().filter_map(stream).collect())
    }

    /// Looks for connections until all have come. In intervals, because nothing portable wakes a thread that waits in `accept`.
    fn watch<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<(), TcpError> {
        let [shortest, longest] = PAUSES;
        let mut pause = shortest;
        loop {
            let missing = self.missing();
            if missing.is_empty() || self.lock().is_closed {
                return Ok(());
            }
            if !self.meeting.check()? {
                return Err(TcpError::Absent {
                    rank: self.own(),
                    missing,
                    deadline: self.meeting.launch.deadline.value,
                });
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    pause = shortest;
                    // One that fails before it belongs to a rank concerns nobody.
                    let _ = self.receive(scope, stream);
                }
                Err(error) if is_temporary(&error) => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(longest);
                }
                Err(error) => return Err(TcpError::system("a connection")(error)),
            }
        }
    }

    /// Starts a thread for a connection, if there is room for it.
    fn receive<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        stream: TcpStream,
    ) -> io::Result<()> {
        let mut state = self.lock();
        if state.strangers.len() >= MAX_STRANGERS {
            return Ok(());
        }
        let number = state.next_stranger;
        state.next_stranger += 1;
        state.strangers.insert(number, stream.try_clone()?);
        drop(state);
        let thread = thread::Builder::new().name("ring-tcp-handshake".to_owned());
        let thread = thread.spawn_scoped(scope, move || {
            let _ = self.examine(stream);
            self.lock().strangers.remove(&number);
        });
        if thread.is_err() {
            self.lock().strangers.remove(&number);
        }
        Ok(())
    }

    /// Lets in whoever is on the other side, if it is a rank that is still to come.
    fn examine(&self, stream: TcpStream) -> io::Result<()> {
        // Some systems pass this on from the listener.
        stream.set_nonblocking(false)?;
        connection::prepare(&stream)?;
        let until = self.meeting.until.min(Instant::now() + HANDSHAKE_DEADLINE);
        let mut timed = Timed::new(&stream, until);
        let own = self.own();
        let examined = handshake::examine(&mut timed, &PROTOCOL, &self.meeting.membership(own));
        let Some((rank, welcome)) = examined.map_err(io::Error::other)? else {
            return Ok(());
        };
        if let Err(refusal) = self.reserve(rank) {
            return write_frame(&mut timed, &refusal);
        }
        let told = write_frame(&mut timed, &welcome);
        let seat = match &told {
            Ok(()) => Seat::Taken(stream),
            Err(_) => Seat::Free,
        };
        if let Some(place) = self.lock().seat_mut(own, rank) {
            *place = seat;
        }
        told
    }

    fn reserve(&self, rank: Rank) -> Result<(), Verdict> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(Verdict::Closing);
        }
        match state.seat_mut(self.own(), rank) {
            None => Err(Verdict::RankOutOfRange),
            Some(seat @ Seat::Free) => {
                *seat = Seat::Reserved;
                Ok(())
            }
            Some(Seat::Reserved | Seat::Taken(_)) => Err(Verdict::DuplicateRank),
        }
    }

    fn missing(&self) -> Vec<Rank> {
        let state = self.lock();
        let seats = (self.own() + 1..).zip(&state.seats);
        let missing = seats.filter(|(_, seat)| !matches!(seat, Seat::Taken(_)));
        missing.map(|(rank, _)| rank).collect()
    }

    fn own(&self) -> Rank {
        self.meeting.launch.rank.value
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn seat_mut(&mut self, own: Rank, rank: Rank) -> Option<&mut Seat> {
        let index = rank.checked_sub(own + 1)?;
        self.seats.get_mut(index)
    }
}

/// Whether the next look may find something.
fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
    )
}
