//! Properties of plans (and of what is estimated from them), judged by enumeration.

mod cases;
mod enumeration;

use std::collections::{BTreeMap, BTreeSet};

use enumeration::{Pair, check_rows, counted, packed_positions, plans, positions};
use proptest::prelude::*;
use ring_core::{
    AttentionSpec, CommunicationEstimate, Documents, Pattern, Plan, Shape, Sharding,
    oracle::multiplicity,
};

/// Rows that `rank` must receive: (head, position) of keys that it does not own and that are visible in some batch entry.
fn visible_elsewhere(spec: &AttentionSpec, rank: usize) -> BTreeSet<(usize, i64)> {
    let own: BTreeSet<i64> = positions(spec, rank, true).into_iter().collect();
    let queries = positions(spec, rank, false);
    let mut needed = BTreeSet::new();
    for head in 0..spec.shape.kv_heads {
        for m in (0..spec.key_length as i64).filter(|m| !own.contains(m)) {
            let mut entries = 0..spec.shape.batch;
            if entries.any(|entry| {
                queries
                    .iter()
                    .any(|&n| multiplicity(spec, entry, head, n, m) > 0)
            }) {
                needed.insert((head, m));
            }
        }
    }
    needed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_pair_is_counted_as_often_as_its_branches_hold_it(spec in cases::any_spec(60)) {
        let mut total: BTreeMap<Pair, usize> = BTreeMap::new();
        let mut work = 0;
        for plan in plans(&spec) {
            let pairs = counted(&plan, plan.steps());
            let group = spec.shape.query_heads / spec.shape.kv_heads;
            let own: usize = pairs.values().sum::<usize>() * group;
            prop_assert_eq!(plan.pairs(), own as u128, "the plan knows its work");
            work += own;
            for (pair, count) in pairs {
                *total.entry(pair).or_insert(0) += count;
            }
        }
        let mut expected = 0;
        for (entry, head) in (0..spec.shape.batch).flat_map(|entry| (0..spec.shape.kv_heads).map(move |head| (entry, head))) {
            for query in 0..spec.query_length as i64 {
                let n = query + spec.query_offset;
                for m in 0..spec.key_length as i64 {
                    let count = multiplicity(&spec, entry, head, n, m);
                    expected += count * spec.shape.query_heads / spec.shape.kv_heads;
                    prop_assert_eq!(total.get(&(entry, head, n, m)).copied().unwrap_or(0), count,
                        "entry {} head {} query {} key {}", entry, head, n, m);
                }
            }
        }
        prop_assert_eq!(work, expected);
    }

    #[test]
    fn what_travels_is_what_is_visible_each_row_once(spec in cases::any_spec(50)) {
        for plan in plans(&spec) {
            let mut received = BTreeSet::new();
            for exchange in plan.exchanges() {
                prop_assert!(exchange.send.is_some() || exchange.receive.is_some(), "dead hop");
                let Some(message) = &exchange.receive else { continue };
                for (head, positions) in packed_positions(message) {
                    prop_assert!(!positions.is_empty(), "empty head in a message");
                    for position in positions {
                        prop_assert!(received.insert((head, position)), "row twice");
                    }
                }
            }
            let needed = visible_elsewhere(&spec, plan.rank());
            prop_assert_eq!(&received, &needed);
            let estimate = CommunicationEstimate::new(&plan);
            let row_bytes = spec.shape.batch as u64 * spec.row_bytes();
            prop_assert_eq!(estimate.forward_received, needed.len() as u64 * row_bytes);
            prop_assert_eq!(
                estimate.received_per_branch.iter().sum::<u64>(),
                estimate.forward_received
            );
        }
    }

    #[test]
    fn every_send_has_its_receive(spec in cases::any_spec(60)) {
        let plans = plans(&spec);
        let mut sends = BTreeMap::new();
        let mut receives = BTreeMap::new();
        for plan in &plans {
            let mut before = 0;
            for exchange in plan.exchanges() {
                prop_assert!(exchange.distance > before, "hops ascend");
                before = exchange.distance;
                if let Some(message) = &exchange.send {
                    let own_keys = positions(&spec, plan.rank(), true);
                    for run in message.rows.iter().flat_map(|entry| &entry.runs) {
                        check_rows(run, &own_keys);
                    }
                    sends.insert((plan.rank(), message.peer, exchange.distance), message.rows.clone());
                }
                if let Some(message) = &exchange.receive {
                    receives.insert((message.peer, plan.rank(), exchange.distance), message.rows.clone());
                }
            }
        }
        prop_assert_eq!(sends, receives);
    }

    #[test]
    fn a_plan_survives_being_written_and_read(spec in cases::any_spec(60)) {
        let plan = Plan::new(&spec, spec.world_size - 1).unwrap();
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }
}

fn spec(
    pattern: Pattern,
    heads: usize,
    length: usize,
    sharding: Sharding,
    ranks: usize,
) -> AttentionSpec {
    let shape = Shape {
        batch: 1,
        query_heads: heads,
        kv_heads: heads,
        head_dim: 4,
    };
    AttentionSpec::new(pattern, shape, length)
        .unwrap()
        .sharded(sharding, ranks)
        .unwrap()
}

#[test]
fn longnet_patterns_receive_exactly_the_lower_bound() {
    for (length, ranks, lengths, rates) in [
        (1024, 4, vec![64, 512, 1024], vec![1, 2, 4]),
        (1024, 8, vec![256, 512, 1024], vec![1, 2, 8]),
        (4096, 4, vec![128, 256, 512], vec![1, 2, 4]),
        (4096, 16, vec![512, 1024, 4096], vec![1, 4, 16]),
    ] {
        let heads = *rates.last().unwrap();
        let spec = spec(
            Pattern::dilated(&lengths, &rates).unwrap(),
            heads,
            length,
            Sharding::Contiguous,
            ranks,
        );
        let shard = length / ranks;
        let mut rows = 0;
        let mut before = 0;
        for (&w, &r) in lengths.iter().zip(&rates) {
            if w > shard {
                rows += (w - shard.max(before)) / r;
            }
            before = w;
        }
        let v_min = rows as u64 * heads as u64 * spec.row_bytes();
        for plan in plans(&spec) {
            assert_eq!(CommunicationEstimate::new(&plan).forward_received, v_min);
        }
    }
}

#[test]
fn full_attention_takes_one_hop_less_than_ranks_of_one_shard_each() {
    for sharding in [Sharding::Contiguous, Sharding::Zigzag] {
        let spec = spec(Pattern::full(), 2, 96, sharding, 6);
        for plan in plans(&spec) {
            let estimate = CommunicationEstimate::new(&plan);
            assert_eq!(estimate.hops, 5);
            assert_eq!(
                estimate.forward_received,
                5 * (96 / 6) * 2 * spec.row_bytes()
            );
        }
    }
}

#[test]
fn causal_contiguous_receives_nothing_from_the_future() {
    let spec = spec(Pattern::full().causal(), 1, 40, Sharding::Contiguous, 4);
    let received: Vec<u64> = plans(&spec)
        .iter()
        .map(|plan| CommunicationEstimate::new(plan).forward_received / spec.row_bytes())
        .collect();
    assert_eq!(received, [0, 10, 20, 30]);
}

#[test]
fn segments_within_a_shard_need_nobody() {
    let pattern = Pattern::dilated(&[16, 32], &[1, 2]).unwrap().causal();
    for plan in plans(&spec(pattern, 4, 256, Sharding::Contiguous, 8)) {
        assert_eq!(plan.exchanges().count(), 0);
        assert_eq!(plan.steps().len(), 1);
    }
}

#[test]
fn the_size_of_a_plan_does_not_depend_on_the_length() {
    let size = |scale: usize| {
        let pattern = Pattern::dilated(&[2048, 8192, 32768 * scale], &[1, 4, 16])
            .unwrap()
            .causal();
        let spec = spec(pattern, 16, 65536 * scale, Sharding::Zigzag, 8);
        serde_json::to_string(&Plan::new(&spec, 3).unwrap())
            .unwrap()
            .len()
    };
    let (small, large) = (size(1), size(4096));
    assert!(
        large < 2 * small,
        "{small} bytes at 64K, {large} at 256M positions"
    );
}

/// Work of the slowest rank over the mean.
fn imbalance(pattern: Pattern, length: usize, sharding: Sharding, ranks: usize) -> f64 {
    let spec = spec(pattern, 4, length, sharding, ranks);
    let work: Vec<f64> = plans(&spec)
        .iter()
        .map(|plan| plan.pairs() as f64)
        .collect();
    let mean = work.iter().sum::<f64>() / ranks as f64;
    work.into_iter().fold(0.0, f64::max) / mean
}

#[test]
fn zigzag_balances_causal_work() {
    let longnet =
        |lengths: &[usize], rates: &[usize]| Pattern::dilated(lengths, rates).unwrap().causal();
    for ranks in [2, 3, 4, 5, 8, 16, 64] {
        for pattern in [
            Pattern::full().causal(),
            // Segments that divide the length, whether chunks divide them or not.
            longnet(&[2048, 4096, 8192], &[1, 2, 4]),
            longnet(&[1024, 8192, 65536], &[1, 4, 16]),
            longnet(&[65536], &[1]),
            longnet(&[32768, 65536], &[2, 8]),
        ] {
            let slowest = imbalance(pattern.clone(), 65536, Sharding::Zigzag, ranks);
            assert!(slowest < 1.01, "{pattern} on {ranks} ranks: {slowest}");
        }
        for window in [1, 16, 256, 4095, 65536 / 16] {
            let pattern = Pattern::full().causal().with_window(Some(window), None);
            let slowest = imbalance(pattern, 65536, Sharding::Zigzag, ranks);
            assert!(
                slowest < 1.05,
                "window {window} on {ranks} ranks: {slowest}"
            );
        }
    }
    let contiguous = imbalance(Pattern::full().causal(), 65536, Sharding::Contiguous, 8);
    assert!(contiguous > 1.8, "{contiguous}");
}

#[test]
fn a_window_takes_the_hops_and_rows_that_it_reaches() {
    let window = |left, right| Pattern::full().with_window(left, right);
    for (pattern, rows) in [
        // Ten rows of the rank before, from the second rank on.
        (window(Some(10), Some(0)), [0, 10, 10, 10, 10, 10]),
        (window(Some(0), Some(3)), [3, 3, 3, 3, 3, 0]),
        // A whole shard and four rows of the one before it.
        (window(Some(20), Some(0)), [0, 16, 20, 20, 20, 20]),
        (window(Some(0), Some(0)), [0; 6]),
        (window(Some(2), Some(1)), [1, 3, 3, 3, 3, 2]),
    ] {
        let spec = spec(pattern.clone(), 2, 96, Sharding::Contiguous, 6);
        for (plan, rows) in plans(&spec).iter().zip(rows) {
            let estimate = CommunicationEstimate::new(plan);
            let expected = rows * 2 * spec.row_bytes();
            assert_eq!(
                estimate.forward_received,
                expected,
                "{pattern} on rank {}",
                plan.rank()
            );
        }
    }
}

#[test]
fn hops_that_nobody_sees_across_do_not_happen() {
    let pattern = Pattern::full().with_window(Some(10), Some(0));
    let plans_of_all = plans(&spec(pattern, 2, 64 * 128, Sharding::Contiguous, 64));
    for plan in &plans_of_all[1..63] {
        // From the rank before, to the rank after: one hop of 63.
        assert_eq!(plan.exchanges().count(), 1);
    }
    // Documents that end where shards do: nothing travels.
    let documents = Documents::new(vec![128; 64]);
    let packed = spec(Pattern::full(), 2, 64 * 128, Sharding::Contiguous, 64)
        .with_documents(documents)
        .unwrap();
    for plan in plans(&packed) {
        assert_eq!(plan.exchanges().count(), 0);
        assert_eq!(plan.pairs(), 2 * 128 * 128);
    }
}

#[test]
fn the_work_of_a_window_grows_with_the_length_not_with_its_square() {
    let pairs = |length: usize| {
        let pattern = Pattern::full().causal().with_window(Some(255), None);
        let spec = spec(pattern, 1, length, Sharding::Zigzag, 4);
        plans(&spec).iter().map(Plan::pairs).sum::<u128>()
    };
    for length in [8192, 32768, 131_072] {
        assert_eq!(pairs(length), 256 * length as u128 - 255 * 256 / 2);
    }
}

#[test]
fn documents_and_padding_may_differ_from_entry_to_entry() {
    let mut spec = spec(Pattern::full(), 1, 40, Sharding::Contiguous, 2);
    spec.shape.batch = 3;
    let spec = spec
        .with_documents(Documents::per_entry(vec![
            vec![40],
            vec![25, 15],
            vec![20, 20],
        ]))
        .and_then(|spec| spec.with_key_lengths(vec![40, 22, 40]))
        .unwrap();
    let plans = plans(&spec);
    // Entry 0: all. Entry 1: the first document without its last 3 keys. Entry 2: two halves.
    let pairs: u128 = plans.iter().map(Plan::pairs).sum();
    assert_eq!(pairs, 40 * 40 + 25 * 22 + 2 * 20 * 20);
    // Rows that one entry needs travel for all.
    assert_eq!(
        plans[1]
            .exchanges()
            .next()
            .unwrap()
            .receive
            .as_ref()
            .unwrap()
            .row_count(),
        20
    );
}

#[test]
fn masks_and_scores_that_cannot_be_are_refused() {
    let base = || spec(Pattern::full(), 3, 8, Sharding::Contiguous, 2);
    let reason =
        |result: Result<AttentionSpec, ring_core::SpecError>| result.unwrap_err().to_string();
    let causal = Pattern::full().causal();
    assert!(
        AttentionSpec::new(
            causal.clone().with_window(Some(3), Some(0)),
            base().shape,
            8
        )
        .is_ok()
    );
    let contradiction = AttentionSpec::new(causal.with_window(None, Some(2)), base().shape, 8);
    assert!(reason(contradiction).contains("causal"));
    let lengths = |lengths: &[usize]| base().with_documents(Documents::new(lengths.to_vec()));
    assert!(lengths(&[3, 0, 5]).is_ok());
    assert!(reason(lengths(&[3, 4])).contains("7 positions together, but there are 8 keys"));
    assert!(reason(lengths(&[usize::MAX, 9])).contains("8 keys"));
    let of_two = Documents::per_entry(vec![vec![8], vec![8]]);
    assert!(reason(base().with_documents(of_two)).contains("2 batch entries, there are 1"));
    assert!(reason(base().with_key_lengths(vec![8, 8])).contains("2 batch entries, there are 1"));
    assert!(reason(base().with_key_lengths(vec![9])).contains("key length 9"));
    for softcap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(reason(base().with_softcap(softcap)).contains("softcap"));
    }
    for dropout in [-0.1, 1.0, f32::NAN] {
        assert!(reason(base().with_dropout(dropout)).contains("[0, 1)"));
    }
    assert!(
        reason(base().with_alibi_slopes(vec![0.5; 2])).contains("2 ALiBi slopes for 3 query heads")
    );
    assert!(reason(base().with_alibi_slopes(vec![0.5, f32::NAN, 0.1])).contains("slope 1"));
}

#[test]
fn impossible_computations_are_refused() {
    let shape = Shape {
        batch: 1,
        query_heads: 3,
        kv_heads: 2,
        head_dim: 4,
    };
    assert!(AttentionSpec::new(Pattern::full(), shape, 8).is_err());
    let shape = Shape {
        kv_heads: 0,
        ..shape
    };
    assert!(AttentionSpec::new(Pattern::full(), shape, 8).is_err());
    let shape = Shape {
        kv_heads: 3,
        head_dim: 0,
        ..shape
    };
    assert!(AttentionSpec::new(Pattern::full(), shape, 8).is_err());
    let shape = Shape {
        head_dim: 4,
        ..shape
    };
    let good = AttentionSpec::new(Pattern::full(), shape, 8).unwrap();
    assert!(good.clone().with_scale(f32::NAN).is_err());
    assert!(good.clone().sharded(Sharding::Zigzag, 0).is_err());
    assert!(good.clone().with_lengths(usize::MAX, 8).is_err());
    assert!(Plan::new(&good, 1).is_err());
}
