//! Kernels with less memory: the same bits at every level, in the memory that is promised.

use proptest::prelude::*;
use ring_comm::buffer::{DType, HostBuffer};

use super::{CpuKernels, InstructionSet};
use crate::judge::*;
use crate::*;

/// Kernels at every level, the first at level 0; none of them shares memory with another.
fn at_levels(set: InstructionSet, threads: usize) -> impl Iterator<Item = CpuKernels> {
    let kernels = CpuKernels::with_instruction_set(threads, set).unwrap();
    let level = move |level| {
        let own = kernels.with_scratch_limit(usize::MAX);
        own.with_less_memory(level)
    };
    (0..).map_while(level)
}

fn bits(buffer: &HostBuffer) -> Vec<u32> {
    let numbers = buffer.as_f32().unwrap();
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// Fails unless all levels give the same bits.
#[track_caller]
fn check_levels(case: &Case, set: InstructionSet, threads: usize) {
    let mut levels = at_levels(set, threads).map(|kernels| {
        let computed = case.run(&kernels).unwrap();
        computed.buffers().map(bits)
    });
    let expected = levels.next().unwrap();
    for (level, computed) in levels.enumerate() {
        let level = level + 1;
        assert!(
            computed == expected,
            "level {level}, {set}, {threads} threads: {case:?}"
        );
    }
}

/// A case of several bands and many tiles, with everything on that changes scores.
fn long(mask: Mask, head_dim: usize) -> Case {
    let problem = Problem {
        mask,
        scores: Scores {
            softcap: Some(5.0),
            alibi_slopes: Some([0.01, 0.0].into()),
            dropout: Some(Dropout::new(0.2, 7, 0)),
        },
        ..problem(1, (2, 1), head_dim, (520, 390))
    };
    let blocks = [
        (at(rows(0, 1, 520), 39, 1), rows(0, 1, 390)),
        (rows(1, 2, 259), at(rows(0, 3, 129), -5, 3)),
    ];
    Case::new(problem.clone(), on_all_heads(&problem, &blocks))
}

#[test]
fn bits_are_the_same_at_every_level_over_many_bands_and_tiles() {
    let window = Mask {
        left: Some(150),
        right: Some(70),
    };
    let masks = [Mask::NONE, Mask::CAUSAL, window];
    for (i, set) in InstructionSet::available().enumerate() {
        for (j, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
            let mut case = long(masks[(i + j) % 3], [8, 33][i % 2]);
            case.dtype = dtype;
            check_levels(&case, set, [1, 3][j]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bits_are_the_same_at_every_level(
        case in any_case(&[DType::F32, DType::F16, DType::BF16]),
        threads in 1usize..5,
        set in prop::sample::select(InstructionSet::available().collect::<Vec<_>>()),
    ) {
        check_levels(&case, set, threads);
    }
}

#[test]
fn every_level_takes_what_it_says_and_less_than_the_one_before() {
    for head_dim in [1, 64, 96, 256, 300] {
        let case = full(problem(1, (9, 9), head_dim, (3, 3)));
        for threads in [1, 2, 4] {
            let mut before = usize::MAX;
            for kernels in at_levels(InstructionSet::available().next().unwrap(), threads) {
                case.run(&kernels).unwrap();
                let bytes = kernels.scratch_bytes_at_level(head_dim);
                let statistics = kernels.scratch_statistics();
                // Threads that find no work left borrow nothing.
                assert!(statistics.most_lent_bytes <= bytes);
                let of_one = CpuKernels::scratch_bytes(head_dim, 1);
                if threads == 1 {
                    assert_eq!(statistics.most_lent_bytes, bytes);
                }
                if kernels.memory_level() == 0 {
                    assert_eq!(bytes, threads * of_one);
                }
                assert!(bytes * 100 <= before.saturating_mul(88), "{bytes} bytes");
                before = bytes;
            }
        }
    }
}

#[test]
fn levels_end_with_one_thread() {
    for (threads, levels) in [(1, 3), (2, 4), (3, 4), (4, 5), (8, 6)] {
        let kernels = CpuKernels::new(threads).unwrap();
        let count = (0..).map_while(|level| kernels.with_less_memory(level));
        assert_eq!(count.count(), levels);
        assert_eq!(
            kernels.with_less_memory(u32::MAX).map(|k| k.memory_level()),
            None
        );
    }
    let of_level = CpuKernels::new(2).unwrap().with_less_memory(3).unwrap();
    let back = of_level.with_less_memory(0).unwrap();
    assert_eq!((of_level.memory_level(), back.memory_level()), (3, 0));
    assert_eq!(
        back.scratch_bytes_at_level(64),
        CpuKernels::scratch_bytes(64, 2)
    );
}

#[test]
fn what_is_kept_is_bounded_and_can_be_released() {
    let case = full(problem(1, (4, 4), 16, (40, 40)));
    let kernels = CpuKernels::new(1).unwrap();
    let bytes = CpuKernels::scratch_bytes(16, 1);
    case.run(&kernels).unwrap();
    case.run(&kernels).unwrap();
    let statistics = kernels.scratch_statistics();
    assert_eq!(statistics.kept_bytes, bytes);
    assert_eq!(statistics.lent_bytes, 0);
    assert_eq!((statistics.borrows, statistics.reuses), (4, 2));
    kernels.release_memory().unwrap();
    let after = kernels.clone().scratch_statistics();
    assert_eq!((after.kept_bytes, after.most_lent_bytes), (0, bytes));

    let forgetful = kernels.with_scratch_limit(bytes - 1);
    assert_eq!(
        forgetful.scratch_statistics(),
        ring_comm::buffer::PoolStatistics::default()
    );
    case.run(&forgetful).unwrap();
    case.run(&forgetful).unwrap();
    let statistics = forgetful.scratch_statistics();
    // What a forward pass needs is less than the limit.
    assert!(statistics.kept_bytes < bytes);
    assert_eq!((statistics.borrows, statistics.reuses), (4, 0));
    assert_eq!(kernels.scratch_statistics(), after);
}
