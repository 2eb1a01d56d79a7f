//! What a kernel is told of its work, in words: where tensors lie, and records of row sets.
//!
//! A table begins with numbers of the problem, up to [`TENSORS`]. For each tensor follow its batch stride, its
//! row stride and where the starts of its heads are listed; then those lists and that of ALiBi's slopes; then the records,
//! [`RECORD`] words each.

use crate::{Block, KernelError, Mask, Problem, RowLayout, Rows};

/// Where the records begin.
pub(super) const RECORDS_AT: usize = 0;
/// Query heads of one key/value head.
pub(super) const GROUP: usize = 1;
/// Query rows of one head.
pub(super) const QUERIES: usize = 2;
/// Query heads.
pub(super) const QUERY_HEADS: usize = 3;
/// The softcap, the bits of an f32.
pub(super) const SOFTCAP: usize = 4;
/// Where ALiBi's slopes are listed, the bits of an f32 for each query head.
pub(super) const SLOPES_AT: usize = 5;
/// Draws below this are dropped.
pub(super) const THRESHOLD: usize = 6;
/// The key of dropout's generator, two words.
pub(super) const SEED: usize = 7;
/// Dropout's stream of the first query head of the first batch entry.
pub(super) const FIRST_STREAM: usize = 9;
/// Dropout's streams of a batch entry.
pub(super) const STREAMS: usize = 10;
/// Where the tensors begin.
pub(super) const TENSORS: usize = 11;

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
/// A part of a message.
pub(super) const MESSAGE: usize = 7;
const TENSOR_COUNT: usize = 8;

/// Words of a record.
pub(super) const RECORD: usize = 25;
pub(super) const KV_HEAD: usize = 0;
pub(super) const QUERY_FIRST: usize = 1;
pub(super) const QUERY_STEP: usize = 2;
pub(super) const QUERY_COUNT: usize = 3;
pub(super) const KEY_FIRST: usize = 4;
pub(super) const KEY_STEP: usize = 5;
pub(super) const KEY_COUNT: usize = 6;
/// The batch entry; the first one where a launch takes all of them.
pub(super) const ENTRY: usize = 7;
/// The branch, for dropout.
pub(super) const BRANCH: usize = 8;
/// Which keys stand at or before the right bound of a query: the words of a sight.
pub(super) const RIGHT: usize = 9;
/// Which keys stand before the left bound of a query: the words of a sight.
pub(super) const LEFT: usize = 13;
/// Global positions of the queries: that of the first one and the step, in two's complement, low words first.
pub(super) const QUERY_POSITION: usize = 17;
/// Global positions of the keys.
pub(super) const KEY_POSITION: usize = 21;

/// Of a sight: query `i` reaches key `j` if `i * SIGHT_QUERY_STEP + SIGHT_LEAD >= j * SIGHT_KEY_STEP + SIGHT_LAG`.
pub(super) const SIGHT_QUERY_STEP: usize = 0;
pub(super) const SIGHT_KEY_STEP: usize = 1;
pub(super) const SIGHT_LEAD: usize = 2;
pub(super) const SIGHT_LAG: usize = 3;

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
        let scores = &problem.scores;
        words[SOFTCAP] = scores.softcap.unwrap_or(0.0).to_bits();
        if let Some(slopes) = &scores.alibi_slopes {
            words[SLOPES_AT] = word("the size of a table", words.len())?;
            words.extend(slopes.iter().map(|slope| slope.to_bits()));
        }
        if let Some(dropout) = scores.dropout {
            words[THRESHOLD] = dropout.threshold;
            words[SEED..SEED + 2].copy_from_slice(&dropout.key());
            let stream = |entry| dropout.stream(entry, problem.query_heads, 0);
            words[FIRST_STREAM] = stream(0);
            words[STREAMS] = stream(1).wrapping_sub(stream(0));
        }
        Ok(Self { words })
    }

    /// A table for rows that travel, which belong to no problem.
    pub(super) fn of_rows() -> Self {
        Self {
            words: vec![0; TENSORS + TENSOR_COUNT * TENSOR],
        }
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

/// The record of a block of one key/value head, for all batch entries; `None` if no query sees a key.
///
/// # Errors
/// [`KernelError::Invalid`] if rows, or distances that count, do not fit into words.
pub(super) fn block_record(
    problem: &Problem,
    kv_head: usize,
    block: &Block,
) -> Result<Option<Record>, KernelError> {
    let Block { queries, keys, .. } = block;
    if queries.count == 0 || keys.count == 0 {
        return Ok(None);
    }
    let Some(Bounds { left, right }) = Bounds::new(problem.mask, queries, keys)? else {
        return Ok(None);
    };
    if problem.scores.alibi_slopes.is_some() {
        check_distances(problem.mask, queries, keys)?;
    }
    let mut record = [0; RECORD];
    record[KV_HEAD] = word("a head", kv_head)?;
    record[QUERY_FIRST] = word("a query row", queries.first_row)?;
    record[QUERY_STEP] = word("a step of query rows", step(queries))?;
    record[QUERY_COUNT] = word("the number of queries", queries.count)?;
    record[KEY_FIRST] = word("a key row", keys.first_row)?;
    record[KEY_STEP] = word("a step of key rows", step(keys))?;
    record[KEY_COUNT] = word("the number of keys", keys.count)?;
    record[BRANCH] = block.branch;
    record[RIGHT..RIGHT + 4].copy_from_slice(&right.words());
    record[LEFT..LEFT + 4].copy_from_slice(&left.words());
    record[QUERY_POSITION..QUERY_POSITION + 4].copy_from_slice(&positions(queries));
    record[KEY_POSITION..KEY_POSITION + 4].copy_from_slice(&positions(keys));
    Ok(Some(record))
}

/// The record of a block for one batch entry alone.
pub(super) fn of_entry(mut record: Record, entry: usize) -> Result<Record, KernelError> {
    record[ENTRY] = word("a batch entry", entry)?;
    Ok(record)
}

/// Whether the left bound of a query hides a key of the block. It does if that of the last one does.
pub(super) fn has_left_bound(record: &Record) -> bool {
    let word = |at: usize| u64::from(record[at]);
    let last = word(QUERY_COUNT) - 1;
    last * word(LEFT + SIGHT_QUERY_STEP) + word(LEFT + SIGHT_LEAD) >= word(LEFT + SIGHT_LAG)
}

/// Position and step of rows, low words first.
fn positions(rows: &Rows) -> [u32; 4] {
    let (first, step) = (rows.first_position as u64, rows.position_step as u64);
    [first, first >> 32, step, step >> 32].map(|word| word as u32)
}

/// Checks that the distances of pairs that the mask admits fit into 31 bits.
fn check_distances(mask: Mask, queries: &Rows, keys: &Rows) -> Result<(), KernelError> {
    let ends = |rows: &Rows| {
        let last = rows.position(rows.count - 1);
        (i128::from(rows.first_position), i128::from(last))
    };
    let ((query_first, query_last), (key_first, key_last)) = (ends(queries), ends(keys));
    let bounded = |distance: i128, bound: Option<u64>| {
        bound.map_or(distance, |bound| distance.min(i128::from(bound)))
    };
    let before = bounded(query_last - key_first, mask.left);
    let largest = before.max(bounded(key_last - query_first, mask.right));
    if largest > i128::from(i32::MAX) {
        return Err(KernelError::Invalid(format!(
            "queries and keys of a block are {largest} positions apart; with ALiBi these kernels count distances up to {}",
            i32::MAX
        )));
    }
    Ok(())
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

/// The bounds of what queries see.
struct Bounds {
    /// Which keys are too far before a query.
    left: Sight,
    /// Which keys are not too far after a query.
    right: Sight,
}

impl Bounds {
    /// The bounds in a block that has queries and keys; `None` if no query sees a key.
    fn new(mask: Mask, queries: &Rows, keys: &Rows) -> Result<Option<Self>, KernelError> {
        let ahead = i128::from(queries.first_position) - i128::from(keys.first_position);
        let right = match mask.right {
            None => Sight::all(keys)?,
            Some(bound) => Sight::new(ahead + i128::from(bound), queries, keys)?,
        };
        let left = match mask.left {
            None => Sight::none(queries)?,
            Some(bound) => Sight::new(ahead - i128::from(bound) - 1, queries, keys)?,
        };
        let nothing = right.reaches == Reaches::Nothing || left.reaches == Reaches::Everything;
        Ok((!nothing).then_some(Self { left, right }))
    }
}

/// Which keys queries reach, without negative numbers: see [`SIGHT_QUERY_STEP`].
struct Sight {
    reaches: Reaches,
    query_step: u32,
    key_step: u32,
    lead: u32,
    lag: u32,
}

/// What all queries of a block reach.
#[derive(PartialEq)]
enum Reaches {
    Nothing,
    Something,
    Everything,
}

impl Sight {
    /// Every query reaches every key.
    fn all(keys: &Rows) -> Result<Self, KernelError> {
        Ok(Self {
            reaches: Reaches::Everything,
            query_step: 0,
            key_step: 1,
            lead: word("the number of keys", keys.count)?,
            lag: 0,
        })
    }

    /// No query reaches a key.
    fn none(queries: &Rows) -> Result<Self, KernelError> {
        Ok(Self {
            reaches: Reaches::Nothing,
            query_step: 1,
            key_step: 1,
            lead: 0,
            lag: word("the number of queries", queries.count)?,
        })
    }

    /// Queries reach the keys up to a distance after them, if the first query stands so far behind the first key that it reaches
    /// up to `ahead` beyond it.
    fn new(ahead: i128, queries: &Rows, keys: &Rows) -> Result<Self, KernelError> {
        let span = |rows: &Rows| match rows.count - 1 {
            0 => (1, 0),
            steps => {
                let step = i128::from(rows.position_step);
                (step, step * steps as i128)
            }
        };
        let ((query_step, query_span), (key_step, key_span)) = (span(queries), span(keys));
        if ahead >= key_span {
            return Self::all(keys);
        }
        if ahead + query_span < 0 {
            return Self::none(queries);
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
        Ok(Self {
            reaches: Reaches::Something,
            query_step: query_step as u32,
            key_step: key_step as u32,
            lead: lead as u32,
            lag: lag as u32,
        })
    }

    /// The words of a record.
    fn words(&self) -> [u32; 4] {
        [self.query_step, self.key_step, self.lead, self.lag]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::problem;

    fn rows(count: usize, first_position: i64, position_step: i64) -> Rows {
        Rows {
            first_row: 0,
            row_step: 1,
            count,
            first_position,
            position_step,
        }
    }

    fn block(queries: Rows, keys: Rows) -> Block {
        Block {
            queries,
            keys,
            branch: 0,
        }
    }

    fn record(mask: Mask, queries: Rows, keys: Rows) -> Result<Option<Record>, KernelError> {
        let problem = Problem {
            mask,
            ..problem(1, (1, 1), 1, (1, 1))
        };
        block_record(&problem, 0, &block(queries, keys))
    }

    /// Whether query `i` reaches key `j`.
    fn reaches(record: &Record, sight: usize, i: usize, j: usize) -> bool {
        i as u32 * record[sight + SIGHT_QUERY_STEP] + record[sight + SIGHT_LEAD]
            >= j as u32 * record[sight + SIGHT_KEY_STEP] + record[sight + SIGHT_LAG]
    }

    const BOUNDS: [Option<u64>; 5] = [None, Some(0), Some(3), Some(11), Some(u64::MAX)];

    #[test]
    fn sight_is_that_of_the_mask() {
        for (first, left, right) in (-40..40)
            .flat_map(|first| BOUNDS.map(|left| (first, left)))
            .flat_map(|(first, left)| BOUNDS.map(|right| (first, left, right)))
        {
            let mask = Mask { left, right };
            for (query_step, key_step) in [(1, 1), (1, 3), (4, 1), (3, 2)] {
                for (query_count, key_count) in [(7, 9), (1, 9), (7, 1), (1, 1)] {
                    let queries = rows(query_count, first, query_step);
                    check(mask, queries, rows(key_count, 3, key_step));
                }
            }
        }
    }

    fn check(mask: Mask, queries: Rows, keys: Rows) {
        let record = record(mask, queries, keys).unwrap();
        let mut too_early = false;
        for i in 0..queries.count {
            for j in 0..keys.count {
                let expected = mask.admits(queries.position(i), keys.position(j));
                let got = record.is_some_and(|record| {
                    reaches(&record, RIGHT, i, j) && !reaches(&record, LEFT, i, j)
                });
                assert_eq!(got, expected, "{mask:?} {queries:?} {keys:?} {i} {j}");
                too_early |= record.is_some_and(|record| reaches(&record, LEFT, i, j));
            }
        }
        assert!(record.is_none_or(|record| has_left_bound(&record) == too_early));
    }

    #[test]
    fn what_does_not_fit_into_words_is_refused() {
        let refused = |result: Result<_, _>| matches!(result, Err(KernelError::Invalid(_)));
        let wide = (rows(3, 0, 1 << 31), rows(3, 1, 1 << 31));
        let window = Mask {
            left: Some(1 << 31),
            right: None,
        };
        assert!(refused(record(Mask::CAUSAL, wide.0, wide.1)));
        assert!(refused(record(window, wide.0, wide.1)));
        assert!(!refused(record(Mask::NONE, wide.0, wide.1)));
        let far = Rows {
            first_row: 1 << 32,
            ..rows(1, 0, 1)
        };
        assert!(refused(record(Mask::NONE, far, rows(1, 0, 1))));
    }

    #[test]
    fn distances_that_do_not_fit_into_words_are_refused_where_they_count() {
        let near = Mask {
            left: Some(5),
            right: None,
        };
        let far = rows(4, 1 << 33, 1);
        for (mask, queries, fits) in [
            (Mask::NONE, far, false),
            (Mask::CAUSAL, far, false),
            (near, far, true),
            (Mask::NONE, rows(4, (1 << 31) - 4, 1), true),
            (Mask::NONE, rows(4, (1 << 31) - 3, 1), false),
        ] {
            let mut problem = problem(1, (1, 1), 1, (1, 1));
            problem.mask = mask;
            problem.scores.alibi_slopes = Some([0.5].into());
            let result = block_record(&problem, 0, &block(queries, rows(4, 0, 1)));
            assert_eq!(result.is_ok(), fits, "{mask:?} {queries:?}");
        }
    }
}
