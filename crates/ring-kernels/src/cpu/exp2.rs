//! The exponential of a vector, to base 2.
//!
//! `x = n + r` with `n` the nearest integer, so `2^x = 2^n 2^r`: a polynomial for `2^r`, and `n` added to its exponent.
//! Softmax takes powers of 2, not of e: the factor `log2 e` goes into the scale of the scores and costs nothing.

use pulp::Simd;

/// Below this, `exp2` is 0: the result would leave the normal numbers.
const LOWEST: f32 = -126.0;
/// From this on, `exp2` is infinite.
const HIGHEST: f32 = 128.0;
/// `1.5 * 2^23`: adding it to a small float leaves the nearest integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;
/// `2^r` for `|r| <= 1/2`, highest power first (Cephes, `exp2f`).
const POLYNOMIAL: [f32; 7] = [
    1.535_336_2e-4,
    1.339_887_4e-3,
    9.618_437e-3,
    5.550_332_5e-2,
    2.402_264_7e-1,
    6.931_472e-1,
    1.0,
];

/// `2^r` for `|r| <= 1/2`
#[inline(always)]
fn polynomial<S: Simd>(simd: S, r: S::f32s) -> S::f32s {
    let mut sum = simd.splat_f32s(POLYNOMIAL[0]);
    for &coefficient in &POLYNOMIAL[1..] {
        sum = simd.mul_add_e_f32s(sum, r, simd.splat_f32s(coefficient));
    }
    sum
}

/// For any vectors: `n` is added to the exponent bits, and what would overflow them is chosen away.
#[inline(always)]
pub(super) fn by_bits<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let shifted = simd.add_f32s(x, splat(ROUND));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, splat(ROUND)));
    let mantissa = simd.transmute_u32s_f32s(polynomial(simd, r));
    let exponent = simd.wrapping_dyn_shl_u32s(
        simd.transmute_u32s_f32s(shifted),
        simd.splat_u32s(f32::MANTISSA_DIGITS - 1),
    );
    let power = simd.transmute_f32s_u32s(simd.add_u32s(mantissa, exponent));
    // The comparisons are false for NaN, whose bits arrive here as some NaN or other number: keep `x` itself then.
    let power = simd.select_f32s(simd.equal_f32s(x, x), power, x);
    let power = simd.select_f32s(simd.less_than_f32s(x, splat(LOWEST)), splat(0.0), power);
    let infinite = simd.greater_than_or_equal_f32s(x, splat(HIGHEST));
    simd.select_f32s(infinite, splat(f32::INFINITY), power)
}

/// With the instruction for `a 2^n` of AVX-512, which also has the right ends: `-inf` gives 0 even where `r` became NaN.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn by_scaling(simd: pulp::x86::V4, x: pulp::f32x16) -> pulp::f32x16 {
    /// To nearest, without exceptions.
    const NEAREST: i32 = 8;
    let avx512f = simd.avx512f;
    let n = avx512f._mm512_roundscale_ps::<NEAREST>(pulp::cast(x));
    let r = simd.sub_f32s(x, pulp::cast(n));
    let power = avx512f._mm512_scalef_ps(pulp::cast(polynomial(simd, r)), n);
    pulp::cast(power)
}

#[cfg(test)]
mod tests {
    use super::super::format::{Format, Vectors};
    use super::super::instruction_set::{InstructionSet, Work};
    use super::*;

    struct Exp2<'a>(&'a mut [f32]);

    impl Work for Exp2<'_> {
        #[inline(always)]
        fn run<S: Vectors, F: Format<S>>(self, simd: S, _: F) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = simd.exp2(*x);
            }
        }
    }

    /// Distance in units in the last place of the exact result.
    fn ulps(got: f32, x: f32) -> f64 {
        let exact = f64::from(x).exp2();
        let unit = (exact.log2().floor() - 23.0).exp2();
        (f64::from(got) - exact).abs() / unit
    }

    #[test]
    fn is_within_two_ulps_over_a_dense_sample() {
        let samples = 1 << 22;
        let span = HIGHEST - LOWEST;
        let mut inputs: Vec<f32> = (0..samples)
            .map(|i| LOWEST + span * (i as f32 / samples as f32))
            .collect();
        // Small arguments are dense in relative terms too.
        inputs.extend((0..1024).map(|i| -(2.0f32.powf(-(i as f32) / 8.0))));
        for set in InstructionSet::available() {
            let mut outputs = inputs.clone();
            set.run(false, Exp2(&mut outputs));
            let worst = inputs
                .iter()
                .zip(&outputs)
                .map(|(&x, &y)| ulps(y, x))
                .fold(0.0, f64::max);
            assert!(worst <= 2.0, "{set}: {worst} ulp");
        }
    }

    #[test]
    fn ends_of_the_domain_are_exact() {
        for set in InstructionSet::available() {
            let mut x = [0.0f32; 16];
            let special = [
                0.0,
                -0.0,
                f32::NEG_INFINITY,
                -300.1,
                -1e30,
                128.0,
                1e30,
                f32::INFINITY,
            ];
            x[..8].copy_from_slice(&special);
            x[8] = f32::NAN;
            x[9] = f32::from_bits(0x7fc0_0001);
            set.run(false, Exp2(&mut x));
            assert_eq!(x[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{set}");
            assert_eq!(x[5..8], [f32::INFINITY; 3], "{set}");
            assert!(x[8].is_nan() && x[9].is_nan(), "{set}");
        }
    }
}
