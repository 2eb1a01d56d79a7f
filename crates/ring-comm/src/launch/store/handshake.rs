//! How two processes find out that they belong together: a rank and rank 0, or any two ranks.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
};

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use thiserror::Error;

use super::{
    Membership,
    connection::Timed,
    error::StoreError,
    wire::{FrameError, MAX_HANDSHAKE_FRAME, read_frame, write_frame},
};
use crate::transport::Rank;

const HELLO_BYTES: usize = 44;

/// What is to be joined: what is proved of one is no proof of another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protocol {
    /// Begins what both sides say first.
    pub(crate) magic: [u8; 8],
    /// Stands after it.
    pub(crate) version: u32,
    /// Heads of what who asks and who answers prove, so that neither can repeat what the other said.
    pub(crate) heads: [&'static [u8; 4]; 2],
}

/// The store of rank 0.
pub(super) const STORE: Protocol = Protocol {
    magic: *b"ringstor",
    version: 1,
    heads: [b"rank", b"zero"],
};

/// A rank asks to be let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) rank: u64,
    pub(super) world_size: u64,
    pub(super) job_id: String,
    pub(super) proof: [u8; 32],
}

/// What is said to that.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub(crate) enum Verdict {
    #[error("welcome")]
    Welcome { proof: [u8; 32] },
    #[error("its job token is another")]
    WrongToken,
    #[error("it is of job {expected:?}")]
    WrongJob { expected: String },
    #[error("its world size is {expected}")]
    WrongWorldSize { expected: u64 },
    #[error("there is no such rank")]
    RankOutOfRange,
    #[error("another process has joined as that rank")]
    DuplicateRank,
    #[error("it is ending")]
    Closing,
}

/// Why a process was not let in.
#[derive(Debug, Error)]
pub(crate) enum AskError {
    #[error("no random numbers: {0}")]
    Random(io::Error),
    #[error("{0}")]
    Connection(#[from] FrameError),
    #[error("something else listens there: it says {:?}", String::from_utf8_lossy(.got))]
    Foreign { got: [u8; 8] },
    #[error("it speaks version {theirs} of the protocol")]
    Version { theirs: u32 },
    #[error("{0}")]
    Refused(Verdict),
    #[error("it does not know the job token")]
    Impostor,
}

impl From<io::Error> for AskError {
    fn from(error: io::Error) -> Self {
        AskError::Connection(error.into())
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

/// The side of the rank: asks rank 0 to be let in.
pub(super) fn join(
    stream: &mut Timed<'_>,
    address: SocketAddr,
    membership: &Membership,
) -> Result<(), JoinError> {
    ask(stream, &STORE, membership).map_err(|error| not_joined(error, address, membership))
}

fn not_joined(error: AskError, address: SocketAddr, membership: &Membership) -> JoinError {
    let rank = membership.rank;
    JoinError::Final(match error {
        AskError::Connection(error) => return error.into(),
        AskError::Refused(Verdict::Closing) => {
            return JoinError::Retry(Verdict::Closing.to_string());
        }
        AskError::Refused(verdict) => refused(verdict, address, membership),
        AskError::Foreign { got } => StoreError::NotAStore {
            address,
            expected: String::from_utf8_lossy(&STORE.magic).into_owned(),
            got: String::from_utf8_lossy(&got).into_owned(),
        },
        AskError::Version { theirs } => StoreError::Version {
            rank,
            address,
            ours: STORE.version,
            theirs,
        },
        AskError::Impostor => StoreError::Impostor { rank, address },
        AskError::Random(error) => StoreError::System {
            what: "random numbers",
            reason: error.to_string(),
        },
    })
}

/// The side of who wants to be let in, to what `protocol` says, as who `membership` says.
pub(crate) fn ask(
    stream: &mut Timed<'_>,
    protocol: &Protocol,
    membership: &Membership,
) -> Result<(), AskError> {
    let ours = protocol.hello().map_err(AskError::Random)?;
    stream.write_all(&ours)?;
    let theirs = protocol.read_hello_of_host(stream)?;

    let transcript = Transcript {
        hellos: [ours, theirs],
        rank: membership.rank as u64,
        world_size: membership.world_size as u64,
        job_id: &membership.job_id,
    };
    let token = membership.token.bytes();
    let [from_guest, from_host] = protocol.heads;
    let proof = transcript.signed(token, from_guest).finalize();
    let join = Join {
        rank: transcript.rank,
        world_size: transcript.world_size,
        job_id: membership.job_id.clone(),
        proof: proof.into_bytes().into(),
    };
    write_frame(stream, &join)?;
    match read_frame(stream, MAX_HANDSHAKE_FRAME)? {
        Verdict::Welcome { proof } => transcript
            .signed(token, from_host)
            .verify_slice(&proof)
            .map_err(|_| AskError::Impostor),
        refusal => Err(AskError::Refused(refusal)),
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

/// The side of who is asked: finds out whether a rank of the same job is asking, and refuses it if not.
///
/// Returns its number, and the verdict that lets it in; nothing if it was refused.
pub(crate) fn examine(
    stream: &mut Timed<'_>,
    protocol: &Protocol,
    membership: &Membership,
) -> Result<Option<(Rank, Verdict)>, FrameError> {
    let Some(theirs) = protocol.read_hello_of_guest(stream)? else {
        return Ok(None);
    };
    let ours = protocol.hello()?;
    stream.write_all(&ours)?;
    if version(&theirs) != protocol.version {
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
    let [from_guest, from_host] = protocol.heads;
    let rank = transcript
        .signed(token, from_guest)
        .verify_slice(&join.proof)
        .map_err(|_| Verdict::WrongToken)
        .and_then(|()| belongs(&join, membership));
    match rank {
        Ok(rank) => {
            let proof = transcript.signed(token, from_host).finalize();
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
    /// Of who asks first.
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

impl Protocol {
    fn hello(&self) -> io::Result<[u8; HELLO_BYTES]> {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&self.magic);
        hello[8..12].copy_from_slice(&self.version.to_le_bytes());
        getrandom::fill(&mut hello[12..]).map_err(io::Error::other)?;
        Ok(hello)
    }

    /// Reads a hello; nothing if what comes is something else, which is not read any further.
    fn read_hello_of_guest(&self, stream: &mut impl Read) -> io::Result<Option<[u8; HELLO_BYTES]>> {
        let mut hello = [0; HELLO_BYTES];
        stream.read_exact(&mut hello[..8])?;
        if hello[..8] != self.magic {
            return Ok(None);
        }
        stream.read_exact(&mut hello[8..])?;
        Ok(Some(hello))
    }

    /// Reads what answers: a hello of our version, or why it cannot be what was asked for.
    fn read_hello_of_host(&self, stream: &mut impl Read) -> Result<[u8; HELLO_BYTES], AskError> {
        let mut hello = [0; HELLO_BYTES];
        let (magic, rest) = hello.split_at_mut(8);
        stream.read_exact(magic)?;
        if *magic != self.magic {
            let mut got = self.magic;
            got.copy_from_slice(magic);
            return Err(AskError::Foreign { got });
        }
        stream.read_exact(rest)?;
        match version(&hello) {
            theirs if theirs == self.version => Ok(hello),
            theirs => Err(AskError::Version { theirs }),
        }
    }
}

fn version(hello: &[u8; HELLO_BYTES]) -> u32 {
    u32::from_le_bytes([hello[8], hello[9], hello[10], hello[11]])
}
