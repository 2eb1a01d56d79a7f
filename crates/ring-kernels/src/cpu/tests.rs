//! The CPU kernels against the oracle.

use proptest::prelude::*;
use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use super::{CpuKernels, InstructionSet};
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
            let tolerance = self.tolerance(set).max(rounding(&expected));
            computed.check(&expected, tolerance, TOLERANCE);
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

/// Output, log-sum-exp and the three gradients for contiguous queries, keys, values and output gradients.
pub(super) fn attention_of(
    kernels: &CpuKernels,
    problem: &Problem,
    blocks: &[HeadBlocks],
    [query, key, value, grad_output]: [HostView<'_>; 4],
) -> [HostBuffer; 5] {
    let query_layout =
        RowLayout::contiguous(problem.query_heads, problem.queries, problem.head_dim);
    let key_layout = RowLayout::contiguous(problem.kv_heads, problem.keys, problem.head_dim);
    let of_queries = |data| Tensor {
        data,
        layout: &query_layout,
    };
    let of_keys = |data| Tensor {
        data,
        layout: &key_layout,
    };
    let source = KeyValue::Own {
        key: of_keys(key),
        value: of_keys(value),
    };
    let mut state = kernels.start(problem).unwrap();
    kernels
        .forward(problem, of_queries(query), &source, blocks, &mut state)
        .unwrap();
    let dtype = query.dtype();
    let (output, log_sum_exp) = kernels.finish(problem, state, dtype, 1.0).unwrap();
    let gradient = of_queries(grad_output);
    let delta = kernels
        .delta(problem, output.view(), gradient, log_sum_exp.view(), None)
        .unwrap();
    let inputs = BackwardInputs {
        query: of_queries(query),
        grad_output: gradient,
        log_sum_exp: log_sum_exp.view(),
        delta: &delta,
    };
    let mut grad_query = HostBuffer::zeros(DType::F32, query.len());
    let mut grad_key = HostBuffer::zeros(DType::F32, key.len());
    let mut grad_value = grad_key.clone();
    let own = KeyValueGradient::Own {
        key: &mut grad_key,
        value: &mut grad_value,
    };
    kernels
        .backward(problem, &inputs, &source, blocks, 1.0, &mut grad_query, own)
        .unwrap();
    [output, log_sum_exp, grad_query, grad_key, grad_value]
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
    let more = block(rows(2, 4, 37), rows(1, 5, 28));
    let more = on_every_entry(&case.problem, vec![0, 1], vec![more]);
    case.blocks.push(more);
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

/// A window, softcap, slopes that differ from head to head, and dropout.
fn everything(problem: Problem) -> Case {
    let slopes = (0..problem.query_heads).map(|head| 0.05 * head as f32);
    let scores = Scores {
        softcap: Some(1.5),
        alibi_slopes: Some(slopes.collect()),
        dropout: Some(Dropout::new(0.3, 11, 1)),
    };
    let mask = Mask {
        left: Some(70),
        right: Some(20),
    };
    let mut case = tangled(Problem {
        mask,
        scores,
        ..problem
    });
    case.output_scale = 1.0 / 0.7;
    for (branch, block) in case.blocks[0].blocks.iter_mut().enumerate() {
        block.branch = branch as u32;
    }
    case
}

#[test]
fn windows_of_any_width_match_the_oracle() {
    let bounds = [None, Some(0), Some(7), Some(64), Some(200)];
    for (left, right) in bounds
        .iter()
        .flat_map(|&left| bounds.map(|right| (left, right)))
    {
        for dtype in [DType::F32, DType::BF16] {
            let mut case = tangled(problem(1, (2, 1), 12, (150, 140)));
            case.problem.mask = Mask { left, right };
            case.dtype = dtype;
            case.check();
        }
    }
}

#[test]
fn windows_over_many_tiles_match_the_oracle() {
    let far = 1_i64 << 40;
    for (first_position, left, right) in [(0, 100, 0), (-far, 3, 130), (far - 5000, 0, 0)] {
        for dtype in [DType::F32, DType::BF16] {
            let problem = Problem {
                mask: Mask {
                    left: Some(left),
                    right: Some(right),
                },
                ..problem(1, (1, 1), 4, (700, 900))
            };
            // Windows in the middle of the keys, none before them, and none behind them.
            for shift in [90, -500, 600] {
                let queries = at(rows(0, 1, 700), first_position + shift, 1);
                let keys = at(rows(0, 1, 900), first_position, 1);
                let mut case =
                    Case::new(problem.clone(), on_all_heads(&problem, &[(queries, keys)]));
                case.dtype = dtype;
                case.check();
            }
        }
    }
}

#[test]
fn keys_that_no_query_of_a_band_sees_are_not_computed_with() {
    let mut problem = problem(1, (1, 1), 8, (100, 1000));
    problem.mask = Mask {
        left: Some(30),
        right: Some(10),
    };
    // The queries see keys 470 to 609: tiles 3 and 4 of 128 keys.
    let block = (at(rows(0, 1, 100), 500, 1), rows(0, 1, 1000));
    let blocks = on_all_heads(&problem, &[block]);
    let mut operands = Case::new(problem.clone(), blocks.clone()).operands();
    let run = |threads, operands: &Operands| {
        let inputs = [
            operands.query.buffer.view(),
            operands.key.buffer.view(),
            operands.value.buffer.view(),
            operands.grad_output.buffer.view(),
        ];
        let kernels = CpuKernels::new(threads).unwrap();
        attention_of(&kernels, &problem, &blocks, inputs)
    };
    let expected = run(1, &operands);
    for operand in [&mut operands.key, &mut operands.value] {
        let numbers = operand.buffer.as_f32_mut().unwrap();
        numbers[..3 * 128 * 8].fill(f32::NAN);
        numbers[5 * 128 * 8..].fill(f32::NAN);
    }
    for threads in [1, 2] {
        assert_eq!(run(threads, &operands), expected, "{threads} threads");
    }
}

#[test]
fn softcap_slopes_and_dropout_match_the_oracle_alone_and_together() {
    let all = everything(problem(2, (4, 2), 20, (150, 140)));
    let Scores {
        softcap,
        alibi_slopes,
        dropout,
    } = all.problem.scores.clone();
    for options in 1..8 {
        for (dtype, order) in [
            (DType::F32, Order::RowsFirst),
            (DType::BF16, Order::HeadsFirst),
            (DType::F16, Order::Bordered(3)),
        ] {
            let mut case = everything(problem(2, (4, 2), 20, (150, 140)));
            (case.dtype, case.order) = (dtype, order);
            case.problem.scores = Scores {
                softcap: softcap.filter(|_| options & 1 > 0),
                alibi_slopes: alibi_slopes.clone().filter(|_| options & 2 > 0),
                dropout: dropout.filter(|_| options & 4 > 0),
            };
            case.check();
        }
    }
}

#[test]
fn every_sign_of_the_scale_matches_the_oracle_with_everything_on() {
    for scale in [-0.3, 0.0, 2.0] {
        for dtype in [DType::F32, DType::BF16] {
            let mut case = everything(problem(1, (2, 2), 20, (150, 140)));
            case.problem.scale = scale;
            case.dtype = dtype;
            case.check();
        }
    }
}

#[test]
fn extreme_softcaps_bound_scores_and_make_no_nan() {
    for softcap in [f32::MIN_POSITIVE, 1e-3, 1e3, f32::MAX] {
        let mut case = full(problem(1, (1, 1), 8, (70, 130)));
        case.problem.scores.softcap = Some(softcap);
        case.check();
    }
}

#[test]
fn slopes_count_far_from_0_and_over_far_distances() {
    let far = 1_i64 << 40;
    // Neighbours, and rows that stand further apart than f32 can tell neighbours apart.
    for (first_position, step, slope) in [
        (far - 200, 1, 0.25),
        (-far, 1, 0.25),
        (-far, (1 << 27) + 1, 1e-8),
    ] {
        let mut problem = problem(1, (1, 1), 8, (140, 130));
        problem.scores.alibi_slopes = Some([slope].into());
        let queries = at(rows(0, 1, 140), first_position + 3, step);
        let keys = at(rows(0, 1, 130), first_position, step);
        Case::new(problem.clone(), on_all_heads(&problem, &[(queries, keys)])).check();
    }
}

/// `rows` rows for each of `heads`: row `i` is unit vector `i`.
fn unit_vectors(heads: usize, rows: usize, head_dim: usize) -> Vec<f32> {
    (0..heads * rows * head_dim)
        .map(|i| f32::from(u8::from(i % head_dim == i / head_dim % rows)))
        .collect()
}

#[test]
fn weights_are_dropped_exactly_where_dropout_says() {
    let far = 1_i64 << 40;
    for (first_position, query_step, key_step) in
        [(0, 1, 1), (-far, 3, 2), (far - 1500, 1, 5), (-77, 2, 1)]
    {
        let (queries, keys) = (70, 150);
        let queries = at(rows(0, 1, queries), first_position, query_step);
        let keys = at(rows(0, 1, keys), first_position + 5, key_step);
        let mut problem = problem(2, (2, 2), keys.count, (queries.count, keys.count));
        problem.scores.dropout = Some(Dropout::new(0.4, 0xfeed_5eed_1234, 3));
        for set in InstructionSet::available() {
            check_dropped(&on(set, 1), &problem, &queries, &keys);
        }
    }
}

/// Scores are 0, values and output gradients unit vectors, so that outputs and value gradients are weights.
#[track_caller]
fn check_dropped(kernels: &CpuKernels, problem: &Problem, queries: &Rows, keys: &Rows) {
    let mut blocks = on_all_heads(problem, &[(*queries, *keys)]);
    blocks[0].blocks[0].branch = 9;
    let zeros = |rows| vec![0.0; 4 * rows * problem.head_dim];
    let (query, key) = (zeros(queries.count), zeros(keys.count));
    let value = unit_vectors(4, keys.count, problem.head_dim);
    let grad_output = unit_vectors(4, queries.count, problem.head_dim);
    let inputs = [&query, &key, &value, &grad_output].map(|numbers| HostView::F32(numbers));
    let [output, _, _, _, grad_value] = attention_of(kernels, problem, &blocks, inputs);
    let (output, grad_value) = (output.as_f32().unwrap(), grad_value.as_f32().unwrap());
    let dropout = problem.scores.dropout.unwrap();
    for head in 0..4 {
        let stream = dropout.stream(head / 2, 2, head % 2);
        for query in 0..queries.count {
            for key in 0..keys.count {
                let (n, m) = (queries.position(query), keys.position(key));
                let kept = dropout.keeps(stream, 9, n, m);
                let weight = output[(head * queries.count + query) * problem.head_dim + key];
                let gradient = grad_value[(head * keys.count + key) * problem.head_dim + query];
                for got in [weight, gradient] {
                    assert_eq!(got != 0.0, kept, "{kernels:?}, {n} {m}");
                }
            }
        }
    }
}

#[test]
fn batch_entries_without_blocks_get_nothing() {
    let mut case = everything(problem(3, (2, 1), 8, (150, 140)));
    case.blocks[0].entries = vec![0, 2];
    let computed = case.check();
    let rows = 2 * 150 * 8;
    let output = computed.output.as_f32().unwrap();
    assert!(output[rows..2 * rows].iter().all(|&x| x == 0.0));
    assert!(output[2 * rows..].iter().any(|&x| x != 0.0));
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
    let single = |block: &Block| on_every_entry(&case.problem, vec![0, 1], vec![*block]);
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
    let blocks = on_all_heads(&problem, &[block]);
    let computed = Case::new(problem, blocks).check();
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
    let case = full(problem.clone());
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
        bits_do_not_depend_on_the_number_of_threads(tangled(problem));
    }
    bits_do_not_depend_on_the_number_of_threads(everything(problem(1, (4, 2), 24, (150, 140))));
    // Several bands and many tiles, which windows cut anywhere.
    let mut windows = everything(problem(1, (2, 1), 8, (1100, 1200)));
    let block = (at(rows(0, 1, 1100), 39, 1), rows(0, 1, 1200));
    windows.blocks = on_all_heads(&windows.problem, &[block]);
    bits_do_not_depend_on_the_number_of_threads(windows);
}

#[track_caller]
fn bits_do_not_depend_on_the_number_of_threads(mut case: Case) {
    let bits = |computed: &Computed| {
        let bits = |buffer: &HostBuffer| -> Vec<u32> {
            buffer
                .as_f32()
                .unwrap()
                .iter()
                .map(|x| x.to_bits())
                .collect()
        };
        computed.buffers().map(bits)
    };
    for set in InstructionSet::available() {
        for dtype in [DType::F32, DType::BF16] {
            case.dtype = dtype;
            let one = bits(&case.run(&on(set, 1)).unwrap());
            for threads in [2, 3, 4] {
                let computed = case.run(&on(set, threads)).unwrap();
                assert_eq!(one, bits(&computed), "{set}, {dtype}, {threads} threads");
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
        heads: vec![head],
        runs: runs.clone(),
    });
    let packed = PackedRows::new(problem.key_shape(), packed.collect(), 2);
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
            let entry = |keys| on_every_entry(problem, vec![head], vec![block(queries, keys)]);
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
        let mut case = Case::new(problem.clone(), own);
        (case.dtype, case.order) = (dtype, Order::RowsFirst);
        let operands = case.operands();
        let kernels = CpuKernels::new(threads).unwrap();
        let expected = case.run(&kernels).unwrap();

        let (key, value) = (operands.key.tensor(), operands.value.tensor());
        let slot = kernels
            .pack(problem.key_shape(), &[key, value], &packed, None)
            .unwrap();
        assert_eq!((slot.dtype(), slot.len()), (dtype, packed.len()));
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
        let mut grad_slot = HostBuffer::zeros(DType::F32, packed.len());
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
                problem.key_shape(),
                &grad_slot,
                &packed,
                &mut [&mut grad_key, &mut grad_value],
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
    let shape = problem.key_shape();
    let packed = PackedRows::new(
        shape,
        vec![HeadRows {
            heads: vec![1],
            runs,
        }],
        2,
    );
    let kernels = CpuKernels::new(1).unwrap();
    let reuse = Vec::with_capacity(packed.len());
    let memory = reuse.as_ptr();
    let reuse = Some(HostBuffer::F32(reuse));
    let message = kernels
        .pack(shape, &[tensor("key"), tensor("value")], &packed, reuse)
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

    let (mut placed_key, mut placed_value) = (
        HostBuffer::zeros(DType::F32, 16),
        HostBuffer::zeros(DType::F32, 16),
    );
    kernels
        .place_rows(
            shape,
            &message,
            &packed,
            &mut [&mut placed_key, &mut placed_value],
        )
        .unwrap();
    for (placed, whole) in [(&placed_key, &key), (&placed_value, &value)] {
        let pairs = placed.as_f32().unwrap().iter().zip(whole.as_f32().unwrap());
        for (i, (placed, whole)) in pairs.enumerate() {
            let travelled = [4, 6, 7, 12, 14, 15].contains(&i);
            assert_eq!(*placed, if travelled { *whole } else { 0.0 }, "row {i}");
        }
    }

    let (mut grad_key, mut grad_value) = (key.clone(), value.clone());
    kernels
        .add_rows(
            shape,
            &message,
            &packed,
            &mut [&mut grad_key, &mut grad_value],
        )
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
    let case = full(problem.clone());
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
fn queries_that_see_nothing_contribute_nothing_whatever_they_hold() {
    let everything = everything(problem(1, (1, 1), 8, (80, 40))).problem;
    for (problem, before) in [
        (causal(problem(1, (1, 1), 8, (80, 40))), 30),
        (everything, 50),
    ] {
        let block = (at(rows(0, 1, 80), -before, 1), rows(0, 1, 40));
        for dtype in [DType::F32, DType::BF16] {
            let mut case = Case::new(problem.clone(), on_all_heads(&problem, &[block]));
            case.dtype = dtype;
            let clean = case.run(&CpuKernels::new(1).unwrap()).unwrap();
            case.poisoned = 0..30;
            let poisoned = case.run(&CpuKernels::new(1).unwrap()).unwrap();
            assert_eq!(poisoned, clean, "{dtype}");
        }
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
    let case = full(problem.clone());
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
    let operands = full(problem.clone()).operands();
    let kernels = CpuKernels::new(1).unwrap();
    let shape = problem.key_shape();
    let pack = |packed: &PackedRows| {
        let tensors = [operands.key.tensor(), operands.value.tensor()];
        kernels.pack(shape, &tensors, packed, None)
    };
    let entry = |heads: &[usize], run| HeadRows {
        heads: heads.to_vec(),
        runs: vec![run],
    };
    let beyond = PackedRows::new(shape, vec![entry(&[0], rows(0, 1, 31))], 2);
    assert!(matches!(pack(&beyond), Err(KernelError::Invalid(_))));
    let twice = PackedRows::new(
        shape,
        vec![entry(&[0], rows(0, 1, 3)), entry(&[0], rows(5, 1, 3))],
        2,
    );
    assert!(matches!(pack(&twice), Err(KernelError::Invalid(_))));
    let mut short = PackedRows::new(shape, vec![entry(&[0, 1], rows(0, 1, 3))], 2);
    short.part_len -= 1;
    assert!(matches!(pack(&short), Err(KernelError::Size { .. })));
    let three_parts = PackedRows::new(shape, vec![entry(&[0], rows(0, 1, 3))], 3);
    assert!(matches!(pack(&three_parts), Err(KernelError::Invalid(_))));
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
        let expected = case.oracle();
        let tolerance = case.tolerance(set).max(rounding(&expected));
        computed.check(&expected, tolerance, TOLERANCE);
    }
}
