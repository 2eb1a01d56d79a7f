//! The processor's peak: independent chains of fused multiply-adds that never leave the registers.

use std::{hint::black_box, time::Instant};

/// Operations of one [`run`].
pub const FLOPS_PER_RUN: f64 = (1_u64 << 34) as f64;

/// More chains than the units' latency times their number, and few enough for sixteen registers.
const CHAINS: usize = 12;

/// What the processor offers of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// 16 numbers at a time.
    Avx512,
    /// 8 numbers at a time.
    Avx2,
    /// What the compiler makes of a multiplication and an addition.
    Portable,
}

impl Instructions {
    /// The widest of this machine.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Instructions::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Instructions::Avx2;
            }
        }
        Instructions::Portable
    }

    /// Their name.
    pub fn name(self) -> &'static str {
        match self {
            Instructions::Avx512 => "AVX-512",
            Instructions::Avx2 => "AVX2 with FMA",
            Instructions::Portable => "neither AVX-512 nor AVX2",
        }
    }

    fn lanes(self) -> usize {
        match self {
            Instructions::Avx512 => 16,
            Instructions::Avx2 => 8,
            Instructions::Portable => 1,
        }
    }
}

/// [`FLOPS_PER_RUN`] on the calling thread, in seconds.
pub fn run() -> f64 {
    let instructions = Instructions::detect();
    let per_step = 2 * CHAINS * instructions.lanes();
    let steps = FLOPS_PER_RUN as usize / per_step;
    let start = Instant::now();
    black_box(multiply_add(instructions, black_box(steps)));
    start.elapsed().as_secs_f64()
}

fn multiply_add(instructions: Instructions, steps: usize) -> f32 {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX-512F, `detect` has asked it.
        Instructions::Avx512 => unsafe { x86::avx512(steps) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX2 and FMA, `detect` has asked it.
        Instructions::Avx2 => unsafe { x86::avx2(steps) },
        _ => portable(steps),
    }
}

/// Every chain is x -> FACTOR x + SUMMAND, which converges to a number of ordinary size.
const FACTOR: f32 = 0.999_999;
const SUMMAND: f32 = 1e-7;

fn portable(steps: usize) -> f32 {
    let mut chains: [f32; CHAINS] = std::array::from_fn(|chain| chain as f32);
    for _ in 0..steps {
        chains = chains.map(|value| value * FACTOR + SUMMAND);
    }
    chains.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{CHAINS, FACTOR, SUMMAND};

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(steps: usize) -> f32 {
        let (factor, summand) = (_mm512_set1_ps(FACTOR), _mm512_set1_ps(SUMMAND));
        let mut chains = [_mm512_setzero_ps(); CHAINS];
        for (index, chain) in chains.iter_mut().enumerate() {
            *chain = _mm512_set1_ps(index as f32);
        }
        for _ in 0..steps {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, summand);
            }
        }
        chains
            .into_iter()
            .map(|chain| _mm512_reduce_add_ps(chain))
            .sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2(steps: usize) -> f32 {
        let (factor, summand) = (_mm256_set1_ps(FACTOR), _mm256_set1_ps(SUMMAND));
        let mut chains = [_mm256_setzero_ps(); CHAINS];
        for (index, chain) in chains.iter_mut().enumerate() {
            *chain = _mm256_set1_ps(index as f32);
        }
        for _ in 0..steps {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, factor, summand);
            }
        }
        chains
            .into_iter()
            .map(|chain| _mm256_cvtss_f32(chain))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chains_do_the_same_work_with_all_instructions() {
        let detected = Instructions::detect();
        let [sum, portable] = [detected, Instructions::Portable].map(|i| multiply_add(i, 1000));
        let lanes = if detected == Instructions::Avx512 {
            16.0
        } else {
            1.0
        };
        assert!(
            (sum / lanes - portable).abs() < 1e-3 * portable,
            "{sum} {portable}"
        );
    }
}
