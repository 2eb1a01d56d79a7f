//! What a kernel is asked to compute: blocks of (query rows x key rows), described by numbers, never by gathered copies.

use std::sync::Arc;

use ring_comm::buffer::Buffer;
use serde::{Deserialize, Serialize};

use crate::dropout::Dropout;

/// Sizes of one attention problem as one rank sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Batch size.
    pub batch: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; divides `query_heads`. Query head `h` uses key/value head `h / (query_heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Query rows this rank owns.
    pub queries: usize,
    /// Key/value rows this rank owns.
    pub keys: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Which pairs inside a block count.
    pub mask: Mask,
    /// What scores and weights go through beside scale and softmax.
    pub scores: Scores,
}

impl Problem {
    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The rank's queries, and what there is one of for each: outputs, their gradients.
    pub fn query_shape(&self) -> TensorShape {
        TensorShape {
            batch: self.batch,
            heads: self.query_heads,
            rows: self.queries,
            head_dim: self.head_dim,
        }
    }

    /// The rank's keys, or its values.
    pub fn key_shape(&self) -> TensorShape {
        TensorShape {
            batch: self.batch,
            heads: self.kv_heads,
            rows: self.keys,
            head_dim: self.head_dim,
        }
    }

    /// One number for each query: log-sum-exp, delta.
    pub fn statistic_shape(&self) -> TensorShape {
        TensorShape {
            head_dim: 1,
            ..self.query_shape()
        }
    }
}

/// Sizes of a `[batch, heads, rows, head_dim]` tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorShape {
    /// Batch size.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Rows of each head.
    pub rows: usize,
    /// Elements of a row.
    pub head_dim: usize,
}

impl TensorShape {
    /// Elements of the whole tensor.
    pub fn elements(&self) -> usize {
        self.batch * self.heads * self.rows * self.head_dim
    }

    /// Where the rows lie if the tensor is contiguous.
    pub fn contiguous(&self) -> RowLayout {
        RowLayout::contiguous(self.heads, self.rows, self.head_dim)
    }
}

/// Which pairs of global positions a block admits: for a query at `n`, the keys from `n - left` to `n + right`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mask {
    /// How far before the query its first key stands; `None` is no bound.
    pub left: Option<u64>,
    /// How far after the query its last key stands; `None` is no bound, 0 is causal.
    pub right: Option<u64>,
}

impl Mask {
    /// Every pair.
    pub const NONE: Self = Self {
        left: None,
        right: None,
    };

    /// Keys at the query's position or before it.
    pub const CAUSAL: Self = Self {
        left: None,
        right: Some(0),
    };

    /// Whether a query at position `query` sees a key at position `key`.
    pub fn admits(&self, query: i64, key: i64) -> bool {
        let within = |bound: Option<u64>| bound.is_none_or(|bound| query.abs_diff(key) <= bound);
        within(if key < query { self.left } else { self.right })
    }
}

/// What scores go through between `S = scale Q K^T` and softmax, and weights after it. By default, nothing.
///
/// In this order: `S = softcap tanh(S / softcap)`; `S = S - slope |n - m|` for query position `n` and key position `m`; then
/// softmax; then dropout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Bound on the scores, positive.
    pub softcap: Option<f32>,
    /// ALiBi's slope of every query head (arXiv 2108.12409), from -2^20 to 2^20. They are constants: they get no gradient. Scores
    /// and log-sum-exp are f32: where the nearest key that a query sees is so far that they are large, weights inherit their
    /// rounding (a log-sum-exp of 1000 is known to 6e-5).
    pub alibi_slopes: Option<Arc<[f32]>>,
    /// Which weights count as 0 when values are summed. Softmax's denominator counts them; the factor `1 / (1 - probability)` on
    /// the others is part of the `output_scale` that kernels are given.
    pub dropout: Option<Dropout>,
}

/// An arithmetic progression of rows, with the global positions they stand at.
///
/// Row `i` (`0 <= i < count`) is local row `first_row + i * row_step` and stands at global position
/// `first_position + i * position_step`. Steps are positive; positions may be negative (queries before the first key).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rows {
    /// Local index of the first row.
    pub first_row: usize,
    /// Distance of neighbouring rows in local memory.
    pub row_step: usize,
    /// Number of rows.
    pub count: usize,
    /// Global position of the first row.
    pub first_position: i64,
    /// Distance of neighbouring rows in global positions.
    pub position_step: i64,
}

impl Rows {
    /// Global position of row `i`.
    pub fn position(&self, i: usize) -> i64 {
        self.first_position + i as i64 * self.position_step
    }

    /// Local index of row `i`.
    pub fn row(&self, i: usize) -> usize {
        self.first_row + i * self.row_step
    }
}

/// Attention of some query rows to some key rows. Every admitted pair counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Rows of the rank's own queries.
    pub queries: Rows,
    /// Rows of the key/value source: the rank's own, or a slot that came from another rank.
    pub keys: Rows,
    /// The branch that holds the pairs, for dropout: in each branch that has it, a pair is dropped or not by itself.
    pub branch: u32,
}

/// Blocks that a set of key/value heads has in common (and all query heads that use them), in a set of batch entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadBlocks {
    /// Batch entries.
    pub entries: Vec<usize>,
    /// Key/value heads.
    pub kv_heads: Vec<usize>,
    /// Their blocks. Blocks may share query rows and key rows: the same pair in two blocks counts twice.
    pub blocks: Vec<Block>,
}

/// The blocks of one key/value head of one batch entry.
pub(crate) fn blocks_of(
    blocks: &[HeadBlocks],
    entry: usize,
    kv_head: usize,
) -> impl Iterator<Item = &Block> {
    blocks
        .iter()
        .filter(move |of| of.kv_heads.contains(&kv_head) && of.entries.contains(&entry))
        .flat_map(|of| &of.blocks)
}

/// Where the rows of a `[batch, heads, rows, head_dim]` tensor lie in memory, in elements.
///
/// Element `d` of row `n` of head `h` of batch `b` is at `b * batch_stride + head_base[h] + n * row_stride + d`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowLayout {
    /// Distance of neighbouring batch entries.
    pub batch_stride: usize,
    /// Start of every head.
    pub head_base: Vec<usize>,
    /// Distance of neighbouring rows.
    pub row_stride: usize,
}

impl RowLayout {
    /// A contiguous `[batch, heads, rows, head_dim]` tensor.
    pub fn contiguous(heads: usize, rows: usize, head_dim: usize) -> Self {
        Self {
            batch_stride: heads * rows * head_dim,
            head_base: (0..heads).map(|head| head * rows * head_dim).collect(),
            row_stride: head_dim,
        }
    }

    /// Start of row `row`.
    pub fn offset(&self, batch: usize, head: usize, row: usize) -> usize {
        batch * self.batch_stride + self.head_base[head] + row * self.row_stride
    }
}

/// A borrowed tensor `[batch, heads, rows, head_dim]` whose last dimension is contiguous.
pub struct Tensor<'a, B: Buffer> {
    /// The elements.
    pub data: B::View<'a>,
    /// Where the rows lie.
    pub layout: &'a RowLayout,
}

impl<B: Buffer> Clone for Tensor<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Buffer> Copy for Tensor<'_, B> {}

impl<'a, B: Buffer> Tensor<'a, B> {
    /// The same tensor, borrowed for a shorter time.
    pub fn shorten<'short>(self) -> Tensor<'short, B>
    where
        'a: 'short,
    {
        Tensor {
            data: B::shorten(self.data),
            layout: self.layout,
        }
    }
}

/// Where the keys and values of a block come from.
pub enum KeyValue<'a, B: Buffer> {
    /// The rank's own tensors.
    Own {
        /// Keys.
        key: Tensor<'a, B>,
        /// Values.
        value: Tensor<'a, B>,
    },
    /// A packed slot: the first half of the buffer holds keys, the second half values, both laid out by `layout`.
    Slot {
        /// The slot.
        slot: &'a B,
        /// Where the rows lie within each half.
        layout: &'a RowLayout,
    },
}

/// Where the f32 gradients of a block's keys and values are added to.
pub enum KeyValueGradient<'a, B: Buffer> {
    /// Contiguous `[batch, kv_heads, keys, head_dim]` tensors.
    Own {
        /// Gradient of the keys.
        key: &'a mut B,
        /// Gradient of the values.
        value: &'a mut B,
    },
    /// A slot of the same layout as the packed keys and values: gradients of keys first, then of values.
    Slot {
        /// The slot.
        slot: &'a mut B,
        /// Where the rows lie within each half.
        layout: &'a RowLayout,
    },
}

/// Rows that travel for a set of heads, in the order in which they are packed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadRows {
    /// Heads.
    pub heads: Vec<usize>,
    /// Rows of the owner's local tensor; no row occurs twice.
    pub runs: Vec<Rows>,
}

impl HeadRows {
    /// Rows of one head.
    pub fn count(&self) -> usize {
        self.runs.iter().map(|run| run.count).sum()
    }
}

/// The rows of one message, and how they lie in it.
///
/// The message has a part for every tensor whose rows it holds: keys and values, say. A part is ordered by batch, then by head,
/// then by the runs of that head. A head that is in no entry of `rows` has no rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedRows {
    /// What is packed.
    pub rows: Vec<HeadRows>,
    /// Where it lies within each part.
    pub layout: RowLayout,
    /// Number of parts.
    pub parts: usize,
    /// Elements of a part: of all batch entries.
    pub part_len: usize,
}

impl PackedRows {
    /// Lays out `rows` of `parts` tensors of one shape.
    pub fn new(shape: TensorShape, rows: Vec<HeadRows>, parts: usize) -> Self {
        let mut counts = vec![0; shape.heads];
        for entry in &rows {
            for &head in &entry.heads {
                counts[head] = entry.count();
            }
        }
        let mut head_base = Vec::with_capacity(counts.len());
        let mut total = 0;
        for count in counts {
            head_base.push(total * shape.head_dim);
            total += count;
        }
        let batch_stride = total * shape.head_dim;
        Self {
            rows,
            layout: RowLayout {
                batch_stride,
                head_base,
                row_stride: shape.head_dim,
            },
            parts,
            part_len: shape.batch * batch_stride,
        }
    }

    /// The same with parts so long that `rows` rows can be read at the start of every head, whatever they are: for kernels that
    /// take tensors whose heads have equally many rows.
    #[must_use]
    pub fn with_room_for(mut self, rows: usize, batch: usize) -> Self {
        let last_head = self.layout.head_base.iter().max().copied().unwrap_or(0);
        let last_entry = batch.saturating_sub(1) * self.layout.batch_stride;
        let needed = last_entry + last_head + rows * self.layout.row_stride;
        self.part_len = self.part_len.max(needed);
        self
    }

    /// Elements of the whole message.
    pub fn len(&self) -> usize {
        self.parts * self.part_len
    }

    /// Whether the message has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
