//! How the ranks begin: each says whether it can use NCCL, and rank 0 by what they find one another.
//!
//! If one cannot, or has another version, all end with an error that says so.

use serde::{Deserialize, Serialize};

use super::{
    deadline::Deadline,
    error::NcclError,
    frame::{Incoming, WireFrame},
    library::{NcclLibrary, UniqueId, Version},
};
use crate::{
    buffer::HostBuffer,
    remote::{Event, Wire},
    transport::Rank,
};

/// What one rank says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Introduction {
    world_size: usize,
    /// The version of its library, or why it cannot use NCCL.
    version: Result<Version, String>,
    /// From rank 0.
    id: Option<UniqueId>,
}

/// What a rank brings to the meeting, if it can use NCCL.
pub(super) type Own<'a> = Result<&'a NcclLibrary, NcclError>;

/// Meets all ranks over `control`. What comes over it that is not part of this is added to `heard`. All ranks come to the same end, but
/// for those that cannot use NCCL: they get their own error.
pub(super) fn meet<C: Wire<HostBuffer>>(
    control: &mut C,
    heard: &mut Vec<Event<HostBuffer>>,
    own: Own<'_>,
    deadline: Deadline,
) -> Result<UniqueId, NcclError> {
    let id = own.and_then(|library| match control.rank() {
        0 => Ok((library.version(), Some(library.unique_id()?))),
        _ => Ok((library.version(), None)),
    });
    let introduction = Introduction {
        world_size: control.world_size(),
        version: id
            .as_ref()
            .map(|(version, _)| *version)
            .map_err(NcclError::to_string),
        id: id.as_ref().ok().and_then(|(_, id)| id.clone()),
    };
    let introductions = exchange(control, heard, introduction, deadline)?;
    id?;
    verdict(introductions)
}

/// Gives every rank's introduction to every rank.
fn exchange<C: Wire<HostBuffer>>(
    control: &mut C,
    heard: &mut Vec<Event<HostBuffer>>,
    own: Introduction,
    deadline: Deadline,
) -> Result<Vec<Introduction>, NcclError> {
    let (rank, world_size) = (control.rank(), control.world_size());
    let frame = WireFrame::Introduce(own.clone()).encode();
    let others = (0..world_size).filter(|&peer| peer != rank);
    others.for_each(|peer| control.send_frame(peer, frame.clone()));
    let mut known: Vec<Option<Introduction>> = vec![None; world_size];
    known[rank] = Some(own);
    let mut events = Vec::new();
    loop {
        control.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Frame { peer, bytes } if known[peer].is_none() => {
                    known[peer] = Some(introduction(peer, bytes)?);
                }
                Event::Lost { peer, reason } if known[peer].is_none() => {
                    return Err(NcclError::PeerLost { rank: peer, reason });
                }
                Event::Failed { reason } => return Err(NcclError::Rendezvous(reason)),
                other => heard.push(other),
            }
        }
        let absent = known.iter().position(Option::is_none);
        let Some(absent) = absent else { break };
        deadline.check(|| format!("rank {absent} to come"))?;
        deadline.pause();
    }
    // The others must hear of this rank even if it cannot go on.
    while !control.is_flushed() {
        deadline.check(|| "the others to hear of this rank".to_owned())?;
        control.poll(heard);
        deadline.pause();
    }
    Ok(known.into_iter().flatten().collect())
}

fn introduction(peer: Rank, bytes: Vec<u8>) -> Result<Introduction, NcclError> {
    match Incoming::decode(bytes) {
        Some(Incoming::OfWire(WireFrame::Introduce(introduction))) => Ok(introduction),
        _ => Err(NcclError::Rendezvous(format!(
            "rank {peer} said something else than who it is"
        ))),
    }
}

/// What all ranks conclude from what all have said.
fn verdict(introductions: Vec<Introduction>) -> Result<UniqueId, NcclError> {
    let mut ours = None;
    for (rank, introduction) in introductions.iter().enumerate() {
        let version = introduction.version.clone();
        let theirs = version.map_err(|reason| NcclError::Elsewhere { rank, reason })?;
        let (version, world_size) = *ours.get_or_insert((theirs, introduction.world_size));
        if introduction.world_size != world_size {
            return Err(NcclError::WorldSizes {
                rank,
                theirs: introduction.world_size,
                ours: world_size,
            });
        }
        if theirs != version {
            return Err(NcclError::Versions {
                rank,
                theirs,
                ours: version,
            });
        }
    }
    let id = introductions.into_iter().next().and_then(|first| first.id);
    id.ok_or_else(|| NcclError::Rendezvous("rank 0 has no id".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn introductions() -> Vec<Introduction> {
        let introduction = |rank| Introduction {
            world_size: 3,
            version: Ok(Version::OLDEST),
            id: (rank == 0).then(|| UniqueId::from_bytes([5; 128])),
        };
        (0..3).map(introduction).collect()
    }

    #[test]
    fn ranks_that_are_alike_get_rank_0s_id() {
        assert_eq!(verdict(introductions()), Ok(UniqueId::from_bytes([5; 128])));
    }

    #[test]
    fn what_differs_is_named() {
        let mut versions = introductions();
        versions[2].version = Ok(Version::MULTI_RANK);
        let error = verdict(versions).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rank 2 has NCCL 2.30.0, rank 0 has 2.22.0"
        );

        let mut sizes = introductions();
        sizes[1].world_size = 4;
        let (rank, theirs, ours) = (1, 4, 3);
        assert_eq!(
            verdict(sizes),
            Err(NcclError::WorldSizes { rank, theirs, ours })
        );

        let mut failed = introductions();
        let reason = "no GPU".to_owned();
        failed[1].version = Err(reason.clone());
        assert_eq!(
            verdict(failed),
            Err(NcclError::Elsewhere { rank: 1, reason })
        );
    }
}
