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
    tiles_in(rows, size, 0..rows.count)
}

/// Those of the [`tiles`] of `rows` that hold rows `range`.
///
/// They are whole, and begin where they would if all tiles were walked: neither running maxima nor chains of additions depend on
/// who walks them, and so the results do not either.
pub(super) fn tiles_in(rows: Rows, size: usize, range: Range<usize>) -> impl Iterator<Item = Rows> {
    let start = range.start / size * size;
    // From `start` on there would be a tile even for an empty range.
    let end = if range.is_empty() { start } else { range.end };
    (start..end)
        .step_by(size)
        .map(move |start| part(&rows, start, size.min(rows.count - start)))
}

/// How many of `rows` stand before `position`. Positions ascend, so these are the first ones.
fn before(position: i64, rows: &Rows) -> usize {
    if position <= rows.first_position {
        return 0;
    }
    at_most(
        position.abs_diff(rows.first_position).div_ceil(step(rows)),
        rows,
    )
}

/// How many of `rows` stand at `position` or before it.
fn up_to(position: i64, rows: &Rows) -> usize {
    if position < rows.first_position {
        return 0;
    }
    let steps = position.abs_diff(rows.first_position) / step(rows);
    at_most(steps.saturating_add(1), rows)
}

fn step(rows: &Rows) -> u64 {
    rows.position_step.unsigned_abs().max(1)
}

fn at_most(count: u64, rows: &Rows) -> usize {
    usize::try_from(count).map_or(rows.count, |count| count.min(rows.count))
}

/// The keys that a query at `position` sees. Both ends do not decrease as the position grows.
pub(super) fn seen(mask: Mask, position: i64, keys: &Rows) -> Range<usize> {
    let first = |left| before(position.saturating_sub_unsigned(left), keys);
    let end = |right| up_to(position.saturating_add_unsigned(right), keys);
    mask.left.map_or(0, first)..mask.right.map_or(keys.count, end)
}

/// What a key sees of the queries: those that see it.
pub(super) fn flipped(mask: Mask) -> Mask {
    Mask {
        left: mask.right,
        right: mask.left,
    }
}

/// From the first key that the first of `queries` sees to the last that the last one sees: no others are seen by any.
pub(super) fn reach(mask: Mask, queries: &Rows, keys: &Rows) -> Range<usize> {
    let Some(last) = queries.count.checked_sub(1) else {
        return 0..0;
    };
    seen(mask, queries.position(0), keys).start..seen(mask, queries.position(last), keys).end
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

    fn masks() -> impl Iterator<Item = Mask> {
        let bounds = || [None, Some(0), Some(1), Some(3), Some(9), Some(u64::MAX)].into_iter();
        bounds().flat_map(move |left| bounds().map(move |right| Mask { left, right }))
    }

    /// The first and one after the last for which `is` holds; it must hold for all between.
    fn range_where(count: usize, is: impl Fn(usize) -> bool) -> Option<Range<usize>> {
        let first = (0..count).find(|&i| is(i))?;
        let end = (first..count).find(|&i| !is(i)).unwrap_or(count);
        assert!(!(end..count).any(is), "not one range");
        Some(first..end)
    }

    #[test]
    fn seen_are_exactly_the_rows_that_the_mask_admits() {
        for mask in masks() {
            for position in -40..50 {
                let expected = range_where(ROWS.count, |i| mask.admits(position, ROWS.position(i)));
                let got = seen(mask, position, &ROWS);
                assert_eq!(Some(got).filter(|got| !got.is_empty()), expected);
                let expected = range_where(ROWS.count, |i| mask.admits(ROWS.position(i), position));
                let got = seen(flipped(mask), position, &ROWS);
                assert_eq!(Some(got).filter(|got| !got.is_empty()), expected);
            }
        }
    }

    #[test]
    fn ends_of_what_is_seen_never_decrease() {
        for mask in masks() {
            for position in -40..50 {
                let (here, next) = (seen(mask, position, &ROWS), seen(mask, position + 1, &ROWS));
                assert!(here.start <= here.end);
                assert!(here.start <= next.start && here.end <= next.end);
            }
        }
    }

    #[test]
    fn positions_and_bounds_at_their_limits_do_not_overflow() {
        let far = 1_i64 << 40;
        for first_position in [-far, far, i64::MIN, i64::MAX - 6 * 4] {
            let rows = Rows {
                first_position,
                ..ROWS
            };
            for bound in [0, 1, far as u64, u64::MAX - 1, u64::MAX].map(Some) {
                for position in [-far, 0, far, i64::MIN, i64::MAX] {
                    for (left, right) in [(bound, None), (None, bound), (bound, bound)] {
                        let mask = Mask { left, right };
                        let expected =
                            range_where(rows.count, |i| mask.admits(position, rows.position(i)));
                        let got = seen(mask, position, &rows);
                        assert_eq!(Some(got).filter(|got| !got.is_empty()), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn no_row_out_of_reach_is_seen() {
        let keys = Rows {
            position_step: 3,
            count: 30,
            ..ROWS
        };
        for mask in masks() {
            for (first_position, count) in [(-70, 9), (-20, 4), (0, 0), (3, 1), (90, 5)] {
                let queries = Rows {
                    first_position,
                    count,
                    ..ROWS
                };
                let reach = reach(mask, &queries, &keys);
                assert!(reach.end <= keys.count);
                for query in 0..count {
                    let seen = seen(mask, queries.position(query), &keys);
                    assert!(seen.is_empty() || reach.start <= seen.start && seen.end <= reach.end);
                }
            }
        }
    }

    #[test]
    fn tiles_in_a_range_are_those_that_hold_its_rows() {
        for size in 1..9 {
            for start in 0..=ROWS.count {
                for end in start..=ROWS.count {
                    let got: Vec<_> = tiles_in(ROWS, size, start..end).collect();
                    let expected: Vec<_> = tiles(ROWS, size)
                        .enumerate()
                        .filter(|(tile, _)| tile * size < end && start < (tile + 1) * size)
                        .filter(|_| start < end)
                        .map(|(_, rows)| rows)
                        .collect();
                    assert_eq!(got, expected, "{size} {start}..{end}");
                }
            }
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
