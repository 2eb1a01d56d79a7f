//! Random computations, shared by the property tests.

use proptest::prelude::*;
use ring_core::{AttentionSpec, HeadOffsets, Mixing, Pattern, Shape, Sharding};

fn any_sharding() -> impl Strategy<Value = Sharding> {
    prop_oneof![
        Just(Sharding::Contiguous),
        Just(Sharding::Zigzag),
        Just(Sharding::Striped { chunk_size: None }),
        (1_usize..7).prop_map(|size| Sharding::Striped {
            chunk_size: Some(size)
        }),
    ]
}

fn any_pattern() -> impl Strategy<Value = Pattern> {
    let branches = prop_oneof![
        3 => prop::collection::vec((1_usize..70, 1_usize..6), 1..4),
        // LongNet-like: nested
        2 => (1_usize..4, 1_usize..4).prop_map(|(first, count)| {
            (0..count).map(|i| ((first * 8) << i, 1 << i)).collect()
        }),
    ];
    let dilated = branches.prop_map(|branches| {
        let (lengths, rates): (Vec<usize>, Vec<usize>) = branches.into_iter().unzip();
        Pattern::dilated(&lengths, &rates).unwrap()
    });
    let base = prop_oneof![1 => Just(Pattern::full()), 4 => dilated];
    (base, any::<bool>(), any::<bool>()).prop_map(|(pattern, causal, blocked)| {
        let pattern = if causal { pattern.causal() } else { pattern };
        if blocked {
            pattern.with_offsets(HeadOffsets::Blocked)
        } else {
            pattern
        }
    })
}

/// Any computation of up to `max_length` positions on up to 8 ranks: ragged lengths, empty shards, cross-attention.
pub(crate) fn any_spec(max_length: usize) -> impl Strategy<Value = AttentionSpec> {
    let heads = (1_usize..6, 1_usize..3);
    let lengths = prop_oneof![
        2 => (0..max_length).prop_map(|length| (length, length)),
        1 => (0..max_length, 0..max_length),
    ];
    let group = (
        1_usize..9,
        any_sharding(),
        prop::option::weighted(0.2, any_sharding()),
    );
    let options = (any::<bool>(), prop::option::weighted(0.2, -20_i64..20));
    (any_pattern(), heads, lengths, group, options).prop_map(
        |(pattern, (kv_heads, group_size), (queries, keys), (ranks, sharding, other), options)| {
            let (head_groups, offset) = options;
            let pattern = if head_groups && kv_heads >= pattern.branches().len() {
                pattern.with_mixing(Mixing::HeadGroups)
            } else {
                pattern
            };
            let shape = Shape {
                batch: 1,
                query_heads: kv_heads * group_size,
                kv_heads,
                head_dim: 3,
            };
            let spec = AttentionSpec::new(pattern, shape, 0)
                .and_then(|spec| spec.with_lengths(queries, keys))
                .and_then(|spec| spec.sharded(sharding, ranks))
                .unwrap();
            let spec = match other {
                Some(key_sharding) => spec.with_key_sharding(key_sharding),
                None => spec,
            };
            match offset {
                Some(offset) => spec.with_query_offset(offset),
                None => spec,
            }
        },
    )
}
