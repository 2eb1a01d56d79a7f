//! Some of the ranks of a transport, as a transport of their own: [`SubGroup`].

use std::{sync::Arc, time::Duration};

use crate::{
    buffer::Buffer,
    error::{CommError, CommErrorKind},
    recorder::FlightRecord,
    transport::{Expected, GroupId, Rank, RecvRequest, SendRequest, Tag, Traffic, Transport},
};

/// This rank's endpoint in a group that was split off another; made by
/// [`Communicator::split`](crate::Communicator::split).
///
/// Messages go over the transport of the group it was split off, under tags of their own. It works for every backend, and
/// the rules of that transport hold in it: so what poisons one group poisons all, and at most
/// [`MAX_OUTSTANDING_SENDS`](crate::MAX_OUTSTANDING_SENDS) messages to a peer may be untaken in all groups together.
#[derive(Debug)]
pub(crate) struct SubGroup<B: Buffer> {
    parent: Arc<dyn Transport<B>>,
    id: GroupId,
    /// By rank in this group, the rank in the parent.
    members: Vec<Rank>,
    rank: Rank,
}

impl<B: Buffer> SubGroup<B> {
    /// The group `id` of `members`, ranks of the parent; this rank is the one at `rank` of them.
    pub(crate) fn new(
        parent: Arc<dyn Transport<B>>,
        id: GroupId,
        members: Vec<Rank>,
        rank: Rank,
    ) -> Self {
        Self {
            parent,
            id,
            members,
            rank,
        }
    }

    /// The peer in the parent, and the tag there.
    fn address(&self, peer: Rank, tag: Tag) -> Result<(Rank, Tag), CommError> {
        match self.members.get(peer) {
            Some(&member) if peer != self.rank => Ok((member, self.tag(tag))),
            _ => Err(CommError::new(
                self.global_rank(self.rank),
                None,
                Some(self.tag(tag)),
                CommErrorKind::InvalidPeer(peer),
            )
            .with_history(self.flight_record())),
        }
    }

    fn tag(&self, tag: Tag) -> Tag {
        Tag {
            group: self.group(tag.group),
            ..tag
        }
    }

    /// Group `id` of this group, as the parent calls it.
    fn group(&self, id: GroupId) -> GroupId {
        self.id.within(id)
    }
}

impl<B: Buffer> Transport<B> for SubGroup<B> {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn global_rank(&self, rank: Rank) -> Rank {
        match self.members.get(rank) {
            Some(&member) => self.parent.global_rank(member),
            None => rank,
        }
    }

    fn deadline(&self) -> Duration {
        self.parent.deadline()
    }

    fn isend(&self, peer: Rank, tag: Tag, buffer: B) -> Result<SendRequest<B>, CommError> {
        let (peer, tag) = self.address(peer, tag)?;
        self.parent.isend(peer, tag, buffer)
    }

    fn irecv(&self, peer: Rank, tag: Tag, expected: Expected) -> Result<RecvRequest<B>, CommError> {
        let (peer, tag) = self.address(peer, tag)?;
        self.parent.irecv(peer, tag, expected)
    }

    fn irecv_into(
        &self,
        peer: Rank,
        tag: Tag,
        expected: Expected,
        memory: Option<B>,
    ) -> Result<RecvRequest<B>, CommError> {
        let (peer, tag) = self.address(peer, tag)?;
        self.parent.irecv_into(peer, tag, expected, memory)
    }

    fn all_gather_bytes_among(
        &self,
        group: GroupId,
        members: &[Rank],
        operation: u64,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let members: Vec<Rank> = members.iter().map(|&rank| self.members[rank]).collect();
        self.parent
            .all_gather_bytes_among(self.group(group), &members, operation, bytes)
    }

    fn poison(&self, cause: CommError) {
        self.parent.poison(cause);
    }

    fn poisoned(&self) -> Option<CommError> {
        self.parent.poisoned()
    }

    fn traffic(&self) -> Traffic {
        self.parent.traffic()
    }

    fn flight_record(&self) -> FlightRecord {
        self.parent.flight_record()
    }
}
