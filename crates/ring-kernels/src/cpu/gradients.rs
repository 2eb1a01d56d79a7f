//! Who may write which gradients: the backward pass divided into tasks that share no memory.
//!
//! A task owns all gradients of one key/value head and of the query heads that use it ([`ByHead`]). Where heads are too few to
//! keep all threads busy, it owns the query gradients of a range of query rows of one head ([`ByQueryRange`]), or the key and
//! value gradients of a range of key rows ([`ByKeyRange`]). Tasks are cut from the gradients as they are asked for: no lists.

use std::ops::Range;

use ring_comm::buffer::{Buffer, HostBuffer};

use super::check;
use super::rows::{blocks_of, range_len};
use super::rows_mut::RowsMut;
use crate::{HeadBlocks, KernelError, KeyValueGradient, Problem, RowLayout};

/// One piece of the gradients, and the rows that contribute to it.
pub(super) struct Task<'a> {
    pub(super) batch: usize,
    pub(super) kv_head: usize,
    /// Query heads of the group that contribute.
    pub(super) members: Range<usize>,
    pub(super) query_rows: Range<usize>,
    pub(super) key_rows: Range<usize>,
    /// Rows of all query heads of the group, one head after the other; `None` if another task owns them.
    pub(super) grad_query: Option<RowsMut<'a>>,
    /// `None` if another task owns them.
    pub(super) grad_key_value: Option<KeyValueRows<'a>>,
}

/// Gradients of some keys and of their values.
pub(super) struct KeyValueRows<'a> {
    pub(super) key: RowsMut<'a>,
    pub(super) value: RowsMut<'a>,
}

/// All gradients, checked to hold what the blocks contribute to.
pub(super) struct Gradients<'a> {
    problem: &'a Problem,
    blocks: &'a [HeadBlocks],
    query: &'a mut [f32],
    key: &'a mut [f32],
    value: &'a mut [f32],
    layout: &'a RowLayout,
}

impl<'a> Gradients<'a> {
    /// `layout` is that of the key and value gradients.
    pub(super) fn new(
        problem: &'a Problem,
        blocks: &'a [HeadBlocks],
        grad_query: &'a mut HostBuffer,
        grad_key_value: KeyValueGradient<'a, HostBuffer>,
        layout: &'a RowLayout,
    ) -> Result<Self, KernelError> {
        let sizes = check::problem(problem)?;
        let (key, value) = match grad_key_value {
            KeyValueGradient::Own { key, value } => {
                let key = check::f32s_mut("grad_key", key, sizes.key_elements)?;
                let value = check::f32s_mut("grad_value", value, sizes.key_elements)?;
                (key, value)
            }
            KeyValueGradient::Slot { slot, .. } => {
                let len = slot.len();
                let slot = check::f32s_mut("gradient slot", slot, len)?;
                slot.split_at_mut(len / 2)
            }
        };
        check::gradient_layout(problem, layout, blocks, key.len())?;
        Ok(Self {
            problem,
            blocks,
            query: check::f32s_mut("grad_query", grad_query, sizes.query_elements)?,
            key,
            value,
            layout,
        })
    }

    /// Number of key/value heads that take part, over all batch entries.
    pub(super) fn heads(&self) -> usize {
        Heads::new(self.problem, self.blocks).count()
    }

    /// One task for each head.
    pub(super) fn by_head(self) -> ByHead<'a> {
        ByHead {
            heads: Heads::new(self.problem, self.blocks),
            query: Cutter::new(self.query),
            key: Cutter::new(self.key),
            value: Cutter::new(self.value),
            layout: self.layout,
        }
    }

    /// For each query head, at most `pieces` tasks that own query gradients; and for each key/value head, as many that own key
    /// and value gradients.
    pub(super) fn by_range(self, pieces: usize) -> (ByQueryRange<'a>, ByKeyRange<'a>) {
        let by_query_range = ByQueryRange {
            heads: Heads::new(self.problem, self.blocks),
            range_len: range_len(self.problem.queries, pieces),
            current: None,
            query: Cutter::new(self.query),
        };
        let by_key_range = ByKeyRange {
            heads: Heads::new(self.problem, self.blocks),
            pieces,
            current: None,
            key: Cutter::new(self.key),
            value: Cutter::new(self.value),
            layout: self.layout,
        };
        (by_query_range, by_key_range)
    }
}

/// A buffer from which pieces are cut, front to back.
struct Cutter<'a> {
    rest: &'a mut [f32],
    /// Elements that are cut off.
    taken: usize,
}

impl<'a> Cutter<'a> {
    fn new(rest: &'a mut [f32]) -> Self {
        Self { rest, taken: 0 }
    }

    /// Elements `span`; `None` if they are not there or were cut off before.
    fn cut(&mut self, span: Range<usize>) -> Option<&'a mut [f32]> {
        self.rest
            .split_off_mut(..span.start.checked_sub(self.taken)?)?;
        self.taken = span.end;
        self.rest.split_off_mut(..span.len())
    }
}

/// A key/value head that blocks contribute to.
#[derive(Clone)]
struct Head {
    batch: usize,
    kv_head: usize,
    /// Key rows that the blocks reach to.
    keys: usize,
}

/// All of them, in the order of memory.
struct Heads<'a> {
    problem: &'a Problem,
    blocks: &'a [HeadBlocks],
    next: usize,
}

impl<'a> Heads<'a> {
    fn new(problem: &'a Problem, blocks: &'a [HeadBlocks]) -> Self {
        Self {
            problem,
            blocks,
            next: 0,
        }
    }

    /// Elements of the query gradients of rows `rows` of the query heads `members` of a head's group.
    fn query_span(&self, head: &Head, members: Range<usize>, rows: Range<usize>) -> Range<usize> {
        let Problem {
            query_heads,
            head_dim,
            queries,
            ..
        } = *self.problem;
        let first = head.batch * query_heads + head.kv_head * self.problem.group_size();
        let row = |member: usize, row| ((first + member) * queries + row) * head_dim;
        row(members.start, rows.start)..row(members.end - 1, rows.end)
    }
}

impl Iterator for Heads<'_> {
    type Item = Head;

    fn next(&mut self) -> Option<Head> {
        let kv_heads = self.problem.kv_heads;
        while self.next < self.problem.batch * kv_heads {
            let (batch, kv_head) = (self.next / kv_heads, self.next % kv_heads);
            self.next += 1;
            let has_keys = blocks_of(self.blocks, batch, kv_head).any(|block| block.keys.count > 0);
            let keys = match has_keys {
                true => check::key_rows(self.blocks, kv_head),
                false => 0,
            };
            if keys > 0 {
                return Some(Head {
                    batch,
                    kv_head,
                    keys,
                });
            }
        }
        None
    }
}

/// Gradients of the key rows `rows` of a head.
fn key_rows<'a>(
    problem: &Problem,
    layout: &RowLayout,
    cutter: &mut Cutter<'a>,
    head: &Head,
    rows: Range<usize>,
) -> Option<RowsMut<'a>> {
    let first = layout.offset(head.batch, head.kv_head, rows.start);
    // The last row ends with its last element, not with its stride.
    let last = layout.offset(head.batch, head.kv_head, rows.end - 1);
    Some(RowsMut {
        data: cutter.cut(first..last + problem.head_dim)?,
        first_row: rows.start,
        stride: layout.row_stride,
    })
}

/// Tasks that own all gradients of a head.
pub(super) struct ByHead<'a> {
    heads: Heads<'a>,
    query: Cutter<'a>,
    key: Cutter<'a>,
    value: Cutter<'a>,
    layout: &'a RowLayout,
}

impl<'a> Iterator for ByHead<'a> {
    type Item = Task<'a>;

    fn next(&mut self) -> Option<Task<'a>> {
        let head = self.heads.next()?;
        let problem = self.heads.problem;
        let (members, keys) = (0..problem.group_size(), 0..head.keys);
        let queries = 0..problem.queries;
        let span = self
            .heads
            .query_span(&head, members.clone(), queries.clone());
        let rows = |cutter| key_rows(problem, self.layout, cutter, &head, keys.clone());
        Some(Task {
            batch: head.batch,
            kv_head: head.kv_head,
            members,
            query_rows: queries,
            grad_query: Some(RowsMut {
                data: self.query.cut(span)?,
                first_row: 0,
                stride: problem.head_dim,
            }),
            grad_key_value: Some(KeyValueRows {
                key: rows(&mut self.key)?,
                value: rows(&mut self.value)?,
            }),
            key_rows: keys,
        })
    }
}

/// Tasks that own the query gradients of a range of rows of one query head.
pub(super) struct ByQueryRange<'a> {
    heads: Heads<'a>,
    range_len: usize,
    /// Head, member of its group and row that come next.
    current: Option<(Head, usize, usize)>,
    query: Cutter<'a>,
}

impl<'a> Iterator for ByQueryRange<'a> {
    type Item = Task<'a>;

    fn next(&mut self) -> Option<Task<'a>> {
        let problem = self.heads.problem;
        let (head, member, row) = match self.current.take() {
            Some(current) => current,
            None => (self.heads.next()?, 0, 0),
        };
        let rows = row..problem.queries.min(row + self.range_len);
        let span = self
            .heads
            .query_span(&head, member..member + 1, rows.clone());
        self.current = if rows.end < problem.queries {
            Some((head.clone(), member, rows.end))
        } else if member + 1 < problem.group_size() {
            Some((head.clone(), member + 1, 0))
        } else {
            None
        };
        Some(Task {
            batch: head.batch,
            kv_head: head.kv_head,
            members: member..member + 1,
            key_rows: 0..head.keys,
            grad_query: Some(RowsMut {
                data: self.query.cut(span)?,
                // As if all heads of the group were there.
                first_row: member * problem.queries + rows.start,
                stride: problem.head_dim,
            }),
            grad_key_value: None,
            query_rows: rows,
        })
    }
}

/// Tasks that own the key and value gradients of a range of rows.
pub(super) struct ByKeyRange<'a> {
    heads: Heads<'a>,
    pieces: usize,
    /// Head and row that come next.
    current: Option<(Head, usize)>,
    key: Cutter<'a>,
    value: Cutter<'a>,
    layout: &'a RowLayout,
}

impl<'a> Iterator for ByKeyRange<'a> {
    type Item = Task<'a>;

    fn next(&mut self) -> Option<Task<'a>> {
        let problem = self.heads.problem;
        let (head, row) = match self.current.take() {
            Some(current) => current,
            None => (self.heads.next()?, 0),
        };
        let rows = row..head.keys.min(row + range_len(head.keys, self.pieces));
        if rows.end < head.keys {
            self.current = Some((head.clone(), rows.end));
        }
        let cut = |cutter| key_rows(problem, self.layout, cutter, &head, rows.clone());
        Some(Task {
            batch: head.batch,
            kv_head: head.kv_head,
            members: 0..problem.group_size(),
            query_rows: 0..problem.queries,
            grad_query: None,
            grad_key_value: Some(KeyValueRows {
                key: cut(&mut self.key)?,
                value: cut(&mut self.value)?,
            }),
            key_rows: rows,
        })
    }
}
