//! What a plan needs of memory, before it runs.

use ring_kernels::{Block, Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    estimate::MemberBytes,
    plan::{Exchange, Message, Plan, Step},
};

/// Bytes of memory that one rank needs for one attention computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryEstimate {
    /// The rank's queries.
    pub query: u64,
    /// The rank's keys and values.
    pub key_value: u64,
    /// The rank's output and log-sum-exp.
    pub output: u64,
    /// Incoming gradient of the output and gradients of queries, keys and values; 0 for a forward pass.
    pub gradients: u64,
    /// If heads are divided: all rows of the rank's part of the heads, their results, and the messages in which they come and go.
    /// 0 otherwise.
    pub divided_heads: u64,
    /// Messages that exist at the same time: the slot computed on, those arriving, those leaving, and in the backward pass
    /// the gradients of a slot, leaving and arriving. The communicator keeps them for its next call. Each is as large as the
    /// largest message of the group; that is taken to be the largest of this rank, which it is, but for a few rows, unless
    /// shards or what is visible to them differ much from rank to rank. Then see [`in_group`](Self::in_group).
    pub exchange_slots: u64,
    /// Running state that is not part of a result, and the kernels' tiles.
    pub scratch: u64,
    /// Sum of all.
    pub total: u64,
    /// What one device would need for the whole sequence.
    pub single_device_total: u64,
    /// `single_device_total / total`.
    pub reduction_factor: f64,
}

impl MemoryEstimate {
    /// Memory of a forward pass; `kernel_scratch` is what the kernels need beside the state.
    pub fn forward(plan: &Plan, kernel_scratch: u64) -> Self {
        Self::new(plan, kernel_scratch, Pass::Forward)
    }

    /// Memory of a backward pass, with everything it needs of the forward pass.
    pub fn backward(plan: &Plan, kernel_scratch: u64) -> Self {
        Self::new(plan, kernel_scratch, Pass::Backward)
    }

    /// Elements of the largest message of the rank's hops; 0 if there is none.
    pub fn largest_message(plan: &Plan) -> u64 {
        let shape = plan.spec().shape;
        let exchanges = steps(plan).filter_map(|step| step.exchange.as_ref());
        let rows = exchanges
            .flat_map(Exchange::messages)
            .map(Message::row_count)
            .max();
        (rows.unwrap_or(0) * shape.batch * 2 * shape.head_dim) as u64
    }

    /// The same estimate, made of `plan`, in a group whose [largest message](Self::largest_message), over all ranks, has `largest`
    /// elements: buffers for messages are as large as that one.
    #[must_use]
    pub fn in_group(mut self, plan: &Plan, largest: u64) -> Self {
        let whole = self.single_device_total;
        self.total -= self.exchange_slots;
        self.exchange_slots = self.exchange_slots / Self::largest_message(plan).max(1) * largest;
        self.total += self.exchange_slots;
        self.reduction_factor = whole as f64 / (self.total as f64).max(1.0);
        self
    }

    fn new(plan: &Plan, kernel_scratch: u64, pass: Pass) -> Self {
        let spec = plan.spec();
        let size = spec.dtype.size() as u64;
        let own = Tensors::of(&plan.problem(), size, pass);
        let (divided_heads, state) = divided(plan, &own, size, pass);
        let exchange_slots = slots(plan, pass);
        let scratch = state + kernel_scratch + lists(plan) + guests(plan, pass);
        let whole = Problem {
            queries: spec.query_length,
            keys: spec.key_length,
            ..plan.problem()
        };
        let whole = Tensors::of(&whole, size, pass);
        let total = own.sum() + divided_heads + exchange_slots + scratch;
        let single_device_total = whole.sum() + whole.state + kernel_scratch;
        Self {
            query: own.query,
            key_value: own.key_value,
            output: own.output,
            gradients: own.gradients,
            divided_heads,
            exchange_slots,
            scratch,
            total,
            single_device_total,
            reduction_factor: single_device_total as f64 / (total as f64).max(1.0),
        }
    }
}

/// What memory is needed for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

/// Bytes of the tensors of a problem, and of what kernels keep beside them.
struct Tensors {
    query: u64,
    key_value: u64,
    output: u64,
    gradients: u64,
    /// Delta, one number for each query.
    delta: u64,
    /// Running state, delta among it.
    state: u64,
}

impl Tensors {
    /// Of elements of `size` bytes.
    fn of(problem: &Problem, size: u64, pass: Pass) -> Self {
        let dim = problem.head_dim as u64;
        let query_rows = (problem.batch * problem.query_heads * problem.queries) as u64;
        let key_rows = (problem.batch * problem.kv_heads * problem.keys) as u64;
        let query = query_rows * dim * size;
        let key_value = 2 * key_rows * dim * size;
        let delta = query_rows * 4;
        // With 16-bit types the f32 sums exist beside the rounded results; each is released once it is rounded.
        let rounded = |results: &[u64]| if size == 4 { 0 } else { sums(results, size) };
        let (gradients, state) = match pass {
            Pass::Backward => {
                let sums = rounded(&[query_rows, key_rows, key_rows].map(|rows| rows * dim));
                (2 * query + key_value, delta + sums)
            }
            // Running maximum and denominator; one of the two becomes the log-sum-exp.
            Pass::Forward => (0, query_rows * 4 + rounded(&[query_rows * dim])),
        };
        Self {
            query,
            key_value,
            output: query_rows * (dim * size + 4),
            gradients,
            delta,
            state,
        }
    }

    fn sum(&self) -> u64 {
        self.query + self.key_value + self.output + self.gradients
    }
}

/// Bytes of the rank's part of the heads and of their messages, and of the running state of whatever the rank computes with.
fn divided(plan: &Plan, own: &Tensors, size: u64, pass: Pass) -> (u64, u64) {
    if plan.regroup().is_none() {
        return (0, own.state);
    }
    let part = Tensors::of(&plan.ring_problem(), size, pass);
    let (mut there, mut back) = (0, 0);
    for pair in MemberBytes::all(plan) {
        let bytes = match pass {
            Pass::Forward => pair.forward,
            Pass::Backward => pair.backward,
        };
        there += bytes.there.sum();
        back += bytes.back.sum();
    }
    let own_delta = match pass {
        Pass::Forward => 0,
        Pass::Backward => own.delta,
    };
    (part.sum() + there.max(back), part.state + own_delta)
}

/// The steps of both passes, those of the backward if they are others.
fn steps(plan: &Plan) -> impl Iterator<Item = &Step> {
    let backward = plan.own_backward_steps().unwrap_or_default();
    plan.steps().iter().chain(backward)
}

/// The most bytes held while sums of f32 are rounded one after the other to results of `size` bytes an element, beyond all results.
pub(crate) fn sums(elements: &[u64], size: u64) -> u64 {
    let all: u64 = elements.iter().sum();
    let mut held = 4 * all;
    let mut most = held;
    for result in elements {
        held += size * result;
        most = most.max(held);
        held -= 4 * result;
    }
    most - size * all
}

/// Bytes of a plan as it is executed: all its blocks written out, and the rows of its messages.
fn lists(plan: &Plan) -> u64 {
    let blocks = |step: &Step| -> usize {
        let work = step.work.iter().chain(&step.guests);
        let planned = work.flat_map(|work| &work.blocks);
        planned.map(|planned| planned.repeat).sum()
    };
    let runs = |exchange: &Exchange| -> usize {
        let rows = exchange.messages().flat_map(|message| &message.rows);
        rows.map(|entry| entry.runs.len()).sum()
    };
    let blocks: usize = steps(plan).map(blocks).sum();
    let exchanges = steps(plan).filter_map(|step| step.exchange.as_ref());
    let runs: usize = exchanges.map(runs).sum();
    (blocks * size_of::<Block>() + runs * size_of::<Rows>()) as u64
}

/// Bytes of the statistics of the queries that visit this rank's keys: those of one hop at a time.
fn guests(plan: &Plan, pass: Pass) -> u64 {
    if pass == Pass::Forward {
        return 0;
    }
    let shape = plan.spec().shape;
    let exchanges = plan.backward_steps().iter();
    let exchanges = exchanges.filter_map(|step| step.exchange.as_ref());
    let rows = exchanges
        .filter_map(|exchange| exchange.receive_queries.as_ref())
        .map(Message::row_count)
        .max();
    // Log-sum-exp and delta, as they came and where they are used.
    (rows.unwrap_or(0) * shape.batch * 4 * size_of::<f32>()) as u64
}

/// Bytes of the buffers that messages lie in: all as large as the largest of them, as many as there are at one time.
fn slots(plan: &Plan, pass: Pass) -> u64 {
    let spec = plan.spec();
    let largest = MemoryEstimate::largest_message(plan);
    let passed = match pass {
        Pass::Forward => plan.steps(),
        Pass::Backward => plan.backward_steps(),
    };
    // One more than there are steps: after the last one, gradients are still on their way.
    let at_steps =
        (0..=passed.len()).flat_map(|index| Held::at(passed, index, plan.lookahead(), pass));
    let size = spec.dtype.size() as u64;
    let buffers = if size == 4 {
        // Rows lie in the buffers of gradients that are gone, and the other way round.
        4 * at_steps
            .map(|held| held.rows + held.gradients)
            .max()
            .unwrap_or(0)
    } else {
        let (rows, gradients) = at_steps.fold((0, 0), |(rows, gradients), held| {
            (held.rows.max(rows), held.gradients.max(gradients))
        });
        size * rows + 4 * gradients
    };
    buffers * largest
}

/// Messages that exist at the same time.
struct Held {
    rows: u64,
    gradients: u64,
}

impl Held {
    /// While step `index` computes, when the exchanges of `lookahead` steps are under way, and right after.
    fn at(steps: &[Step], index: usize, lookahead: usize, pass: Pass) -> [Self; 2] {
        let exchange = |index: Option<usize>| steps.get(index?)?.exchange.as_ref();
        let next = exchange(Some(index));
        let current = exchange(index.checked_sub(1));
        let earlier = exchange(index.checked_sub(2));
        // Gradients travel while the hop right after theirs is computed, or after a gap at once.
        let follows = |later: Option<&Exchange>, hop: Option<&Exchange>| {
            later
                .zip(hop)
                .is_some_and(|(later, hop)| later.distance == hop.distance + 1)
        };
        let under_way = |hop, travels| {
            if travels {
                received(hop) + sent(hop)
            } else {
                0
            }
        };
        let in_flight: u64 = steps
            .iter()
            .skip(index)
            .take(lookahead)
            .map(|step| step.exchange.as_ref())
            .map(|hop| received(hop) + sent(hop))
            .sum();
        let computing = Self {
            rows: received(current) + in_flight,
            gradients: received(current)
                + visited(current)
                + under_way(earlier, follows(current, earlier)),
        };
        let after = Self {
            rows: in_flight,
            gradients: under_way(current, !follows(next, current)),
        };
        [computing, after].map(|held| Self {
            gradients: match pass {
                Pass::Forward => 0,
                Pass::Backward => held.gradients,
            },
            ..held
        })
    }
}

/// Messages of a hop that come here.
fn received(hop: Option<&Exchange>) -> u64 {
    hop.map_or(0, |hop| {
        u64::from(hop.receive.is_some()) + u64::from(hop.receive_queries.is_some())
    })
}

/// Where gradients lie before they are packed, of queries that a hop brought.
fn visited(hop: Option<&Exchange>) -> u64 {
    u64::from(hop.is_some_and(|hop| hop.receive_queries.is_some()))
}

/// Messages of a hop that leave.
fn sent(hop: Option<&Exchange>) -> u64 {
    hop.map_or(0, |hop| {
        u64::from(hop.send.is_some()) + u64::from(hop.send_queries.is_some())
    })
}
