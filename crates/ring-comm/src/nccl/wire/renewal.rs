//! Which communicator a group uses: the one that all ranks have, or a new one.

use std::collections::VecDeque;

use super::{NcclWire, Stage};
use crate::{
    buffer::{Buffer, HostBuffer},
    nccl::{
        deadline::Deadline,
        device::{Device, Status},
        error::NcclError,
        frame::WireFrame,
    },
    remote::{Event, Wire},
};

impl<B: Buffer, C: Wire<HostBuffer>, D: Device<B>> NcclWire<B, C, D> {
    pub(super) fn all_have_begun(&mut self) -> bool {
        let (own, epoch) = (self.control.rank(), self.epoch);
        let mut peers = self.begun.iter_mut().enumerate();
        peers.all(|(rank, begun)| {
            while begun.front().is_some_and(|&(of, _)| of < epoch) {
                begun.pop_front();
            }
            rank == own || begun.front().is_some_and(|&(of, _)| of == epoch)
        })
    }

    /// Whether all ranks have the same communicator.
    pub(super) fn compare(&mut self) {
        let is_same = |begun: &VecDeque<_>| {
            begun
                .front()
                .is_none_or(|&(_, theirs)| theirs == self.communicator)
        };
        self.stage = if self.communicator.is_some() && self.begun.iter().all(is_same) {
            Stage::Connecting
        } else {
            Stage::Replacing
        };
    }

    /// Makes a new communicator, when the old one is gone.
    pub(super) fn replace(&mut self, status: Status) -> Result<(), NcclError> {
        self.communicator = None;
        match status {
            Status::Aborting => return Ok(()),
            Status::Unconnected => {}
            _ => {
                self.device.abort();
                return Ok(());
            }
        }
        let (rank, world_size, epoch) =
            (self.control.rank(), self.control.world_size(), self.epoch);
        if rank == 0 {
            let id = self.device.unique_id()?;
            self.tell_all(&WireFrame::Connect {
                epoch,
                id: id.clone(),
            });
            self.invitation = Some((epoch, id));
        }
        let Some((_, id)) = self.invitation.take_if(|(of, _)| *of == epoch) else {
            return Ok(());
        };
        self.device.connect(&id, rank, world_size)?;
        self.communicator = Some(epoch);
        self.connected.clear();
        self.stage = Stage::Connecting;
        Ok(())
    }
}

/// Waits for the first communicator, and keeps what comes over the control wire meanwhile.
pub(super) fn connect_within<B, C: Wire<HostBuffer>, D: Device<B>>(
    device: &mut D,
    control: &mut C,
    heard: &mut Vec<Event<HostBuffer>>,
    deadline: Deadline,
) -> Result<(), NcclError> {
    while device.poll()? != Status::Idle {
        let before = heard.len();
        control.poll(heard);
        for event in &heard[before..] {
            if let Event::Lost { peer, reason } = event {
                let (rank, reason) = (*peer, reason.clone());
                return Err(NcclError::PeerLost { rank, reason });
            }
        }
        deadline.check(|| "the ranks to make a communicator".to_owned())?;
        deadline.pause();
    }
    Ok(())
}
