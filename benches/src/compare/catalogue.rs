//! The cases of the comparison.

use ring_comm::buffer::DType;

use crate::{
    compare::{Case, Contender, Section},
    work::Work,
};

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As they count.
    Full,
    /// So small that only the machinery is tried.
    Tiny,
}

const THREADS: [usize; 2] = [1, 2];
const PASSES: [bool; 2] = [false, true];
const MASKS: [bool; 2] = [false, true];

/// All cases, in the order of the sections.
pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = sdpa(size);
    cases.extend(fma_peak(size));
    cases.extend(bf16(size));
    cases.extend(longnet(size));
    cases.extend(longnet_memory(size));
    cases.extend(ring_efficiency(size));
    cases.extend(torch_ring(size));
    cases.push(growth(size));
    cases.extend(module(size));
    cases
}

fn sdpa(size: Size) -> Vec<Case> {
    let mut cases = Vec::new();
    for head_dim in [64, 128] {
        for backward in PASSES {
            for causal in MASKS {
                let work = attention(size, 4096, head_dim)
                    .with_causal(causal)
                    .with_backward(backward);
                let bar = match (backward, causal) {
                    (false, false) => 1.15,
                    _ => 1.3,
                };
                cases.extend(
                    THREADS.map(|threads| against_torch(Section::Sdpa, &work, threads, bar)),
                );
            }
        }
    }
    cases
}

fn fma_peak(size: Size) -> Vec<Case> {
    let case = |head_dim| Case {
        section: Section::FmaPeak,
        ours: ranks(attention(size, 4096, head_dim), 1, 1),
        theirs: Contender::FmaChains,
        bar: 0.65,
    };
    vec![case(64), case(128)]
}

fn bf16(size: Size) -> Vec<Case> {
    let mut cases = Vec::new();
    for causal in MASKS {
        let work = attention(size, 4096, 64)
            .with_dtype(DType::BF16)
            .with_causal(causal)
            .with_backward(true);
        cases.extend(THREADS.map(|threads| against_torch(Section::Bf16, &work, threads, 2.5)));
    }
    cases
}

fn longnet(size: Size) -> Vec<Case> {
    let case = |backward, threads, bar| {
        let work = dilated(size, 12, 32_768).with_backward(backward);
        against_torch(Section::LongNet, &work, threads, bar)
    };
    vec![
        case(false, 1, 2.0),
        case(false, 2, 2.5),
        case(true, 1, 1.7),
        case(true, 2, 2.3),
    ]
}

fn longnet_memory(size: Size) -> Vec<Case> {
    PASSES
        .map(|backward| {
            let work = dilated(size, 12, 32_768).with_backward(backward);
            against_torch(Section::LongNetMemory, &work, 2, 3.0)
        })
        .to_vec()
}

fn ring_efficiency(size: Size) -> Vec<Case> {
    rings(size, &PASSES, |work| Case {
        section: Section::RingEfficiency,
        ours: ranks(work.clone(), 2, 1),
        theirs: ranks(work, 1, 2),
        bar: 0.95,
    })
}

fn torch_ring(size: Size) -> Vec<Case> {
    rings(size, &[true], |work| Case {
        section: Section::TorchRing,
        ours: ranks(work.clone(), 2, 1),
        theirs: Contender::TorchRing { work, ranks: 2 },
        bar: 1.2,
    })
}

fn rings(size: Size, passes: &[bool], case: impl Fn(Work) -> Case) -> Vec<Case> {
    let mut cases = Vec::new();
    for &backward in passes {
        for causal in MASKS {
            let work = attention(size, 8192, 64);
            cases.push(case(work.with_causal(causal).with_backward(backward)));
        }
    }
    cases
}

/// At most 15% more time per position.
fn growth(size: Size) -> Case {
    let of_length = |length| ranks(dilated(size, 4, length).with_backward(true), 1, 2);
    Case {
        section: Section::Growth,
        ours: of_length(1 << 20),
        theirs: of_length(1 << 15),
        bar: 1.0 / 1.15,
    }
}

/// At most 3% more time.
fn module(size: Size) -> Vec<Case> {
    let mut cases = Vec::new();
    for causal in MASKS {
        for threads in THREADS {
            let work = attention(size, 4096, 64)
                .with_causal(causal)
                .with_backward(true);
            cases.push(Case {
                section: Section::Module,
                ours: Contender::Module {
                    work: work.clone(),
                    threads,
                },
                theirs: ranks(work, 1, threads),
                bar: 1.0 / 1.03,
            });
        }
    }
    cases
}

fn against_torch(section: Section, work: &Work, threads: usize, bar: f64) -> Case {
    Case {
        section,
        ours: ranks(work.clone(), 1, threads),
        theirs: Contender::Torch {
            work: work.clone(),
            threads,
        },
        bar,
    }
}

fn ranks(work: Work, ranks: usize, threads: usize) -> Contender {
    Contender::Ranks {
        work,
        ranks,
        threads,
    }
}

/// The forward pass of full attention with 8 heads.
fn attention(size: Size, length: usize, head_dim: usize) -> Work {
    match size {
        Size::Full => Work::full(8, length, head_dim),
        Size::Tiny => Work::full(2, length / 32, head_dim),
    }
}

/// The forward pass of LongNet's attention.
fn dilated(size: Size, heads: usize, length: usize) -> Work {
    match size {
        Size::Full => Work::full(heads, length, 64).dilated(&[1024, 2048, 4096], &[1, 2, 4]),
        Size::Tiny => Work::full(4, length / 64, 64).dilated(&[64, 128, 256], &[1, 2, 4]),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_case_can_be_planned_and_has_a_name_of_its_own() {
        for size in [Size::Full, Size::Tiny] {
            let cases = cases(size);
            let names: BTreeSet<String> = cases.iter().map(Case::name).collect();
            assert_eq!(names.len(), cases.len());
            for case in &cases {
                for contender in [&case.ours, &case.theirs] {
                    if let Some(work) = contender.work() {
                        work.spec(2).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn every_section_has_cases_and_they_stand_together() {
        let mut sections: Vec<Section> =
            cases(Size::Full).iter().map(|case| case.section).collect();
        sections.dedup();
        assert_eq!(sections, Section::ALL);
    }
}
