//! The hyperbolic tangent of a vector, and its derivative.

use std::f32::consts::LOG2_E;

use super::format::Vectors;

/// Below this a polynomial, from this on an exponential.
const SMALL: f32 = 0.625;
/// `(tanh x / x - 1) / x^2` for `|x| < SMALL`, as a polynomial of `x^2`, highest power first (Cephes, `tanhf`).
const POLYNOMIAL: [f32; 5] = [
    -5.704_988_7e-3,
    2.063_909e-2,
    -5.373_971_6e-2,
    1.333_144_2e-1,
    -3.333_328e-1,
];
const SIGN: u32 = 1 << 31;

/// `tanh x`, within 3 units in the last place, and `1 - tanh^2 x`, whose relative error stays as small where `tanh x` has
/// become 1 (but grows with `x`, as that of an exponential does). NaN for NaN.
///
/// With `u = 2 / (1 + e^2x)` for `x > 0`: `tanh x = 1 - u` and `1 - tanh^2 x = u (2 - u)`. Near 0 the former would cancel.
#[inline(always)]
pub(super) fn tanh<S: Vectors>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let splat = |value| simd.splat_f32s(value);
    let (one, two) = (splat(1.0), splat(2.0));
    let bits = simd.transmute_u32s_f32s(x);
    let sign = simd.and_u32s(bits, simd.splat_u32s(SIGN));
    let size = simd.transmute_f32s_u32s(simd.and_u32s(bits, simd.splat_u32s(!SIGN)));

    let power = simd.exp2(simd.mul_f32s(size, splat(2.0 * LOG2_E)));
    let u = simd.div_f32s(two, simd.add_f32s(one, power));
    let large = simd.sub_f32s(one, u);
    let large_derivative = simd.mul_f32s(u, simd.sub_f32s(two, u));

    let square = simd.mul_f32s(x, x);
    let mut sum = splat(POLYNOMIAL[0]);
    for &coefficient in &POLYNOMIAL[1..] {
        sum = simd.mul_add_e_f32s(sum, square, splat(coefficient));
    }
    let small = simd.mul_add_e_f32s(simd.mul_f32s(sum, square), x, x);
    let small_derivative = simd.sub_f32s(one, simd.mul_f32s(small, small));

    let is_small = simd.less_than_f32s(size, splat(SMALL));
    let tanh = simd.transmute_u32s_f32s(simd.select_f32s(is_small, small, large));
    (
        simd.transmute_f32s_u32s(simd.or_u32s(tanh, sign)),
        simd.select_f32s(is_small, small_derivative, large_derivative),
    )
}

#[cfg(test)]
mod tests {
    use super::super::format::{Format, Vectors};
    use super::super::instruction_set::{InstructionSet, Work};
    use super::*;

    /// Arguments, which become their tangents, and room for the derivatives.
    struct Tanh<'a>(&'a mut [f32], &'a mut [f32]);

    impl Work for Tanh<'_> {
        #[inline(always)]
        fn run<S: Vectors, F: Format<S>>(self, simd: S, _: F) {
            let (values, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            let (derivatives, _) = S::as_mut_simd_f32s(self.1);
            for (x, derivative) in values.iter_mut().zip(derivatives) {
                (*x, *derivative) = tanh(simd, *x);
            }
        }
    }

    /// Distance in units in the last place of the exact result.
    fn ulps(got: f32, exact: f64) -> f64 {
        let unit = (exact.abs().log2().floor() - 23.0).exp2();
        (f64::from(got) - exact).abs() / unit
    }

    #[test]
    fn value_and_derivative_are_within_a_few_ulps_over_a_dense_sample() {
        let samples = 1 << 20;
        let mut inputs: Vec<f32> = (0..samples)
            .map(|i| 24.0 * (i as f32 / samples as f32) - 12.0)
            .collect();
        // Small arguments are dense in relative terms too.
        for i in 0..1 << 14 {
            let x = 2.0f32.powf(-(i as f32) / 160.0);
            inputs.extend([x, -x]);
        }
        for set in InstructionSet::available() {
            let (mut outputs, mut derivatives) = (inputs.clone(), inputs.clone());
            set.run(false, Tanh(&mut outputs, &mut derivatives));
            let (mut worst, mut worst_derivative) = (0.0f64, 0.0f64);
            for (i, &x) in inputs.iter().enumerate() {
                let x = f64::from(x);
                worst = worst.max(ulps(outputs[i], x.tanh()));
                worst_derivative = worst_derivative.max(ulps(derivatives[i], x.cosh().powi(-2)));
            }
            assert!(worst <= 3.0, "{set}: {worst} ulp");
            // The exponent of `e^2x` is up to 35 here, and rounded once.
            assert!(worst_derivative <= 40.0, "{set}: {worst_derivative} ulp");
        }
    }

    #[test]
    fn ends_of_the_domain_are_exact() {
        for set in InstructionSet::available() {
            let mut x = [0.0f32; 16];
            x[..8].copy_from_slice(&[
                0.0,
                -0.0,
                20.0,
                -20.0,
                1e30,
                -1e30,
                f32::INFINITY,
                f32::NEG_INFINITY,
            ]);
            x[8] = f32::NAN;
            x[9] = f32::MIN_POSITIVE;
            let mut derivatives = [0.0; 16];
            set.run(false, Tanh(&mut x, &mut derivatives));
            assert_eq!(x[..8], [0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], "{set}");
            assert!(x[1].is_sign_negative(), "{set}");
            assert!(x[8].is_nan() && derivatives[8].is_nan(), "{set}");
            assert_eq!(x[9], f32::MIN_POSITIVE, "{set}");
            assert_eq!(derivatives[..2], [1.0; 2], "{set}");
            assert_eq!(derivatives[4..8], [0.0; 4], "{set}");
        }
    }
}
