//! Attention on matrix units, which only the emulated device has.

use proptest::prelude::*;

use super::masks::{all_scores, check_dropped, check_unseen_tiles, far_rows, with_entries};
use super::on_device::OnDevice;
use super::*;

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

/// Runs with both half types and compares with the oracle.
#[track_caller]
fn check_halves(mut case: Case) {
    for dtype in HALVES {
        case.dtype = dtype;
        assert!(tolerance(&case) > TOLERANCE);
        check(&case);
    }
}

/// Were matrix units never used, all other tests here would pass too.
#[test]
fn weights_are_rounded_where_matrix_units_compute() {
    let mut case = full(problem(1, (1, 1), 32, (40, 40)));
    for dtype in HALVES {
        case.dtype = dtype;
        let rounded = case.run(&OnDevice::new()).unwrap();
        let exact = case.run(&OnDevice::plain()).unwrap();
        exact.check(&case.oracle(), TOLERANCE, TOLERANCE);
        let results = |computed: Computed| {
            let Computed {
                output,
                grad_query,
                grad_key,
                grad_value,
                ..
            } = computed;
            [output, grad_query, grad_key, grad_value]
        };
        for (rounded, exact) in results(rounded).iter().zip(results(exact)) {
            assert!(relative_error(rounded, &widened(&exact)) > 1e-5);
        }
    }
}

#[test]
fn every_head_size_matches_the_oracle() {
    for head_dim in (16..=256).step_by(16) {
        // The types take turns: each kernel takes seconds to compile.
        let mut case = full(causal(problem(1, (2, 1), head_dim, (40, 70))));
        case.dtype = HALVES[head_dim / 16 % 2];
        check(&case);
    }
}

#[test]
fn every_size_around_the_borders_of_tiles_matches_the_oracle() {
    for queries in [1, 15, 17, 64, 127, 129] {
        for keys in [1, 16, 33, 64, 129] {
            let mut case = full(problem(1, (1, 1), 16, (queries, keys)));
            case.dtype = DType::F16;
            check(&case);
            case.problem.mask = Mask::CAUSAL;
            check(&case);
        }
    }
}

#[test]
fn several_cubes_and_many_tiles_match_the_oracle() {
    for head_dim in [64, 128, 256] {
        check_halves(full(causal(problem(1, (1, 1), head_dim, (300, 300)))));
        check_halves(full(problem(1, (2, 1), head_dim, (150, 330))));
    }
}

#[test]
fn strided_and_shared_rows_match_the_oracle() {
    for order in [
        Order::HeadsFirst,
        Order::RowsFirst,
        Order::Bordered(3),
        Order::Bordered(8),
    ] {
        for mask in [Mask::NONE, Mask::CAUSAL] {
            let mut case = tangled(problem(2, (4, 2), 48, (150, 140)));
            case.problem.mask = mask;
            case.order = order;
            check_halves(case);
        }
    }
}

#[test]
fn neither_asynchronous_copies_nor_assembly_are_needed() {
    for (order, dtype) in [
        (Order::HeadsFirst, DType::F16),
        (Order::Bordered(3), DType::BF16),
    ] {
        let mut case = tangled(causal(problem(1, (2, 1), 32, (150, 140))));
        (case.order, case.dtype) = (order, dtype);
        let computed = case.run(&OnDevice::without_assembly()).unwrap();
        computed.check(&case.oracle(), tolerance(&case), TOLERANCE);
    }
}

#[test]
fn output_scale_reaches_output_and_gradients() {
    let mut case = tangled(problem(1, (2, 1), 32, (150, 140)));
    case.output_scale = 0.25;
    check_halves(case);
}

#[test]
fn calls_may_mix_matrix_units_and_plain_kernels() {
    let mut case = tangled(causal(problem(1, (2, 2), 32, (150, 140))));
    case.dtype = DType::F16;
    let blocks = case.blocks[0].blocks.iter();
    let hops: Vec<Vec<HeadBlocks>> = blocks
        .map(|&block| {
            let heads = vec![0, 1];
            vec![on_every_entry(&case.problem, heads, vec![block])]
        })
        .collect();
    let hops: Vec<&[HeadBlocks]> = hops.iter().map(Vec::as_slice).collect();
    for hops in [hops.clone(), hops.into_iter().rev().collect()] {
        let computed = case.run_hops(&OnDevice::mixed(), &hops).unwrap();
        computed.check(&case.oracle(), tolerance(&case), TOLERANCE);
    }
}

#[test]
fn results_are_the_same_bits_every_time() {
    let mut case = tangled(causal(problem(1, (4, 2), 64, (150, 140))));
    case.dtype = DType::BF16;
    let once = case.run(&OnDevice::new()).unwrap();
    assert_eq!(case.run(&OnDevice::new()).unwrap(), once);
    use cuda_emulator::Order::{Ascending, Descending, Random};
    for order in [Ascending, Descending, Random { seed: 7 }] {
        let device = CubeDevice::new(cuda_emulator::client_with_order(order));
        let again = case.run(&OnDevice::of(device)).unwrap();
        assert_eq!(again, once, "{order:?}");
    }
}

#[test]
fn rows_without_keys_are_zero_and_never_nan() {
    let problem = causal(problem(1, (1, 1), 16, (80, 40)));
    // The first 30 queries stand before every key; the last 10 are in no block.
    let block = (at(rows(0, 1, 70), -30, 1), rows(0, 1, 40));
    let mut case = Case::new(problem.clone(), on_all_heads(&problem, &[block]));
    case.dtype = DType::F16;
    let computed = check(&case);
    let log_sum_exp = computed.log_sum_exp.as_f32().unwrap();
    for row in (0..30).chain(70..80) {
        assert_eq!(log_sum_exp[row], f32::NEG_INFINITY);
        for gradient in [&computed.output, &computed.grad_query] {
            let row = &gradient.as_f32().unwrap()[row * 16..(row + 1) * 16];
            assert_eq!(row, [0.0; 16]);
        }
    }
    assert!(log_sum_exp[30..70].iter().all(|x| x.is_finite()));
}

#[test]
fn queries_that_see_nothing_contribute_nothing_whatever_they_hold() {
    check_unseeing_queries(32, DType::F16);
}

#[test]
fn tiles_that_no_query_sees_are_not_computed_with() {
    check_unseen_tiles(32, DType::F16);
}

#[test]
fn huge_scores_do_not_overflow() {
    let mut case = tangled(causal(problem(1, (2, 2), 16, (150, 140))));
    case.dtype = DType::F16;
    case.temperature = 3e4;
    let computed = case.run(&OnDevice::new()).unwrap();
    for buffer in computed.buffers() {
        assert!(widened(buffer).iter().all(|x| !x.is_nan()));
    }
    let expected = case.oracle();
    assert!(relative_error(&computed.output, &expected.output) < 1e-2);
    assert!(relative_error(&computed.log_sum_exp, &expected.log_sum_exp) < 1e-6);
}

#[test]
fn what_matrix_units_cannot_do_is_done_by_plain_kernels() {
    let mut case = full(problem(1, (1, 1), 16, (20, 20)));
    case.dtype = DType::F16;
    for scale in [-0.3, 0.0] {
        case.problem.scale = scale;
        check(&case);
    }
    for head_dim in [24, 272] {
        let mut case = full(problem(1, (1, 1), head_dim, (20, 20)));
        case.dtype = DType::BF16;
        check(&case);
    }
}

/// Exponents are those of base 2, and sums go over many tiles.
#[test]
fn long_rows_stay_accurate() {
    let mut case = full(problem(1, (1, 1), 16, (48, 4096)));
    case.dtype = DType::F16;
    check(&case);
}

/// A window, entries with blocks of their own, softcap, slopes and dropout.
fn all_at_once(head_dim: usize, dtype: DType) -> Case {
    let mut case = with_entries(tangled(problem(3, (4, 2), head_dim, (150, 140))));
    case.problem.mask = Mask {
        left: Some(60),
        right: Some(30),
    };
    case.problem.scores = all_scores(4);
    case.output_scale = 1.0 / 0.7;
    case.dtype = dtype;
    case
}

#[test]
fn all_at_once_matches_the_oracle() {
    for (head_dim, dtype) in [
        (16, DType::F16),
        (64, DType::BF16),
        (128, DType::F16),
        (144, DType::BF16),
    ] {
        check(&all_at_once(head_dim, dtype));
    }
}

#[test]
fn all_at_once_gives_the_same_bits_every_time() {
    let case = all_at_once(64, DType::BF16);
    let once = case.run(&OnDevice::new()).unwrap();
    use cuda_emulator::Order::{Descending, Random};
    for order in [Descending, Random { seed: 7 }] {
        let device = CubeDevice::new(cuda_emulator::client_with_order(order));
        let again = case.run(&OnDevice::of(device)).unwrap();
        assert_eq!(again, once, "{order:?}");
    }
}

#[test]
fn windows_match_the_oracle() {
    for (head_dim, dtype) in [(64, DType::F16), (128, DType::BF16)] {
        for (left, right) in [
            (Some(0), Some(0)),
            (Some(40), Some(0)),
            (Some(70), None),
            (Some(9), Some(130)),
        ] {
            let mut case = full(problem(1, (2, 1), head_dim, (300, 280)));
            case.problem.mask = Mask { left, right };
            case.dtype = dtype;
            check(&case);
        }
    }
}

#[test]
fn softcap_and_slopes_alone_match_the_oracle() {
    for dtype in HALVES {
        let mut case = tangled(causal(problem(1, (4, 2), 32, (150, 140))));
        let Scores {
            softcap,
            alibi_slopes,
            ..
        } = all_scores(4);
        case.dtype = dtype;
        match dtype {
            DType::F16 => case.problem.scores.softcap = softcap,
            _ => case.problem.scores.alibi_slopes = alibi_slopes,
        }
        check(&case);
    }
}

#[test]
fn dropped_are_the_weights_that_the_definition_drops() {
    for (size, dtype) in [(64, DType::F16), (128, DType::BF16)] {
        for (branch, (queries, keys)) in (0..).zip(far_rows(size)) {
            check_dropped(dtype, queries, keys, 16_000 * branch);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: RANDOM_CASES, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_blocks_match_the_oracle(case in any_case(&HALVES), sixteens in 1usize..5) {
        let head_dim = 16 * sixteens;
        let mut case = case;
        case.problem = Problem { head_dim, scale: 1.0 / (head_dim as f32).sqrt(), ..case.problem };
        check(&case);
    }
}
