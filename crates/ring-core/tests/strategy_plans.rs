//! Properties of plans under every strategy: who exchanges what, who computes what, and how many bytes that takes.

mod cases;
mod enumeration;

use std::collections::{BTreeMap, BTreeSet};

use enumeration::{Pair, counted, own_member, packed_positions, plans, positions};
use proptest::prelude::*;
use ring_comm::buffer::DType;
use ring_core::{
    AttentionSpec, CommunicationEstimate, Message, Pattern, Plan, Shape, Sharding, Step, Strategy,
    oracle::multiplicity,
};

/// Messages by sender, receiver and hop.
type Messages = BTreeMap<(usize, usize, usize), Message>;

/// What all ranks send in a pass, and what they receive; of keys and values, or of queries. The peer is left out.
fn messages(plans: &[Plan], pass: fn(&Plan) -> &[Step], queries: bool) -> (Messages, Messages) {
    let (mut sends, mut receives) = (Messages::new(), Messages::new());
    for plan in plans {
        let exchanges = pass(plan).iter().filter_map(|step| step.exchange.as_ref());
        for exchange in exchanges {
            let (send, receive) = match queries {
                true => (&exchange.send_queries, &exchange.receive_queries),
                false => (&exchange.send, &exchange.receive),
            };
            let rank = plan.rank();
            let message = |message: &Message| Message {
                peer: 0,
                ..message.clone()
            };
            if let Some(to) = send {
                // Queries go where the hop's keys would have come from.
                let key = (rank, to.peer, exchange.distance);
                assert!(sends.insert(key, message(to)).is_none());
            }
            if let Some(from) = receive {
                let key = (from.peer, rank, exchange.distance);
                assert!(receives.insert(key, message(from)).is_none());
            }
        }
    }
    (sends, receives)
}

/// Asserts that no rank receives a row twice in a pass.
fn assert_no_row_twice(received: &Messages) {
    let mut seen = BTreeSet::new();
    for (&(_, to, _), message) in received {
        for (head, positions) in packed_positions(message) {
            for position in positions {
                let is_new = seen.insert((to, head, position));
                assert!(is_new, "position {position} of head {head} twice at {to}");
            }
        }
    }
}

/// Asserts that the ranks that divide heads agree who they are and what each gives each.
fn assert_same_members(plans: &[Plan]) {
    for plan in plans {
        let Some(regroup) = plan.regroup() else {
            continue;
        };
        let mut next_head = 0;
        for member in &regroup.members {
            let theirs = &plans[member.rank];
            assert_eq!(theirs.regroup(), Some(regroup));
            assert_eq!(
                member.kv_heads.start, next_head,
                "no head twice, none left out"
            );
            next_head = member.kv_heads.end;
            let count =
                |runs: &[ring_kernels::Rows]| runs.iter().map(|run| run.count).sum::<usize>();
            assert_eq!(count(&member.queries), theirs.problem().queries);
            assert_eq!(count(&member.keys), theirs.problem().keys);
            assert_eq!(member.kv_heads.len(), theirs.ring_problem().kv_heads);
        }
        assert_eq!(next_head, plan.spec().shape.kv_heads);
        assert!(own_member(plan).is_some());
    }
}

/// The pairs of all ranks together.
fn all_counted(plans: &[Plan], pass: fn(&Plan) -> &[Step]) -> BTreeMap<Pair, usize> {
    let mut total = BTreeMap::new();
    for plan in plans {
        for (pair, count) in counted(plan, pass(plan)) {
            *total.entry(pair).or_insert(0) += count;
        }
    }
    total
}

/// The pairs of the computation.
fn defined(spec: &AttentionSpec) -> BTreeMap<Pair, usize> {
    let mut pairs = BTreeMap::new();
    for entry in 0..spec.shape.batch {
        for head in 0..spec.shape.kv_heads {
            for n in (0..spec.query_length as i64).map(|query| query + spec.query_offset) {
                for m in 0..spec.key_length as i64 {
                    let count = multiplicity(spec, entry, head, n, m);
                    if count > 0 {
                        pairs.insert((entry, head, n, m), count);
                    }
                }
            }
        }
    }
    pairs
}

/// Backward bytes of all ranks.
fn backward_bytes(plans: &[Plan]) -> u64 {
    let estimates = plans.iter().map(CommunicationEstimate::new);
    estimates.map(|estimate| estimate.backward_received).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_send_has_its_receive(spec in cases::any_divided_spec(60)) {
        let plans = plans(&spec);
        for pass in [Plan::steps, Plan::backward_steps] {
            for queries in [false, true] {
                let (sends, receives) = messages(&plans, pass, queries);
                assert_no_row_twice(&receives);
                prop_assert_eq!(sends, receives);
            }
        }
        let (queries_forward, _) = messages(&plans, Plan::steps, true);
        prop_assert!(queries_forward.is_empty());
        assert_same_members(&plans);
        let sum = |value: fn(&CommunicationEstimate) -> u64| -> u64 {
            plans.iter().map(|plan| value(&CommunicationEstimate::new(plan))).sum()
        };
        prop_assert_eq!(sum(|bytes| bytes.forward_sent), sum(|bytes| bytes.forward_received));
        prop_assert_eq!(sum(|bytes| bytes.backward_sent), sum(|bytes| bytes.backward_received));
    }

    #[test]
    fn all_ranks_together_count_every_pair_as_often_as_branches_hold_it(spec in cases::any_divided_spec(40)) {
        let plans = plans(&spec);
        let expected = defined(&spec);
        prop_assert_eq!(&all_counted(&plans, Plan::steps), &expected);
        prop_assert_eq!(&all_counted(&plans, Plan::backward_steps), &expected);
        let group = spec.shape.query_heads / spec.shape.kv_heads;
        let pairs: u128 = plans.iter().map(Plan::pairs).sum();
        prop_assert_eq!(pairs, (expected.values().sum::<usize>() * group) as u128);
    }

    #[test]
    fn queries_travel_only_where_that_is_fewer_bytes(spec in cases::any_spec(50), wide in any::<bool>()) {
        let spec = match wide {
            true => spec.with_dtype(DType::BF16),
            false => spec,
        };
        let ring = plans(&spec);
        let spec = spec.with_strategy(Strategy::RingQuery).unwrap();
        let ring_query = plans(&spec);
        prop_assert!(backward_bytes(&ring_query) <= backward_bytes(&ring));
        for (ring, ring_query) in ring.iter().zip(&ring_query) {
            prop_assert_eq!(ring.steps(), ring_query.steps());
        }
    }

    #[test]
    fn an_all_gather_is_all_that_a_rank_does_not_own(spec in cases::any_spec(50)) {
        let spec = spec.with_strategy(Strategy::AllGather).unwrap();
        let heads = (spec.shape.batch * spec.shape.kv_heads) as u64;
        let gradient = 2 * spec.shape.head_dim as u64 * 4;
        for plan in plans(&spec) {
            let own = positions(&spec, plan.rank(), true).len() as u64;
            let others = spec.key_length as u64 - own;
            let ranks = spec.world_size as u64 - 1;
            let estimate = CommunicationEstimate::new(&plan);
            let there = heads * spec.row_bytes();
            prop_assert_eq!(estimate.forward_received, others * there);
            prop_assert_eq!(estimate.forward_sent, ranks * own * there);
            let home = heads * gradient;
            prop_assert_eq!(estimate.backward_received, others * there + ranks * own * home);
            prop_assert_eq!(estimate.backward_sent, ranks * own * there + others * home);
        }
    }
}

fn spec(pattern: Pattern, shape: Shape, length: usize, ranks: usize) -> AttentionSpec {
    AttentionSpec::new(pattern, shape, length)
        .and_then(|spec| spec.sharded(Sharding::Contiguous, ranks))
        .unwrap()
}

#[test]
fn queries_are_two_thirds_of_the_backward_bytes_with_16_bits_and_three_quarters_with_32() {
    let shape = |head_dim| Shape {
        batch: 1,
        query_heads: 2,
        kv_heads: 2,
        head_dim,
    };
    for (dtype, query, keys) in [
        (DType::BF16, 8, 12),
        (DType::F16, 8, 12),
        (DType::F32, 12, 16),
    ] {
        for dim in [4_u64, 64, 1 << 14] {
            let spec = spec(Pattern::full(), shape(dim as usize), 96, 6).with_dtype(dtype);
            let ring = backward_bytes(&plans(&spec));
            let spec = spec.with_strategy(Strategy::RingQuery).unwrap();
            let ring_query = backward_bytes(&plans(&spec));
            // 5 of 6 of the rows of both heads, to each rank.
            let rows = 6 * 80 * 2;
            assert_eq!(ring, rows * keys * dim);
            // Log-sum-exp and delta are two numbers a row, whatever the head size.
            let expected = (query * dim + 8).min(keys * dim);
            assert_eq!(ring_query, rows * expected);
        }
    }
}

#[test]
fn shared_key_heads_make_keys_travel() {
    let shape = Shape {
        batch: 1,
        query_heads: 8,
        kv_heads: 2,
        head_dim: 64,
    };
    let ring = spec(Pattern::full(), shape, 96, 4);
    let ring_query = ring.clone().with_strategy(Strategy::RingQuery).unwrap();
    for (ring, ring_query) in plans(&ring).iter().zip(&plans(&ring_query)) {
        assert_eq!(ring.backward_steps(), ring_query.backward_steps());
    }
}

#[test]
fn divided_heads_receive_what_the_formula_says() {
    let shape = Shape {
        batch: 3,
        query_heads: 24,
        kv_heads: 12,
        head_dim: 16,
    };
    let (length, ranks) = (480_u64, 6_u64);
    for (strategy, members) in [
        (Strategy::HeadParallel, 6),
        (Strategy::Mesh { head_ranks: 6 }, 6),
        (Strategy::Mesh { head_ranks: 3 }, 3),
        (Strategy::Mesh { head_ranks: 2 }, 2),
        (Strategy::Mesh { head_ranks: 1 }, 1),
    ] {
        for (dtype, size) in [(DType::F32, 4), (DType::BF16, 2)] {
            let spec = spec(Pattern::full(), shape, length as usize, ranks as usize)
                .with_dtype(dtype)
                .with_strategy(strategy)
                .unwrap();
            let own = length / ranks;
            let (queries, keys) = (24 / members, 12 / members);
            let row = 16 * size;
            // From each other member, its rows of own heads; and own rows of its heads come back.
            let forward = (queries + 2 * keys) * row + queries * (row + 4);
            let backward =
                (2 * queries + 2 * keys) * row + 8 * queries + (queries + 2 * keys) * row;
            // Round the ring, the rows of the other places, and gradients of those here.
            let places = ranks / members - 1;
            let along = places * own * members * keys * 2 * 16;
            for plan in plans(&spec) {
                let estimate = CommunicationEstimate::new(&plan);
                let regrouped = (members - 1) * own * forward;
                assert_eq!(estimate.forward_regrouped, 3 * regrouped, "{strategy}");
                assert_eq!(estimate.forward_received, 3 * (regrouped + along * size));
                let regrouped = (members - 1) * own * backward;
                let along = along * (size + 4);
                assert_eq!(
                    estimate.backward_received,
                    3 * (regrouped + along),
                    "{strategy}"
                );
            }
        }
    }
}

/// Rows of each head that torchscale's ranks receive, every one: for each branch whose segments are longer than a shard, the
/// dilated keys and values of all other ranks, `(P - 1) N/P / r`, whichever of them are in the same segment or visible
/// (torchscale, `torchscale/component/dilated_attention.py`: `gathering` dilates the shard and has `gather_kv` call `all_gather_func`
/// on it, which picks the segment's ranks, and of a causal model the earlier ones, out of the result).
fn torchscale_rows(branches: &[(usize, usize)], length: usize, ranks: usize) -> usize {
    let shard = length / ranks;
    let gathered = branches.iter().filter(|(segment, _)| *segment > shard);
    gathered.map(|(_, rate)| (ranks - 1) * shard / rate).sum()
}

#[test]
fn longnet_on_64_ranks_receives_a_twentieth_of_torchscale_and_a_two_hundredth_of_a_ring() {
    const BRANCHES: [(usize, usize); 3] = [(32 << 10, 16), (128 << 10, 64), (512 << 10, 256)];
    let (length, ranks) = (1 << 20, 64);
    // A head for every offset of the sparsest branch.
    let shape = Shape {
        batch: 1,
        query_heads: 256,
        kv_heads: 256,
        head_dim: 64,
    };
    let (lengths, rates): (Vec<usize>, Vec<usize>) = BRANCHES.into_iter().unzip();
    let torchscale = torchscale_rows(&BRANCHES, length, ranks);
    let ring = length - length / ranks;
    for causal in [false, true] {
        let pattern = Pattern::dilated(&lengths, &rates).unwrap();
        let pattern = if causal { pattern.causal() } else { pattern };
        let spec = spec(pattern, shape, length, ranks);
        for plan in plans(&spec) {
            let received = plan
                .exchanges()
                .filter_map(|exchange| exchange.receive.as_ref());
            let rows: usize = received.map(Message::row_count).sum();
            let heads = shape.kv_heads;
            assert!(
                torchscale * heads >= 20 * rows,
                "rank {}: {rows}",
                plan.rank()
            );
            assert!(ring * heads >= 200 * rows, "rank {}: {rows}", plan.rank());
            // 16K / 16 + 96K / 64 + 384K / 256 of each head.
            assert!(causal || rows == heads * (1024 + 1536 + 1536));
        }
    }
}
