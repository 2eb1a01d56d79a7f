//! How a rank and rank 0 find out that they belong together.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::{
    Membership,
    error::StoreError,
    wire::{FrameError, MAX_HANDSHAKE_FRAME, read_frame, write_frame},
};
use crate::transport::Rank;

const MAGIC: [u8; 8] = *b"ringstor";
const VERSION: u32 = 1;
const HELLO_BYTES: usize = 44;

/// Heads of what the two sides prove, so that neither can repeat what the other said.
const FROM_RANK: &[u8; 4] = b"rank";
const FROM_ZERO: &[u8; 4] = b"zero";

/// A rank asks to be let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) rank: u64,
    pub(super) world_size: u64,
    pub(super) job_id: String,
    pub(super) proof: [u8; 32],
}

/// What rank 0 says to that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Verdict {
    Welcome { proof: [u8; 32] },
    WrongToken,
    WrongJob { expected: String },
    WrongWorldSize { expected: u64 },
    RankOutOfRange,
    DuplicateRank,
    Closing,
}

/// A connection on which every wait ends by an instant.
pub(super) struct Timed<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl<'a> Timed<'a> {
    pub(super) fn new(stream: &'a TcpStream, until: Instant) -> Self {
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

/// Why a rank was not let in.
pub(super) enum JoinError {
    /// Another attempt may succeed.
    Retry(String),
    /// It will not.
    Final(StoreError),
}

impl From<io::Error> for JoinError {
    fn from(error: io::Error) -> Self {
        JoinError::Retry(match error.kind() {
            io::ErrorKind::UnexpectedEof => "the connection was closed".to_owned(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "it accepts connections and does not answer".to_owned()
            }
            _ => error.to_string(),
        })
    }
}

impl From<FrameError> for JoinError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Connection(error) => error.into(),
            error => JoinError::Retry(error.to_string()),
        }
    }
}

/// The side of the rank: asks to be let in.
pub(super) fn join(
    stream: &mut Timed<'_>,
    address: SocketAddr,
    membership: &Membership,
) -> Result<(), JoinError> {
    let ours = hello().map_err(|error| {
        JoinError::Final(StoreError::System {
            what: "random numbers",
            reason: error.to_string(),
        })
    })?;
    stream.write_all(&ours)?;
    let theirs = read_hello_of_store(stream, address, membership.rank)?;

    let transcript = Transcript {
        hellos: [ours, theirs],
        rank: membership.rank as u64,
        world_size: membership.world_size as u64,
        job_id: &membership.job_id,
    };
    let token = membership.token.bytes();
    let join = Join {
        rank: transcript.rank,
        world_size: transcript.world_size,
        job_id: membership.job_id.clone(),
        proof: transcript
            .signed(token, FROM_RANK)
            .finalize()
            .into_bytes()
            .into(),
    };
    write_frame(stream, &join)?;
    match read_frame(stream, MAX_HANDSHAKE_FRAME)? {
        Verdict::Welcome { proof } => transcript
            .signed(token, FROM_ZERO)
            .verify_slice(&proof)
            .map_err(|_| {
                JoinError::Final(StoreError::Impostor {
                    rank: membership.rank,
                    address,
                })
            }),
        Verdict::Closing => Err(JoinError::Retry("it is ending".to_owned())),
        refusal => Err(JoinError::Final(refused(refusal, address, membership))),
    }
}

fn refused(verdict: Verdict, address: SocketAddr, membership: &Membership) -> StoreError {
    let rank = membership.rank;
    match verdict {
        Verdict::WrongToken => StoreError::WrongToken { rank, address },
        Verdict::WrongJob { expected } => StoreError::WrongJob {
            rank,
            address,
            expected,
            got: membership.job_id.clone(),
        },
        Verdict::WrongWorldSize { expected } => StoreError::WrongWorldSize {
            rank,
            address,
            expected: usize::try_from(expected).unwrap_or(usize::MAX),
            got: membership.world_size,
        },
        Verdict::RankOutOfRange => StoreError::RankOutOfRange {
            rank,
            world_size: membership.world_size,
        },
        Verdict::DuplicateRank => StoreError::DuplicateRank { rank, address },
        Verdict::Closing | Verdict::Welcome { .. } => StoreError::UnexpectedAnswer,
    }
}

/// The side of rank 0: finds out whether a rank of the job is asking, and refuses it if not.
///
/// Returns its number, and the verdict that lets it in; nothing if it was refused.
pub(super) fn examine(
    stream: &mut Timed<'_>,
    membership: &Membership,
) -> Result<Option<(Rank, Verdict)>, FrameError> {
    let Some(theirs) = read_hello_of_rank(stream)? else {
        return Ok(None);
    };
    let ours = hello()?;
    stream.write_all(&ours)?;
    if version(&theirs) != VERSION {
        // The rank learns of that from our hello.
        return Ok(None);
    }
    let join: Join = read_frame(stream, MAX_HANDSHAKE_FRAME)?;
    let transcript = Transcript {
        hellos: [theirs, ours],
        rank: join.rank,
        world_size: join.world_size,
        job_id: &join.job_id,
    };
    let token = membership.token.bytes();
    let rank = transcript
        .signed(token, FROM_RANK)
        .verify_slice(&join.proof)
        .map_err(|_| Verdict::WrongToken)
        .and_then(|()| belongs(&join, membership));
    match rank {
        Ok(rank) => {
            let proof = transcript.signed(token, FROM_ZERO).finalize();
            let proof = proof.into_bytes().into();
            Ok(Some((rank, Verdict::Welcome { proof })))
        }
        Err(verdict) => {
            write_frame(stream, &verdict)?;
            Ok(None)
        }
    }
}

/// The rank that asks, if it is of this job.
fn belongs(join: &Join, membership: &Membership) -> Result<Rank, Verdict> {
    if join.job_id != membership.job_id {
        return Err(Verdict::WrongJob {
            expected: membership.job_id.clone(),
        });
    }
    if join.world_size != membership.world_size as u64 {
        return Err(Verdict::WrongWorldSize {
            expected: membership.world_size as u64,
        });
    }
    match Rank::try_from(join.rank) {
        Ok(rank) if rank < membership.world_size => Ok(rank),
        _ => Err(Verdict::RankOutOfRange),
    }
}

/// What both sides prove to have seen.
struct Transcript<'a> {
    /// The rank's first.
    hellos: [[u8; HELLO_BYTES]; 2],
    rank: u64,
    world_size: u64,
    job_id: &'a str,
}

impl Transcript<'_> {
    fn signed(&self, token: &[u8], head: &[u8; 4]) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(token)
            .expect("HMAC takes keys of every length")
            .chain_update(head)
            .chain_update(self.hellos.as_flattened())
            .chain_update(self.rank.to_le_bytes())
            .chain_update(self.world_size.to_le_bytes())
            .chain_update(self.job_id)
    }
}

fn hello() -> io::Result<[u8; HELLO_BYTES]> {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..12].copy_from_slice(&VERSION.to_le_bytes());
    getrandom::fill(&mut hello[12..]).map_err(io::Error::other)?;
    Ok(hello)
}

fn version(hello: &[u8; HELLO_BYTES]) -> u32 {
    u32::from_le_bytes([hello[8], hello[9], hello[10], hello[11]])
}

/// Reads a hello; nothing if what comes is something else, which is not read any further.
fn read_hello_of_rank(stream: &mut impl Read) -> io::Result<Option<[u8; HELLO_BYTES]>> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello[..8])?;
    if hello[..8] != MAGIC {
        return Ok(None);
    }
    stream.read_exact(&mut hello[8..])?;
    Ok(Some(hello))
}

/// Reads what answers as rank 0: a hello of our version, or why it cannot be rank 0.
fn read_hello_of_store(
    stream: &mut impl Read,
    address: SocketAddr,
    rank: Rank,
) -> Result<[u8; HELLO_BYTES], JoinError> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello[..8])?;
    if hello[..8] != MAGIC {
        return Err(JoinError::Final(StoreError::NotAStore {
            address,
            expected: String::from_utf8_lossy(&MAGIC).into_owned(),
            got: String::from_utf8_lossy(&hello[..8]).into_owned(),
        }));
    }
    stream.read_exact(&mut hello[8..])?;
    match version(&hello) {
        VERSION => Ok(hello),
        theirs => Err(JoinError::Final(StoreError::Version {
            rank,
            address,
            ours: VERSION,
            theirs,
        })),
    }
}
