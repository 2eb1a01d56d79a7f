//! The exponential of a vector.

use pulp::Simd;

/// Below this, `exp` is 0: the result would leave the normal numbers (`exp(-87.34) < 2^-126`).
const LOWEST: f32 = -87.0;
/// Above this, `exp` is infinite: the result would exceed `f32::MAX`.
const HIGHEST: f32 = 88.722;
/// `1.5 * 2^23`: adding it to a small float leaves the nearest integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;
/// `ln 2` in two parts; the first has 10 significant bits, so that `n * LN2_HIGH` is exact for `|n| < 2^14`.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// `(e^r - 1 - r) / r^2` for `|r| <= ln(2) / 2`, highest power first (Cephes, `expf`).
const POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// `e^x`, within 2 units in the last place; 0 for `x < -87` (and for `-inf`), `inf` for `x > 88.722`, NaN for NaN.
///
/// `x = n ln 2 + r`, so `e^x = 2^n e^r`: a polynomial for `e^r`, and `n` added to its exponent bits.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    let r = simd.mul_add_e_f32s(n, splat(-LN2_HIGH), x);
    let r = simd.mul_add_e_f32s(n, splat(-LN2_LOW), r);

    let mut sum = splat(POLYNOMIAL[0]);
    for &coefficient in &POLYNOMIAL[1..] {
        sum = simd.mul_add_e_f32s(sum, r, splat(coefficient));
    }
    let mantissa = simd.mul_add_e_f32s(sum, simd.mul_f32s(r, r), r);
    let mantissa = simd.add_f32s(mantissa, splat(1.0));

    let exponent = simd.wrapping_dyn_shl_u32s(
        simd.transmute_u32s_f32s(shifted),
        simd.splat_u32s(f32::MANTISSA_DIGITS - 1),
    );
    let power =
        simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(mantissa), exponent));
    // The comparisons are false for NaN, whose bits arrive here as some NaN or other number: keep `x` itself then.
    let power = simd.select_f32s(simd.equal_f32s(x, x), power, x);
    let power = simd.select_f32s(simd.less_than_f32s(x, splat(LOWEST)), splat(0.0), power);
    simd.select_f32s(
        simd.greater_than_f32s(x, splat(HIGHEST)),
        splat(f32::INFINITY),
        power,
    )
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl WithSimd for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = exp(simd, *x);
            }
        }
    }

    /// Distance in units in the last place of the exact result.
    fn ulps(got: f32, x: f32) -> f64 {
        let exact = f64::from(x).exp();
        let unit = (exact.log2().floor() - 23.0).exp2();
        (f64::from(got) - exact).abs() / unit
    }

    fn worst(arch: Arch) -> f64 {
        let samples = 1 << 22;
        let span = HIGHEST - LOWEST;
        let inputs: Vec<f32> = (0..samples)
            .map(|i| LOWEST + span * (i as f32 / samples as f32))
            .collect();
        let mut outputs = inputs.clone();
        arch.dispatch(Exp(&mut outputs));
        inputs
            .iter()
            .zip(&outputs)
            .map(|(&x, &y)| ulps(y, x))
            .fold(0.0, f64::max)
    }

    #[test]
    fn is_within_two_ulps_over_a_dense_sample() {
        for arch in [Arch::new(), Arch::Scalar] {
            let worst = worst(arch);
            assert!(worst <= 2.0, "{arch:?}: {worst} ulp");
        }
    }

    #[test]
    fn small_arguments_are_dense_in_relative_terms_too() {
        let mut x: Vec<f32> = (0..1024)
            .map(|i| -(2.0f32.powf(-(i as f32) / 8.0)))
            .collect();
        let inputs = x.clone();
        Arch::new().dispatch(Exp(&mut x));
        for (&x, &y) in inputs.iter().zip(&x).filter(|(x, _)| **x >= LOWEST) {
            assert!(ulps(y, x) <= 2.0, "exp({x}) = {y}");
        }
    }

    #[test]
    fn ends_of_the_domain_are_exact() {
        for arch in [Arch::new(), Arch::Scalar] {
            let mut x = [0.0f32; 16];
            let special = [
                0.0,
                -0.0,
                f32::NEG_INFINITY,
                -87.1,
                -1e30,
                89.0,
                1e30,
                f32::INFINITY,
            ];
            x[..8].copy_from_slice(&special);
            x[8] = f32::NAN;
            arch.dispatch(Exp(&mut x));
            assert_eq!(x[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
            assert_eq!(x[5..8], [f32::INFINITY; 3]);
            assert!(x[8].is_nan());
        }
    }
}
