//! Which weights attention dropout drops: a pure function of a seed and of what the weight belongs to.

use serde::{Deserialize, Serialize};

/// Dropout of attention weights.
///
/// Whether the weight of a pair is dropped depends on the seed, the batch entry, the query head, the positions of query and key
/// and the branch that holds the pair, by a counter-based generator (Philox4x32-10; Salmon et al., SC 2011): on nothing
/// else, so ranks, tiles, devices and a second run agree to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dropout {
    /// Weights whose draw, of 32 bits, is below this are dropped.
    pub threshold: u32,
    /// The seed.
    pub seed: u64,
    /// What the first batch entry counts as, if batches are parts of a larger one.
    pub first_entry: u32,
    /// Which query heads these are, if they are a part of those of a computation: the first one, and the number of all.
    pub part_of_heads: Option<(u32, u32)>,
}

impl Dropout {
    /// Dropout with `probability`, which must be in `[0, 1)` (others are taken for the nearest of them), rounded down to a multiple
    /// of 2^-32.
    pub fn new(probability: f32, seed: u64, first_entry: u32) -> Self {
        Self {
            threshold: (f64::from(probability) * 2_f64.powi(32)) as u32,
            seed,
            first_entry,
            part_of_heads: None,
        }
    }

    /// The same for a problem whose query heads are those from `first` on of `all` heads.
    #[must_use]
    pub fn of_heads(self, first: u32, all: u32) -> Self {
        Self {
            part_of_heads: Some((first, all)),
            ..self
        }
    }

    /// Whether the weight of a pair counts. `query` and `key` are global positions; `stream` is that of [`stream`](Self::stream).
    pub fn keeps(&self, stream: u32, branch: u32, query: i64, key: i64) -> bool {
        let counter = counter(stream, branch, query, key);
        let draws = philox(counter, self.key());
        draws[key.rem_euclid(4) as usize] >= self.threshold
    }

    /// What tells the (batch entry, query head) pairs of a computation apart, as long as there are at most 2^32, entries counted
    /// from `first_entry`'s 0.
    pub fn stream(&self, entry: usize, query_heads: usize, query_head: usize) -> u32 {
        let (first, all) = self.part_of_heads.unwrap_or((0, query_heads as u32));
        (self.first_entry.wrapping_add(entry as u32))
            .wrapping_mul(all)
            .wrapping_add(first.wrapping_add(query_head as u32))
    }

    /// The generator's key.
    pub(crate) fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }
}

/// The generator's counter: four neighbouring keys, which begin at a multiple of 4, have it in common and take one word each of
/// what it yields.
///
/// Positions are below 2^41 in size (keys below 2^40), so 42 bits hold them with their sign; there are 38 of a quarter of the key's,
/// and 16 of the branch.
pub(crate) fn counter(stream: u32, branch: u32, query: i64, key: i64) -> [u32; 4] {
    let keys = key.div_euclid(4);
    let query_high = (query >> 32) as u32 & 0x3ff;
    let keys_high = (keys >> 32) as u32 & 0x3f;
    [
        keys as u32,
        query as u32,
        stream,
        query_high | keys_high << 10 | branch << 16,
    ]
}

/// Multipliers of the generator's rounds.
pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What the generator's key grows by from round to round.
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// The generator's rounds.
pub(crate) const ROUNDS: usize = 10;

/// Philox4x32-10: four random words from a counter and a key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let product = |lane: usize, word: u32| {
            let wide = u64::from(MULTIPLIERS[lane]) * u64::from(word);
            ((wide >> 32) as u32, wide as u32)
        };
        let (high_0, low_0) = product(0, counter[0]);
        let (high_1, low_1) = product(1, counter[2]);
        counter = [
            high_1 ^ counter[1] ^ key[0],
            low_1,
            high_0 ^ counter[3] ^ key[1],
            low_0,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_heads_drops_as_it_does_among_all() {
        let dropout = Dropout::new(0.5, 3, 7);
        let part = dropout.of_heads(4, 6);
        for (entry, head) in [(0, 0), (0, 1), (2, 1)] {
            assert_eq!(
                part.stream(entry, 2, head),
                dropout.stream(entry, 6, 4 + head)
            );
        }
    }

    /// The known answers that Random123 publishes (kat_vectors).
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn counters_of_different_pairs_differ() {
        let mut seen = std::collections::HashSet::new();
        let far = 1_i64 << 40;
        for query in [-2 * far, -far, -1, 0, 1, 1 << 32, far, 2 * far - 1] {
            for keys in [0, 1, 1 << 30, 1 << 32, (far >> 2) - 1] {
                for (stream, branch) in [(0, 0), (1, 0), (0, 1), (0, 65_535)] {
                    let key = 4 * keys;
                    let first = counter(stream, branch, query, key);
                    assert!(seen.insert(first));
                    assert_eq!(counter(stream, branch, query, key + 3), first);
                }
            }
        }
    }

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let dropout = Dropout::new(probability, 17, 0);
            let pairs = 200 * 200;
            let dropped = (0..pairs)
                .filter(|pair| !dropout.keeps(3, 1, pair / 200, pair % 200))
                .count();
            let expected = f64::from(probability) * pairs as f64;
            let deviation = (expected * (1.0 - f64::from(probability))).sqrt();
            assert!((dropped as f64 - expected).abs() <= 4.0 * deviation);
        }
    }
}
