//! Which row sets may be written at the same time.
//!
//! Cubes of one launch run in any order. Sets of rows that have a row in common are therefore written by launches one after the
//! other, always in the same order, so that results do not depend on chance and need no atomic additions.

use crate::Rows;

/// Divides row sets of heads into waves, within each of which no row of a head is in two sets. A set comes in a later wave
/// than all sets before it that it shares rows with. Returns the indices of the sets of each wave.
pub(super) fn waves(heads: usize, sets: impl Iterator<Item = (usize, Rows)>) -> Vec<Vec<usize>> {
    let mut waves: Vec<Vec<usize>> = Vec::new();
    let mut placed: Vec<Vec<(Rows, usize)>> = vec![Vec::new(); heads];
    // Behind the last row of those that are placed.
    let mut ends = vec![0; heads];
    for (index, (head, rows)) in sets.enumerate() {
        // Mostly sets ascend, and there may be many: those behind all others meet none of them.
        let is_behind = rows.first_row >= ends[head];
        let others = if is_behind { 0 } else { placed[head].len() };
        let before = placed[head][..others].iter();
        let wave = before
            .filter(|(other, _)| share_a_row(other, &rows))
            .map(|&(_, wave)| wave + 1)
            .max()
            .unwrap_or(0);
        if wave == waves.len() {
            waves.push(Vec::new());
        }
        waves[wave].push(index);
        if let Some(last) = rows.count.checked_sub(1) {
            ends[head] = ends[head].max(rows.row(last) + 1);
        }
        placed[head].push((rows, wave));
    }
    waves
}

/// Whether two sets may have a row in common; never false if they have.
fn share_a_row(a: &Rows, b: &Rows) -> bool {
    if a.count == 0 || b.count == 0 {
        return false;
    }
    let (last_a, last_b) = (a.row(a.count - 1), b.row(b.count - 1));
    if last_a < b.first_row || last_b < a.first_row {
        return false;
    }
    let step = |rows: &Rows| if rows.count > 1 { rows.row_step } else { 0 };
    match greatest_common_divisor(step(a), step(b)) {
        0 => true,
        common => a.first_row.abs_diff(b.first_row).is_multiple_of(common),
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => greatest_common_divisor(b, a % b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(first_row: usize, row_step: usize, count: usize) -> Rows {
        Rows {
            first_row,
            row_step,
            count,
            first_position: 0,
            position_step: 1,
        }
    }

    #[test]
    fn sets_with_a_common_row_are_found() {
        let sets: Vec<Rows> = (0..5)
            .flat_map(|first| {
                (1..5).flat_map(move |step| (0..4).map(move |n| rows(first, step, n)))
            })
            .collect();
        for a in &sets {
            for b in &sets {
                let common = (0..a.count).any(|i| (0..b.count).any(|j| a.row(i) == b.row(j)));
                assert!(share_a_row(a, b) || !common, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn segments_and_offsets_of_a_branch_are_one_wave() {
        let segments = (0..4).map(|i| (0, rows(16 * i, 4, 4)));
        let other_offset = (0..4).map(|i| (0, rows(16 * i + 1, 4, 4)));
        let other_head = (0..4).map(|i| (1, rows(16 * i, 1, 16)));
        let sets = segments.chain(other_offset).chain(other_head);
        assert_eq!(waves(2, sets), [(0..12).collect::<Vec<_>>()]);
    }

    #[test]
    fn sets_that_meet_keep_their_order() {
        let sets = [
            rows(0, 1, 10),
            rows(20, 1, 10),
            rows(5, 1, 20),
            rows(0, 1, 5),
            rows(6, 1, 1),
        ];
        let got = waves(1, sets.into_iter().map(|rows| (0, rows)));
        assert_eq!(got, [vec![0, 1], vec![2, 3], vec![4]]);
    }
}
