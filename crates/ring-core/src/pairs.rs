//! How many pairs of a block a mask admits, without enumerating them: [`block_pairs`].

use ring_kernels::{Block, Mask};

/// Admitted pairs of a block.
pub(crate) fn block_pairs(block: &Block, mask: Mask) -> u128 {
    let all = block.queries.count as u128 * block.keys.count as u128;
    let up_to = |bound: Option<u64>| bound.map(|bound| i64::try_from(bound).unwrap_or(i64::MAX));
    let seen = up_to(mask.right).map_or(all, |right| pairs_up_to(block, right));
    // Those further back than the left bound.
    let left = up_to(mask.left).and_then(|left| left.checked_add(1));
    seen - left.map_or(0, |left| pairs_up_to(block, -left))
}

/// Pairs of a block whose key stands at most `ahead` positions after the query.
fn pairs_up_to(block: &Block, ahead: i64) -> u128 {
    let (queries, keys) = (&block.queries, &block.keys);
    if queries.count == 0 || keys.count == 0 {
        return 0;
    }
    // In the order of positions all below 2^42, so that no sum overflows.
    let ahead = ahead.clamp(-(1 << 50), 1 << 50);
    let reach = |i: usize| queries.position(i) + ahead;
    // Queries below the first key see nothing, queries at or after the last key see all; between, floor((q - k0)/ks) + 1.
    let first_query_at = |position: i64| {
        let distance = (position - reach(0)).max(0);
        let steps = (distance + queries.position_step - 1) / queries.position_step;
        (steps as usize).min(queries.count)
    };
    let some = first_query_at(keys.first_position);
    let all = first_query_at(keys.position(keys.count - 1));
    let between = (all - some) as u128;
    let first = (reach(some) - keys.first_position).max(0) as u128;
    between
        + floor_sum(
            between,
            keys.position_step as u128,
            queries.position_step as u128,
            first,
        )
        + (queries.count - all) as u128 * keys.count as u128
}

/// `sum of floor((a i + b) / m) for i in 0..n`, in the time of Euclid's algorithm.
fn floor_sum(n: u128, m: u128, a: u128, b: u128) -> u128 {
    if n == 0 {
        return 0;
    }
    let mut sum = 0;
    if a >= m {
        sum += n * (n - 1) / 2 * (a / m);
    }
    if b >= m {
        sum += n * (b / m);
    }
    let (a, b) = (a % m, b % m);
    let last = a * n + b;
    if last >= m {
        sum += floor_sum(last / m, a, m, last % m);
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring_kernels::Rows;

    use super::*;

    fn rows(first_position: i64, position_step: i64, count: usize) -> Rows {
        Rows {
            first_row: 0,
            row_step: 1,
            count,
            first_position,
            position_step,
        }
    }

    proptest! {
        #[test]
        fn pairs_are_counted_without_enumeration(
            q0 in -20_i64..40, qs in 1_i64..7, nq in 1_usize..30,
            k0 in -20_i64..40, ks in 1_i64..7, nk in 1_usize..30,
            left in prop::option::of(0_u64..60), right in prop::option::of(0_u64..60),
        ) {
            let block = Block { queries: rows(q0, qs, nq), keys: rows(k0, ks, nk), branch: 0 };
            let mask = Mask { left, right };
            let brute = (0..nq)
                .flat_map(|i| (0..nk).map(move |j| (i, j)))
                .filter(|&(i, j)| mask.admits(block.queries.position(i), block.keys.position(j)))
                .count();
            prop_assert_eq!(block_pairs(&block, mask), brute as u128);
        }
    }

    #[test]
    fn bounds_beyond_all_positions_bound_nothing() {
        let block = Block {
            queries: rows(-5, 3, 40),
            keys: rows(2, 2, 50),
            branch: 0,
        };
        for far in [1 << 41, i64::MAX as u64, u64::MAX] {
            let mask = Mask {
                left: Some(far),
                right: Some(far),
            };
            assert_eq!(block_pairs(&block, mask), 2000);
        }
    }
}
