//! Parts of row sets: what lies in a range of rows, tiles, and what a query sees of them.

use std::ops::Range;

use super::scratch::QUERY_TILE;
pub(super) use crate::block::blocks_of;
use crate::{Mask, Rows};

/// Rows `start..start + count` of `rows`.
fn part(rows: &Rows, start: usize, count: usize) -> Rows {
    Rows {
        first_row: rows.first_row + start * rows.row_step,
        count,
        first_position: rows.first_position + start as i64 * rows.position_step,
        ..*rows
    }
}

/// The rows whose local index lies in `range`.
pub(super) fn within(rows: &Rows, range: &Range<usize>) -> Rows {
    let before = |end: usize| {
        let rows_to_end = end
            .saturating_sub(rows.first_row)
            .div_ceil(rows.row_step.max(1));
        rows_to_end.min(rows.count)
    };
    let start = before(range.start);
    if start == rows.count {
        return Rows { count: 0, ..*rows };
    }
    part(rows, start, before(range.end) - start)
}

/// Consecutive pieces of at most `size` rows.
pub(super) fn tiles(rows: Rows, size: usize) -> impl Iterator<Item = Rows> {
    (0..rows.count)
        .step_by(size)
        .map(move |start| part(&rows, start, size.min(rows.count - start)))
}

/// How many of `keys` a query at `position` sees. Positions ascend, so these are the first ones.
pub(super) fn visible(mask: Mask, position: i64, keys: &Rows) -> usize {
    let Some(right) = mask.right else {
        return keys.count;
    };
    let position = position.saturating_add_unsigned(right);
    match position {
        _ if position < keys.first_position => 0,
        _ => {
            let steps =
                position.abs_diff(keys.first_position) / keys.position_step.unsigned_abs().max(1);
            usize::try_from(steps)
                .map_or(keys.count, |steps| keys.count.min(steps.saturating_add(1)))
        }
    }
}

/// The first of `queries` that sees a key at `position`; their number if none does.
pub(super) fn first_seeing(mask: Mask, position: i64, queries: &Rows) -> usize {
    let Some(right) = mask.right else {
        return 0;
    };
    let position = position.saturating_sub_unsigned(right);
    match position {
        _ if position <= queries.first_position => 0,
        _ => {
            let steps = position
                .abs_diff(queries.first_position)
                .div_ceil(queries.position_step.unsigned_abs().max(1));
            usize::try_from(steps).map_or(queries.count, |steps| queries.count.min(steps))
        }
    }
}

/// How many of `keys` the last of `queries` sees: the most that any of them does.
pub(super) fn most_visible(mask: Mask, queries: &Rows, keys: &Rows) -> usize {
    match queries.count {
        0 => 0,
        count => visible(mask, queries.position(count - 1), keys),
    }
}

/// Rows of each range when `rows` rows are cut into at most `pieces` ranges of whole tiles.
pub(super) fn range_len(rows: usize, pieces: usize) -> usize {
    rows.div_ceil(pieces.max(1))
        .next_multiple_of(QUERY_TILE)
        .max(1)
}

/// Into how many ranges each of `heads` heads is cut: enough that threads that finish early find work, and no more, since
/// every range packs its keys anew.
pub(super) fn pieces(heads: usize, threads: usize) -> usize {
    const TASKS_PER_THREAD: usize = 4;
    match threads {
        1 => 1,
        _ => (TASKS_PER_THREAD * threads).div_ceil(heads.max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: Rows = Rows {
        first_row: 5,
        row_step: 3,
        count: 7,
        first_position: -10,
        position_step: 4,
    };

    #[test]
    fn within_keeps_exactly_the_rows_of_the_range() {
        for start in 0..30 {
            for end in start..30 {
                let part = within(&ROWS, &(start..end));
                let got: Vec<_> = (0..part.count)
                    .map(|i| (part.row(i), part.position(i)))
                    .collect();
                let expected: Vec<_> = (0..ROWS.count)
                    .map(|i| (ROWS.row(i), ROWS.position(i)))
                    .filter(|(row, _)| (start..end).contains(row))
                    .collect();
                assert_eq!(got, expected, "{start}..{end}");
            }
        }
    }

    #[test]
    fn visible_counts_the_keys_at_or_before_the_query() {
        for position in -20..30 {
            let expected = (0..ROWS.count)
                .filter(|&i| ROWS.position(i) <= position)
                .count();
            assert_eq!(visible(Mask::CAUSAL, position, &ROWS), expected);
            assert_eq!(visible(Mask::NONE, position, &ROWS), ROWS.count);
        }
    }

    #[test]
    fn first_seeing_is_the_first_query_at_or_after_the_key() {
        for position in -20..30 {
            let expected = (0..ROWS.count)
                .find(|&i| ROWS.position(i) >= position)
                .unwrap_or(ROWS.count);
            assert_eq!(first_seeing(Mask::CAUSAL, position, &ROWS), expected);
            assert_eq!(first_seeing(Mask::NONE, position, &ROWS), 0);
        }
    }

    #[test]
    fn ranges_are_whole_tiles_and_not_more_than_asked_for() {
        for rows in [0usize, 1, 63, 64, 65, 1000] {
            for pieces in 0..9 {
                let len = range_len(rows, pieces);
                assert!(rows.div_ceil(len) <= pieces.max(1));
                assert_eq!(len % QUERY_TILE * usize::from(rows > 0), 0);
            }
        }
    }
}
