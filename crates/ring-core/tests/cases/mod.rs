//! Random computations, shared by the property tests.

use proptest::prelude::*;
use ring_core::{AttentionSpec, Documents, HeadOffsets, Mixing, Pattern, Shape, Sharding};

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
    let any_bound = prop_oneof![
        6 => 0_u64..60,
        1 => prop::sample::select(vec![1 << 41, i64::MAX as u64, u64::MAX]),
    ];
    let bound = || prop::option::weighted(0.3, any_bound.clone());
    let window = (bound(), bound());
    (base, any::<bool>(), any::<bool>(), window).prop_map(|(pattern, causal, blocked, window)| {
        let (left, right) = window;
        let pattern = if causal {
            pattern.causal().with_window(left, None)
        } else {
            pattern.with_window(left, right)
        };
        if blocked {
            pattern.with_offsets(HeadOffsets::Blocked)
        } else {
            pattern
        }
    })
}

/// Cuts a sequence of `length` positions at shares of it.
fn documents(length: usize, cuts: &[f64]) -> Vec<usize> {
    let mut ends: Vec<usize> = cuts
        .iter()
        .map(|cut| (cut * length as f64) as usize)
        .collect();
    ends.sort_unstable();
    ends.push(length);
    let mut start = 0;
    ends.iter()
        .map(|&end| end - std::mem::replace(&mut start, end))
        .collect()
}

/// What is the same for all heads and ranks beside pattern and sizes.
#[derive(Clone, Debug)]
struct Extras {
    /// Cuts between documents, in one list for all batch entries or one for each.
    documents: Option<Vec<Vec<f64>>>,
    /// Shares of the keys that are no padding.
    key_lengths: Option<Vec<f64>>,
    softcap: Option<f32>,
    slopes: Option<Vec<f32>>,
    dropout: f32,
}

fn any_extras(batch: usize) -> impl Strategy<Value = Extras> {
    let cuts = || prop::collection::vec(0.0..1.0, 0..5);
    let documents = prop_oneof![
        3 => Just(None),
        1 => cuts().prop_map(|cuts| Some(vec![cuts])),
        1 => prop::collection::vec(cuts(), batch).prop_map(Some),
    ];
    (
        documents,
        prop::option::weighted(0.25, prop::collection::vec(0.0..=1.0, batch)),
        prop::option::weighted(0.25, 0.5..8.0_f32),
        prop::option::weighted(0.25, prop::collection::vec(-0.01..0.5_f32, 16)),
        prop_oneof![3 => Just(0.0), 1 => 0.0..0.9_f32],
    )
        .prop_map(
            |(documents, key_lengths, softcap, slopes, dropout)| Extras {
                documents,
                key_lengths,
                softcap,
                slopes,
                dropout,
            },
        )
}

impl Extras {
    fn added_to(self, spec: AttentionSpec) -> AttentionSpec {
        let keys = spec.key_length;
        let documents = self.documents.map(|lists| {
            let lists: Vec<_> = lists.iter().map(|cuts| documents(keys, cuts)).collect();
            match <[_; 1]>::try_from(lists) {
                Ok([of_all]) => Documents::new(of_all),
                Err(lists) => Documents::per_entry(lists),
            }
        });
        let key_lengths = self.key_lengths.map(|shares| {
            let lengths = shares.iter().map(|share| (share * keys as f64) as usize);
            lengths.collect()
        });
        let heads = spec.shape.query_heads;
        AttentionSpec {
            documents,
            key_lengths,
            softcap: self.softcap,
            alibi_slopes: self.slopes.map(|slopes| slopes[..heads].into()),
            dropout: self.dropout,
            ..spec
        }
    }
}

/// Any computation of up to `max_length` positions on up to 8 ranks: ragged lengths, empty shards, cross-attention.
pub(crate) fn any_spec(max_length: usize) -> impl Strategy<Value = AttentionSpec> {
    let heads = (1_usize..6, 1_usize..3);
    let entries = (0_usize..4)
        .prop_flat_map(|batch| any_extras(batch).prop_map(move |extras| (batch, extras)));
    let lengths = prop_oneof![
        2 => (0..max_length).prop_map(|length| (length, length)),
        1 => (0..max_length, 0..max_length),
    ];
    let group = (
        1_usize..9,
        any_sharding(),
        prop::option::weighted(0.2, any_sharding()),
    );
    let options = (
        any::<bool>(),
        prop::option::weighted(0.2, -20_i64..20),
        entries,
    );
    (any_pattern(), heads, lengths, group, options).prop_map(
        |(pattern, (kv_heads, group_size), (queries, keys), (ranks, sharding, other), options)| {
            let (head_groups, offset, (batch, extras)) = options;
            let pattern = if head_groups && kv_heads >= pattern.branches().len() {
                pattern.with_mixing(Mixing::HeadGroups)
            } else {
                pattern
            };
            let shape = Shape {
                batch,
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
            extras.added_to(match offset {
                Some(offset) => spec.with_query_offset(offset),
                None => spec,
            })
        },
    )
}

/// Any of them, divided by any strategy that can serve.
#[allow(dead_code, reason = "not every test that has these cases divides them")]
pub(crate) fn any_divided_spec(max_length: usize) -> impl Strategy<Value = AttentionSpec> {
    (any_spec(max_length), any::<prop::sample::Index>()).prop_map(|(spec, index)| {
        let candidates = ring_core::Strategy::candidates(&spec);
        let strategy = *index.get(&candidates);
        spec.with_strategy(strategy).unwrap()
    })
}
