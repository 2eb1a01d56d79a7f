//! What is compared: [`Case`].

use std::fmt;

use crate::{compare::fma, work::Work};

/// Two contenders, and how much better the first is asked to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Where it belongs.
    pub section: Section,
    /// What is measured.
    pub ours: Contender,
    /// What it is measured against.
    pub theirs: Contender,
    /// Least ratio of rates, ours to theirs; of bytes, least ratio of theirs to ours.
    pub bar: f64,
}

/// Who computes, what, and on how many threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// The drivers of this workspace over loopback ranks.
    Ranks {
        /// What they compute together.
        work: Work,
        /// How many.
        ranks: usize,
        /// Kernel threads of each.
        threads: usize,
    },
    /// The Burn module on one rank.
    Module {
        /// What it computes.
        work: Work,
        /// Kernel threads.
        threads: usize,
    },
    /// PyTorch in one process.
    Torch {
        /// What it computes.
        work: Work,
        /// Its threads.
        threads: usize,
    },
    /// PyTorch's own ring attention, each rank a process of one thread.
    TorchRing {
        /// What they compute together.
        work: Work,
        /// How many.
        ranks: usize,
    },
    /// Nothing but fused multiply-adds in registers, on one thread.
    FmaChains,
}

/// The questions of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Full attention in f32 against PyTorch.
    Sdpa,
    /// Against what the processor could do at most.
    FmaPeak,
    /// Full attention of bf16 against PyTorch.
    Bf16,
    /// LongNet's attention against torchscale's computation.
    LongNet,
    /// Memory of the same.
    LongNetMemory,
    /// Two ranks against two threads.
    RingEfficiency,
    /// Against PyTorch's own ring attention.
    TorchRing,
    /// A long sequence against a short one.
    Growth,
    /// The Burn module against the drivers.
    Module,
}

/// What a rate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Floating-point operations a second.
    Flops,
    /// Positions a second.
    Tokens,
    /// No rate: bytes of memory.
    Bytes,
}

impl Section {
    /// All, in the order of the report.
    pub const ALL: [Section; 9] = [
        Section::Sdpa,
        Section::FmaPeak,
        Section::Bf16,
        Section::LongNet,
        Section::LongNetMemory,
        Section::RingEfficiency,
        Section::TorchRing,
        Section::Growth,
        Section::Module,
    ];

    /// The first part of its cases' names.
    pub fn name(self) -> &'static str {
        match self {
            Section::Sdpa => "sdpa",
            Section::FmaPeak => "fma-peak",
            Section::Bf16 => "bf16",
            Section::LongNet => "longnet",
            Section::LongNetMemory => "longnet-memory",
            Section::RingEfficiency => "ring-efficiency",
            Section::TorchRing => "torch-ring",
            Section::Growth => "growth",
            Section::Module => "module",
        }
    }

    /// Its heading.
    pub fn title(self) -> &'static str {
        match self {
            Section::Sdpa => "Attention, f32, against PyTorch",
            Section::FmaPeak => "Share of the processor's peak",
            Section::Bf16 => "Attention, bf16, against PyTorch",
            Section::LongNet => "LongNet against torchscale",
            Section::LongNetMemory => "Memory of LongNet against torchscale",
            Section::RingEfficiency => "Two ranks against two threads",
            Section::TorchRing => "Ring attention against PyTorch's",
            Section::Growth => "A long sequence against a short one",
            Section::Module => "The Burn module against the drivers",
        }
    }

    /// What the two sides are.
    pub fn explanation(self) -> &'static str {
        match self {
            Section::Sdpa | Section::Bf16 => {
                "Against `torch.nn.functional.scaled_dot_product_attention`, with autograd."
            }
            Section::FmaPeak => {
                "Against independent chains of fused multiply-adds in registers, measured in the same pairs: the ratio is the \
                 share of the peak that the forward pass reaches."
            }
            Section::LongNet => {
                "Against torchscale's computation, equation for equation, on PyTorch's fused attention (`benches/python/longnet.py`)."
            }
            Section::LongNetMemory => {
                "Peak resident memory beyond what was resident with the inputs, each run in a fresh process, against the same \
                 computation. The bar of 3 is a third of the memory."
            }
            Section::RingEfficiency => {
                "Ranks over loopback, one thread each, against one rank with as many threads."
            }
            Section::TorchRing => {
                "Against the ring attention inside PyTorch's context parallelism, over gloo; zigzag on both sides if causal."
            }
            Section::Growth => {
                "Positions a second of the long sequence against those of the short one; 0.87 is 15% more time per position."
            }
            Section::Module => {
                "`RingAttention` on Burn's Flex backend, through autodiff, against the drivers called directly; 0.97 is 3% more \
                 time."
            }
        }
    }

    /// What its rates count.
    pub fn unit(self) -> Unit {
        match self {
            Section::LongNet | Section::Growth => Unit::Tokens,
            Section::LongNetMemory => Unit::Bytes,
            _ => Unit::Flops,
        }
    }
}

impl Contender {
    /// What it computes, if it computes attention.
    pub fn work(&self) -> Option<&Work> {
        match self {
            Contender::Ranks { work, .. }
            | Contender::Module { work, .. }
            | Contender::Torch { work, .. }
            | Contender::TorchRing { work, .. } => Some(work),
            Contender::FmaChains => None,
        }
    }

    /// How much of `unit` one run is.
    pub fn amount(&self, unit: Unit) -> f64 {
        match (unit, self.work()) {
            (Unit::Bytes, _) => 1.0,
            (Unit::Flops, Some(work)) => work.flops(),
            (Unit::Tokens, Some(work)) => work.length as f64,
            (_, None) => fma::FLOPS_PER_RUN,
        }
    }

    /// Whether it is PyTorch.
    pub fn needs_torch(&self) -> bool {
        matches!(self, Contender::Torch { .. } | Contender::TorchRing { .. })
    }

    /// Ranks, and threads of each.
    fn setup(&self) -> (usize, usize) {
        match *self {
            Contender::Ranks { ranks, threads, .. } => (ranks, threads),
            Contender::TorchRing { ranks, .. } => (ranks, 1),
            Contender::Module { threads, .. } | Contender::Torch { threads, .. } => (1, threads),
            Contender::FmaChains => (1, 1),
        }
    }
}

impl Case {
    /// The name by which it is chosen: section, and what varies in it.
    pub fn name(&self) -> String {
        let mut parts = vec![self.section.name().to_string()];
        if let Some(work) = self.ours.work() {
            parts.push(format!("d{}", work.head_dim));
            parts.push(work.mask_name().to_string());
            parts.push(if work.backward { "both" } else { "forward" }.to_string());
        }
        let (ranks, threads) = self.ours.setup();
        parts.push(match ranks {
            1 => format!("t{threads}"),
            _ => format!("r{ranks}"),
        });
        parts.join("-")
    }

    /// What is computed.
    pub fn description(&self) -> String {
        let Some(work) = self.ours.work() else {
            return "multiply-adds".into();
        };
        match self.theirs.work() {
            Some(other) if other.length != work.length => {
                format!("{work}; against N={}", other.length)
            }
            _ => work.to_string(),
        }
    }

    /// On how many ranks and threads, on each side if they differ.
    pub fn setup(&self) -> String {
        let (ours, theirs) = (self.ours.setup(), self.theirs.setup());
        if ours == theirs {
            setup(ours)
        } else {
            format!("{} / {}", setup(ours), setup(theirs))
        }
    }

    /// What its rates count.
    pub fn unit(&self) -> Unit {
        self.section.unit()
    }

    /// Whether a side is PyTorch.
    pub fn needs_torch(&self) -> bool {
        self.ours.needs_torch() || self.theirs.needs_torch()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.section.title(), self.description())
    }
}

fn setup((ranks, threads): (usize, usize)) -> String {
    match ranks {
        1 => threads.to_string(),
        _ => format!("{ranks} x {threads}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> Case {
        let work = Work::full(8, 8192, 64)
            .with_causal(true)
            .with_backward(true);
        Case {
            section: Section::RingEfficiency,
            ours: Contender::Ranks {
                work: work.clone(),
                ranks: 2,
                threads: 1,
            },
            theirs: Contender::Ranks {
                work,
                ranks: 1,
                threads: 2,
            },
            bar: 0.95,
        }
    }

    #[test]
    fn a_case_says_what_it_is() {
        let case = ring();
        assert_eq!(case.name(), "ring-efficiency-d64-causal-both-r2");
        assert_eq!(case.setup(), "2 x 1 / 2");
        assert_eq!(
            case.description(),
            "N=8192 H=8 D=64 f32, causal, forward + backward"
        );
        assert!(!case.needs_torch());
    }

    #[test]
    fn the_length_of_the_other_side_is_told_if_it_differs() {
        let mut case = ring();
        case.theirs = Contender::Torch {
            work: Work::full(8, 512, 64),
            threads: 2,
        };
        assert!(case.description().ends_with("; against N=512"));
        assert!(case.needs_torch());
    }
}
