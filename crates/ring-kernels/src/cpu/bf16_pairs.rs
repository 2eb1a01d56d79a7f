//! Products of bf16 pairs with AVX-512 BF16. The only `unsafe` code of the kernels: four instructions that no safe crate has.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_permutexvar_epi16,
};
use std::mem::transmute;

use bytemuck::{cast_slice, cast_slice_mut};
use pulp::x86::V4;
use pulp::{NullaryFnOnce, f32x16};
use ring_comm::buffer::HostView;

use super::format::{Format, copy};

/// Two bf16 numbers in a word. A value of this type is the proof that the processor has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Bf16Pairs(V4);

impl Bf16Pairs {
    /// `None` if the processor lacks the instructions.
    pub(super) fn try_new() -> Option<Self> {
        let simd = V4::try_new()?;
        is_x86_feature_detected!("avx512bf16").then_some(Self(simd))
    }

    /// The vectors that go with it.
    pub(super) fn simd(self) -> V4 {
        self.0
    }

    /// Does `work`, compiled for these instructions.
    pub(super) fn vectorize<F: NullaryFnOnce>(self, work: F) -> F::Output {
        // SAFETY: `V4` and the check of avx512bf16 in `try_new`, which made `self`, cover all features that `entry` enables.
        unsafe { entry(work) }
    }
}

#[target_feature(
    enable = "sse,sse2,fxsr,sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt"
)]
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
fn entry<F: NullaryFnOnce>(work: F) -> F::Output {
    work.call()
}

/// Places of the halves `0, 16, 1, 17, ...`: what turns two rows after one another into two rows interleaved.
const INTERLEAVED: [u16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = (i / 2 + 16 * (i % 2)) as u16;
        i += 1;
    }
    places
};

impl Format<V4> for Bf16Pairs {
    const DEPTH: usize = 2;

    /// Both products and sums are rounded to f32, to nearest; subnormal numbers count as 0.
    #[inline(always)]
    fn dot(self, _: V4, a: f32x16, b: f32x16, sum: f32x16) -> f32x16 {
        // SAFETY: `self` proves that the instruction exists; the types are 512 bits without invalid values.
        unsafe {
            transmute(_mm512_dpbf16_ps(
                transmute::<f32x16, __m512>(sum),
                transmute::<f32x16, __m512bh>(a),
                transmute::<f32x16, __m512bh>(b),
            ))
        }
    }

    #[inline(always)]
    fn read(self, source: HostView<'_>, offset: usize, len: usize, words: &mut [f32]) {
        let HostView::BF16(values) = source else {
            unreachable!("pairs are chosen for bf16 inputs")
        };
        let (numbers, rest) = cast_slice_mut::<f32, u16>(words).split_at_mut(len);
        copy(cast_slice(&values[offset..offset + len]), numbers);
        rest.fill(0);
    }

    #[inline(always)]
    fn negate(self, words: &mut [f32]) {
        for word in cast_slice_mut::<f32, u32>(words) {
            *word ^= 0x8000_8000;
        }
    }

    #[inline(always)]
    fn interleave(self, even: &[f32], odd: &[f32], first: usize, words: &mut [f32]) {
        let words = cast_slice_mut::<f32, u32>(words);
        let even = &cast_slice::<f32, u16>(even)[first..first + words.len()];
        let odd = &cast_slice::<f32, u16>(odd)[first..first + words.len()];
        for ((word, &even), &odd) in words.iter_mut().zip(even).zip(odd) {
            *word = u32::from(even) | u32::from(odd) << 16;
        }
    }

    #[inline(always)]
    fn pair(self, simd: V4, even: f32x16, odd: f32x16) -> f32x16 {
        let joined = self.join(simd, even, odd);
        // SAFETY: as in `dot`; the places of `INTERLEAVED` are those of 32 halves.
        unsafe {
            transmute(_mm512_permutexvar_epi16(
                transmute::<[u16; 32], __m512i>(INTERLEAVED),
                transmute::<f32x16, __m512i>(joined),
            ))
        }
    }

    #[inline(always)]
    fn join(self, _: V4, low: f32x16, high: f32x16) -> f32x16 {
        // SAFETY: as in `dot`.
        unsafe {
            transmute(_mm512_cvtne2ps_pbh(
                transmute::<f32x16, __m512>(high),
                transmute::<f32x16, __m512>(low),
            ))
        }
    }
}
