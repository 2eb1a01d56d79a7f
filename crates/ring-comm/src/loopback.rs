//! The loopback backend: ranks are threads of one process, and a buffer moves from one to the other without a copy.
//!
//! It keeps the rules at the head of [`Transport`](crate::Transport)'s module to the letter, so it is also the judge of
//! what the other backends do. Three things are its own:
//!
//! - A message counts as received when its receive is waited for; size and element type are checked there, by the
//!   receiver. The send is complete before, when a posted receive takes the message.
//! - Memory that a receive brings goes to the sender of its message, in place of the buffer that moved.
//! - An all-gather to which every rank has contributed succeeds on every rank, even if the group is poisoned meanwhile.

mod channel;
mod endpoint;
mod group;
mod sync;

use std::{any::Any, sync::Arc, thread, time::Duration};

use thiserror::Error;

pub use endpoint::LoopbackEndpoint;
pub(crate) use endpoint::{LoopbackRecv, LoopbackSend};
use group::Group;

use crate::{
    buffer::Buffer,
    transport::{Rank, Transport},
};

/// Makes groups whose ranks are threads of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loopback;

/// A rank whose thread panicked instead of returning.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("rank {rank} panicked: {message}")]
pub struct RankPanic {
    /// The rank.
    pub rank: Rank,
    /// What the panic said.
    pub message: String,
}

impl Loopback {
    /// The endpoints of a new group, in rank order. No wait in it takes longer than `deadline`.
    pub fn group<B: Buffer>(world_size: usize, deadline: Duration) -> Vec<LoopbackEndpoint<B>> {
        let group = Arc::new(Group::new(world_size, deadline));
        (0..world_size)
            .map(|rank| LoopbackEndpoint::new(Arc::clone(&group), rank))
            .collect()
    }

    /// Runs `body` once per rank of a new group, each on a thread `rank-N` of its own, and returns the results in rank
    /// order when all have ended.
    ///
    /// A rank is over when its body ends, even if something still holds its endpoint: then it has departed, or, if it
    /// panicked, poisoned the group, so that the others get an error and end too.
    ///
    /// # Panics
    /// If the operating system refuses to start a thread.
    pub fn run<B: Buffer, R: Send>(
        world_size: usize,
        deadline: Duration,
        body: impl Fn(LoopbackEndpoint<B>) -> R + Sync,
    ) -> Vec<Result<R, RankPanic>> {
        let body = &body;
        thread::scope(|scope| {
            let start = |endpoint: LoopbackEndpoint<B>| {
                let name = format!("rank-{}", endpoint.rank());
                let run = move || {
                    let _membership = endpoint.membership();
                    body(endpoint)
                };
                let thread = thread::Builder::new().name(name).spawn_scoped(scope, run);
                thread.expect("a thread for each rank")
            };
            let threads: Vec<_> = Self::group(world_size, deadline)
                .into_iter()
                .map(start)
                .collect();
            let join = |(rank, thread): (Rank, thread::ScopedJoinHandle<'_, R>)| {
                thread
                    .join()
                    .map_err(|payload| RankPanic::new(rank, payload.as_ref()))
            };
            threads.into_iter().enumerate().map(join).collect()
        })
    }
}

impl RankPanic {
    pub(crate) fn new(rank: Rank, payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self {
            rank,
            message: text.unwrap_or("(no message)").to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        buffer::{DType, HostBuffer},
        error::CommErrorKind,
        transport::{Expected, Payload, Tag},
    };

    const DEADLINE: Duration = Duration::from_secs(30);
    const TAG: Tag = Tag::new(0, 0, Payload::KeyValue);

    #[test]
    fn a_buffer_moves_without_a_copy() {
        let [sender, receiver] = pair();
        let values = vec![1.0, 2.0];
        let address = values.as_ptr();
        let send = sender.isend(1, TAG, HostBuffer::F32(values)).unwrap();
        let expected = Expected {
            dtype: DType::F32,
            len: 2,
        };
        let received = receiver.irecv(0, TAG, expected).unwrap().wait().unwrap();
        assert_eq!(send.wait().unwrap(), None);
        assert_eq!(received.as_f32().unwrap().as_ptr(), address);
    }

    #[test]
    fn results_come_in_rank_order_and_panics_as_values() {
        let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
            assert_ne!(endpoint.rank(), 1, "staged");
            thread::current().name().map(str::to_owned)
        });
        assert_eq!(results[0], Ok(Some("rank-0".to_owned())));
        assert!(
            matches!(&results[1], Err(RankPanic { rank: 1, message }) if message.contains("staged"))
        );
        assert_eq!(results[2], Ok(Some("rank-2".to_owned())));
    }

    /// A graph of an autodiff engine, say, can keep an endpoint alive after its rank has panicked.
    #[test]
    fn a_panic_poisons_even_if_the_endpoint_lives_on() {
        let kept = std::sync::Mutex::new(Vec::new());
        let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
            let endpoint = Arc::new(endpoint);
            kept.lock().unwrap().push(Arc::clone(&endpoint));
            assert_ne!(endpoint.rank(), 1, "staged");
            endpoint.all_gather_bytes(0, Vec::new())
        });
        let error = results[0].clone().unwrap().unwrap_err();
        assert_eq!(error.root().kind, CommErrorKind::Panicked { culprit: 1 });
    }

    #[test]
    fn a_deadline_beyond_the_clock_is_none() {
        let results = Loopback::run::<HostBuffer, _>(2, Duration::MAX, |endpoint| {
            endpoint.all_gather_bytes(0, vec![endpoint.rank() as u8])
        });
        for result in results {
            assert_eq!(result.unwrap().unwrap(), [[0], [1]]);
        }
    }

    fn pair() -> [LoopbackEndpoint<HostBuffer>; 2] {
        Loopback::group(2, DEADLINE).try_into().unwrap()
    }
}
