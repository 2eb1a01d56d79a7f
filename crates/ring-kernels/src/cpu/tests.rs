//! The CPU kernels against the oracle.

use proptest::prelude::*;
use ring_comm::buffer::{Buffer, DType, HostBuffer};

use super::scratch::{self, Pool};
use super::{CpuKernels, InstructionSet, backward, forward};
use crate::judge::*;
use crate::*;

/// Kernels with the given instructions.
fn on(set: InstructionSet, threads: usize) -> CpuKernels {
    CpuKernels::with_instruction_set(threads, set).unwrap()
}

impl Case {
    /// Runs and compares with the oracle.
    /// With every instruction set of this machine; returns what the fastest gives.
    #[track_caller]
    fn check(&self) -> Computed {
        let expected = self.oracle();
        let mut last = None;
        for set in InstructionSet::available() {
            let computed = self.run(&on(set, 1)).unwrap();
            computed.check(&expected, self.tolerance(set), TOLERANCE);
            last = Some(computed);
        }
        last.unwrap()
    }

    /// Relative error that is allowed.
    fn tolerance(&self, set: InstructionSet) -> f64 {
        match (set, self.dtype) {
            // Weights and score gradients are rounded to 8 bits before they are multiplied.
            (InstructionSet::Avx512Bf16, DType::BF16) => 1e-2,
            _ => TOLERANCE,
        }
    }
}

#[test]
fn any_head_size_matches_the_oracle() {
    for head_dim in [1, 3, 8, 20, 64, 80, 128] {
        full(problem(1, (2, 2), head_dim, (70, 131))).check();
        full(causal(problem(1, (2, 2), head_dim, (131, 131)))).check();
    }
}

#[test]
fn every_small_size_matches_the_oracle() {
    for queries in [0, 1, 7, 63, 64, 65] {
        for keys in [0, 1, 15, 17, 127, 128, 129, 257] {
            full(problem(1, (1, 1), 5, (queries, keys))).check();
            full(causal(problem(1, (1, 1), 5, (queries, keys)))).check();
        }
    }
    full(problem(0, (2, 1), 8, (10, 10))).check();
}

#[test]
fn shared_rows_count_with_their_multiplicity() {
    tangled(problem(2, (2, 2), 16, (150, 140))).check();
    tangled(causal(problem(2, (2, 2), 16, (150, 140)))).check();
}

#[test]
fn query_heads_of_a_group_share_their_keys() {
    let problem = causal(problem(2, (6, 2), 16, (150, 140)));
    let mut case = tangled(problem);
    case.blocks[0].kv_heads = vec![1];
    case.blocks.push(HeadBlocks {
        kv_heads: vec![0, 1],
        blocks: vec![Block {
            queries: rows(2, 4, 37),
            keys: rows(1, 5, 28),
        }],
    });
    case.check();
}

#[test]
fn heads_without_blocks_get_nothing() {
    let mut case = full(problem(1, (2, 2), 8, (20, 20)));
    case.blocks[0].kv_heads = vec![1];
    let computed = case.check();
    let output = computed.output.as_f32().unwrap();
    assert!(output[..20 * 8].iter().all(|&x| x == 0.0));
    assert!(output[20 * 8..].iter().all(|&x| x != 0.0));
}

#[test]
fn strided_memory_matches_the_oracle() {
    for order in [Order::RowsFirst, Order::Bordered(3)] {
        let mut case = tangled(causal(problem(2, (4, 2), 20, (150, 140))));
        case.order = order;
        case.check();
    }
}

#[test]
fn half_precision_inputs_are_only_rounded_once() {
    for dtype in [DType::F16, DType::BF16] {
        let mut case = tangled(causal(problem(1, (4, 2), 20, (150, 140))));
        case.dtype = dtype;
        case.order = Order::RowsFirst;
        case.check();
    }
}

#[test]
fn output_scale_reaches_output_and_gradients() {
    let mut case = tangled(problem(1, (2, 1), 8, (150, 140)));
    case.output_scale = 0.25;
    case.check();
}

#[test]
fn every_sign_of_the_scale_matches_the_oracle() {
    for scale in [-0.3, 0.0] {
        for dtype in [DType::F32, DType::BF16] {
            let mut case = tangled(causal(problem(1, (2, 2), 20, (150, 140))));
            case.problem.scale = scale;
            case.dtype = dtype;
            case.check();
        }
    }
}

#[test]
fn an_instruction_set_that_the_processor_lacks_is_a_typed_error() {
    for set in InstructionSet::ALL {
        let kernels = CpuKernels::with_instruction_set(1, set);
        assert_eq!(kernels.is_ok(), set.is_available());
        assert_eq!(set.to_string().parse(), Ok(set));
    }
    let unknown = "mmx".parse::<InstructionSet>().unwrap_err();
    assert!(
        unknown.to_string().contains("portable, sse42, avx2"),
        "{unknown}"
    );
}

#[test]
fn hops_add_up_to_one_call() {
    let case = tangled(causal(problem(1, (2, 2), 16, (150, 140))));
    let single = |block: &Block| HeadBlocks {
        kv_heads: vec![0, 1],
        blocks: vec![*block],
    };
    let hops: Vec<Vec<HeadBlocks>> = case.blocks[0]
        .blocks
        .iter()
        .rev()
        .map(|block| vec![single(block)])
        .collect();
    let hops: Vec<&[HeadBlocks]> = hops.iter().map(Vec::as_slice).collect();
    let computed = case.run_hops(&CpuKernels::new(1).unwrap(), &hops).unwrap();
    computed.check(&case.oracle(), TOLERANCE, TOLERANCE);
}

#[test]
fn rows_without_keys_are_zero_and_never_nan() {
    let problem = causal(problem(1, (1, 1), 8, (80, 40)));
    // The first 30 queries stand before every key; the last 10 are in no block.
    let block = (at(rows(0, 1, 70), -30, 1), rows(0, 1, 40));
    let computed = Case::new(problem, on_all_heads(&problem, &[block])).check();
    let log_sum_exp = computed.log_sum_exp.as_f32().unwrap();
    for row in (0..30).chain(70..80) {
        assert_eq!(log_sum_exp[row], f32::NEG_INFINITY);
        for gradient in [&computed.output, &computed.grad_query] {
            assert_eq!(gradient.as_f32().unwrap()[row * 8..(row + 1) * 8], [0.0; 8]);
        }
    }
    assert!(log_sum_exp[30..70].iter().all(|x| x.is_finite()));
}

#[test]
fn huge_scores_do_not_overflow() {
    let mut case = tangled(causal(problem(1, (2, 2), 16, (150, 140))));
    case.temperature = 3e4;
    let computed = case.run(&CpuKernels::new(1).unwrap()).unwrap();
    let expected = case.oracle();
    let largest = expected
        .log_sum_exp
        .iter()
        .filter(|x| x.is_finite())
        .fold(0.0, |a: f64, b| a.max(b.abs()));
    assert!(largest > 1e4);
    for buffer in computed.buffers() {
        assert!(widened(buffer).iter().all(|x| !x.is_nan()));
    }
    // Scores of 1e4 carry an error of 1e-3 in f32, and that is what the weights inherit.
    assert!(relative_error(&computed.output, &expected.output) < 1e-2);
    assert!(relative_error(&computed.log_sum_exp, &expected.log_sum_exp) < 1e-6);
}

#[test]
fn nan_in_a_query_reaches_its_own_row_and_no_other() {
    let problem = causal(problem(1, (1, 1), 8, (20, 20)));
    let case = full(problem);
    let mut operands = case.operands();
    operands.query.buffer.as_f32_mut().unwrap()[7 * 8] = f32::NAN;
    let kernels = CpuKernels::new(1).unwrap();
    let source = KeyValue::Own {
        key: operands.key.tensor(),
        value: operands.value.tensor(),
    };
    let mut state = kernels.start(&problem).unwrap();
    kernels
        .forward(
            &problem,
            operands.query.tensor(),
            &source,
            &case.blocks,
            &mut state,
        )
        .unwrap();
    let (output, log_sum_exp) = kernels.finish(&problem, state, DType::F32, 1.0).unwrap();
    for (i, row) in output.as_f32().unwrap().chunks_exact(8).enumerate() {
        assert!(row.iter().all(|x| x.is_nan() == (i == 7)));
        assert_eq!(log_sum_exp.as_f32().unwrap()[i].is_nan(), i == 7);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    // 1 x 2 heads: two passes for 3 and 4 threads, one pass for 1 and 2.
    for problem in [
        problem(1, (2, 2), 24, (150, 140)),
        causal(problem(1, (4, 2), 24, (150, 140))),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let mut case = tangled(problem);
            case.dtype = dtype;
            let one = case.run(&CpuKernels::new(1).unwrap()).unwrap();
            for threads in [2, 3, 4] {
                let computed = case.run(&CpuKernels::new(threads).unwrap()).unwrap();
                assert_eq!(one, computed, "{dtype}, {threads} threads");
            }
        }
    }
}

#[test]
fn one_head_on_many_threads_matches_the_oracle() {
    let case = full(causal(problem(1, (1, 1), 16, (1000, 1000))));
    let computed = case.run(&CpuKernels::new(3).unwrap()).unwrap();
    computed.check(&case.oracle(), TOLERANCE, TOLERANCE);
}

/// Two runs of every head's rows, and the same rows as one block per run in slot order.
fn packed_case(problem: &Problem) -> (PackedRows, Vec<HeadBlocks>, Vec<HeadBlocks>) {
    let runs = [vec![rows(1, 3, 30), rows(100, 2, 15)], vec![rows(0, 2, 60)]];
    let packed = runs.iter().enumerate().map(|(head, runs)| HeadRows {
        kv_heads: vec![head],
        runs: runs.clone(),
    });
    let packed = PackedRows::new(problem, packed.collect());
    let queries = rows(0, 1, problem.queries);
    let (mut own, mut slot) = (Vec::new(), Vec::new());
    for (head, runs) in runs.iter().enumerate() {
        let mut start = 0;
        for run in runs {
            let in_slot = at(
                rows(start, 1, run.count),
                run.first_position,
                run.position_step,
            );
            start += run.count;
            let entry = |keys| HeadBlocks {
                kv_heads: vec![head],
                blocks: vec![Block { queries, keys }],
            };
            own.push(entry(*run));
            slot.push(entry(in_slot));
        }
    }
    (packed, own, slot)
}

#[test]
fn packed_rows_give_what_own_rows_give() {
    for (dtype, threads) in [(DType::F32, 1), (DType::BF16, 1), (DType::F16, 8)] {
        let problem = causal(problem(2, (4, 2), 16, (130, 140)));
        let (packed, own, slot_blocks) = packed_case(&problem);
        let mut case = Case::new(problem, own);
        (case.dtype, case.order) = (dtype, Order::RowsFirst);
        let operands = case.operands();
        let kernels = CpuKernels::new(threads).unwrap();
        let expected = case.run(&kernels).unwrap();

        let (key, value) = (operands.key.tensor(), operands.value.tensor());
        let slot = kernels.pack(&problem, key, value, &packed, None).unwrap();
        assert_eq!((slot.dtype(), slot.len()), (dtype, packed.len));
        let source = KeyValue::Slot {
            slot: &slot,
            layout: &packed.layout,
        };
        let mut state = kernels.start(&problem).unwrap();
        kernels
            .forward(
                &problem,
                operands.query.tensor(),
                &source,
                &slot_blocks,
                &mut state,
            )
            .unwrap();
        let (output, log_sum_exp) = kernels.finish(&problem, state, DType::F32, 1.0).unwrap();
        assert_eq!(
            (&output, &log_sum_exp),
            (&expected.output, &expected.log_sum_exp)
        );

        let delta = case
            .delta(&kernels, &operands, &output, &log_sum_exp)
            .unwrap();
        let inputs = BackwardInputs {
            query: operands.query.tensor(),
            grad_output: operands.grad_output.tensor(),
            log_sum_exp: log_sum_exp.view(),
            delta: &delta,
        };
        let mut grad_query = HostBuffer::zeros(DType::F32, operands.query.buffer.len());
        let mut grad_slot = HostBuffer::zeros(DType::F32, packed.len);
        let grad = KeyValueGradient::Slot {
            slot: &mut grad_slot,
            layout: &packed.layout,
        };
        kernels
            .backward(
                &problem,
                &inputs,
                &source,
                &slot_blocks,
                1.0,
                &mut grad_query,
                grad,
            )
            .unwrap();
        let mut grad_key = HostBuffer::zeros(DType::F32, operands.key.buffer.len());
        let mut grad_value = grad_key.clone();
        kernels
            .add_rows(
                &problem,
                &grad_slot,
                &packed,
                &mut grad_key,
                &mut grad_value,
            )
            .unwrap();
        assert_eq!(grad_query, expected.grad_query);
        assert_eq!(
            (grad_key, grad_value),
            (expected.grad_key, expected.grad_value)
        );
    }
}

#[test]
fn a_message_is_keys_then_values_by_batch_head_and_run() {
    let problem = problem(2, (2, 2), 1, (0, 4));
    let numbers = |start: u8| HostBuffer::F32((0..16).map(|i| f32::from(start + i)).collect());
    let (key, value) = (numbers(0), numbers(100));
    let layout = RowLayout::contiguous(2, 4, 1);
    let tensor = |data: &'static str| match data {
        "key" => Tensor::<HostBuffer> {
            data: key.view(),
            layout: &layout,
        },
        _ => Tensor {
            data: value.view(),
            layout: &layout,
        },
    };
    let runs = vec![rows(3, 1, 1), rows(0, 2, 2)];
    let packed = PackedRows::new(
        &problem,
        vec![HeadRows {
            kv_heads: vec![1],
            runs,
        }],
    );
    let kernels = CpuKernels::new(1).unwrap();
    let reuse = Vec::with_capacity(packed.len);
    let memory = reuse.as_ptr();
    let reuse = Some(HostBuffer::F32(reuse));
    let message = kernels
        .pack(&problem, tensor("key"), tensor("value"), &packed, reuse)
        .unwrap();
    let expected = [
        7.0, 4.0, 6.0, 15.0, 12.0, 14.0, 107.0, 104.0, 106.0, 115.0, 112.0, 114.0,
    ];
    assert_eq!(message.as_f32().unwrap(), expected);
    assert_eq!(
        message.as_f32().unwrap().as_ptr(),
        memory,
        "the memory was not reused"
    );

    let (mut grad_key, mut grad_value) = (key.clone(), value.clone());
    kernels
        .add_rows(&problem, &message, &packed, &mut grad_key, &mut grad_value)
        .unwrap();
    for (got, before) in [(&grad_key, &key), (&grad_value, &value)] {
        for (i, (got, before)) in got
            .as_f32()
            .unwrap()
            .iter()
            .zip(before.as_f32().unwrap())
            .enumerate()
        {
            let travelled = i % 8 >= 4 && i % 4 != 1;
            assert_eq!(*got, if travelled { 2.0 * before } else { *before });
        }
    }
}

#[test]
fn allocate_zeroes_reused_memory() {
    let kernels = CpuKernels::new(1).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let used = rounded(vec![7.0; 10], dtype);
        let buffer = kernels.allocate(dtype, 8, Some(used)).unwrap();
        assert_eq!(buffer, HostBuffer::zeros(dtype, 8));
        let other = kernels
            .allocate(dtype, 3, Some(rounded(vec![7.0; 10], DType::F32)))
            .unwrap();
        assert_eq!(other, HostBuffer::zeros(dtype, 3));
    }
}

#[test]
fn refused_memory_is_an_error() {
    let kernels = CpuKernels::new(1).unwrap();
    let len = usize::MAX / 8;
    let error = kernels.allocate(DType::F32, len, None).unwrap_err();
    assert_eq!(error, KernelError::Allocation { bytes: len * 4 });
    let huge = problem(1, (1, 1), 4, (1 << 57, 0));
    assert!(matches!(
        kernels.start(&huge).unwrap_err(),
        KernelError::Allocation { .. }
    ));
}

#[test]
fn results_are_rounded_to_the_asked_type() {
    let problem = problem(1, (1, 1), 4, (10, 10));
    let case = full(problem);
    let operands = case.operands();
    let kernels = CpuKernels::new(1).unwrap();
    let exact = case.run(&kernels).unwrap().output;
    for dtype in [DType::F16, DType::BF16] {
        let source = KeyValue::Own {
            key: operands.key.tensor(),
            value: operands.value.tensor(),
        };
        let mut state = kernels.start(&problem).unwrap();
        kernels
            .forward(
                &problem,
                operands.query.tensor(),
                &source,
                &case.blocks,
                &mut state,
            )
            .unwrap();
        let (output, log_sum_exp) = kernels.finish(&problem, state, dtype, 1.0).unwrap();
        assert_eq!(output, rounded(exact.as_f32().unwrap().to_vec(), dtype));
        assert_eq!(output, kernels.round(exact.clone(), dtype).unwrap());
        assert_eq!(log_sum_exp.dtype(), DType::F32);
    }
    assert_eq!(kernels.round(exact.clone(), DType::F32).unwrap(), exact);
    assert!(matches!(
        kernels.round(HostBuffer::zeros(DType::F16, 1), DType::F16),
        Err(KernelError::DType { .. })
    ));
}

#[test]
fn scratch_is_as_large_as_it_says() {
    for head_dim in [1, 64, 96, 256, 300] {
        let pool = Pool::default();
        let words = backward::scratch_words(head_dim);
        assert!(words >= forward::scratch_words(head_dim));
        assert_eq!(
            CpuKernels::scratch_bytes(head_dim, 2),
            2 * scratch::bytes(words)
        );
        let borrowed = pool.borrow(words).unwrap();
        assert_eq!(borrowed.allocated(), scratch::bytes(words));
    }
}

#[test]
fn queries_that_see_nothing_contribute_nothing_whatever_they_hold() {
    let problem = causal(problem(1, (1, 1), 8, (80, 40)));
    let block = (at(rows(0, 1, 80), -30, 1), rows(0, 1, 40));
    for dtype in [DType::F32, DType::BF16] {
        let mut case = Case::new(problem, on_all_heads(&problem, &[block]));
        case.dtype = dtype;
        let clean = case.run(&CpuKernels::new(1).unwrap()).unwrap();
        case.poisoned = 30;
        let poisoned = case.run(&CpuKernels::new(1).unwrap()).unwrap();
        assert_eq!(poisoned, clean, "{dtype}");
    }
}

/// The error that a change of an otherwise good forward call causes.
fn forward_error(change: impl FnOnce(&mut Case, &mut Operands)) -> KernelError {
    let mut case = full(problem(1, (2, 2), 8, (20, 30)));
    let mut operands = case.operands();
    let kernels = CpuKernels::new(1).unwrap();
    let mut state = kernels.start(&case.problem).unwrap();
    change(&mut case, &mut operands);
    let source = KeyValue::Own {
        key: operands.key.tensor(),
        value: operands.value.tensor(),
    };
    kernels
        .forward(
            &case.problem,
            operands.query.tensor(),
            &source,
            &case.blocks,
            &mut state,
        )
        .unwrap_err()
}

#[test]
fn bad_arguments_are_typed_errors() {
    let size = |error| matches!(error, KernelError::Size { .. });
    let dtype = |error| matches!(error, KernelError::DType { .. });
    let invalid = |error| matches!(error, KernelError::Invalid(_));
    let key_rows = |case: &mut Case, keys| case.blocks[0].blocks[0].keys = keys;

    assert!(size(forward_error(
        |_, with| with.query.buffer = HostBuffer::zeros(DType::F32, 319)
    )));
    assert!(size(forward_error(
        |_, with| with.value.buffer = HostBuffer::zeros(DType::F32, 479)
    )));
    assert!(size(forward_error(|case, _| case.problem.batch = 2)));
    assert!(dtype(forward_error(
        |_, with| with.key.buffer = HostBuffer::zeros(DType::F16, 480)
    )));
    assert!(invalid(forward_error(|case, _| case.problem.kv_heads = 0)));
    assert!(invalid(forward_error(
        |case, _| case.problem.query_heads = 3
    )));
    assert!(invalid(forward_error(|case, _| case.problem.head_dim = 0)));
    assert!(invalid(forward_error(
        |case, _| case.problem.queries = usize::MAX / 2
    )));
    assert!(invalid(forward_error(|case, _| case.blocks[0]
        .kv_heads
        .push(2))));
    assert!(invalid(forward_error(|case, _| case.blocks[0].blocks[0]
        .queries
        .first_row = 1)));
    assert!(invalid(forward_error(|case, _| key_rows(
        case,
        rows(0, 1, 31)
    ))));
    assert!(invalid(forward_error(|case, _| key_rows(
        case,
        rows(0, 0, 2)
    ))));
    assert!(invalid(forward_error(|case, _| key_rows(
        case,
        at(rows(0, 1, 2), 0, -1)
    ))));
    assert!(invalid(forward_error(|case, _| key_rows(
        case,
        at(rows(0, 1, 2), i64::MAX, 1)
    ))));
    assert!(invalid(forward_error(|case, _| key_rows(
        case,
        rows(1, usize::MAX, 2)
    ))));
    assert!(invalid(forward_error(|_, with| with
        .query
        .layout
        .head_base
        .truncate(1))));
    assert!(invalid(forward_error(|_, with| with
        .query
        .layout
        .row_stride =
        usize::MAX)));
    assert!(invalid(CpuKernels::new(0).unwrap_err()));
}

#[test]
fn gradient_heads_that_overlap_are_refused() {
    let problem = problem(1, (2, 2), 8, (20, 30));
    let case = full(problem);
    let operands = case.operands();
    let kernels = CpuKernels::new(1).unwrap();
    let rows = HostBuffer::zeros(DType::F32, 40);
    let inputs = BackwardInputs {
        query: operands.query.tensor(),
        grad_output: operands.grad_output.tensor(),
        log_sum_exp: rows.view(),
        delta: &rows,
    };
    let source = KeyValue::Own {
        key: operands.key.tensor(),
        value: operands.value.tensor(),
    };
    for (layout, len) in [
        (Order::RowsFirst.layout(2, 30, 8), 960),
        (
            RowLayout {
                row_stride: 4,
                ..RowLayout::contiguous(2, 30, 8)
            },
            960,
        ),
    ] {
        let mut slot = HostBuffer::zeros(DType::F32, len);
        let mut grad_query = HostBuffer::zeros(DType::F32, operands.query.buffer.len());
        let grad = KeyValueGradient::Slot {
            slot: &mut slot,
            layout: &layout,
        };
        let error = kernels
            .backward(
                &problem,
                &inputs,
                &source,
                &case.blocks,
                1.0,
                &mut grad_query,
                grad,
            )
            .unwrap_err();
        assert!(matches!(error, KernelError::Invalid(_)), "{error}");
    }
}

#[test]
fn messages_with_bad_rows_are_refused() {
    let problem = problem(1, (2, 2), 8, (20, 30));
    let operands = full(problem).operands();
    let kernels = CpuKernels::new(1).unwrap();
    let pack = |packed: &PackedRows| {
        kernels.pack(
            &problem,
            operands.key.tensor(),
            operands.value.tensor(),
            packed,
            None,
        )
    };
    let entry = |kv_heads: &[usize], run| HeadRows {
        kv_heads: kv_heads.to_vec(),
        runs: vec![run],
    };
    let beyond = PackedRows::new(&problem, vec![entry(&[0], rows(0, 1, 31))]);
    assert!(matches!(pack(&beyond), Err(KernelError::Invalid(_))));
    let twice = PackedRows::new(
        &problem,
        vec![entry(&[0], rows(0, 1, 3)), entry(&[0], rows(5, 1, 3))],
    );
    assert!(matches!(pack(&twice), Err(KernelError::Invalid(_))));
    let mut short = PackedRows::new(&problem, vec![entry(&[0, 1], rows(0, 1, 3))]);
    short.len -= 2;
    assert!(matches!(pack(&short), Err(KernelError::Size { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_blocks_match_the_oracle(
        case in any_case(&[DType::F32, DType::BF16]),
        threads in 1usize..4,
        set in prop::sample::select(InstructionSet::available().collect::<Vec<_>>()),
    ) {
        let computed = case.run(&on(set, threads)).unwrap();
        computed.check(&case.oracle(), case.tolerance(set), TOLERANCE);
    }
}
