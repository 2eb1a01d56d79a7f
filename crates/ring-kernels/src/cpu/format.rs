//! How numbers lie in the operands of a product, and how they meet.
//!
//! Products work on *words* of 32 bits: a word of the left operand, broadcast, meets a vector of words of the right one.
//! In the [`Single`] format a word is one f32. In the format of bf16 pairs it holds two numbers that are neighbours along the
//! depth of the product, and one instruction multiplies and adds both. Packing, products and softmax are written once for
//! both. Words are kept in `f32` memory whatever they mean.

use half::slice::HalfFloatSliceExt;
use pulp::{Scalar, Simd};
use ring_comm::buffer::HostView;

use super::exp2;

/// Vectors with an exponential.
pub(super) trait Vectors: Simd {
    /// `2^x`, within 2 units in the last place; 0 for `x < -126` (and for `-inf`), `inf` for `x >= 128`, NaN for NaN.
    fn exp2(self, x: Self::f32s) -> Self::f32s;
}

/// What a word is.
pub(super) trait Format<S: Vectors>: Copy {
    /// Numbers in a word: neighbours along the depth of a product.
    const DEPTH: usize;

    /// `sum + a b`, for every lane; all numbers of a word are multiplied and added.
    fn dot(self, simd: S, a: S::f32s, b: S::f32s, sum: S::f32s) -> S::f32s;

    /// Reads a row of numbers into words: neighbours in the row share a word. What is left of `words` becomes 0.
    fn read(self, source: HostView<'_>, offset: usize, len: usize, words: &mut [f32]);

    /// The numbers, with the other sign.
    fn negate(self, words: &mut [f32]);

    /// Words of numbers that are neighbours in two rows of words: number `first + i` of both goes to word `i`.
    /// Only if `DEPTH` is 2.
    fn interleave(self, even: &[f32], odd: &[f32], first: usize, words: &mut [f32]);

    /// Words that hold a number of `even` and one of `odd`. Only if `DEPTH` is 2.
    fn pair(self, simd: S, even: S::f32s, odd: S::f32s) -> S::f32s;

    /// Words that hold neighbours of the row that `low` and then `high` are. Only if `DEPTH` is 2.
    fn join(self, simd: S, low: S::f32s, high: S::f32s) -> S::f32s;
}

/// One f32 in a word; f16 and bf16 are widened, which is exact.
#[derive(Clone, Copy)]
pub(super) struct Single;

impl<S: Vectors> Format<S> for Single {
    const DEPTH: usize = 1;

    #[inline(always)]
    fn dot(self, simd: S, a: S::f32s, b: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, sum)
    }

    #[inline(always)]
    fn read(self, source: HostView<'_>, offset: usize, len: usize, words: &mut [f32]) {
        let (numbers, rest) = words.split_at_mut(len);
        match source {
            HostView::F32(values) => copy(&values[offset..offset + len], numbers),
            _ => widen(source, offset, numbers),
        }
        rest.fill(0.0);
    }

    #[inline(always)]
    fn negate(self, words: &mut [f32]) {
        for word in words {
            *word = -*word;
        }
    }

    #[inline(always)]
    fn interleave(self, _: &[f32], _: &[f32], _: usize, _: &mut [f32]) {
        unreachable!("a word holds one number")
    }

    #[inline(always)]
    fn pair(self, _: S, _: S::f32s, _: S::f32s) -> S::f32s {
        unreachable!("a word holds one number")
    }

    #[inline(always)]
    fn join(self, _: S, _: S::f32s, _: S::f32s) -> S::f32s {
        unreachable!("a word holds one number")
    }
}

/// Copies a short row, without the call that `copy_from_slice` would make.
#[inline(always)]
pub(super) fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    let (from, from_rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = *from;
    }
}

/// Copies elements from `offset` on into `target`, as f32 (exact for every element type).
pub(super) fn widen(source: HostView<'_>, offset: usize, target: &mut [f32]) {
    let range = offset..offset + target.len();
    match source {
        HostView::F32(values) => target.copy_from_slice(&values[range]),
        HostView::F16(values) => values[range].convert_to_f32_slice(target),
        HostView::BF16(values) => values[range].convert_to_f32_slice(target),
    }
}

macro_rules! vectors_by_bits {
    ($($simd:ty),*) => {$(
        impl Vectors for $simd {
            #[inline(always)]
            fn exp2(self, x: Self::f32s) -> Self::f32s {
                exp2::by_bits(self, x)
            }
        }
    )*};
}

vectors_by_bits!(Scalar);
#[cfg(target_arch = "x86_64")]
vectors_by_bits!(pulp::x86::V2, pulp::x86::V3);
#[cfg(target_arch = "aarch64")]
vectors_by_bits!(pulp::aarch64::Neon);

#[cfg(target_arch = "x86_64")]
impl Vectors for pulp::x86::V4 {
    #[inline(always)]
    fn exp2(self, x: Self::f32s) -> Self::f32s {
        exp2::by_scaling(self, x)
    }
}
