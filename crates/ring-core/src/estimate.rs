//! What a plan costs on the wire, before it runs.

use ring_kernels::{Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    place::{Place, Shard},
    plan::{Exchange, Message, Plan},
    progression::{Progression, disjoint_cover},
    regroup::Member,
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
    /// Forward bytes received from ranks that hold the same positions and divide the heads; part of `forward_received`.
    pub forward_regrouped: u64,
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
            forward_regrouped: 0,
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
        for pair in MemberBytes::all(plan) {
            all.forward_regrouped += pair.forward.received();
            all.forward_sent += pair.forward.sent();
            all.backward_received += pair.backward.received();
            all.backward_sent += pair.backward.sent();
        }
        all.forward_received += all.forward_regrouped;
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
}

/// Bytes that a rank exchanges with one of those that hold the same positions.
pub(crate) struct MemberBytes {
    pub(crate) forward: RegroupBytes,
    pub(crate) backward: RegroupBytes,
}

/// Bytes of one pass.
pub(crate) struct RegroupBytes {
    /// Own rows of the other's heads.
    pub(crate) there: Both,
    /// Results for them.
    pub(crate) back: Both,
}

/// Bytes both ways.
pub(crate) struct Both {
    sent: u64,
    received: u64,
}

impl MemberBytes {
    /// With every other member; nothing if heads are not divided.
    pub(crate) fn all(plan: &Plan) -> Vec<Self> {
        let members = plan
            .regroup()
            .into_iter()
            .flat_map(|regroup| &regroup.members);
        let others = members.filter(|member| member.rank != plan.rank());
        others.map(|member| Self::with(plan, member)).collect()
    }

    fn with(plan: &Plan, member: &Member) -> Self {
        let (own, divided) = (plan.problem(), plan.ring_problem());
        let group = own.group_size();
        let size = plan.spec().dtype.size();
        let rows = |runs: &[Rows]| -> usize { runs.iter().map(|run| run.count).sum() };
        // Own rows of the member's heads go there, its rows of own heads come here.
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
        let pass = |there, back| RegroupBytes {
            there: Both {
                sent: bytes(&going, there),
                received: bytes(&coming, there),
            },
            back: Both {
                sent: bytes(&coming, back),
                received: bytes(&going, back),
            },
        };
        Self {
            forward: pass([1, 2, 0], [1, 0, 1]),
            backward: pass([2, 2, 2], [1, 2, 0]),
        }
    }
}

impl RegroupBytes {
    fn sent(&self) -> u64 {
        self.there.sent + self.back.sent
    }

    fn received(&self) -> u64 {
        self.there.received + self.back.received
    }
}

impl Both {
    pub(crate) fn sum(&self) -> u64 {
        self.sent + self.received
    }
}

/// Rows, of all heads that they move for.
struct Moved {
    queries: usize,
    keys: usize,
}

/// Bytes of a message of keys and values, or of their gradients.
pub(crate) fn key_bytes(message: &Option<Message>, problem: &Problem, element: usize) -> u64 {
    message.as_ref().map_or(0, |message| {
        (message.row_count() * problem.batch * 2 * problem.head_dim * element) as u64
    })
}

/// Bytes of a message of queries.
#[derive(Default)]
pub(crate) struct QueryBytes {
    /// With what goes along.
    pub(crate) there: u64,
    /// The gradients.
    pub(crate) back: u64,
}

impl QueryBytes {
    pub(crate) fn of(message: &Option<Message>, problem: &Problem, element: usize) -> Self {
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
