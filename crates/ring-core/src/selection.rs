//! Which rows of which rank a rank needs: the pattern, applied to pairs of spans.

use std::collections::BTreeMap;

use crate::{progression::Progression, sharding::Span, spec::AttentionSpec};

/// Key/value heads with the same offset in every branch, and therefore the same rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeadClass {
    pub(crate) kv_heads: Vec<usize>,
    /// Offset in every branch; `None` where the heads do not have the branch.
    pub(crate) offsets: Vec<Option<usize>>,
}

/// The head classes of a computation, ordered by their first head.
pub(crate) fn head_classes(spec: &AttentionSpec) -> Vec<HeadClass> {
    let kv_heads = spec.shape.kv_heads;
    let mut index_of: BTreeMap<Vec<Option<usize>>, usize> = BTreeMap::new();
    let mut classes: Vec<HeadClass> = Vec::new();
    for head in 0..kv_heads {
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
        classes[index].kv_heads.push(head);
    }
    classes
}

/// Spans of positions with the local row at which each begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) pieces: Vec<Piece>,
}

/// One span of a shard, in positions that may be negative (queries before the first key).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: i64,
    pub(crate) end: i64,
    pub(crate) first_row: usize,
}

impl Shard {
    fn new(spans: &[Span], offset: i64) -> Self {
        let mut first_row = 0;
        let pieces = spans
            .iter()
            .map(|span| {
                let piece = Piece {
                    start: span.start as i64 + offset,
                    end: span.end as i64 + offset,
                    first_row,
                };
                first_row += span.len();
                piece
            })
            .collect();
        Self { pieces }
    }

    /// The queries of `rank`, at their global positions.
    pub(crate) fn queries(spec: &AttentionSpec, rank: usize) -> Self {
        let spans = spec
            .query_sharding
            .spans(spec.query_length, spec.world_size, rank);
        Self::new(&spans, spec.query_offset)
    }

    /// The keys of `rank`.
    pub(crate) fn keys(spec: &AttentionSpec, rank: usize) -> Self {
        let spans = spec
            .key_sharding
            .spans(spec.key_length, spec.world_size, rank);
        Self::new(&spans, 0)
    }
}

impl Piece {
    /// Local row of a position of this piece.
    pub(crate) fn row(&self, position: i64) -> usize {
        self.first_row + (position - self.start) as usize
    }
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
    /// Start and end of the first segment.
    low: i64,
    high: i64,
    repeat: usize,
    period: i64,
}

/// The segments that two shards have in common.
pub(crate) fn overlaps(spec: &AttentionSpec, queries: &Shard, keys: &Shard) -> Vec<Overlap> {
    let mut found = Vec::new();
    for (branch, rule) in spec.pattern.branches().iter().enumerate() {
        for query_piece in &queries.pieces {
            for key_piece in &keys.pieces {
                if spec.pattern.is_causal() && key_piece.start >= query_piece.end {
                    continue;
                }
                let whole = Overlap {
                    branch,
                    query_piece: *query_piece,
                    key_piece: *key_piece,
                    low: i64::MIN,
                    high: i64::MAX,
                    repeat: 1,
                    period: 0,
                };
                match rule.segment_length {
                    None => found.push(whole),
                    Some(length) => segments(length as i64, whole, &mut found),
                }
            }
        }
    }
    found
}

/// The segments of `length` positions that lie in both pieces of `whole`; runs of whole segments folded into one.
fn segments(length: i64, whole: Overlap, found: &mut Vec<Overlap>) {
    let (query, key) = (whole.query_piece, whole.key_piece);
    let (both_low, both_high) = (query.start.max(key.start), query.end.min(key.end));
    // Pieces this far apart share no segment: most pairs of ranks end here, before any division.
    if both_low - both_high >= length {
        return;
    }
    let first = query
        .start
        .div_euclid(length)
        .max(key.start.div_euclid(length));
    let last = (query.end - 1)
        .div_euclid(length)
        .min((key.end - 1).div_euclid(length));
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
            let select = |piece: &Piece| {
                let (low, high) = (low.max(piece.start), overlap.high.min(piece.end));
                let first = low + (phase - low).rem_euclid(rate);
                Progression::new(first, high.max(first), rate)
            };
            let (queries, keys) = prune(
                spec.pattern.is_causal(),
                select(&overlap.query_piece),
                select(&overlap.key_piece),
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

/// Drops what causality hides; `None` if nothing is left.
fn prune(
    causal: bool,
    queries: Progression,
    keys: Progression,
) -> Option<(Progression, Progression)> {
    let (first_key, last_query) = (keys.first()?, queries.last()?);
    if !causal {
        return Some((queries, keys));
    }
    let queries = queries.clip(first_key, i64::MAX);
    let keys = keys.clip(i64::MIN / 2, last_query + 1);
    queries.first()?;
    keys.first()?;
    Some((queries, keys))
}
