//! A small key/value store over TCP, served by rank 0, in which the ranks of a job find one another; then their abort
//! channel.
//!
//! Every rank, rank 0 too, is a client. [`set`](Store::set) and [`get`](Store::get) exchange small values (addresses,
//! identifiers), [`all_gather`](Store::all_gather) gives everybody's to everybody, [`barrier`](Store::barrier) lets all go on
//! together. Every wait ends by a deadline.
//!
//! # Abort channel
//!
//! A store that is kept open tells every rank at once when one fails: when it calls [`abort`](Store::abort), drops its
//! store while it panics, or when its connection ends without a goodbye, because its process ended (noticed at once) or its
//! host did (within about twenty seconds). A process that is only stopped is not noticed. The first [`Failure`] ends the
//! store: pending and later calls on every rank return it. See [`failure`](Store::failure),
//! [`wait_for_failure`](Store::wait_for_failure) and [`on_failure`](Store::on_failure).
//!
//! A rank that drops its store has left in peace. When rank 0 does, the store ends: pending and later calls return
//! [`StoreError::Closed`], and nobody hears of failures any more. When a gather or barrier returns on one rank, its answer
//! is on the way to all others, so that rank 0 may leave after a barrier.
//!
//! # Who may join
//!
//! Rank 0 listens at the address it was given and nowhere else: a loopback address is not reachable from other hosts. Both
//! sides prove by challenge and response that they know the job's token, which itself is never sent. A peer that does not
//! learns nothing of the job, and all such peers together hold at most [`MAX_STRANGERS`] connections, each for
//! [`HANDSHAKE_DEADLINE`], with a thread and less than a kilobyte of what they sent. Without a token whoever can reach the
//! port can join. What travels after the handshake is neither encrypted nor signed: the token keeps out mistakes and
//! strangers, not somebody who can change the traffic, and one that can be guessed can be guessed from a handshake.
//!
//! # Wire format
//!
//! Numbers are little-endian. Each side first sends 44 bytes: `ringstor`, the version of the protocol (u32), a random nonce
//! of 32 bytes; the rank first, rank 0 in answer. What follows are frames: the length of the body (u32), and the body, a
//! serde value in [postcard](https://postcard.jamesmunns.com/wire-format) encoding.
//!
//! 1. The rank sends a `Join`: rank, world size, job id, and HMAC-SHA256 under the token of
//!    `rank` ‖ both hellos, the rank's first ‖ rank (u64) ‖ world size (u64) ‖ job id.
//! 2. Rank 0 answers with a `Verdict`: welcome, with the HMAC of the same that begins with `zero` instead of `rank`; or
//!    why not.
//! 3. Then the rank sends `Request`s, numbered, and rank 0 `Answer`s. A get is answered when its key is set, a gather when
//!    all ranks have contributed; a rank that does not want to wait any longer sends `Forget`. `Failed` and `Farewell` come
//!    unasked.

mod client;
pub(crate) mod connection;
mod error;
pub(crate) mod handshake;
mod hub;
mod server;
pub(crate) mod wire;

use std::{net::SocketAddr, time::Duration};

use self::{
    client::Client,
    server::Server,
    wire::{Answer, Question},
};
pub use self::{
    error::{Failure, FailureKind, StoreError},
    hub::MAX_STRANGERS,
    server::HANDSHAKE_DEADLINE,
    wire::{MAX_JOB_ID_BYTES, MAX_KEY_BYTES, MAX_REASON_BYTES, MAX_VALUE_BYTES},
};
use super::Token;
use crate::transport::Rank;

/// Most ranks that one store serves; each costs rank 0 two threads.
pub const MAX_WORLD_SIZE: usize = 4096;

/// Most bytes that the keys and values of one store take together.
pub const MAX_STORED_BYTES: usize = 64 << 20;

/// Who a rank claims to be when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    rank: Rank,
    world_size: usize,
    job_id: String,
    token: Token,
}

impl Membership {
    /// Rank `rank` of `world_size`, of a job without name and token.
    pub fn new(rank: Rank, world_size: usize) -> Self {
        Self {
            rank,
            world_size,
            job_id: String::new(),
            token: Token::new([]),
        }
    }

    /// Of the job of this name, at most [`MAX_JOB_ID_BYTES`] long: only ranks that say the same are let in.
    pub fn job_id(mut self, job_id: &str) -> Self {
        self.job_id = job_id.to_owned();
        self
    }

    /// Of the job with this secret: only ranks that know it are let in.
    pub fn token(mut self, token: Token) -> Self {
        self.token = token;
        self
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.world_size > MAX_WORLD_SIZE {
            return Err(StoreError::TooManyRanks {
                world_size: self.world_size,
            });
        }
        if self.rank >= self.world_size {
            return Err(StoreError::RankOutOfRange {
                rank: self.rank,
                world_size: self.world_size,
            });
        }
        if self.job_id.len() > MAX_JOB_ID_BYTES {
            return Err(StoreError::TooLong {
                what: "job id",
                len: self.job_id.len(),
                limit: MAX_JOB_ID_BYTES,
            });
        }
        Ok(())
    }
}

/// One rank's connection to the store of its job; on rank 0 the store itself too. Dropping it leaves in peace.
#[derive(Debug)]
pub struct Store {
    address: SocketAddr,
    deadline: Duration,
    // Dropped in this order: rank 0 says goodbye to itself, then to everybody.
    client: Client,
    server: Option<Server>,
}

impl Store {
    /// Joins the store at `address` (`host:port`); rank 0 serves it there, on a free port if it is 0.
    ///
    /// The others try until rank 0 listens, or `deadline` is over; rank 0 does not wait for them. `deadline` also bounds
    /// every later wait for which no other is given. Resolving a host name can take longer than the deadline.
    ///
    /// # Errors
    /// [`StoreError`] if the address cannot be listened at (rank 0) or reached by the deadline (the others), or if rank 0
    /// refuses this rank.
    pub fn open(
        address: &str,
        membership: Membership,
        deadline: Duration,
    ) -> Result<Self, StoreError> {
        membership.check()?;
        let (server, address) = match membership.rank {
            0 => {
                let server = Server::bind(address, membership.clone())?;
                let address = server.reachable_at().to_string();
                (Some(server), address)
            }
            _ => (None, address.to_owned()),
        };
        let client = Client::connect(&address, &membership, deadline)?;
        Ok(Self {
            address: server
                .as_ref()
                .map_or(client.peer_address(), Server::listens_at),
            deadline,
            client,
            server,
        })
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.client.rank()
    }

    /// Number of ranks in the job.
    pub fn world_size(&self) -> usize {
        self.client.world_size()
    }

    /// The address of this host on which another rank can reach it, because rank 0 does: that of this end of the connection to
    /// rank 0. On rank 0 it is where the store listens, which may be everywhere.
    pub(crate) fn local_address(&self) -> Result<SocketAddr, StoreError> {
        match &self.server {
            Some(server) => Ok(server.listens_at()),
            None => self.client.local_address(),
        }
    }

    /// Where rank 0 listens, as seen from here.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Gives `key` a value, in place of one it may have. Returns when rank 0 has it.
    ///
    /// # Errors
    /// [`StoreError`] if key or value are too large, the store is full or has ended, or rank 0 does not answer by the
    /// deadline.
    pub fn set(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<(), StoreError> {
        let value = value.into();
        wire::check_key(key)?;
        wire::check_value(value.len(), MAX_VALUE_BYTES)?;
        let key = key.to_owned();
        match self
            .client
            .ask(Question::Set { key, value }, self.deadline)?
        {
            Answer::Done { .. } => Ok(()),
            _ => Err(StoreError::UnexpectedAnswer),
        }
    }

    /// The value of `key`; waits until it has one.
    ///
    /// # Errors
    /// [`StoreError`] if the key is too long, the store has ended, or the key has no value by the deadline.
    pub fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>, StoreError> {
        wire::check_key(key)?;
        let key = key.to_owned();
        match self.client.ask(Question::Get { key }, deadline)? {
            Answer::Value { value, .. } => Ok(value),
            _ => Err(StoreError::UnexpectedAnswer),
        }
    }

    /// Gives every rank's `bytes` to every rank, in rank order. All must call it, with the same `name`, which can be used
    /// again.
    ///
    /// Together the ranks can contribute [`MAX_VALUE_BYTES`], each an equal part of that.
    ///
    /// # Errors
    /// [`StoreError`] if name or bytes are too large, the store has ended, this rank is contributing to that name already,
    /// or ranks are missing at the deadline: the error says which.
    pub fn all_gather(
        &self,
        name: &str,
        bytes: impl Into<Vec<u8>>,
        deadline: Duration,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        let value = bytes.into();
        wire::check_key(name)?;
        wire::check_value(value.len(), MAX_VALUE_BYTES / self.world_size())?;
        let name = name.to_owned();
        match self
            .client
            .ask(Question::Gather { name, value }, deadline)?
        {
            Answer::Gathered { values, .. } => Ok(values),
            _ => Err(StoreError::UnexpectedAnswer),
        }
    }

    /// Waits until every rank has called it with the same `name`.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    pub fn barrier(&self, name: &str, deadline: Duration) -> Result<(), StoreError> {
        self.all_gather(name, [], deadline).map(|_| ())
    }

    /// Ends the store on every rank, with `reason`, of which the first [`MAX_REASON_BYTES`] count. Does nothing if it has
    /// failed already.
    ///
    /// Returns when rank 0 has taken note, so that the process may end; after a second at the latest.
    pub fn abort(&self, reason: &str) {
        self.client.abort(reason);
    }

    /// The failure that ended the store, if one has.
    pub fn failure(&self) -> Option<Failure> {
        self.client.failure()
    }

    /// Waits for a failure, `timeout` at most. Returns early, with nothing, when rank 0 leaves in peace.
    pub fn wait_for_failure(&self, timeout: Duration) -> Option<Failure> {
        self.client.wait_for_failure(timeout)
    }

    /// Calls `callback` when the store fails, at once if it has failed already, never otherwise. It is called on the thread
    /// that learns of the failure and should not take long.
    pub fn on_failure(&self, callback: impl FnOnce(&Failure) + Send + 'static) {
        self.client.on_failure(Box::new(callback));
    }
}

#[cfg(test)]
mod tests;
