//! A plan written out for kernels and transport: [`Schedule`].
//!
//! A plan is compact; kernels want every block, and every message's layout. Both are the same in every call, so they are made
//! once, when the plan is first executed, and a call allocates nothing for them. Whoever only reads a plan pays nothing.

use std::{fmt, sync::OnceLock};

use ring_comm::Rank;
use ring_kernels::{HeadBlocks, HeadRows, PackedRows, Problem, RowLayout, Rows, TensorShape};

use crate::plan::{Exchange, Message, Plan, Source, Step};

/// The steps of a plan as they are executed.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) steps: Vec<ScheduledStep>,
    /// Those of the backward pass, if they are others.
    backward: Option<Vec<ScheduledStep>>,
    /// What ranks compare.
    pub(crate) fields: Vec<(String, String)>,
}

/// A [`Step`].
#[derive(Clone, Debug)]
pub(crate) struct ScheduledStep {
    pub(crate) source: Source,
    pub(crate) blocks: Vec<HeadBlocks>,
    /// Blocks of queries that came from elsewhere and own keys.
    pub(crate) guests: Vec<HeadBlocks>,
    pub(crate) exchange: Option<ScheduledExchange>,
}

/// An [`Exchange`].
#[derive(Clone, Debug)]
pub(crate) struct ScheduledExchange {
    pub(crate) distance: usize,
    pub(crate) send: Option<Parcel>,
    pub(crate) receive: Option<Parcel>,
    pub(crate) send_queries: Option<QueryParcel>,
    pub(crate) receive_queries: Option<QueryParcel>,
}

/// A [`Message`] of keys and values, and of their gradients on the way back.
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    pub(crate) peer: Rank,
    pub(crate) rows: PackedRows,
}

/// A [`Message`] of queries and the gradients of their outputs, with what goes along and comes back.
#[derive(Clone, Debug)]
pub(crate) struct QueryParcel {
    pub(crate) peer: Rank,
    /// The shape of the tensors whose rows travel: the rank's own, or for a rank that they visit `[batch, query_heads, most
    /// rows of a head, head_dim]`.
    pub(crate) shape: TensorShape,
    /// Queries and gradients of outputs.
    pub(crate) rows: PackedRows,
    /// Where the gradients of outputs lie in the message.
    pub(crate) grad_output_layout: RowLayout,
    /// Log-sum-exp and delta.
    pub(crate) statistics: PackedRows,
    /// Gradients of the queries.
    pub(crate) gradients: PackedRows,
}

impl Schedule {
    fn new(plan: &Plan) -> Self {
        let problem = plan.ring_problem();
        let scheduled = |steps: &[Step]| -> Vec<ScheduledStep> {
            let step = |step| ScheduledStep::new(step, &problem);
            steps.iter().map(step).collect()
        };
        let differs = !std::ptr::eq(plan.backward_steps(), plan.steps());
        Self {
            steps: scheduled(plan.steps()),
            backward: differs.then(|| scheduled(plan.backward_steps())),
            fields: plan.spec().fields(),
        }
    }

    /// The steps of the backward pass.
    pub(crate) fn backward(&self) -> &[ScheduledStep] {
        self.backward.as_ref().unwrap_or(&self.steps)
    }

    /// Elements of the largest message of the rank's hops.
    pub(crate) fn largest_message(&self) -> usize {
        let steps = self.steps.iter().chain(self.backward());
        let exchanges = steps.filter_map(|step| step.exchange.as_ref());
        let largest = exchanges.map(ScheduledExchange::largest_message);
        largest.max().unwrap_or(0)
    }
}

impl ScheduledStep {
    fn new(step: &Step, problem: &Problem) -> Self {
        let exchange = step.exchange.as_ref();
        Self {
            source: step.source,
            blocks: Step::head_blocks(&step.work),
            guests: Step::head_blocks(&step.guests),
            exchange: exchange.map(|exchange| ScheduledExchange::new(exchange, problem)),
        }
    }
}

impl ScheduledExchange {
    fn new(exchange: &Exchange, problem: &Problem) -> Self {
        let parcel = |message: &Message| Parcel {
            peer: message.peer,
            rows: PackedRows::new(problem.key_shape(), message.rows.clone(), 2),
        };
        let own = |message| QueryParcel::of_owner(message, problem);
        let guest = |message| QueryParcel::of_host(message, problem);
        Self {
            distance: exchange.distance,
            send: exchange.send.as_ref().map(parcel),
            receive: exchange.receive.as_ref().map(parcel),
            send_queries: exchange.send_queries.as_ref().map(own),
            receive_queries: exchange.receive_queries.as_ref().map(guest),
        }
    }

    fn largest_message(&self) -> usize {
        let rows = [&self.send, &self.receive].into_iter().flatten();
        let queries = [&self.send_queries, &self.receive_queries];
        let queries = queries.into_iter().flatten();
        let lens = rows.map(|parcel| parcel.rows.len());
        lens.chain(queries.map(|parcel| parcel.rows.len()))
            .max()
            .unwrap_or(0)
    }
}

impl QueryParcel {
    /// For the rank whose queries travel.
    pub(crate) fn of_owner(message: &Message, problem: &Problem) -> Self {
        Self::new(message.peer, problem.query_shape(), message.rows.clone())
    }

    /// For the rank that they visit: there, the rows of a head come one after the other.
    fn of_host(message: &Message, problem: &Problem) -> Self {
        let count = |entry: &HeadRows| entry.count();
        let packed = |entry: &HeadRows| HeadRows {
            heads: entry.heads.clone(),
            runs: vec![Rows {
                first_row: 0,
                row_step: 1,
                count: entry.count(),
                first_position: 0,
                position_step: 1,
            }],
        };
        let shape = TensorShape {
            rows: message.rows.iter().map(count).max().unwrap_or(0),
            ..problem.query_shape()
        };
        let rows = message.rows.iter().map(packed).collect();
        Self::new(message.peer, shape, rows)
    }

    fn new(peer: Rank, shape: TensorShape, rows: Vec<HeadRows>) -> Self {
        let statistic = TensorShape {
            head_dim: 1,
            ..shape
        };
        let most = rows.iter().map(HeadRows::count).max().unwrap_or(0);
        let statistics = PackedRows::new(statistic, rows.clone(), 2);
        let gradients = PackedRows::new(shape, rows.clone(), 1);
        let rows = PackedRows::new(shape, rows, 2).with_room_for(most, shape.batch);
        let mut grad_output_layout = rows.layout.clone();
        for base in &mut grad_output_layout.head_base {
            *base += rows.part_len;
        }
        Self {
            peer,
            shape,
            rows,
            grad_output_layout,
            statistics,
            gradients,
        }
    }

    /// The shape of the numbers that go along.
    pub(crate) fn statistic_shape(&self) -> TensorShape {
        TensorShape {
            head_dim: 1,
            ..self.shape
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
