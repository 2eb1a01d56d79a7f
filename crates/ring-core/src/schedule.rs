//! A plan written out for kernels and transport: [`Schedule`].
//!
//! A plan is compact; kernels want every block, and every message's layout. Both are the same in every call, so they are made
//! once, when the plan is first executed, and a call allocates nothing for them. Whoever only reads a plan pays nothing.

use std::{fmt, sync::OnceLock};

use ring_comm::Rank;
use ring_kernels::{HeadBlocks, PackedRows, Problem};

use crate::plan::{Exchange, Message, Plan, Source, Step};

/// The steps of a plan as they are executed.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) steps: Vec<ScheduledStep>,
    /// What ranks compare.
    pub(crate) fields: Vec<(String, String)>,
}

/// A [`Step`].
#[derive(Clone, Debug)]
pub(crate) struct ScheduledStep {
    pub(crate) source: Source,
    pub(crate) blocks: Vec<HeadBlocks>,
    pub(crate) exchange: Option<ScheduledExchange>,
}

/// An [`Exchange`].
#[derive(Clone, Debug)]
pub(crate) struct ScheduledExchange {
    pub(crate) distance: usize,
    pub(crate) send: Option<Parcel>,
    pub(crate) receive: Option<Parcel>,
}

/// A [`Message`].
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    pub(crate) peer: Rank,
    pub(crate) rows: PackedRows,
}

impl Schedule {
    fn new(plan: &Plan) -> Self {
        let problem = plan.problem();
        let scheduled = |step| ScheduledStep::new(step, &problem);
        Self {
            steps: plan.steps().iter().map(scheduled).collect(),
            fields: plan.spec().fields(),
        }
    }

    /// Elements of the largest message of this rank.
    pub(crate) fn largest_message(&self) -> usize {
        let exchanges = self.steps.iter().filter_map(|step| step.exchange.as_ref());
        exchanges
            .flat_map(|exchange| [&exchange.send, &exchange.receive])
            .flatten()
            .map(|parcel| parcel.rows.len)
            .max()
            .unwrap_or(0)
    }
}

impl ScheduledStep {
    fn new(step: &Step, problem: &Problem) -> Self {
        let exchange = step.exchange.as_ref();
        Self {
            source: step.source,
            blocks: step.head_blocks(),
            exchange: exchange.map(|exchange| ScheduledExchange::new(exchange, problem)),
        }
    }
}

impl ScheduledExchange {
    fn new(exchange: &Exchange, problem: &Problem) -> Self {
        let parcel = |message: &Message| Parcel {
            peer: message.peer,
            rows: message.packed(problem),
        };
        Self {
            distance: exchange.distance,
            send: exchange.send.as_ref().map(parcel),
            receive: exchange.receive.as_ref().map(parcel),
        }
    }
}

/// The schedule of a plan, once it was asked for. No part of the plan's value: it follows from the rest.
#[derive(Clone, Default)]
pub(crate) struct OnDemand(OnceLock<Schedule>);

impl OnDemand {
    pub(crate) fn of(&self, plan: &Plan) -> &Schedule {
        self.0.get_or_init(|| Schedule::new(plan))
    }
}

impl PartialEq for OnDemand {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}
