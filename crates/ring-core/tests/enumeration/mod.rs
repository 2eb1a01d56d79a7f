//! What a plan says, written out pair by pair and row by row.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;

use ring_core::{AttentionSpec, Exchange, HeadWork, Member, Message, Plan, Source, Step};
use ring_kernels::Rows;

/// A pair of a key/value head: batch entry, head, query position, key position.
pub(crate) type Pair = (usize, usize, i64, i64);

/// Position of every local row of a rank.
pub(crate) fn positions(spec: &AttentionSpec, rank: usize, keys: bool) -> Vec<i64> {
    let (sharding, length, offset) = if keys {
        (spec.key_sharding, spec.key_length, 0)
    } else {
        (spec.query_sharding, spec.query_length, spec.query_offset)
    };
    sharding
        .spans(length, spec.world_size, rank)
        .iter()
        .flat_map(|span| span.start..span.end)
        .map(|position| position as i64 + offset)
        .collect()
}

/// Position of every row that a rank computes with: its own, or if heads are divided those of all that hold the same positions.
pub(crate) fn place_positions(plan: &Plan, keys: bool) -> Vec<i64> {
    let Some(regroup) = plan.regroup() else {
        return positions(plan.spec(), plan.rank(), keys);
    };
    let mut all = BTreeMap::new();
    for member in &regroup.members {
        let runs = if keys { &member.keys } else { &member.queries };
        let own = positions(plan.spec(), member.rank, keys);
        let mut told = Vec::new();
        for run in runs {
            for i in 0..run.count {
                told.push(run.position(i));
                assert!(all.insert(run.row(i), run.position(i)).is_none());
            }
        }
        assert_eq!(told, own, "rank {} among {}", member.rank, plan.rank());
    }
    assert!(all.keys().copied().eq(0..all.len()), "rows without a gap");
    all.into_values().collect()
}

/// This rank among those that divide the heads.
pub(crate) fn own_member(plan: &Plan) -> Option<&Member> {
    let mut members = plan.regroup()?.members.iter();
    members.find(|member| member.rank == plan.rank())
}

/// The plans of all ranks.
pub(crate) fn plans(spec: &AttentionSpec) -> Vec<Plan> {
    (0..spec.world_size)
        .map(|rank| Plan::new(spec, rank).unwrap())
        .collect()
}

/// Positions of the rows of a message, by head, in packed order.
pub(crate) fn packed_positions(message: &Message) -> BTreeMap<usize, Vec<i64>> {
    let mut by_head = BTreeMap::new();
    for entry in &message.rows {
        for &head in &entry.heads {
            let positions = entry
                .runs
                .iter()
                .flat_map(|run| (0..run.count).map(|i| run.position(i)))
                .collect();
            assert!(
                by_head.insert(head, positions).is_none(),
                "head packed twice"
            );
        }
    }
    by_head
}

pub(crate) fn check_rows(rows: &Rows, positions: &[i64]) {
    for i in 0..rows.count {
        assert_eq!(positions[rows.row(i)], rows.position(i));
    }
}

/// The pairs that `steps` of a plan count, and how often; checks on the way that every row stands where the block says.
pub(crate) fn counted(plan: &Plan, steps: &[Step]) -> BTreeMap<Pair, usize> {
    let group = plan.spec().shape.query_heads / plan.spec().shape.kv_heads;
    let own_queries = place_positions(plan, false);
    let own_keys = place_positions(plan, true);
    let mut pairs = Pairs::of(plan);
    let mut exchange: Option<&Exchange> = None;
    for step in steps {
        let rows = exchange.and_then(|exchange| exchange.receive.as_ref());
        let rows = rows.map(packed_positions);
        let queries = exchange.and_then(|exchange| exchange.receive_queries.as_ref());
        let queries = queries.map(packed_positions);
        for work in &step.work {
            for &head in &work.kv_heads {
                let keys = match step.source {
                    Source::Own => &own_keys,
                    Source::Slot(_) => &rows.as_ref().unwrap()[&head],
                    Source::Nothing => panic!("work on nothing"),
                };
                pairs.count(work, head, &own_queries, keys);
            }
        }
        for work in &step.guests {
            for &head in &work.kv_heads {
                let queries = queries.as_ref().unwrap();
                for query_head in head * group..(head + 1) * group {
                    assert_eq!(queries[&query_head], queries[&(head * group)]);
                }
                pairs.count(work, head, &queries[&(head * group)], &own_keys);
            }
        }
        exchange = step.exchange.as_ref();
    }
    pairs.counts
}

/// Pairs of a rank, counted.
struct Pairs<'a> {
    spec: &'a AttentionSpec,
    first_head: usize,
    counts: BTreeMap<Pair, usize>,
}

impl<'a> Pairs<'a> {
    fn of(plan: &'a Plan) -> Self {
        Self {
            spec: plan.spec(),
            first_head: own_member(plan).map_or(0, |member| member.kv_heads.start),
            counts: BTreeMap::new(),
        }
    }

    /// Counts those of one head.
    fn count(&mut self, work: &HeadWork, head: usize, queries: &[i64], keys: &[i64]) {
        for block in work.blocks.iter().flat_map(|planned| planned.blocks()) {
            check_rows(&block.queries, queries);
            check_rows(&block.keys, keys);
            let mut any = false;
            for i in 0..block.queries.count {
                for j in 0..block.keys.count {
                    let (n, m) = (block.queries.position(i), block.keys.position(j));
                    if self.spec.pattern.mask().admits(n, m) {
                        any = true;
                        for &entry in &work.entries {
                            let pair = (entry, self.first_head + head, n, m);
                            *self.counts.entry(pair).or_insert(0) += 1;
                        }
                    }
                }
            }
            assert!(any, "a block without any pair: {block:?}");
        }
    }
}
