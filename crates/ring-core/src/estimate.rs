//! What a plan costs, before it runs: bytes on the wire and bytes of memory.

use ring_kernels::{Block, Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    place::{Place, Shard},
    plan::{Exchange, Message, Plan, Step},
    progression::{Progression, disjoint_cover},
    regroup::Regroup,
    schedule::QueryParcel,
    selection::{Overlap, entry_classes, head_classes, overlaps, segment_pairs},
    spec::AttentionSpec,
    strategy::Strategy,
};

/// Bytes that one rank exchanges in one attention computation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommunicationEstimate {
    /// Bytes received in the forward pass: key/value rows, and if heads are divided queries and outputs too.
    pub forward_received: u64,
    /// Bytes sent in the forward pass.
    pub forward_sent: u64,
    /// Bytes received in the backward pass: the rows again, and gradients.
    pub backward_received: u64,
    /// Bytes sent in the backward pass.
    pub backward_sent: u64,
    /// Forward bytes received by branch; a row that several branches want counts for the first of them. Sums to
    /// `forward_received`. Empty for strategies by which other rows travel than branches want.
    pub received_per_branch: Vec<u64>,
    /// Rounds of messages in the forward pass: hops in which this rank sends or receives anything, and the two among the ranks
    /// that divide heads.
    pub hops: usize,
}

impl CommunicationEstimate {
    /// The estimate of a plan; exact, byte by byte.
    pub fn new(plan: &Plan) -> Self {
        let spec = plan.spec();
        let mut all = Self {
            forward_received: 0,
            forward_sent: 0,
            backward_received: 0,
            backward_sent: 0,
            received_per_branch: match spec.strategy {
                Strategy::Ring | Strategy::RingQuery => received_per_branch(spec, plan.rank()),
                _ => Vec::new(),
            },
            hops: plan.exchanges().count() + 2 * usize::from(plan.regroup().is_some()),
        };
        for exchange in plan.exchanges() {
            let (received, sent) = Self::of_hop(plan, exchange, false);
            all.forward_received += received;
            all.forward_sent += sent;
        }
        let backward = plan.backward_steps().iter();
        for exchange in backward.filter_map(|step| step.exchange.as_ref()) {
            let (received, sent) = Self::of_hop(plan, exchange, true);
            all.backward_received += received;
            all.backward_sent += sent;
        }
        if let Some(regroup) = plan.regroup() {
            all.add_regroup(plan, regroup);
        }
        all
    }

    /// Bytes that a rank receives and sends because of a hop: rows, and in a backward pass the gradients that go home.
    pub(crate) fn of_hop(plan: &Plan, exchange: &Exchange, backward: bool) -> (u64, u64) {
        let problem = plan.ring_problem();
        let own_size = plan.spec().dtype.size();
        let rows = |message| key_bytes(message, &problem, own_size);
        let (mut received, mut sent) = (rows(&exchange.receive), rows(&exchange.send));
        if backward {
            let gradients = |message| key_bytes(message, &problem, size_of::<f32>());
            let guests = QueryBytes::of(&exchange.receive_queries, &problem, own_size);
            let visitors = QueryBytes::of(&exchange.send_queries, &problem, own_size);
            received += gradients(&exchange.send) + guests.there + visitors.back;
            sent += gradients(&exchange.receive) + visitors.there + guests.back;
        }
        (received, sent)
    }

    /// Adds what ranks that divide heads exchange.
    fn add_regroup(&mut self, plan: &Plan, regroup: &Regroup) {
        let (own, divided) = (plan.problem(), plan.ring_problem());
        let group = own.group_size();
        let size = plan.spec().dtype.size();
        let rows = |runs: &[Rows]| -> usize { runs.iter().map(|run| run.count).sum() };
        let others = regroup.members.iter();
        for member in others.filter(|member| member.rank != plan.rank()) {
            // Own rows of the member's heads go there, their rows of own heads come here.
            let going = Moved {
                queries: own.queries * member.kv_heads.len() * group,
                keys: own.keys * member.kv_heads.len(),
            };
            let coming = Moved {
                queries: rows(&member.queries) * divided.query_heads,
                keys: rows(&member.keys) * divided.kv_heads,
            };
            let bytes = |moved: &Moved, tensors: [usize; 3]| {
                let [of_queries, of_keys, numbers] = tensors;
                let elements = of_queries * moved.queries + of_keys * moved.keys;
                let numbers = numbers * moved.queries * size_of::<f32>();
                (own.batch * (elements * own.head_dim * size + numbers)) as u64
            };
            self.forward_received += bytes(&coming, [1, 2, 0]) + bytes(&going, [1, 0, 1]);
            self.forward_sent += bytes(&going, [1, 2, 0]) + bytes(&coming, [1, 0, 1]);
            self.backward_received += bytes(&coming, [2, 2, 2]) + bytes(&going, [1, 2, 0]);
            self.backward_sent += bytes(&going, [2, 2, 2]) + bytes(&coming, [1, 2, 0]);
        }
    }
}

/// Rows, of all heads that they move for.
struct Moved {
    queries: usize,
    keys: usize,
}

/// Bytes of a message of keys and values, or of their gradients.
fn key_bytes(message: &Option<Message>, problem: &Problem, element: usize) -> u64 {
    message.as_ref().map_or(0, |message| {
        (message.row_count() * problem.batch * 2 * problem.head_dim * element) as u64
    })
}

/// Bytes of a message of queries.
#[derive(Default)]
struct QueryBytes {
    /// With what goes along.
    there: u64,
    /// The gradients.
    back: u64,
}

impl QueryBytes {
    fn of(message: &Option<Message>, problem: &Problem, element: usize) -> Self {
        message.as_ref().map_or(Self::default(), |message| {
            let parcel = QueryParcel::of_owner(message, problem);
            let numbers = parcel.statistics.len() * size_of::<f32>();
            Self {
                there: (parcel.rows.len() * element + numbers) as u64,
                back: (parcel.gradients.len() * size_of::<f32>()) as u64,
            }
        })
    }
}

/// Forward bytes received, by the first branch that wants the row.
fn received_per_branch(spec: &AttentionSpec, rank: usize) -> Vec<u64> {
    let place = Place::of(spec, rank);
    let queries = Shard::queries(spec, place);
    let (classes, entries) = (head_classes(spec, place), entry_classes(spec));
    let mut bytes = vec![0; spec.pattern.branches().len()];
    for distance in 1..Place::ring_size(spec) {
        let keys = Shard::keys(spec, place.further(spec, distance));
        let of_entries = |entries| overlaps(spec, entries, &queries, &keys);
        let overlaps: Vec<Overlap> = entries.iter().flat_map(of_entries).collect();
        for class in &classes {
            let mut pairs = segment_pairs(spec, class, &overlaps);
            pairs.sort_by_key(|pairs| pairs.branch);
            let row_bytes = (class.kv_heads.len() * spec.shape.batch) as u64 * spec.row_bytes();
            let mut sets: Vec<Progression> = Vec::new();
            let mut counted = 0;
            for of_branch in pairs.chunk_by(|a, b| a.branch == b.branch) {
                for pairs in of_branch {
                    let copies = 0..pairs.repeat as i64;
                    sets.extend(copies.map(|copy| pairs.keys.shifted(copy * pairs.period)));
                }
                let rows: usize = disjoint_cover(sets.clone())
                    .iter()
                    .map(Progression::count)
                    .sum();
                bytes[of_branch[0].branch] += (rows - counted) as u64 * row_bytes;
                counted = rows;
            }
        }
    }
    bytes
}

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
    /// Messages that exist at the same time: the slot computed on, the one arriving, the one leaving, and in the backward pass
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
        Self::new(plan, kernel_scratch, false)
    }

    /// Memory of a backward pass, with everything it needs of the forward pass.
    pub fn backward(plan: &Plan, kernel_scratch: u64) -> Self {
        Self::new(plan, kernel_scratch, true)
    }

    /// Elements of the largest message that the rank of `plan` sends or receives; 0 if there is none.
    pub fn largest_message(plan: &Plan) -> u64 {
        let shape = plan.spec().shape;
        let messages = plan.exchanges().flat_map(|hop| [&hop.send, &hop.receive]);
        let rows = messages.flatten().map(Message::row_count).max();
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

    fn new(plan: &Plan, kernel_scratch: u64, backward: bool) -> Self {
        let spec = plan.spec();
        let problem = plan.problem();
        let mut own = Self::tensors(
            spec,
            problem.queries as u64,
            problem.keys as u64,
            kernel_scratch,
            backward,
        );
        own.exchange_slots = slots(plan, backward);
        let lists = lists(plan);
        own.scratch += lists;
        own.total += own.exchange_slots + lists;
        let whole = Self::tensors(
            spec,
            spec.query_length as u64,
            spec.key_length as u64,
            kernel_scratch,
            backward,
        );
        own.single_device_total = whole.total;
        own.reduction_factor = whole.total as f64 / (own.total as f64).max(1.0);
        own
    }

    /// Everything but the exchange, for so many rows.
    fn tensors(
        spec: &AttentionSpec,
        queries: u64,
        keys: u64,
        kernel_scratch: u64,
        backward: bool,
    ) -> Self {
        let (shape, size) = (spec.shape, spec.dtype.size() as u64);
        let dim = shape.head_dim as u64;
        let query_rows = (shape.batch * shape.query_heads) as u64 * queries;
        let key_rows = (shape.batch * shape.kv_heads) as u64 * keys;
        let query = query_rows * dim * size;
        let key_value = 2 * key_rows * dim * size;
        let output = query_rows * (dim * size + 4);
        // With 16-bit types the f32 sums exist beside the rounded results; each is released once it is rounded.
        let rounded = |results: &[u64]| if size == 4 { 0 } else { sums(results, size) };
        let (gradients, state) = if backward {
            let gradients = 2 * query + key_value;
            let delta = query_rows * 4;
            let sums = rounded(&[query_rows, key_rows, key_rows].map(|rows| rows * dim));
            (gradients, delta + sums)
        } else {
            // Running maximum and denominator; one of the two becomes the log-sum-exp.
            (0, query_rows * 4 + rounded(&[query_rows * dim]))
        };
        let scratch = state + kernel_scratch;
        Self {
            query,
            key_value,
            output,
            gradients,
            exchange_slots: 0,
            scratch,
            total: query + key_value + output + gradients + scratch,
            single_device_total: 0,
            reduction_factor: 1.0,
        }
    }
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
        let planned = step.work.iter().flat_map(|work| &work.blocks);
        planned.map(|planned| planned.repeat).sum()
    };
    let runs = |exchange: &Exchange| -> usize {
        let messages = [&exchange.send, &exchange.receive].into_iter().flatten();
        messages
            .flat_map(|message| &message.rows)
            .map(|entry| entry.runs.len())
            .sum()
    };
    let blocks: usize = plan.steps().iter().map(blocks).sum();
    let runs: usize = plan.exchanges().map(runs).sum();
    (blocks * size_of::<Block>() + runs * size_of::<Rows>()) as u64
}

/// Bytes of the buffers that messages lie in: all as large as the largest of them, as many as there are at one time.
fn slots(plan: &Plan, backward: bool) -> u64 {
    let spec = plan.spec();
    let largest = MemoryEstimate::largest_message(plan);
    // One more than there are steps: after the last one, gradients are still on their way.
    let at_steps = (0..=plan.steps().len()).flat_map(|index| Held::at(plan, index, backward));
    let size = spec.dtype.size() as u64;
    let buffers = if size == 4 {
        // Keys and values lie in the buffers of gradients that are gone, and the other way round.
        4 * at_steps
            .map(|held| held.key_values + held.gradients)
            .max()
            .unwrap_or(0)
    } else {
        let (key_values, gradients) = at_steps.fold((0, 0), |(key_values, gradients), held| {
            (
                held.key_values.max(key_values),
                held.gradients.max(gradients),
            )
        });
        size * key_values + 4 * gradients
    };
    buffers * largest
}

/// Messages that exist at the same time.
struct Held {
    key_values: u64,
    gradients: u64,
}

impl Held {
    /// While step `index` computes, and right after.
    fn at(plan: &Plan, index: usize, backward: bool) -> [Self; 2] {
        let exchange = |index: Option<usize>| plan.steps().get(index?)?.exchange.as_ref();
        let next = exchange(Some(index));
        let current = exchange(index.checked_sub(1));
        let earlier = exchange(index.checked_sub(2));
        let received =
            |hop: Option<&Exchange>| u64::from(hop.is_some_and(|hop| hop.receive.is_some()));
        let sent = |hop: Option<&Exchange>| u64::from(hop.is_some_and(|hop| hop.send.is_some()));
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
        let in_flight = received(next) + sent(next);
        let computing = Self {
            key_values: received(current) + in_flight,
            gradients: received(current) + under_way(earlier, follows(current, earlier)),
        };
        let after = Self {
            key_values: in_flight,
            gradients: under_way(current, !follows(next, current)),
        };
        [computing, after].map(|held| Self {
            gradients: if backward { held.gradients } else { 0 },
            ..held
        })
    }
}
