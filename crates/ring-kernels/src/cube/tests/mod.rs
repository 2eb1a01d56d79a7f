//! The kernels against the oracle, on wgpu's CPU adapter (Mesa's lavapipe), or with the feature `emulated-cuda` on the emulator of a
//! CUDA device.

mod masks;
#[cfg(feature = "emulated-cuda")]
mod matrix_units;
mod on_device;
mod tiles;
mod transport;

use proptest::prelude::*;
use ring_comm::buffer::{Buffer, DType, HostBuffer};

use self::on_device::{DTYPES, OnDevice, device};
use super::*;
use crate::judge::*;
use crate::*;

/// Runs and compares with the oracle.
#[track_caller]
fn check(case: &Case) -> Computed {
    let computed = case.run(&OnDevice::new()).unwrap();
    let expected = case.oracle();
    computed.check(
        &expected,
        tolerance(case).max(rounding(&expected)),
        TOLERANCE,
    );
    computed
}

/// The relative error of output and gradients: that of sums in f32, or where matrix units compute that of rounded weights.
fn tolerance(case: &Case) -> f64 {
    let Problem {
        head_dim, scale, ..
    } = case.problem;
    let by_matrix_units = cfg!(feature = "emulated-cuda")
        && head_dim.is_multiple_of(16)
        && head_dim <= 256
        && scale > 0.0;
    match case.dtype {
        DType::F16 if by_matrix_units => 2e-3,
        DType::BF16 if by_matrix_units => 1e-2,
        _ => TOLERANCE,
    }
}

#[test]
fn any_head_size_matches_the_oracle() {
    for head_dim in [1, 3, 8, 20, 64, 80, 128] {
        check(&full(problem(1, (2, 2), head_dim, (70, 131))));
        check(&full(causal(problem(1, (2, 2), head_dim, (131, 131)))));
    }
}

#[test]
fn every_small_size_matches_the_oracle() {
    for queries in [0, 1, 7, 63, 64, 65] {
        for keys in [0, 1, 31, 32, 33, 65, 129] {
            check(&full(problem(1, (1, 1), 5, (queries, keys))));
            check(&full(causal(problem(1, (1, 1), 5, (queries, keys)))));
        }
    }
    check(&full(problem(0, (2, 1), 8, (10, 10))));
}

#[test]
fn shared_rows_count_with_their_multiplicity() {
    check(&tangled(problem(2, (2, 2), 16, (150, 140))));
    check(&tangled(causal(problem(2, (2, 2), 16, (150, 140)))));
}

/// Cubes that wrote the same rows at the same time would lose what others add.
#[test]
fn blocks_that_write_the_same_rows_add_up() {
    let problem = problem(1, (1, 1), 16, (64, 512));
    let blocks = vec![(rows(0, 1, 64), rows(0, 1, 512)); 24];
    check(&Case::new(problem.clone(), on_all_heads(&problem, &blocks)));
}

#[test]
fn query_heads_of_a_group_share_their_keys() {
    let mut case = tangled(causal(problem(2, (6, 2), 16, (150, 140))));
    case.blocks[0].kv_heads = vec![1];
    let more = block(rows(2, 4, 37), rows(1, 5, 28));
    let more = on_every_entry(&case.problem, vec![0, 1], vec![more]);
    case.blocks.push(more);
    check(&case);
}

#[test]
fn heads_without_blocks_get_nothing() {
    let mut case = full(problem(1, (2, 2), 8, (20, 20)));
    case.blocks[0].kv_heads = vec![1];
    let computed = check(&case);
    let output = computed.output.as_f32().unwrap();
    assert!(output[..20 * 8].iter().all(|&x| x == 0.0));
    assert!(output[20 * 8..].iter().all(|&x| x != 0.0));
}

#[test]
fn strided_memory_with_nan_around_rows_matches_the_oracle() {
    for order in [Order::RowsFirst, Order::Bordered(3), Order::Bordered(4)] {
        let mut case = tangled(causal(problem(2, (4, 2), 20, (150, 140))));
        case.order = order;
        check(&case);
    }
}

#[test]
fn dilated_segments_with_offsets_match_the_oracle() {
    let problem = causal(problem(1, (4, 4), 16, (256, 256)));
    let segment = |segment: usize, rate: usize, length: usize, offset: usize| {
        let rows = rows(
            segment * length + offset,
            rate,
            (length - offset).div_ceil(rate),
        );
        block(rows, rows)
    };
    let blocks = (0..4)
        .map(|head| {
            let blocks = (0..4)
                .map(|i| segment(i, 1, 64, 0))
                .chain((0..2).map(|i| segment(i, 2, 128, head % 2)))
                .chain([segment(0, 4, 256, head)]);
            on_every_entry(&problem, vec![head], blocks.collect())
        })
        .collect();
    check(&Case::new(problem, blocks));
}

#[test]
fn half_precision_inputs_are_only_rounded_once() {
    for &dtype in DTYPES.iter().filter(|&&dtype| dtype != DType::F32) {
        let mut case = tangled(causal(problem(1, (4, 2), 20, (150, 140))));
        case.dtype = dtype;
        case.order = Order::RowsFirst;
        check(&case);
    }
}

#[test]
fn output_scale_reaches_output_and_gradients() {
    let mut case = tangled(problem(1, (2, 1), 8, (150, 140)));
    case.output_scale = 0.25;
    check(&case);
}

#[test]
fn every_sign_of_the_scale_matches_the_oracle() {
    for scale in [-0.3, 0.0] {
        let mut case = tangled(causal(problem(1, (2, 2), 20, (150, 140))));
        case.problem.scale = scale;
        check(&case);
    }
}

#[test]
fn hops_add_up_to_one_call() {
    let case = tangled(causal(problem(1, (2, 2), 16, (150, 140))));
    let hops: Vec<Vec<HeadBlocks>> = case.blocks[0]
        .blocks
        .iter()
        .rev()
        .map(|&block| {
            let heads = vec![0, 1];
            vec![on_every_entry(&case.problem, heads, vec![block])]
        })
        .collect();
    let hops: Vec<&[HeadBlocks]> = hops.iter().map(Vec::as_slice).collect();
    let computed = case.run_hops(&OnDevice::new(), &hops).unwrap();
    computed.check(&case.oracle(), TOLERANCE, TOLERANCE);
}

#[test]
fn rows_without_keys_are_zero_and_never_nan() {
    let problem = causal(problem(1, (1, 1), 8, (80, 40)));
    // The first 30 queries stand before every key; the last 10 are in no block.
    let block = (at(rows(0, 1, 70), -30, 1), rows(0, 1, 40));
    let computed = check(&Case::new(
        problem.clone(),
        on_all_heads(&problem, &[block]),
    ));
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
fn queries_that_see_nothing_contribute_nothing_whatever_they_hold() {
    check_unseeing_queries(8, DType::F32);
}

/// NaN in queries that stand before all keys, or too far behind them, and in their output gradients, changes no bit.
#[track_caller]
fn check_unseeing_queries(head_dim: usize, dtype: DType) {
    let before = causal(problem(1, (1, 1), head_dim, (80, 40)));
    let behind = Problem {
        mask: Mask {
            left: Some(5),
            right: Some(0),
        },
        ..before.clone()
    };
    for (problem, first, poisoned) in [(before, -30, 0..30), (behind, 0, 45..80)] {
        let block = (at(rows(0, 1, 80), first, 1), rows(0, 1, 40));
        let mut case = Case::new(problem.clone(), on_all_heads(&problem, &[block]));
        case.dtype = dtype;
        let clean = case.run(&OnDevice::new()).unwrap();
        case.poisoned = poisoned;
        assert_eq!(case.run(&OnDevice::new()).unwrap(), clean);
    }
}

/// Much shorter ones, as documents may be, have launches of their own.
#[test]
fn long_and_short_blocks_match_the_oracle() {
    let blocks = [
        (rows(0, 1, 1200), rows(0, 1, 20)),
        (rows(1200, 1, 6), rows(20, 1, 1200)),
        (rows(1206, 1, 3), rows(1220, 1, 2)),
        (rows(1209, 1, 150), rows(1222, 1, 5)),
    ];
    let problem = problem(1, (2, 1), 8, (1359, 1227));
    check(&Case::new(problem.clone(), on_all_heads(&problem, &blocks)));
}

#[test]
fn huge_scores_do_not_overflow() {
    let mut case = tangled(causal(problem(1, (2, 2), 16, (150, 140))));
    case.temperature = 3e4;
    let computed = case.run(&OnDevice::new()).unwrap();
    let expected = case.oracle();
    for buffer in computed.buffers() {
        assert!(widened(buffer).iter().all(|x| !x.is_nan()));
    }
    // Scores of 1e4 carry an error of 1e-3 in f32, and that is what the weights inherit.
    assert!(relative_error(&computed.output, &expected.output) < 1e-2);
    assert!(relative_error(&computed.log_sum_exp, &expected.log_sum_exp) < 1e-6);
}

#[test]
fn results_are_the_same_bits_every_time() {
    let case = tangled(causal(problem(2, (4, 2), 24, (150, 140))));
    let once = case.run(&OnDevice::new()).unwrap();
    assert_eq!(case.run(&OnDevice::new()).unwrap(), once);
}

#[test]
fn results_are_rounded_to_the_asked_type() {
    let problem = problem(1, (1, 1), 4, (10, 10));
    let case = full(problem.clone());
    let operands = case.operands();
    let kernels = OnDevice::new();
    let exact = case.run(&kernels).unwrap().output;
    let source = KeyValue::Own {
        key: operands.key.tensor(),
        value: operands.value.tensor(),
    };
    let mut state = kernels.start(&problem).unwrap();
    let query = operands.query.tensor();
    kernels
        .forward(&problem, query, &source, &case.blocks, &mut state)
        .unwrap();
    let (output, log_sum_exp) = kernels.finish(&problem, state, DType::F16, 1.0).unwrap();
    assert_eq!(
        output,
        rounded(exact.as_f32().unwrap().to_vec(), DType::F16)
    );
    assert_eq!(log_sum_exp.dtype(), DType::F32);
    for &dtype in DTYPES {
        let expected = rounded(exact.as_f32().unwrap().to_vec(), dtype);
        assert_eq!(kernels.round(exact.clone(), dtype).unwrap(), expected);
    }
    assert_eq!(kernels.round(exact.clone(), DType::F32).unwrap(), exact);
}

#[test]
fn packed_rows_give_the_same_bits_as_own_rows() {
    for &dtype in DTYPES {
        let problem = causal(problem(2, (4, 2), 16, (60, 90)));
        let runs = vec![rows(1, 3, 20), rows(66, 2, 12)];
        let own: Vec<_> = runs.iter().map(|&run| (rows(0, 1, 60), run)).collect();
        let slot_rows = [(0, runs[0]), (20, runs[1])].map(|(first_row, run)| Rows {
            first_row,
            row_step: 1,
            ..run
        });
        let in_slot: Vec<_> = slot_rows.iter().map(|&run| (rows(0, 1, 60), run)).collect();
        let mut case = Case::new(problem.clone(), on_all_heads(&problem, &own));
        case.dtype = dtype;
        case.order = Order::RowsFirst;
        let expected = check(&case);
        let packed = PackedRows::new(
            problem.key_shape(),
            vec![HeadRows {
                heads: vec![0, 1],
                runs,
            }],
            2,
        );
        let computed = through_a_message(&case, &packed, &on_all_heads(&problem, &in_slot));
        assert_eq!(computed, expected, "{dtype}");
    }
}

#[test]
fn rows_that_arrive_lie_where_they_were_taken_from() {
    for &dtype in DTYPES {
        let problem = problem(2, (4, 4), 8, (30, 30));
        let shape = problem.query_shape();
        let heads = |heads: &[usize], run| HeadRows {
            heads: heads.to_vec(),
            runs: vec![run],
        };
        let travelling = vec![heads(&[1, 2], rows(3, 2, 10)), heads(&[3], rows(0, 1, 30))];
        let packed = PackedRows::new(shape, travelling, 1);
        let mut case = Case::new(problem.clone(), Vec::new());
        case.dtype = dtype;
        let (operands, kernels) = (case.operands(), OnDevice::new());
        let query = operands.query.tensor();
        let message = kernels.pack(shape, &[query], &packed, None).unwrap();
        let mut placed = HostBuffer::zeros(dtype, shape.elements());
        kernels
            .place_rows(shape, &message, &packed, &mut [&mut placed])
            .unwrap();
        // On the CPU, which other tests hold against numbers.
        let judge = CpuKernels::new(1).unwrap();
        let mut expected = HostBuffer::zeros(dtype, shape.elements());
        let message = judge.pack(shape, &[query], &packed, None).unwrap();
        judge
            .place_rows(shape, &message, &packed, &mut [&mut expected])
            .unwrap();
        assert_eq!(placed, expected, "{dtype}");
    }
}

/// Runs a case whose keys and values are packed first, and whose gradients come home.
fn through_a_message(case: &Case, packed: &PackedRows, blocks: &[HeadBlocks]) -> Computed {
    let (problem, operands, kernels) = (&case.problem, case.operands(), OnDevice::new());
    let (query, key) = (operands.query.tensor(), operands.key.tensor());
    let slot = kernels
        .pack(
            problem.key_shape(),
            &[key, operands.value.tensor()],
            packed,
            None,
        )
        .unwrap();
    assert_eq!((slot.dtype(), slot.len()), (case.dtype, packed.len()));
    let layout = &packed.layout;
    let source = KeyValue::Slot {
        slot: &slot,
        layout,
    };
    let mut state = kernels.start(problem).unwrap();
    kernels
        .forward(problem, query, &source, blocks, &mut state)
        .unwrap();
    let (output, log_sum_exp) = kernels.finish(problem, state, DType::F32, 1.0).unwrap();
    let delta = case
        .delta(&kernels, &operands, &output, &log_sum_exp)
        .unwrap();
    let inputs = BackwardInputs {
        query,
        grad_output: operands.grad_output.tensor(),
        log_sum_exp: log_sum_exp.view(),
        delta: &delta,
    };
    let mut grad_query = HostBuffer::zeros(DType::F32, operands.query.exact.len());
    let mut grad_slot = HostBuffer::zeros(DType::F32, packed.len());
    let gradient = KeyValueGradient::Slot {
        slot: &mut grad_slot,
        layout,
    };
    kernels
        .backward(
            problem,
            &inputs,
            &source,
            blocks,
            1.0,
            &mut grad_query,
            gradient,
        )
        .unwrap();
    let mut grad_key = HostBuffer::zeros(DType::F32, operands.key.exact.len());
    let mut grad_value = grad_key.clone();
    kernels
        .add_rows(
            problem.key_shape(),
            &grad_slot,
            packed,
            &mut [&mut grad_key, &mut grad_value],
        )
        .unwrap();
    Computed {
        output,
        log_sum_exp,
        grad_query,
        grad_key,
        grad_value,
    }
}

/// Tells memory apart.
fn memory_id(buffer: &CubeBuffer) -> impl PartialEq + std::fmt::Debug + use<> {
    buffer.handle().clone().binding().memory.id()
}

#[test]
fn allocate_zeroes_reused_memory() {
    let kernels = CubeKernels::new(device()).unwrap();
    for &dtype in DTYPES {
        let used =
            |dtype| CubeBuffer::from_host(&device(), &rounded(vec![7.0; 10], dtype)).unwrap();
        let memory = used(dtype);
        let id = memory_id(&memory);
        let buffer = kernels.allocate(dtype, 7, Some(memory)).unwrap();
        assert_eq!(memory_id(&buffer), id, "the memory was not reused");
        assert_eq!(buffer.to_host().unwrap(), HostBuffer::zeros(dtype, 7));
        let small = kernels.allocate(dtype, 11, Some(used(dtype))).unwrap();
        assert_eq!(small.to_host().unwrap(), HostBuffer::zeros(dtype, 11));
        let empty = kernels.allocate(dtype, 0, None).unwrap();
        assert_eq!(empty.to_host().unwrap(), HostBuffer::zeros(dtype, 0));
    }
}

#[test]
fn what_the_device_lacks_is_a_typed_error() {
    let kernels = CubeKernels::new(device()).unwrap();
    if !DTYPES.contains(&DType::BF16) {
        let error = kernels.allocate(DType::BF16, 4, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a buffer of this device has element type bf16, expected f32 or f16"
        );
    }
    let len = usize::MAX / 8;
    let error = kernels.allocate(DType::F32, len, None).unwrap_err();
    assert_eq!(error, KernelError::Allocation { bytes: len * 4 });
    let case = full(problem(1, (1, 1), 1 << 15, (1, 1)));
    assert!(matches!(
        case.run(&OnDevice::new()),
        Err(KernelError::Invalid(reason)) if reason.contains("shared memory")
    ));
}

/// The error that a change of an otherwise good forward call causes.
fn forward_error(change: impl FnOnce(&mut Case, &mut Operands)) -> KernelError {
    let mut case = full(problem(1, (2, 2), 8, (20, 30)));
    let mut operands = case.operands();
    let kernels = OnDevice::new();
    let mut state = kernels.start(&case.problem).unwrap();
    change(&mut case, &mut operands);
    let source = KeyValue::Own {
        key: operands.key.tensor(),
        value: operands.value.tensor(),
    };
    let query = operands.query.tensor();
    kernels
        .forward(&case.problem, query, &source, &case.blocks, &mut state)
        .unwrap_err()
}

#[test]
fn bad_arguments_are_typed_errors() {
    let size = |error| matches!(error, KernelError::Size { .. });
    let dtype = |error| matches!(error, KernelError::DType { .. });
    let invalid = |error| matches!(error, KernelError::Invalid(_));
    let zeros = HostBuffer::zeros;
    assert!(size(forward_error(
        |_, with| with.query.buffer = zeros(DType::F32, 319)
    )));
    assert!(size(forward_error(
        |_, with| with.value.buffer = zeros(DType::F32, 479)
    )));
    assert!(size(forward_error(|case, _| case.problem.batch = 2)));
    assert!(dtype(forward_error(
        |_, with| with.key.buffer = zeros(DType::F16, 480)
    )));
    assert!(invalid(forward_error(|case, _| case.problem.kv_heads = 0)));
    assert!(invalid(forward_error(|case, _| case.problem.head_dim = 0)));
    assert!(invalid(forward_error(|case, _| {
        case.blocks[0].blocks[0].keys = rows(0, 1, 31);
    })));
    assert!(invalid(forward_error(|case, _| {
        case.blocks[0].kv_heads.push(2);
    })));
}

/// Each compiles kernels of its own, on the emulator by a C++ compiler.
const RANDOM_CASES: u32 = if cfg!(feature = "emulated-cuda") {
    12
} else {
    36
};

proptest! {
    #![proptest_config(ProptestConfig { cases: RANDOM_CASES, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_blocks_match_the_oracle(case in any_case(DTYPES)) {
        check(&case);
    }
}
