//! Who may write which gradients: the backward pass divided into tasks that share no memory.
//!
//! A task owns all gradients of one key/value head and of the query heads that use it; or, where heads are too few to keep
//! all threads busy, the query gradients of a range of query rows, or the key and value gradients of a range of key rows.

use std::ops::Range;

use ring_comm::buffer::{Buffer, HostBuffer};

use super::carve::{RowsMut, carve};
use super::check;
use super::rows::ranges;
use crate::{KernelError, KeyValueGradient, Problem, RowLayout};

/// One piece of a key/value head's gradients, and the rows that contribute to it.
pub(super) struct Task<'a> {
    pub(super) batch: usize,
    pub(super) kv_head: usize,
    pub(super) query_rows: Range<usize>,
    pub(super) key_rows: Range<usize>,
    /// One entry for each query head of the group; `None` if another task owns them.
    pub(super) grad_query: Option<Vec<RowsMut<'a>>>,
    /// `None` if another task owns them.
    pub(super) grad_key_value: Option<KeyValueRows<'a>>,
}

/// Gradients of some keys and of their values.
pub(super) struct KeyValueRows<'a> {
    pub(super) key: RowsMut<'a>,
    pub(super) value: RowsMut<'a>,
}

/// All gradients, by key/value head.
pub(super) struct Gradients<'a> {
    queries: usize,
    heads: Vec<HeadGradients<'a>>,
}

/// The gradients of one key/value head of one batch entry.
struct HeadGradients<'a> {
    batch: usize,
    kv_head: usize,
    /// Key rows that the blocks of this head reach to.
    keys: usize,
    /// One entry for each query head of the group.
    query: Vec<RowsMut<'a>>,
    key_value: KeyValueRows<'a>,
}

impl<'a> Gradients<'a> {
    /// Divides the buffers; head `h` takes part if `key_rows[h] > 0`, that is, if it has blocks.
    pub(super) fn new(
        problem: &Problem,
        grad_query: &'a mut HostBuffer,
        grad_key_value: KeyValueGradient<'a, HostBuffer>,
        key_rows: &[usize],
    ) -> Result<Self, KernelError> {
        let own = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
        let (key, value, layout) = key_and_value(problem, grad_key_value, &own)?;
        check::gradient_layout(problem, layout, key_rows, key.len())?;

        // In the order of memory, because that is how it is carved.
        let mut kv_heads: Vec<_> = (0..problem.kv_heads)
            .filter(|&head| key_rows[head] > 0)
            .collect();
        kv_heads.sort_by_key(|&head| layout.head_base[head]);
        let owned: Vec<_> = (0..problem.batch)
            .flat_map(|batch| kv_heads.iter().map(move |&kv_head| (batch, kv_head)))
            .collect();
        let spans = || {
            owned.iter().map(|&(batch, kv_head)| {
                let start = layout.offset(batch, kv_head, 0);
                start..layout.offset(batch, kv_head, key_rows[kv_head] - 1) + problem.head_dim
            })
        };
        let rows = |data| RowsMut {
            data,
            first_row: 0,
            stride: layout.row_stride,
        };
        let keys = carve("gradient of the keys", key, spans())?
            .into_iter()
            .map(rows);
        let values = carve("gradient of the values", value, spans())?
            .into_iter()
            .map(rows);
        let mut queries = by_query_head(problem, grad_query)?;

        let mut heads = Vec::with_capacity(owned.len());
        for (&(batch, kv_head), (key, value)) in owned.iter().zip(keys.zip(values)) {
            let group = batch * problem.query_heads + kv_head * problem.group_size();
            let group = &mut queries[group..group + problem.group_size()];
            heads.push(HeadGradients {
                batch,
                kv_head,
                keys: key_rows[kv_head],
                query: group.iter_mut().filter_map(Option::take).collect(),
                key_value: KeyValueRows { key, value },
            });
        }
        Ok(Self {
            queries: problem.queries,
            heads,
        })
    }

    /// Number of key/value heads, over all batch entries.
    pub(super) fn heads(&self) -> usize {
        self.heads.len()
    }

    /// One task for each head.
    pub(super) fn by_head(self) -> Vec<Task<'a>> {
        let task = |head: HeadGradients<'a>| Task {
            batch: head.batch,
            kv_head: head.kv_head,
            query_rows: 0..self.queries,
            key_rows: 0..head.keys,
            grad_query: Some(head.query),
            grad_key_value: Some(head.key_value),
        };
        self.heads.into_iter().map(task).collect()
    }

    /// For each head, `pieces` tasks that own query gradients, and as many that own key and value gradients.
    pub(super) fn by_range(self, pieces: usize) -> (Vec<Task<'a>>, Vec<Task<'a>>) {
        let (mut by_query_range, mut by_key_range) = (Vec::new(), Vec::new());
        for head in self.heads {
            let task = |query_rows, key_rows| Task {
                batch: head.batch,
                kv_head: head.kv_head,
                query_rows,
                key_rows,
                grad_query: None,
                grad_key_value: None,
            };
            let rows = ranges(self.queries, pieces);
            let mut group: Vec<_> = head
                .query
                .into_iter()
                .map(|query| query.split(&rows).into_iter())
                .collect();
            for query_rows in rows {
                by_query_range.push(Task {
                    grad_query: group.iter_mut().map(Iterator::next).collect(),
                    ..task(query_rows, 0..head.keys)
                });
            }
            let rows = ranges(head.keys, pieces);
            let keys = head.key_value.key.split(&rows);
            let values = head.key_value.value.split(&rows);
            for ((key_rows, key), value) in rows.into_iter().zip(keys).zip(values) {
                by_key_range.push(Task {
                    grad_key_value: Some(KeyValueRows { key, value }),
                    ..task(0..self.queries, key_rows)
                });
            }
        }
        (by_query_range, by_key_range)
    }
}

/// The gradients of the keys and of the values, and the layout of both.
fn key_and_value<'a, 'l>(
    problem: &Problem,
    gradient: KeyValueGradient<'a, HostBuffer>,
    own: &'l RowLayout,
) -> Result<(&'a mut [f32], &'a mut [f32], &'l RowLayout), KernelError>
where
    'a: 'l,
{
    match gradient {
        KeyValueGradient::Own { key, value } => {
            let len = check::problem(problem)?.key_elements;
            let key = check::f32s_mut("grad_key", key, len)?;
            Ok((key, check::f32s_mut("grad_value", value, len)?, own))
        }
        KeyValueGradient::Slot { slot, layout } => {
            let len = slot.len();
            let slot = check::f32s_mut("gradient slot", slot, len)?;
            let (key, value) = slot.split_at_mut(len / 2);
            Ok((key, value, layout))
        }
    }
}

/// The query gradients of all heads of all batch entries.
fn by_query_head<'a>(
    problem: &Problem,
    grad_query: &'a mut HostBuffer,
) -> Result<Vec<Option<RowsMut<'a>>>, KernelError> {
    let len = check::problem(problem)?.query_elements;
    let grad_query = check::f32s_mut("grad_query", grad_query, len)?;
    let stride = problem.head_dim;
    let head_len = problem.queries * stride;
    let spans =
        (0..problem.batch * problem.query_heads).map(|head| head * head_len..(head + 1) * head_len);
    let heads = carve("grad_query", grad_query, spans)?;
    Ok(heads
        .into_iter()
        .map(|data| {
            Some(RowsMut {
                data,
                first_row: 0,
                stride,
            })
        })
        .collect())
}
