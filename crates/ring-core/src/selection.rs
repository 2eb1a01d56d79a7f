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

/// What the queries of one shard see of the keys of another, for one head class; one entry for each branch and segment, runs
/// of whole segments folded into one.
pub(crate) fn segment_pairs(
    spec: &AttentionSpec,
    class: &HeadClass,
    queries: &Shard,
    keys: &Shard,
) -> Vec<SegmentPairs> {
    let mut found = Vec::new();
    for (branch, offset) in class.offsets.iter().enumerate() {
        let Some(offset) = *offset else { continue };
        for query_piece in &queries.pieces {
            for key_piece in &keys.pieces {
                if spec.pattern.is_causal() && key_piece.start >= query_piece.end {
                    continue;
                }
                pairs_of_pieces(spec, branch, offset, query_piece, key_piece, &mut found);
            }
        }
    }
    found
}

fn pairs_of_pieces(
    spec: &AttentionSpec,
    branch: usize,
    offset: usize,
    query_piece: &Piece,
    key_piece: &Piece,
    found: &mut Vec<SegmentPairs>,
) {
    let rule = spec.pattern.branches()[branch];
    let (rate, offset) = (rule.dilation_rate as i64, offset as i64);
    let mut add = |low: i64, high: i64, phase: i64, repeat: usize, period: i64| {
        let select = |piece: &Piece| {
            let (low, high) = (low.max(piece.start), high.min(piece.end));
            let first = low + (phase - low).rem_euclid(rate);
            Progression::new(first, high.max(first), rate)
        };
        // The offset counts from the segment's start, so positions before it are never selected.
        let (queries, keys) = (select(query_piece), select(key_piece));
        if let Some((queries, keys)) = prune(spec.pattern.is_causal(), queries, keys) {
            found.push(SegmentPairs {
                branch,
                query_piece: *query_piece,
                key_piece: *key_piece,
                queries,
                keys,
                repeat,
                period,
            });
        }
    };
    let Some(length) = rule.segment_length.map(|length| length as i64) else {
        add(i64::MIN, i64::MAX, offset, 1, 0);
        return;
    };
    let both_low = query_piece.start.max(key_piece.start);
    let both_high = query_piece.end.min(key_piece.end);
    let first = query_piece
        .start
        .div_euclid(length)
        .max(key_piece.start.div_euclid(length));
    let last = (query_piece.end - 1)
        .div_euclid(length)
        .min((key_piece.end - 1).div_euclid(length));
    // Segments that lie whole in both pieces are copies of each other, `length` positions apart.
    let whole_first = -(-both_low).div_euclid(length);
    let whole_count = (both_high.div_euclid(length) - whole_first).max(0);
    let mut segment = first;
    while segment <= last {
        let low = segment * length;
        // Where r does not divide w, the selected positions begin anew in every segment.
        let phase = low + offset;
        if offset < length {
            if segment == whole_first && whole_count > 1 {
                add(phase, low + length, phase, whole_count as usize, length);
                segment += whole_count;
                continue;
            }
            add(phase, low + length, phase, 1, 0);
        }
        segment += 1;
    }
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
