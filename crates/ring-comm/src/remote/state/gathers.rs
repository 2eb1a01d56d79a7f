//! All-gathers: every member sends its part to every other.

use std::collections::VecDeque;

use super::{Attempt, Gather, REMEMBERED_GATHERS, State};
use crate::{
    buffer::Buffer,
    error::CommErrorKind,
    recorder,
    remote::frame::{Completed, Frame},
    transport::{GroupId, Rank},
};

impl<B: Buffer> State<B> {
    /// Sends the rank's part to the other members, once, and yields all parts when they are there.
    pub(in crate::remote) fn all_gather(
        &mut self,
        key: (GroupId, u64),
        members: &[Rank],
        part: &mut Option<Vec<u8>>,
    ) -> Attempt<Vec<Vec<u8>>> {
        let world_size = self.world_size();
        if let Some(&stranger) = members.iter().find(|&&member| member >= world_size) {
            return Attempt::Failed(CommErrorKind::InvalidPeer(stranger));
        }
        if !members.contains(&self.rank) {
            return Attempt::Failed(CommErrorKind::InvalidPeer(self.rank));
        }
        self.join(key, members, part);
        if part.is_some() {
            // Another thread of this rank uses the number.
            return Attempt::Blocked(self.rank);
        }
        if let Some(absent) = self.first_absent(key, members) {
            return Attempt::Blocked(absent);
        }
        let parts = self.take_parts(key, members);
        self.remember(key, members, &parts);
        self.advance(self.current, recorder::Progress::Ended);
        Attempt::Done(parts)
    }

    pub(super) fn gather_mut(&mut self, key: (GroupId, u64)) -> &mut Gather {
        let world_size = self.world_size();
        self.gathers
            .entry(key)
            .or_insert_with(|| Gather::new(world_size))
    }

    pub(super) fn join(
        &mut self,
        key: (GroupId, u64),
        members: &[Rank],
        part: &mut Option<Vec<u8>>,
    ) {
        let rank = self.rank;
        let gather = self.gather_mut(key);
        let is_free = gather.joined.is_none();
        let Some(bytes) = part.take_if(|_| is_free) else {
            return;
        };
        gather.joined = Some(members.to_vec());
        gather.parts[rank].push_back(bytes.clone());
        let (group, operation) = key;
        for &member in members.iter().filter(|&&member| member != rank) {
            let bytes = bytes.clone();
            self.tell(
                member,
                Frame::Gather {
                    group,
                    operation,
                    bytes,
                },
            );
        }
    }

    /// A member whose part is missing; one that has departed if there is such, because it will never come.
    pub(super) fn first_absent(&self, key: (GroupId, u64), members: &[Rank]) -> Option<Rank> {
        let is_absent = |&rank: &Rank| {
            let gather = self.gathers.get(&key);
            gather.is_none_or(|gather| gather.parts[rank].is_empty())
        };
        let absent = || members.iter().copied().filter(is_absent);
        absent()
            .find(|&rank| self.has_departed(rank))
            .or_else(|| absent().next())
    }

    /// The oldest part of every member; ends this rank's part in the all-gather.
    pub(super) fn take_parts(&mut self, key: (GroupId, u64), members: &[Rank]) -> Vec<Vec<u8>> {
        let gather = self.gather_mut(key);
        gather.joined = None;
        let mut take = |&member: &Rank| gather.parts[member].pop_front().unwrap_or_default();
        let parts = members.iter().map(&mut take).collect();
        if gather.parts.iter().all(VecDeque::is_empty) {
            self.gathers.remove(&key);
        }
        parts
    }

    pub(super) fn remember(
        &mut self,
        (group, operation): (GroupId, u64),
        members: &[Rank],
        parts: &[Vec<u8>],
    ) {
        if self.world_size() == 1 {
            return;
        }
        if self.completed.len() == REMEMBERED_GATHERS {
            self.completed.pop_front();
        }
        let parts = members.iter().copied().zip(parts.iter().cloned());
        self.completed.push_back(Completed {
            group,
            operation,
            parts: parts.collect(),
        });
    }

    /// All-gathers that this rank takes part in and cannot finish.
    pub(super) fn joined_in_vain(&self) -> Vec<(GroupId, u64)> {
        let in_vain = |(key, gather): (&(GroupId, u64), &Gather)| {
            let absent = self.first_absent(*key, gather.joined.as_ref()?);
            absent.map(|_| *key)
        };
        self.gathers.iter().filter_map(in_vain).collect()
    }

    /// Fills in what of a complete all-gather has not come yet, if this rank waits for it.
    pub(super) fn complete_with(&mut self, completed: Completed) {
        let key = (completed.group, completed.operation);
        let gather = self.gathers.get_mut(&key);
        let Some(gather) = gather.filter(|gather| gather.joined.is_some()) else {
            return;
        };
        for (rank, part) in completed.parts {
            if let Some(parts) = gather.parts.get_mut(rank).filter(|parts| parts.is_empty()) {
                parts.push_back(part);
            }
        }
    }
}

impl Gather {
    pub(super) fn new(world_size: usize) -> Self {
        Self {
            joined: None,
            parts: vec![VecDeque::new(); world_size],
        }
    }
}
