//! Which instructions compute: chosen at run time, or forced.

use std::env::{self, VarError};
use std::fmt;
use std::str::FromStr;

use pulp::{NullaryFnOnce, Scalar};

use super::format::{Format, Single, Vectors};
use crate::KernelError;

/// Environment variable that forces an [`InstructionSet`] on all kernels that do not ask for one.
pub const INSTRUCTION_SET_VARIABLE: &str = "RING_INSTRUCTION_SET";

/// The vector instructions that [`CpuKernels`](crate::CpuKernels) compute with.
///
/// All sets compute f32, f16 and bf16 inputs with f32 sums. Results differ from set to set by rounding, because vectors of
/// another length add in another order; and [`Avx512Bf16`](Self::Avx512Bf16) rounds weights and score gradients of bf16
/// inputs to bf16 before it multiplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum InstructionSet {
    /// No vectors: any processor.
    Portable,
    /// SSE 4.2 (x86-64-v2): 128 bits, no fused multiply-add.
    Sse42,
    /// AVX2 and FMA (x86-64-v3): 256 bits.
    Avx2,
    /// AVX-512 F, BW, CD, DQ, VL (x86-64-v4): 512 bits.
    Avx512,
    /// AVX-512 with products of bf16 pairs: twice the multiplications per instruction for bf16 inputs.
    Avx512Bf16,
    /// NEON: 128 bits, on aarch64.
    Neon,
}

impl InstructionSet {
    /// All of them, slowest first.
    pub const ALL: [Self; 6] = [
        Self::Portable,
        Self::Sse42,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Neon,
    ];

    /// Those that this processor has, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|set| set.is_available())
    }

    /// The fastest that this processor has.
    pub fn fastest() -> Self {
        Self::available().last().unwrap_or(Self::Portable)
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Sse42 => pulp::x86::V2::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => pulp::x86::V3::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::try_new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => super::bf16_pairs::Bf16Pairs::try_new().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => pulp::aarch64::Neon::try_new().is_some(),
            #[allow(unreachable_patterns)] // those of other architectures
            _ => false,
        }
    }

    /// The set that [`INSTRUCTION_SET_VARIABLE`] names, or the fastest if it is not set.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] if it names no set, or one that this processor lacks.
    pub fn from_env() -> Result<Self, KernelError> {
        match env::var(INSTRUCTION_SET_VARIABLE) {
            Ok(name) => name
                .parse::<Self>()
                .and_then(Self::checked)
                .map_err(|error| {
                    KernelError::Invalid(format!("{INSTRUCTION_SET_VARIABLE}: {error}"))
                }),
            Err(VarError::NotPresent) => Ok(Self::fastest()),
            Err(VarError::NotUnicode(_)) => Err(KernelError::Invalid(format!(
                "{INSTRUCTION_SET_VARIABLE} is not text"
            ))),
        }
    }

    /// Itself, if this processor has it.
    pub(super) fn checked(self) -> Result<Self, KernelError> {
        if self.is_available() {
            return Ok(self);
        }
        Err(KernelError::Invalid(format!(
            "this processor has no {self}; it has {}",
            names(Self::available())
        )))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Sse42 => "sse42",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
        }
    }

    /// Does `work` with these instructions, in the format that suits numbers of type bf16 (`bf16`) or any other.
    ///
    /// # Panics
    /// If this processor lacks them.
    pub(super) fn run<W: Work>(self, bf16: bool, work: W) {
        match self {
            Self::Portable => work.run(Scalar, Single),
            #[cfg(target_arch = "x86_64")]
            Self::Sse42 => {
                let simd = token(pulp::x86::V2::try_new());
                simd.vectorize(Run(work, simd, Single));
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                let simd = token(pulp::x86::V3::try_new());
                simd.vectorize(Run(work, simd, Single));
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 if bf16 => {
                let pairs = token(super::bf16_pairs::Bf16Pairs::try_new());
                pairs.vectorize(Run(work, pairs.simd(), pairs));
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 => {
                let simd = token(pulp::x86::V4::try_new());
                simd.vectorize(Run(work, simd, Single));
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                let simd = token(pulp::aarch64::Neon::try_new());
                simd.vectorize(Run(work, simd, Single));
            }
            #[allow(unreachable_patterns)] // those of other architectures
            _ => unreachable!("{self} was checked to be available, {bf16}"),
        }
    }
}

fn token<T>(found: Option<T>) -> T {
    found.expect("the instruction set was checked to be available")
}

fn names(sets: impl Iterator<Item = InstructionSet>) -> String {
    let names: Vec<_> = sets.map(InstructionSet::name).collect();
    names.join(", ")
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for InstructionSet {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        Self::ALL
            .into_iter()
            .find(|set| set.name() == name)
            .ok_or_else(|| {
                KernelError::Invalid(format!(
                    "there is no instruction set `{name}`; there are {}",
                    names(Self::ALL.into_iter())
                ))
            })
    }
}

/// Work that can be done with any vectors and any format of numbers.
///
/// `run` must be `#[inline(always)]`, and so must be all that it calls: only then is it compiled for the instruction set.
pub(super) trait Work {
    /// Does it.
    fn run<S: Vectors, F: Format<S>>(self, simd: S, format: F);
}

/// Work, and what to do it with.
struct Run<W, S, F>(W, S, F);

impl<W: Work, S: Vectors, F: Format<S>> NullaryFnOnce for Run<W, S, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(work, simd, format) = self;
        work.run(simd, format);
    }
}
