//! What is issued together.

use super::{LARGEST_GROUP, NcclWire};
use crate::{
    buffer::{Buffer, HostBuffer},
    nccl::{
        device::{Device, Direction, Half},
        order::Position,
    },
    remote::Wire,
    transport::Rank,
};

impl<B: Buffer, C: Wire<HostBuffer>, D: Device<B>> NcclWire<B, C, D> {
    /// What is certain to come next, as far as it may be issued together.
    pub(super) fn next_group(&mut self) -> Vec<Half<B>> {
        let mut group: Vec<Half<B>> = Vec::new();
        while let Some(position) = self.order.next().filter(|_| group.len() < LARGEST_GROUP) {
            let (direction, peer) = self.side(position);
            let is_like = |half: &Half<B>| (half.direction, half.peer) == (direction, peer);
            let pair = (position.source, position.destination);
            let is_first = !self.connected.contains(&pair);
            if group.iter().any(is_like) || (is_first && !group.is_empty()) {
                break;
            }
            self.order.issued(position);
            let key = (direction, peer, position.sequence);
            let Some(buffer) = self.waiting.remove(&key) else {
                continue;
            };
            group.push(Half {
                peer,
                sequence: position.sequence,
                direction,
                buffer,
            });
            if is_first {
                self.connected.insert(pair);
                break;
            }
        }
        group
    }

    /// This rank's part in a transfer, and the other rank.
    fn side(&self, position: Position) -> (Direction, Rank) {
        if position.source == self.control.rank() {
            (Direction::Out, position.destination)
        } else {
            (Direction::In, position.source)
        }
    }
}
