//! Which rows of which rank a rank needs: the pattern, applied to pairs of spans.
//!
//! Everything is decided on global positions. What differs from batch entry to batch entry (documents, padding) cuts spans of
//! positions; what moves with the query (causality, windows) cuts row sets to what can see and be seen, and is left to the
//! kernels within them.

use std::collections::BTreeMap;

use ring_kernels::Mask;

use crate::{
    place::{Piece, Place, Shard},
    progression::Progression,
    spec::AttentionSpec,
};

/// Batch entries to whose queries the same keys are visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryClass {
    pub(crate) entries: Vec<usize>,
    /// Ranges of positions that see nothing of each other, ascending; `None` is one range of all positions.
    documents: Option<Vec<(i64, i64)>>,
    /// One past the position of the last key that is no padding.
    key_end: i64,
}

/// The entry classes of a computation, ordered by their first entry; none for an empty batch.
pub(crate) fn entry_classes(spec: &AttentionSpec) -> Vec<EntryClass> {
    let key_end = |entry: usize| match &spec.key_lengths {
        Some(lengths) => lengths[entry],
        None => spec.key_length,
    };
    let differ = spec.key_lengths.is_some()
        || spec
            .documents
            .as_ref()
            .is_some_and(|documents| documents.lists() != 1);
    if spec.shape.batch == 0 {
        return Vec::new();
    }
    if !differ {
        return vec![EntryClass {
            entries: (0..spec.shape.batch).collect(),
            documents: spec
                .documents
                .as_ref()
                .map(|documents| documents.ranges(0).collect()),
            key_end: spec.key_length as i64,
        }];
    }
    let mut index_of = BTreeMap::new();
    let mut classes: Vec<EntryClass> = Vec::new();
    for entry in 0..spec.shape.batch {
        let lengths = spec
            .documents
            .as_ref()
            .map(|documents| documents.lengths(entry));
        let index = *index_of
            .entry((lengths, key_end(entry)))
            .or_insert_with(|| {
                classes.push(EntryClass {
                    entries: Vec::new(),
                    documents: spec
                        .documents
                        .as_ref()
                        .map(|documents| documents.ranges(entry).collect()),
                    key_end: key_end(entry) as i64,
                });
                classes.len() - 1
            });
        classes[index].entries.push(entry);
    }
    classes
}

impl EntryClass {
    /// The documents that have positions in both ranges.
    fn documents_of(&self, queries: (i64, i64), keys: (i64, i64)) -> &[(i64, i64)] {
        let Some(documents) = &self.documents else {
            return &[(i64::MIN, i64::MAX)];
        };
        let first = documents.partition_point(|document| document.1 <= queries.0.max(keys.0));
        let end = documents.partition_point(|document| document.0 < queries.1.min(keys.1));
        &documents[first..end.max(first)]
    }
}

/// Key/value heads with the same offset in every branch, and therefore the same rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeadClass {
    /// Counted from the first one that the rank computes with.
    pub(crate) kv_heads: Vec<usize>,
    /// Offset in every branch; `None` where the heads do not have the branch.
    pub(crate) offsets: Vec<Option<usize>>,
}

/// The head classes of what one of the ranks computes that divide the heads, ordered by their first head.
pub(crate) fn head_classes(spec: &AttentionSpec, place: Place) -> Vec<HeadClass> {
    let kv_heads = spec.shape.kv_heads;
    let of_rank = place.kv_heads(spec);
    let first = of_rank.start;
    let mut index_of: BTreeMap<Vec<Option<usize>>, usize> = BTreeMap::new();
    let mut classes: Vec<HeadClass> = Vec::new();
    for head in of_rank {
        let offsets: Vec<Option<usize>> = (0..spec.pattern.branches().len())
            .map(|branch| spec.pattern.offset(branch, head, kv_heads))
            .collect();
        let index = *index_of.entry(offsets.clone()).or_insert_with(|| {
            classes.push(HeadClass {
                kv_heads: Vec::new(),
                offsets,
            });
            classes.len() - 1
        });
        classes[index].kv_heads.push(head - first);
    }
    classes
}

/// Selected queries and keys of one segment (or of `repeat` segments, `period` positions apart), with pairs to compute.
///
/// Queries that see none of the keys, and keys that none of the queries sees, are pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentPairs {
    pub(crate) branch: usize,
    pub(crate) query_piece: Piece,
    pub(crate) key_piece: Piece,
    pub(crate) queries: Progression,
    pub(crate) keys: Progression,
    pub(crate) repeat: usize,
    pub(crate) period: i64,
}

/// A segment (or `repeat` segments, `period` positions apart) that lies in a piece of queries and a piece of keys, of a branch.
///
/// Which segments these are does not depend on the head: only what the head selects of them does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Overlap {
    branch: usize,
    query_piece: Piece,
    key_piece: Piece,
    /// The positions of the pieces that are in one document, keys without padding.
    queries: (i64, i64),
    keys: (i64, i64),
    /// Start and end of the first segment.
    low: i64,
    high: i64,
    repeat: usize,
    period: i64,
}

/// The segments that two shards have in common, in some batch entries; in the order of the branches.
pub(crate) fn overlaps(
    spec: &AttentionSpec,
    class: &EntryClass,
    queries: &Shard,
    keys: &Shard,
) -> Vec<Overlap> {
    let mask = spec.pattern.mask();
    let mut found = Vec::new();
    for (branch, rule) in spec.pattern.branches().iter().enumerate() {
        for query_piece in &queries.pieces {
            for key_piece in &keys.pieces {
                let of_queries = (query_piece.start, query_piece.end);
                let of_keys = (key_piece.start, key_piece.end.min(class.key_end));
                if !may_see(mask, of_queries, of_keys) {
                    continue;
                }
                for &document in class.documents_of(of_queries, of_keys) {
                    let whole = Overlap {
                        branch,
                        query_piece: *query_piece,
                        key_piece: *key_piece,
                        queries: common(of_queries, document),
                        keys: common(of_keys, document),
                        low: i64::MIN,
                        high: i64::MAX,
                        repeat: 1,
                        period: 0,
                    };
                    if !may_see(mask, whole.queries, whole.keys) {
                        continue;
                    }
                    match rule.segment_length {
                        None => found.push(whole),
                        Some(length) => segments(length as i64, whole, &mut found),
                    }
                }
            }
        }
    }
    found
}

/// The positions in both ranges.
fn common(a: (i64, i64), b: (i64, i64)) -> (i64, i64) {
    (a.0.max(b.0), a.1.min(b.1))
}

/// Whether a query of one range may see a key of the other.
fn may_see(mask: Mask, queries: (i64, i64), keys: (i64, i64)) -> bool {
    let within = |distance: i64, bound: Option<u64>| {
        bound.is_none_or(|bound| distance < 0 || distance.unsigned_abs() <= bound)
    };
    queries.0 < queries.1
        && keys.0 < keys.1
        && within(keys.0 - (queries.1 - 1), mask.right)
        && within(queries.0 - (keys.1 - 1), mask.left)
}

/// The segments of `length` positions that have queries and keys of `whole`; runs of whole segments folded into one.
fn segments(length: i64, whole: Overlap, found: &mut Vec<Overlap>) {
    let (query, key) = (whole.queries, whole.keys);
    let (both_low, both_high) = common(query, key);
    // Pieces this far apart share no segment: most pairs of ranks end here, before any division.
    if both_low - both_high >= length {
        return;
    }
    let first = query.0.div_euclid(length).max(key.0.div_euclid(length));
    let last = (query.1 - 1)
        .div_euclid(length)
        .min((key.1 - 1).div_euclid(length));
    if first > last {
        return;
    }
    // Segments that lie whole in both pieces are copies of each other, `length` positions apart.
    let whole_first = -(-both_low).div_euclid(length);
    let whole_count = both_high.div_euclid(length) - whole_first;
    let mut segment = first;
    while segment <= last {
        let copies = if segment == whole_first && whole_count > 1 {
            whole_count
        } else {
            1
        };
        found.push(Overlap {
            low: segment * length,
            high: (segment + 1) * length,
            repeat: copies as usize,
            period: if copies > 1 { length } else { 0 },
            ..whole
        });
        segment += copies;
    }
}

/// What the queries of one shard see of the keys of another, for one head class; one entry for each overlap in which anything
/// is visible.
pub(crate) fn segment_pairs(
    spec: &AttentionSpec,
    class: &HeadClass,
    overlaps: &[Overlap],
) -> Vec<SegmentPairs> {
    overlaps
        .iter()
        .filter_map(|overlap| {
            let offset = class.offsets[overlap.branch]? as i64;
            let rate = spec.pattern.branches()[overlap.branch].dilation_rate as i64;
            // Selected positions begin anew in every segment, at the offset; whether r divides w or not.
            let whole_sequence = overlap.low == i64::MIN;
            let phase = if whole_sequence {
                offset
            } else {
                overlap.low + offset
            };
            let low = if whole_sequence { i64::MIN } else { phase };
            let select = |positions: (i64, i64)| {
                let (low, high) = (low.max(positions.0), overlap.high.min(positions.1));
                let first = low + (phase - low).rem_euclid(rate);
                Progression::new(first, high.max(first), rate)
            };
            let (queries, keys) = prune(
                spec.pattern.mask(),
                select(overlap.queries),
                select(overlap.keys),
            )?;
            Some(SegmentPairs {
                branch: overlap.branch,
                query_piece: overlap.query_piece,
                key_piece: overlap.key_piece,
                queries,
                keys,
                repeat: overlap.repeat,
                period: overlap.period,
            })
        })
        .collect()
}

/// Drops queries that see no key and keys that no query sees; `None` if nothing is left.
///
/// Both sets are selected by one rule, so a query between two keys stands at a key, and sees it: what is dropped lies at the
/// ends.
fn prune(
    mask: Mask,
    queries: Progression,
    keys: Progression,
) -> Option<(Progression, Progression)> {
    let (first_query, last_query) = (queries.first()?, queries.last()?);
    let (first_key, last_key) = (keys.first()?, keys.last()?);
    // Positions are below 2^42 in size: what reaches further reaches all of them, and no sum overflows.
    let far = |bound: Option<u64>| bound.map_or(1 << 50, |bound| bound.min(1 << 50) as i64);
    let before = |position: i64, bound: Option<u64>| position - far(bound);
    let after = |position: i64, bound: Option<u64>| position + far(bound) + 1;
    let queries = queries.clip(before(first_key, mask.right), after(last_key, mask.left));
    let keys = keys.clip(
        before(first_query, mask.left),
        after(last_query, mask.right),
    );
    queries.first()?;
    keys.first()?;
    Some((queries, keys))
}
