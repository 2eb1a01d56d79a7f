//! Sets of positions as arithmetic progressions, so that no size depends on the length of the sequence.

use serde::{Deserialize, Serialize};

/// The positions `start, start + stride, ...` below `end`.
///
/// Kept in canonical form: `end` is one past the last position, or equals `start` if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Progression {
    start: i64,
    end: i64,
    stride: i64,
}

impl Progression {
    /// The positions `start, start + stride, ...` below `end`; `stride` is at least 1.
    pub(crate) fn new(start: i64, end: i64, stride: i64) -> Self {
        debug_assert!(stride >= 1);
        let end = if end <= start {
            start
        } else {
            start + (end - 1 - start) / stride * stride + 1
        };
        Self { start, end, stride }
    }

    /// First position, if there is one.
    pub(crate) fn first(&self) -> Option<i64> {
        (!self.is_empty()).then_some(self.start)
    }

    /// Last position, if there is one.
    pub(crate) fn last(&self) -> Option<i64> {
        (!self.is_empty()).then_some(self.end - 1)
    }

    /// Distance of neighbouring positions.
    pub(crate) fn stride(&self) -> i64 {
        self.stride
    }

    /// Number of positions.
    pub(crate) fn count(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            ((self.end - 1 - self.start) / self.stride + 1) as usize
        }
    }

    /// Whether there is no position.
    pub(crate) fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Whether `position` is one of them.
    pub(crate) fn contains(&self, position: i64) -> bool {
        (self.start..self.end).contains(&position) && (position - self.start) % self.stride == 0
    }

    /// The positions in `low..high`.
    #[must_use]
    pub(crate) fn clip(&self, low: i64, high: i64) -> Self {
        let skipped = (low - self.start).max(0);
        let steps = (skipped + self.stride - 1) / self.stride;
        let start = self.start.saturating_add(steps.saturating_mul(self.stride));
        Self::new(start, self.end.min(high).max(start), self.stride)
    }

    /// The same positions, `distance` further on.
    #[must_use]
    pub(crate) fn shifted(&self, distance: i64) -> Self {
        Self {
            start: self.start + distance,
            end: self.end + distance,
            stride: self.stride,
        }
    }

    /// The positions that both have; a progression again (Chinese remainder theorem).
    #[must_use]
    pub(crate) fn intersect(&self, other: &Self) -> Self {
        let none = Self::new(self.start, self.start, self.stride);
        let (a, m) = (i128::from(self.start), i128::from(self.stride));
        let (b, n) = (i128::from(other.start), i128::from(other.stride));
        let (gcd, inverse) = gcd_with_inverse(m, n);
        if self.is_empty() || other.is_empty() || (b - a) % gcd != 0 {
            return none;
        }
        let lcm = m / gcd * n;
        // a + m*t = b (mod n)
        let t = ((b - a) / gcd * inverse).rem_euclid(n / gcd);
        let meeting = a + m * t;
        let low = a.max(b);
        let high = i128::from(self.end.min(other.end));
        let start = meeting + (low - meeting).div_euclid(lcm) * lcm;
        let start = if start < low { start + lcm } else { start };
        if start >= high {
            return none;
        }
        let stride = i64::try_from(lcm).unwrap_or(i64::MAX / 4);
        Self::new(start as i64, high as i64, stride)
    }
}

/// `gcd(m, n)` and the inverse of `m / gcd` modulo `n / gcd`.
fn gcd_with_inverse(m: i128, n: i128) -> (i128, i128) {
    let (mut old_remainder, mut remainder) = (m, n);
    let (mut old_factor, mut factor) = (1_i128, 0_i128);
    while remainder != 0 {
        let quotient = old_remainder / remainder;
        (old_remainder, remainder) = (remainder, old_remainder - quotient * remainder);
        (old_factor, factor) = (factor, old_factor - quotient * factor);
    }
    (old_remainder, old_factor)
}

/// Disjoint progressions whose union is the union of `sets`, in ascending order of where they begin.
///
/// Nested sets (each stride divides the next, as in LongNet's patterns) give one progression for each interval between the
/// ends of the sets; other strides are split into residues modulo their least common multiple.
pub(crate) fn disjoint_cover(sets: Vec<Progression>) -> Vec<Progression> {
    if sets.len() == 1 && !sets[0].is_empty() {
        return sets;
    }
    let mut cuts: Vec<i64> = sets
        .iter()
        .filter(|set| !set.is_empty())
        .flat_map(|set| [set.start, set.end])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut cover: Vec<Progression> = Vec::new();
    for window in cuts.windows(2) {
        let maximal = maximal_sets(&sets, window[0], window[1]);
        match maximal.as_slice() {
            [only] => push_merged(&mut cover, *only),
            several => push_residues(&mut cover, several, window[0], window[1]),
        }
    }
    cover
}

/// The sets clipped to `low..high`, without those contained in another.
fn maximal_sets(sets: &[Progression], low: i64, high: i64) -> Vec<Progression> {
    let mut clipped: Vec<Progression> = sets
        .iter()
        .map(|set| set.clip(low, high))
        .filter(|set| !set.is_empty())
        .collect();
    clipped.sort_by_key(|set| (set.stride, set.start));
    let mut maximal: Vec<Progression> = Vec::with_capacity(clipped.len());
    for set in clipped {
        let inside = |outer: &Progression| {
            outer.contains(set.start)
                && (set.count() == 1
                    || (set.stride % outer.stride == 0 && outer.contains(set.end - 1)))
        };
        if !maximal.iter().any(inside) {
            maximal.push(set);
        }
    }
    maximal
}

/// Appends `set`, joined to the last one if it continues it.
fn push_merged(cover: &mut Vec<Progression>, set: Progression) {
    if let Some(last) = cover.last_mut()
        && last.stride == set.stride
        && last.end - 1 + last.stride == set.start
    {
        last.end = set.end;
        return;
    }
    cover.push(set);
}

/// Appends the union of `sets` within `low..high`, split into residues modulo the least common multiple of their strides.
fn push_residues(cover: &mut Vec<Progression>, sets: &[Progression], low: i64, high: i64) {
    let lcm = sets.iter().fold(1_i128, |lcm, set| {
        let stride = i128::from(set.stride);
        let (gcd, _) = gcd_with_inverse(lcm, stride);
        (lcm / gcd * stride).min(i128::from(high - low))
    });
    // Beyond the width of the window every residue has one element at most, so the width serves as well.
    let period = if sets.iter().all(|set| lcm % i128::from(set.stride) == 0) {
        lcm as i64
    } else {
        high - low
    };
    for (index, set) in sets.iter().enumerate() {
        let mut position = set.start;
        while position < set.end && position < low + period {
            if !sets[..index].iter().any(|other| other.covers(position)) {
                cover.push(Progression::new(position, set.end, period));
            }
            position += set.stride;
        }
    }
}

impl Progression {
    /// Whether the endless progression in both directions has `position`: the residue test of [`push_residues`], where
    /// all sets fill the same window.
    fn covers(&self, position: i64) -> bool {
        (position - self.start).rem_euclid(self.stride) == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn any_progression() -> impl Strategy<Value = Progression> {
        (-30_i64..60, -10_i64..80, 1_i64..12)
            .prop_map(|(start, len, stride)| Progression::new(start, start + len, stride))
    }

    fn members(set: &Progression) -> BTreeSet<i64> {
        (-100..200).filter(|&p| set.contains(p)).collect()
    }

    proptest! {
        #[test]
        fn clip_and_intersect_are_set_operations(
            a in any_progression(), b in any_progression(), low in -40_i64..100, len in 0_i64..60,
        ) {
            let range: BTreeSet<i64> = (low..low + len).collect();
            let clipped = a.clip(low, low + len);
            prop_assert_eq!(members(&clipped), &members(&a) & &range);
            prop_assert_eq!(clipped.count(), members(&clipped).len());
            let both = a.intersect(&b);
            prop_assert_eq!(members(&both), &members(&a) & &members(&b));
            prop_assert_eq!(both.count(), members(&both).len());
        }

        #[test]
        fn a_cover_holds_every_member_once(sets in prop::collection::vec(any_progression(), 0..5)) {
            let mut union = BTreeSet::new();
            for set in &sets {
                union.extend(members(set));
            }
            let mut covered = BTreeSet::new();
            for set in disjoint_cover(sets) {
                for member in members(&set) {
                    prop_assert!(covered.insert(member), "{} twice", member);
                }
            }
            prop_assert_eq!(covered, union);
        }
    }

    #[test]
    fn nested_strides_need_one_progression_per_interval() {
        let sets = [
            Progression::new(0, 64, 1),
            Progression::new(0, 128, 2),
            Progression::new(0, 256, 4),
        ];
        assert_eq!(disjoint_cover(sets.to_vec()).len(), 3);
    }

    #[test]
    fn huge_strides_do_not_overflow() {
        let a = Progression::new(3, 1 << 40, (1 << 39) + 1);
        let b = Progression::new(0, 1 << 40, (1 << 38) + 3);
        assert!(a.intersect(&b).count() <= 1);
        assert_eq!(
            disjoint_cover(vec![a, b])
                .iter()
                .map(Progression::count)
                .sum::<usize>(),
            6
        );
    }
}
