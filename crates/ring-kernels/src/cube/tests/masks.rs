//! Windows, batch entries that differ, and what scores and weights go through.

use super::on_device::OnDevice;
use super::*;

/// Windows of many kinds.
const WINDOWS: [Mask; 6] = [
    window(Some(0), Some(0)),
    window(Some(7), None),
    window(None, Some(5)),
    window(Some(33), Some(0)),
    window(Some(100), Some(30)),
    window(Some(i64::MAX as u64), Some(i64::MAX as u64)),
];

const fn window(left: Option<u64>, right: Option<u64>) -> Mask {
    Mask { left, right }
}

/// Softcap, slopes and dropout.
pub(super) fn all_scores(query_heads: usize) -> Scores {
    Scores {
        softcap: Some(1.5),
        alibi_slopes: Some((1..=query_heads).map(|head| 0.1 / head as f32).collect()),
        dropout: Some(Dropout::new(0.3, 0x0123_4567_89ab_cdef, 5)),
    }
}

/// The case with blocks for some batch entries each, and branches.
pub(super) fn with_entries(mut case: Case) -> Case {
    let blocks = case.blocks[0].blocks.clone();
    let entries = [vec![0, 2], vec![1], vec![2], vec![0, 1, 2]];
    case.blocks = blocks
        .into_iter()
        .zip(entries)
        .zip(0..)
        .map(|((block, entries), branch)| {
            let branch = branch % 2;
            HeadBlocks {
                entries,
                ..on_every_entry(&case.problem, vec![0, 1], vec![Block { branch, ..block }])
            }
        })
        .collect();
    case
}

/// The case that far along the sequence.
fn moved(mut case: Case, by: i64) -> Case {
    for block in case.blocks.iter_mut().flat_map(|of| &mut of.blocks) {
        block.queries.first_position += by;
        block.keys.first_position += by;
    }
    case
}

#[test]
fn windows_match_the_oracle() {
    for mask in WINDOWS {
        let mut case = tangled(problem(1, (2, 2), 16, (150, 140)));
        case.problem.mask = mask;
        let computed = check(&case);
        for far in [1 << 33, -(1 << 33) - 1] {
            let there = moved(tangled(case.problem.clone()), far);
            assert_eq!(
                there.run(&OnDevice::new()).unwrap(),
                computed,
                "{mask:?} {far}"
            );
        }
    }
}

#[test]
fn entries_with_blocks_of_their_own_match_the_oracle() {
    for mask in [Mask::NONE, Mask::CAUSAL, WINDOWS[3]] {
        let mut case = with_entries(tangled(problem(3, (4, 2), 16, (150, 140))));
        case.problem.mask = mask;
        check(&case);
    }
}

#[test]
fn all_at_once_matches_the_oracle_and_gives_the_same_bits_every_time() {
    let mut case = with_entries(tangled(problem(3, (4, 2), 24, (150, 140))));
    case.problem.mask = WINDOWS[4];
    case.problem.scores = all_scores(4);
    case.output_scale = 1.0 / 0.7;
    let once = check(&case);
    assert_eq!(case.run(&OnDevice::new()).unwrap(), once);
}

/// The score of a query that sees one key is its log-sum-exp.
#[test]
fn softcap_is_exact_for_scores_of_every_size() {
    let sizes: Vec<f32> = (-24..=12)
        .flat_map(|power| [0.7, 1.0, 1.3].map(|x| x * 2f32.powi(power)))
        .collect();
    let queries: Vec<f32> = sizes.iter().flat_map(|&size| [size, -size]).collect();
    let mut problem = problem(1, (1, 1), 1, (queries.len(), 1));
    problem.scores.softcap = Some(3.0);
    let case = full(problem.clone());
    let (own, one) = (HostBuffer::F32(queries.clone()), HostBuffer::F32(vec![1.0]));
    let query_layout = RowLayout::contiguous(1, queries.len(), 1);
    let key_layout = RowLayout::contiguous(1, 1, 1);
    let key = Tensor {
        data: one.view(),
        layout: &key_layout,
    };
    let query = Tensor {
        data: own.view(),
        layout: &query_layout,
    };
    let kernels = OnDevice::new();
    let mut state = kernels.start(&problem).unwrap();
    let source = KeyValue::Own { key, value: key };
    kernels
        .forward(&problem, query, &source, &case.blocks, &mut state)
        .unwrap();
    let (_, log_sum_exp) = kernels.finish(&problem, state, DType::F32, 1.0).unwrap();
    for (got, query) in log_sum_exp.as_f32().unwrap().iter().zip(queries) {
        let expected = 3.0 * (f64::from(query) / 3.0).tanh();
        let error = (f64::from(*got) - expected).abs() / expected.abs();
        assert!(error < 5e-7, "{query}: {got} is off by {error:e}");
    }
}

#[test]
fn tiles_that_no_query_sees_are_not_computed_with() {
    check_unseen_tiles(8, DType::F32);
}

/// NaN in keys and values that are far from what any query sees changes no bit, but the gradients of these keys, which are 0.
#[track_caller]
pub(super) fn check_unseen_tiles(head_dim: usize, dtype: DType) {
    let mut problem = problem(1, (1, 1), head_dim, (100, 1000));
    problem.mask = window(Some(30), Some(10));
    // The queries see keys 470 to 609.
    let block = (at(rows(0, 1, 100), 500, 1), rows(0, 1, 1000));
    let mut case = Case::new(problem.clone(), on_all_heads(&problem, &[block]));
    case.dtype = dtype;
    let clean = case.operands();
    let mut poisoned = case.operands();
    for operand in [&mut poisoned.key, &mut poisoned.value] {
        let mut numbers: Vec<f32> = operand.exact.iter().map(|&x| x as f32).collect();
        numbers[..320 * head_dim].fill(f32::NAN);
        numbers[768 * head_dim..].fill(f32::NAN);
        operand.buffer = rounded(numbers, dtype);
    }
    let run = |operands: &Operands| case.run_with(&OnDevice::new(), operands, &[&case.blocks]);
    assert_eq!(run(&poisoned).unwrap(), run(&clean).unwrap());
}

/// Two keys, of which one has score 0: the gradient of a query is the derivative of the softcap times what the weights give.
#[test]
fn the_gradient_of_softcap_is_exact_where_it_is_almost_0() {
    let queries: Vec<f32> = (-48..=48).map(|i| i as f32 / 4.0).collect();
    let count = queries.len();
    let mut problem = problem(1, (1, 1), 1, (count, 2));
    problem.scores.softcap = Some(1.0);
    let case = full(problem);
    let mut operands = case.operands();
    let of = |numbers: Vec<f32>| HostBuffer::F32(numbers);
    operands.query.buffer = of(queries.clone());
    operands.key.buffer = of(vec![1.0, 0.0]);
    operands.value.buffer = of(vec![1.0, 0.0]);
    operands.grad_output.buffer = of(vec![1.0; count]);
    operands.grad_output.exact = vec![1.0; count];
    operands.grad_log_sum_exp = of(vec![0.0; count]);
    let computed = case
        .run_with(&OnDevice::new(), &operands, &[&case.blocks])
        .unwrap();
    for (got, query) in computed.grad_query.as_f32().unwrap().iter().zip(queries) {
        let query = f64::from(query);
        let weight = 1.0 / (1.0 + (-query.tanh()).exp());
        let expected = weight * (1.0 - weight) / query.cosh().powi(2);
        let error = (f64::from(*got) - expected).abs() / expected;
        assert!(error < 5e-6, "{query}: {got} is off by {error:e}");
    }
}

/// Rows of a unit matrix, or of ones.
fn unit_rows(rows: usize, ones: bool, dtype: DType) -> HostBuffer {
    let element = |at| {
        if ones || at % rows == at / rows % rows {
            1.0
        } else {
            0.0
        }
    };
    rounded((0..4 * rows * rows).map(element).collect(), dtype)
}

/// Reads off which weights were dropped: by the output, where values are unit vectors, and by the gradients, where other rows are.
#[track_caller]
pub(super) fn check_dropped(dtype: DType, queries: Rows, keys: Rows, branch: u32) {
    let size = queries.count;
    let mut problem = problem(2, (2, 2), size, (size, size));
    let dropout = Dropout::new(0.4, 0xfedc_ba98_7654_3210, 0xffff_fffe);
    problem.scores.dropout = Some(dropout);
    let blocks = [on_every_entry(
        &problem,
        vec![0, 1],
        vec![Block {
            queries,
            keys,
            branch,
        }],
    )];
    let layout = RowLayout::contiguous(2, size, size);
    let (units, ones) = (unit_rows(size, false, dtype), unit_rows(size, true, dtype));
    let [units, ones] = [&units, &ones].map(|rows| Tensor {
        data: rows.view(),
        layout: &layout,
    });
    let kernels = OnDevice::new();
    let mut state = kernels.start(&problem).unwrap();
    let source = KeyValue::Own {
        key: ones,
        value: units,
    };
    kernels
        .forward(&problem, units, &source, &blocks, &mut state)
        .unwrap();
    let (output, log_sum_exp) = kernels.finish(&problem, state, DType::F32, 1.0).unwrap();

    let zeros = |len| HostBuffer::zeros(DType::F32, len);
    let delta = zeros(4 * size);
    let inputs = BackwardInputs {
        query: units,
        grad_output: units,
        log_sum_exp: log_sum_exp.view(),
        delta: &delta,
    };
    let mut gradients = [(); 3].map(|()| zeros(4 * size * size));
    let [grad_query, key, value] = &mut gradients;
    let source = KeyValue::Own {
        key: units,
        value: ones,
    };
    let own = KeyValueGradient::Own { key, value };
    kernels
        .backward(&problem, &inputs, &source, &blocks, 1.0, grad_query, own)
        .unwrap();
    let [grad_query, grad_key, grad_value] = &gradients;
    for stream in 0..4 {
        let of_dropout = dropout.stream(stream / 2, 2, stream % 2);
        for i in 0..size {
            for j in 0..size {
                let (n, m) = (queries.position(i), keys.position(j));
                let expected = dropout.keeps(of_dropout, branch, n, m);
                let at = |row, column| (stream * size + row) * size + column;
                for (what, buffer, at) in [
                    ("output", &output, at(i, j)),
                    ("grad_query", grad_query, at(i, j)),
                    ("grad_key", grad_key, at(j, i)),
                    ("grad_value", grad_value, at(j, i)),
                ] {
                    let kept = buffer.as_f32().unwrap()[at] != 0.0;
                    assert_eq!(kept, expected, "{what} {dtype} {stream} {n} {m}");
                }
            }
        }
    }
}

/// Positions of queries and of keys that need all words, and quads that begin anywhere.
pub(super) fn far_rows(size: usize) -> [(Rows, Rows); 5] {
    let all = rows(0, 1, size);
    let (wide, edge) = (1 << 33, 1 << 32);
    [
        (all, all),
        (at(all, wide + 5, 1), at(all, wide - 30, 1)),
        (at(all, edge - 7, 1), at(all, edge - 18, 1)),
        (at(all, -20, 3), at(all, -31, 2)),
        (at(all, -wide, wide - 1), at(all, -edge - 3, (1 << 34) + 7)),
    ]
}

#[test]
fn dropped_are_the_weights_that_the_definition_drops() {
    for (branch, (queries, keys)) in (0..).zip(far_rows(32)) {
        check_dropped(DType::F32, queries, keys, 16_000 * branch);
    }
}
