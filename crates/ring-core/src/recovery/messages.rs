//! How many buffers of messages a pass holds at one time: [`Most`], found by going through the steps as [`Walk`](crate::walk::Walk)
//! does.

use std::collections::VecDeque;

use crate::{
    schedule::{ScheduledExchange, ScheduledStep},
    walk::is_next_hop,
};

/// Buffers of messages that there are at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Most {
    /// Of rows.
    pub(super) rows: usize,
    /// Of gradients.
    pub(super) gradients: usize,
    /// Of both together.
    pub(super) together: usize,
}

/// Buffers held now, and the most so far.
#[derive(Default)]
struct Count {
    rows: usize,
    gradients: usize,
    most: Most,
}

impl Most {
    /// In a pass over these steps, of which so many exchanges are under way at once.
    pub(super) fn of(steps: &[ScheduledStep], lookahead: usize, backward: bool) -> Self {
        let mut count = Count::default();
        let mut posts = steps.iter().map(|step| step.exchange.as_ref());
        let mut ahead = VecDeque::new();
        let (mut filled_by, mut pending): (Option<&ScheduledExchange>, _) = (None, None);
        for step in steps {
            while ahead.len() < lookahead {
                let Some(exchange) = posts.next() else { break };
                count.take_rows(exchange.map_or(0, |hop| received(hop) + sent(hop)));
                ahead.push_back(exchange);
            }
            let homecoming: Option<&ScheduledExchange> = pending.take();
            count.post_gradients(homecoming);
            let arrived = filled_by.map_or(0, received);
            if backward {
                count.take_gradients(arrived);
            }
            count.rows -= arrived;
            count.bring_home(homecoming);
            if let Some(hop) = filled_by.filter(|_| backward) {
                if is_next_hop(step, hop) {
                    pending = Some(hop);
                } else {
                    count.post_gradients(Some(hop));
                    count.bring_home(Some(hop));
                }
            }
            count.rows -= ahead.pop_front().flatten().map_or(0, sent);
            filled_by = step.exchange.as_ref();
        }
        if backward {
            for hop in [pending, filled_by] {
                count.post_gradients(hop);
                count.bring_home(hop);
            }
        }
        count.most
    }
}

impl Count {
    fn take_rows(&mut self, buffers: usize) {
        self.rows += buffers;
        self.look();
    }

    fn take_gradients(&mut self, buffers: usize) {
        self.gradients += buffers;
        self.look();
    }

    /// Gradients come from where rows went to; those that leave are held already.
    fn post_gradients(&mut self, hop: Option<&ScheduledExchange>) {
        self.take_gradients(hop.map_or(0, sent));
    }

    fn bring_home(&mut self, hop: Option<&ScheduledExchange>) {
        self.gradients -= hop.map_or(0, |hop| sent(hop) + received(hop));
    }

    fn look(&mut self) {
        let Self {
            rows,
            gradients,
            most,
        } = self;
        most.rows = most.rows.max(*rows);
        most.gradients = most.gradients.max(*gradients);
        most.together = most.together.max(*rows + *gradients);
    }
}

/// Messages of rows that a hop brings.
fn received(hop: &ScheduledExchange) -> usize {
    usize::from(hop.receive.is_some()) + usize::from(hop.receive_queries.is_some())
}

/// Messages of rows that leave.
fn sent(hop: &ScheduledExchange) -> usize {
    usize::from(hop.send.is_some()) + usize::from(hop.send_queries.is_some())
}
