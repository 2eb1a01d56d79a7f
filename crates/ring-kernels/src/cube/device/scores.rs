//! What products of queries and keys go through to become scores.

use cubecl::prelude::*;

use super::super::table::*;
use super::index::*;

/// What a kernel is compiled for. What is not asked for takes no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Options {
    /// Whether the left bound of some query hides a key.
    pub(crate) windowed: bool,
    /// Whether scores are bounded.
    pub(crate) softcap: bool,
    /// Whether scores fall with the distance.
    pub(crate) slopes: bool,
    /// Whether weights are dropped.
    pub(crate) dropout: bool,
}

impl Options {
    /// How many bounds the columns have that a row of scores sees.
    pub(crate) fn bounds(self) -> usize {
        if self.windowed { 2 } else { 1 }
    }

    /// How many of `count` derivatives of scores are not 1.
    pub(crate) fn derivatives(self, count: usize) -> usize {
        if self.softcap { count } else { 0 }
    }

    /// Whether a score is more than a scaled product.
    pub(crate) fn scored(self) -> bool {
        self.softcap || self.slopes
    }
}

/// What scores depend on beside products and positions.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Scoring {
    softcap: f32,
    slope: f32,
    /// The product of a pair that does not count, which is also its score.
    hidden: f32,
}

/// What the scores of a query head depend on.
#[cube]
pub(crate) fn scoring(
    table: &[u32],
    head: usize,
    hidden: f32,
    #[comptime] options: Options,
) -> Scoring {
    Scoring {
        softcap: float(table[SOFTCAP]),
        slope: if comptime!(options.slopes) {
            float(table[word(table, SLOPES_AT) + head])
        } else {
            0.0f32.runtime()
        },
        hidden,
    }
}

/// The number of these bits.
#[cube]
fn float(bits: u32) -> f32 {
    f32::reinterpret(bits)
}

/// A score, and the factor between its gradient and that of the scaled product that it was.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Score {
    pub(crate) value: f32,
    pub(crate) derivative: f32,
}

/// The score of a query and a key. Of their positions the low words are enough, see [`distance`].
#[cube]
pub(crate) fn score(
    product: f32,
    query: u32,
    key: u32,
    scoring: &Scoring,
    #[comptime] options: Options,
) -> Score {
    let mut value = product;
    let mut derivative = 1.0f32;
    if comptime!(options.softcap) {
        let bounded = tanh(product / scoring.softcap);
        value = bounded.value * scoring.softcap;
        derivative = bounded.derivative;
    }
    if comptime!(options.slopes) {
        value -= scoring.slope * distance(query, key);
    }
    Score {
        value: choose(product == scoring.hidden, scoring.hidden, value),
        derivative,
    }
}

/// The distance of two positions that are less than 2^31 apart, of which these are the low words.
#[cube]
fn distance(a: u32, b: u32) -> f32 {
    let ahead = a - b;
    f32::cast_from(min(ahead, b - a))
}

/// The hyperbolic tangent and its derivative, within a few units in the last place also near 0, where devices are not so exact, and
/// where the derivative is almost 0.
#[cube]
fn tanh(x: f32) -> Score {
    let size = x.abs();
    // Near 0 a polynomial: the coefficients are those of Cephes' tanhf.
    let square = x * x;
    let polynomial =
        (((square * -5.704_988_7e-3f32 + 2.063_909e-2f32) * square - 5.373_971_6e-2f32) * square
            + 1.333_144_2e-1f32)
            * square
            - 3.333_328e-1f32;
    let near = x + x * square * polynomial;
    let power = (size * -2.0f32).exp();
    let far = (1.0f32 - power) / (1.0f32 + power);
    let is_near = size < 0.625f32;
    let far_derivative = 4.0f32 * power / ((1.0f32 + power) * (1.0f32 + power));
    Score {
        value: choose(is_near, near, choose(x < 0.0f32, -far, far)),
        derivative: choose(is_near, 1.0f32 - near * near, far_derivative),
    }
}

/// One of two numbers.
#[cube]
pub(crate) fn choose(condition: bool, then: f32, otherwise: f32) -> f32 {
    select(condition, then, otherwise)
}
