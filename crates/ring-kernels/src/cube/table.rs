//! What a kernel is told of its work, in words: where tensors lie, and records of row sets.
//!
//! A table begins with [`RECORDS_AT`], [`GROUP`], [`QUERIES`] and [`QUERY_HEADS`]. For each tensor follow its batch stride, its
//! row stride and where the starts of its heads are listed; then those lists; then the records, [`RECORD`] words each.

use crate::{Block, KernelError, Mask, Problem, RowLayout, Rows};

/// Where the records begin.
pub(super) const RECORDS_AT: usize = 0;
/// Query heads of one key/value head.
pub(super) const GROUP: usize = 1;
/// Query rows of one head.
pub(super) const QUERIES: usize = 2;
/// Query heads.
pub(super) const QUERY_HEADS: usize = 3;
/// Where the tensors begin.
pub(super) const TENSORS: usize = 4;

/// Words of a tensor.
pub(super) const TENSOR: usize = 3;
pub(super) const QUERY: usize = 0;
pub(super) const KEY: usize = 1;
pub(super) const VALUE: usize = 2;
pub(super) const GRAD_OUTPUT: usize = 3;
/// Gradients of keys.
pub(super) const GRAD_KEY: usize = 4;
/// Gradients of values.
pub(super) const GRAD_VALUE: usize = 5;
/// One number for each query row: maximum, denominator, log-sum-exp, delta.
pub(super) const STATE: usize = 6;
/// Half a message.
pub(super) const MESSAGE: usize = 7;
const TENSOR_COUNT: usize = 8;

/// Words of a record.
pub(super) const RECORD: usize = 11;
pub(super) const KV_HEAD: usize = 0;
pub(super) const QUERY_FIRST: usize = 1;
pub(super) const QUERY_STEP: usize = 2;
pub(super) const QUERY_COUNT: usize = 3;
pub(super) const KEY_FIRST: usize = 4;
pub(super) const KEY_STEP: usize = 5;
pub(super) const KEY_COUNT: usize = 6;
/// Query `i` sees key `j` if `i * QUERY_POSITION_STEP + LEAD >= j * KEY_POSITION_STEP + LAG`.
pub(super) const QUERY_POSITION_STEP: usize = 7;
pub(super) const KEY_POSITION_STEP: usize = 8;
pub(super) const LEAD: usize = 9;
pub(super) const LAG: usize = 10;

/// Rows that travel have no queries: here is which of the rows of their head in the message the first one is.
pub(super) const PACKED_FIRST: usize = QUERY_FIRST;

/// One record.
pub(super) type Record = [u32; RECORD];

fn word(what: &str, value: usize) -> Result<u32, KernelError> {
    u32::try_from(value).map_err(|_| {
        KernelError::Invalid(format!(
            "{what} is {value}; these kernels count in 32 bits, up to {}",
            u32::MAX
        ))
    })
}

/// A table without records.
pub(super) struct Table {
    words: Vec<u32>,
}

impl Table {
    /// A table of a problem, in which no tensor is placed yet.
    pub(super) fn new(problem: &Problem) -> Result<Self, KernelError> {
        let mut words = vec![0; TENSORS + TENSOR_COUNT * TENSOR];
        words[GROUP] = word("the number of query heads of a group", problem.group_size())?;
        words[QUERIES] = word("the number of queries", problem.queries)?;
        words[QUERY_HEADS] = word("the number of query heads", problem.query_heads)?;
        Ok(Self { words })
    }

    /// Says where a tensor lies: as in `layout`, `offset` elements further on.
    pub(super) fn place(
        &mut self,
        tensor: usize,
        layout: &RowLayout,
        offset: usize,
    ) -> Result<(), KernelError> {
        let at = TENSORS + tensor * TENSOR;
        self.words[at] = word("a batch stride", layout.batch_stride)?;
        self.words[at + 1] = word("a row stride", layout.row_stride)?;
        self.words[at + 2] = word("the size of a table", self.words.len())?;
        for &base in &layout.head_base {
            let start = word("the start of a head", base.saturating_add(offset))?;
            self.words.push(start);
        }
        Ok(())
    }

    /// The table with records.
    pub(super) fn with(&self, records: &[Record]) -> Result<Vec<u32>, KernelError> {
        let mut words = Vec::with_capacity(self.words.len() + records.len() * RECORD);
        words.extend_from_slice(&self.words);
        words[RECORDS_AT] = word("the size of a table", words.len())?;
        words.extend(records.iter().flatten());
        Ok(words)
    }
}

/// The record of a block of one key/value head; `None` if no query sees a key.
pub(super) fn block_record(
    mask: Mask,
    kv_head: usize,
    block: &Block,
) -> Result<Option<Record>, KernelError> {
    let Block { queries, keys, .. } = block;
    if queries.count == 0 || keys.count == 0 {
        return Ok(None);
    }
    let Some(sight) = Sight::new(mask, queries, keys)? else {
        return Ok(None);
    };
    let mut record = [0; RECORD];
    record[KV_HEAD] = word("a head", kv_head)?;
    record[QUERY_FIRST] = word("a query row", queries.first_row)?;
    record[QUERY_STEP] = word("a step of query rows", step(queries))?;
    record[QUERY_COUNT] = word("the number of queries", queries.count)?;
    record[KEY_FIRST] = word("a key row", keys.first_row)?;
    record[KEY_STEP] = word("a step of key rows", step(keys))?;
    record[KEY_COUNT] = word("the number of keys", keys.count)?;
    record[QUERY_POSITION_STEP] = sight.query_step;
    record[KEY_POSITION_STEP] = sight.key_step;
    record[LEAD] = sight.lead;
    record[LAG] = sight.lag;
    Ok(Some(record))
}

/// The record of rows that travel, the first of which is row `packed_first` of its head in the message.
pub(super) fn run_record(
    kv_head: usize,
    run: &Rows,
    packed_first: usize,
) -> Result<Record, KernelError> {
    let mut record = [0; RECORD];
    record[KV_HEAD] = word("a head", kv_head)?;
    record[PACKED_FIRST] = word("a row of a message", packed_first)?;
    record[KEY_FIRST] = word("a key row", run.first_row)?;
    record[KEY_STEP] = word("a step of key rows", step(run))?;
    record[KEY_COUNT] = word("the number of rows", run.count)?;
    Ok(record)
}

/// The step between rows; a single row has none.
fn step(rows: &Rows) -> usize {
    if rows.count > 1 { rows.row_step } else { 0 }
}

/// What queries see, without negative numbers: see [`QUERY_POSITION_STEP`].
struct Sight {
    query_step: u32,
    key_step: u32,
    lead: u32,
    lag: u32,
}

impl Sight {
    /// Sight in a block that has queries and keys; `None` if no query sees a key.
    fn new(mask: Mask, queries: &Rows, keys: &Rows) -> Result<Option<Self>, KernelError> {
        let span = |rows: &Rows| match rows.count - 1 {
            0 => (1, 0),
            steps => {
                let step = i128::from(rows.position_step);
                (step, step * steps as i128)
            }
        };
        let ((query_step, query_span), (key_step, key_span)) = (span(queries), span(keys));
        let ahead = i128::from(queries.first_position) - i128::from(keys.first_position);
        if mask == Mask::NONE || ahead >= key_span {
            // Every query leads every key.
            return Ok(Some(Self {
                query_step: 0,
                key_step: 1,
                lead: word("the number of keys", keys.count)?,
                lag: 0,
            }));
        }
        if ahead + query_span < 0 {
            return Ok(None);
        }
        let (lead, lag) = (ahead.max(0), (-ahead).max(0));
        // What kernels compute; they add a step before they divide by it.
        let largest = (query_span + lead).max(key_span + lag) + query_step + key_step;
        if largest > i128::from(u32::MAX) {
            return Err(KernelError::Invalid(format!(
                "the positions of a block are {largest} apart; these kernels count in 32 bits, up to {}",
                u32::MAX
            )));
        }
        Ok(Some(Self {
            query_step: query_step as u32,
            key_step: key_step as u32,
            lead: lead as u32,
            lag: lag as u32,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: usize, first_position: i64, position_step: i64) -> Rows {
        Rows {
            first_row: 0,
            row_step: 1,
            count,
            first_position,
            position_step,
        }
    }

    #[test]
    fn sight_is_that_of_the_mask() {
        for first in -40..40 {
            for (query_step, key_step) in [(1, 1), (1, 3), (4, 1), (3, 2)] {
                for (query_count, key_count) in [(7, 9), (1, 9), (7, 1), (1, 1)] {
                    for mask in [Mask::NONE, Mask::CAUSAL] {
                        let queries = rows(query_count, first, query_step);
                        let keys = rows(key_count, 3, key_step);
                        let block = Block {
                            queries,
                            keys,
                            branch: 0,
                        };
                        let record = block_record(mask, 0, &block).unwrap();
                        for i in 0..query_count {
                            for j in 0..key_count {
                                let expected =
                                    mask == Mask::NONE || keys.position(j) <= queries.position(i);
                                let got = record.is_some_and(|record| {
                                    i as u32 * record[QUERY_POSITION_STEP] + record[LEAD]
                                        >= j as u32 * record[KEY_POSITION_STEP] + record[LAG]
                                });
                                assert_eq!(got, expected, "{mask:?} {queries:?} {keys:?} {i} {j}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_into_words_is_refused() {
        let wide = Block {
            queries: rows(3, 0, 1 << 31),
            keys: rows(3, 1, 1 << 31),
            branch: 0,
        };
        let refused = |result: Result<_, _>| matches!(result, Err(KernelError::Invalid(_)));
        assert!(refused(block_record(Mask::CAUSAL, 0, &wide)));
        assert!(!refused(block_record(Mask::NONE, 0, &wide)));
        let far = Block {
            queries: Rows {
                first_row: 1 << 32,
                ..rows(1, 0, 1)
            },
            keys: rows(1, 0, 1),
            branch: 0,
        };
        assert!(refused(block_record(Mask::NONE, 0, &far)));
    }
}
