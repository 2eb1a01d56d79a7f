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
        let world_size = self.control.world_size();
        let mut group: Vec<Half<B>> = Vec::new();
        let mut distance = None;
        while let Some(position) = self.order.next().filter(|_| group.len() < LARGEST_GROUP) {
            let (direction, peer) = self.side(position);
            let is_like = |half: &Half<B>| (half.direction, half.peer) == (direction, peer);
            let pair = (position.source, position.destination);
            let is_first = !self.connected.contains(&pair);
            let how_far = (position.destination + world_size - position.source) % world_size;
            let is_apart =
                world_size > LARGEST_GROUP && distance.is_some_and(|distance| distance != how_far);
            if group.iter().any(is_like) || is_apart || (is_first && !group.is_empty()) {
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
            distance = Some(how_far);
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
