//! Dropout: which weights of a tile are kept.
//!
//! [`Dropout::keeps`] says so for one pair; here it is computed for a tile at once. Lanes are queries, and a group of four keys
//! shares its draws if the keys are neighbours in global positions.

use super::format::Vectors;
use super::scratch::QUERY_TILE;
use super::softmax::Sight;
use crate::Dropout;
use crate::dropout::{MULTIPLIERS, ROUNDS, WEYL, counter};

/// Dropout of the weights of one query head in one block.
#[derive(Clone, Copy)]
pub(super) struct Keep {
    pub(super) dropout: Dropout,
    /// That of the batch entry and the query head.
    pub(super) stream: u32,
    /// That of the block.
    pub(super) branch: u32,
}

impl Keep {
    /// Fills a tile, keys x queries: 1 for weights that are kept, 0 for others. Only keys that are seen, and only whole vectors that
    /// hold queries, are filled in.
    #[inline(always)]
    pub(super) fn fill<S: Vectors>(&self, _: S, sight: &Sight<'_>, kept: &mut [f32]) {
        let lanes = sight.lanes::<S>();
        let queries = self.query_words(sight);
        let round_keys = round_keys(self.dropout.key());
        let mut draws = [[0; QUERY_TILE]; 4];
        let mut drawn = None;
        for key in sight.seen.clone() {
            let position = sight.keys.position(key);
            let four = position.div_euclid(4);
            if drawn != Some(four) {
                let counter = counter(self.stream, self.branch, 0, position).map(u64::from);
                draw(&mut draws, counter, &queries, &round_keys, lanes);
                drawn = Some(four);
            }
            let draws = &draws[position.rem_euclid(4) as usize][..lanes];
            let kept = &mut kept[key * QUERY_TILE..][..lanes];
            for (kept, &draw) in kept.iter_mut().zip(draws) {
                *kept = f32::from(u8::from(draw >= self.dropout.threshold));
            }
        }
    }

    /// What the queries are in words 1 and 3 of their counters.
    #[inline(always)]
    fn query_words(&self, sight: &Sight<'_>) -> [[u64; QUERY_TILE]; 2] {
        let mut words = [[0; QUERY_TILE]; 2];
        let [low_words, high_words] = &mut words;
        for i in 0..sight.queries.count {
            let [_, low, _, high] = counter(0, 0, sight.queries.position(i), 0);
            (low_words[i], high_words[i]) = (low.into(), high.into());
        }
        words
    }
}

/// The generator's key in every round.
#[inline(always)]
fn round_keys([mut low, mut high]: [u32; 2]) -> [[u64; 2]; ROUNDS] {
    let mut keys = [[0; 2]; ROUNDS];
    for key in &mut keys {
        *key = [low.into(), high.into()];
        low = low.wrapping_add(WEYL[0]);
        high = high.wrapping_add(WEYL[1]);
    }
    keys
}

/// Philox4x32-10 for all queries; `counter` is that of a query at position 0.
///
/// A word is the lower half of a `u64`, as vectors multiply them; what is in the upper half does not matter. A plain loop, of which
/// the compiler makes vectors.
#[inline(always)]
fn draw(
    draws: &mut [[u32; QUERY_TILE]; 4],
    counter: [u64; 4],
    queries: &[[u64; QUERY_TILE]; 2],
    round_keys: &[[u64; 2]; ROUNDS],
    lanes: usize,
) {
    const LOW: u64 = u32::MAX as u64;
    let [first, second, third, fourth] = draws;
    for i in 0..lanes.min(QUERY_TILE) {
        let mut words = [
            counter[0],
            queries[0][i],
            counter[2],
            counter[3] | queries[1][i],
        ];
        for key in round_keys {
            let product = [
                u64::from(MULTIPLIERS[0]) * (words[0] & LOW),
                u64::from(MULTIPLIERS[1]) * (words[2] & LOW),
            ];
            words = [
                product[1] >> 32 ^ words[1] ^ key[0],
                product[1],
                product[0] >> 32 ^ words[3] ^ key[1],
                product[0],
            ];
        }
        first[i] = words[0] as u32;
        second[i] = words[1] as u32;
        third[i] = words[2] as u32;
        fourth[i] = words[3] as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::Format;
    use super::super::instruction_set::{InstructionSet, Work};
    use super::super::scratch::KEY_TILE;
    use super::*;
    use crate::{Mask, Rows};

    struct Fill<'a>(Keep, Sight<'a>, &'a mut [f32]);

    impl Work for Fill<'_> {
        #[inline(always)]
        fn run<S: Vectors, F: Format<S>>(self, simd: S, _: F) {
            let Self(keep, sight, kept) = self;
            keep.fill(simd, &sight, kept);
        }
    }

    fn rows(first_position: i64, position_step: i64, count: usize) -> Rows {
        Rows {
            first_row: 0,
            row_step: 1,
            count,
            first_position,
            position_step,
        }
    }

    #[test]
    fn a_tile_is_what_dropout_says_of_each_pair() {
        let keep = Keep {
            dropout: Dropout::new(0.37, 0x0123_4567_89ab_cdef, 2),
            stream: 77,
            branch: 65_535,
        };
        let far = 1_i64 << 40;
        for first in [-far, -3, 0, 1, (1 << 32) - 20, (1 << 34) - 30, far - 1000] {
            for step in [1, 2, 3, 4, 7] {
                for count in [1, 17, QUERY_TILE] {
                    let queries = rows(first, step, count);
                    let keys = rows(first + 6 - step, step, KEY_TILE - 1);
                    for set in InstructionSet::available() {
                        let mut kept = vec![f32::NAN; KEY_TILE * QUERY_TILE];
                        let sight = Sight::new(Mask::NONE, 1, &queries, &keys).unwrap();
                        set.run(false, Fill(keep, sight, &mut kept));
                        for key in 0..keys.count {
                            for query in 0..count {
                                let (n, m) = (queries.position(query), keys.position(key));
                                let expected = keep.dropout.keeps(keep.stream, keep.branch, n, m);
                                let got = kept[key * QUERY_TILE + query];
                                assert_eq!(got, f32::from(u8::from(expected)), "{set} {n} {m}");
                            }
                        }
                    }
                }
            }
        }
    }
}
