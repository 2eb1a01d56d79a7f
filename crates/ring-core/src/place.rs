//! Where a rank stands, and the positions it computes with: [`Place`] and [`Shard`].

use std::ops::Range;

use ring_kernels::Rows;

use crate::{
    progression::Progression,
    sharding::{Sharding, Span},
    spec::AttentionSpec,
};

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

    /// The queries that the ranks of `place` own together, at their global positions.
    pub(crate) fn queries(spec: &AttentionSpec, place: Place) -> Self {
        let spans = place.spans(spec, spec.query_sharding, spec.query_length);
        Self::new(&spans, spec.query_offset)
    }

    /// The keys that the ranks of `place` own together.
    pub(crate) fn keys(spec: &AttentionSpec, place: Place) -> Self {
        let spans = place.spans(spec, spec.key_sharding, spec.key_length);
        Self::new(&spans, 0)
    }

    /// The rows of `count` neighbouring positions of the shard.
    pub(crate) fn rows(&self, first_position: i64, count: usize) -> Rows {
        Rows {
            first_row: self.piece_of(first_position).row(first_position),
            row_step: 1,
            count,
            first_position,
            position_step: 1,
        }
    }

    /// The piece that holds a position of the shard.
    pub(crate) fn piece_of(&self, position: i64) -> &Piece {
        let after = self.pieces.partition_point(|piece| piece.start <= position);
        &self.pieces[after - 1]
    }
}

/// Where a rank stands: which of the ranks that hold the same positions and divide the heads, and where these stand in the ring.
///
/// Unless heads are divided, every rank is alone in its place of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Place in the ring.
    pub(crate) ring: usize,
    /// Which of the ranks at this place.
    pub(crate) index: usize,
}

impl Place {
    /// The place of a rank.
    pub(crate) fn of(spec: &AttentionSpec, rank: usize) -> Self {
        let head_ranks = spec.strategy.head_ranks(spec.world_size);
        Self {
            ring: rank / head_ranks,
            index: rank % head_ranks,
        }
    }

    /// Places in the ring.
    pub(crate) fn ring_size(spec: &AttentionSpec) -> usize {
        spec.world_size / spec.strategy.head_ranks(spec.world_size)
    }

    /// The rank that holds the same heads, `distance` places further round the ring.
    pub(crate) fn further(self, spec: &AttentionSpec, distance: usize) -> Self {
        Self {
            ring: (self.ring + distance) % Self::ring_size(spec),
            ..self
        }
    }

    /// The rank that stands here.
    pub(crate) fn rank(self, spec: &AttentionSpec) -> usize {
        self.ring * spec.strategy.head_ranks(spec.world_size) + self.index
    }

    /// The ranks that hold the same positions, in order.
    pub(crate) fn ranks(self, spec: &AttentionSpec) -> Range<usize> {
        let head_ranks = spec.strategy.head_ranks(spec.world_size);
        self.ring * head_ranks..(self.ring + 1) * head_ranks
    }

    /// The key/value heads that this rank computes with.
    pub(crate) fn kv_heads(self, spec: &AttentionSpec) -> Range<usize> {
        let (heads, ranks) = (spec.shape.kv_heads, spec.world_size);
        spec.strategy.heads_of(heads, ranks, self.index)
    }

    /// The spans that the ranks of this place own together, ascending, neighbours merged.
    fn spans(self, spec: &AttentionSpec, sharding: Sharding, length: usize) -> Vec<Span> {
        let of_rank = |rank| sharding.spans(length, spec.world_size, rank);
        let mut spans: Vec<Span> = self.ranks(spec).flat_map(of_rank).collect();
        spans.sort_by_key(|span| span.start);
        spans.dedup_by(|next, span| {
            let neighbours = span.end == next.start;
            if neighbours {
                span.end = next.end;
            }
            neighbours
        });
        spans
    }
}

impl Piece {
    /// All its positions.
    pub(crate) fn positions(&self) -> Progression {
        Progression::new(self.start, self.end, 1)
    }

    /// Local row of a position of this piece.
    pub(crate) fn row(&self, position: i64) -> usize {
        self.first_row + (position - self.start) as usize
    }
}
