//! What kernels are judged by: problems with random inputs, run on any kernels that take host memory, held against the oracle.

use std::ops::Range;

use half::{bf16, f16};
use proptest::prelude::*;
use ring_comm::buffer::{Buffer, DType, HostBuffer, HostView};

use crate::oracle::{self, Answer, Inputs};
use crate::*;

/// Relative error of sums in f32.
pub(crate) const TOLERANCE: f64 = 5e-6;

/// Order of a tensor in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Order {
    /// `[batch, heads, rows, head_dim]`
    HeadsFirst,
    /// `[batch, rows, heads, head_dim]`
    RowsFirst,
    /// `[batch, heads, rows, head_dim]`, with this many NaN before and after every row.
    Bordered(usize),
}

impl Order {
    pub(crate) fn layout(self, heads: usize, rows: usize, head_dim: usize) -> RowLayout {
        match self {
            Order::HeadsFirst => RowLayout::contiguous(heads, rows, head_dim),
            Order::RowsFirst => RowLayout {
                batch_stride: heads * rows * head_dim,
                head_base: (0..heads).map(|head| head * head_dim).collect(),
                row_stride: heads * head_dim,
            },
            Order::Bordered(border) => {
                let stride = head_dim + border;
                RowLayout {
                    batch_stride: heads * rows * stride,
                    head_base: (0..heads)
                        .map(|head| border + head * rows * stride)
                        .collect(),
                    row_stride: stride,
                }
            }
        }
    }

    /// Elements of the memory of a tensor of `rows` rows, over all heads and batch entries.
    fn len(self, rows: usize, head_dim: usize) -> usize {
        match self {
            Order::HeadsFirst | Order::RowsFirst => rows * head_dim,
            Order::Bordered(border) => rows * (head_dim + border) + border,
        }
    }
}

/// A problem with random inputs.
pub(crate) struct Case {
    pub(crate) problem: Problem,
    pub(crate) blocks: Vec<HeadBlocks>,
    pub(crate) order: Order,
    pub(crate) dtype: DType,
    /// Multiplies queries: how large scores get.
    pub(crate) temperature: f32,
    pub(crate) output_scale: f32,
    /// The rows of queries and output gradients that are NaN, of the first head.
    pub(crate) poisoned: Range<usize>,
}

/// A tensor as kernels see it, and as the oracle does.
pub(crate) struct Operand {
    pub(crate) buffer: HostBuffer,
    pub(crate) layout: RowLayout,
    pub(crate) exact: Vec<f64>,
}

impl Operand {
    pub(crate) fn tensor(&self) -> Tensor<'_, HostBuffer> {
        Tensor {
            data: self.buffer.view(),
            layout: &self.layout,
        }
    }
}

pub(crate) struct Operands {
    pub(crate) query: Operand,
    pub(crate) key: Operand,
    pub(crate) value: Operand,
    pub(crate) grad_output: Operand,
    pub(crate) grad_log_sum_exp: HostBuffer,
}

/// Uniform in -1..1 (xorshift).
pub(crate) fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub(crate) fn rounded(values: Vec<f32>, dtype: DType) -> HostBuffer {
    match dtype {
        DType::F32 => HostBuffer::F32(values),
        DType::F16 => HostBuffer::F16(values.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => HostBuffer::BF16(values.into_iter().map(bf16::from_f32).collect()),
    }
}

pub(crate) fn widened(buffer: &HostBuffer) -> Vec<f64> {
    match buffer {
        HostBuffer::F32(values) => values.iter().map(|&x| x.into()).collect(),
        HostBuffer::F16(values) => values.iter().map(|&x| x.into()).collect(),
        HostBuffer::BF16(values) => values.iter().map(|&x| x.into()).collect(),
    }
}

impl Case {
    pub(crate) fn new(problem: Problem, blocks: Vec<HeadBlocks>) -> Self {
        Self {
            problem,
            blocks,
            order: Order::HeadsFirst,
            dtype: DType::F32,
            temperature: 2.0,
            output_scale: 1.0,
            poisoned: 0..0,
        }
    }

    pub(crate) fn operand(&self, heads: usize, rows: usize, seed: u64, factor: f32) -> Operand {
        let Problem {
            batch, head_dim, ..
        } = self.problem;
        let mut random = random(seed);
        let len = self.order.len(batch * heads * rows, head_dim);
        let mut values: Vec<f32> = (0..len).map(|_| factor * random()).collect();
        if let Order::Bordered(border) = self.order {
            let in_row = |i: usize| i % (head_dim + border) >= border;
            let border = values.iter_mut().enumerate().filter(|&(i, _)| !in_row(i));
            border.for_each(|(_, x)| *x = f32::NAN);
        }
        if seed == 1 || seed == 4 {
            let Range { start, end } = self.poisoned;
            values[start * head_dim..end * head_dim].fill(f32::NAN);
        }
        let buffer = rounded(values, self.dtype);
        let layout = self.order.layout(heads, rows, head_dim);
        let memory = widened(&buffer);
        let mut exact = Vec::with_capacity(memory.len());
        for batch in 0..batch {
            for head in 0..heads {
                for row in 0..rows {
                    let start = layout.offset(batch, head, row);
                    exact.extend_from_slice(&memory[start..start + head_dim]);
                }
            }
        }
        Operand {
            buffer,
            layout,
            exact,
        }
    }

    pub(crate) fn operands(&self) -> Operands {
        let Problem {
            batch,
            query_heads,
            kv_heads,
            queries,
            keys,
            ..
        } = self.problem;
        let mut random = random(5);
        Operands {
            query: self.operand(query_heads, queries, 1, self.temperature),
            key: self.operand(kv_heads, keys, 2, 1.0),
            value: self.operand(kv_heads, keys, 3, 1.0),
            grad_output: self.operand(query_heads, queries, 4, 1.0),
            grad_log_sum_exp: HostBuffer::F32(
                (0..batch * query_heads * queries)
                    .map(|_| random())
                    .collect(),
            ),
        }
    }

    pub(crate) fn oracle(&self) -> Answer {
        let operands = self.operands();
        let inputs = Inputs {
            query: operands.query.exact,
            key: operands.key.exact,
            value: operands.value.exact,
            grad_output: operands.grad_output.exact,
            grad_log_sum_exp: widened(&operands.grad_log_sum_exp),
        };
        oracle::attention(
            &self.problem,
            &self.blocks,
            &inputs,
            self.output_scale.into(),
        )
    }

    /// All blocks in one call.
    pub(crate) fn run(&self, kernels: &impl Kernels<HostBuffer>) -> Result<Computed, KernelError> {
        self.run_hops(kernels, &[&self.blocks])
    }

    /// One call for each hop.
    pub(crate) fn run_hops(
        &self,
        kernels: &impl Kernels<HostBuffer>,
        hops: &[&[HeadBlocks]],
    ) -> Result<Computed, KernelError> {
        self.run_with(kernels, &self.operands(), hops)
    }

    /// One call for each hop, with other operands than the case's own.
    pub(crate) fn run_with(
        &self,
        kernels: &impl Kernels<HostBuffer>,
        operands: &Operands,
        hops: &[&[HeadBlocks]],
    ) -> Result<Computed, KernelError> {
        let problem = &self.problem;
        let source = KeyValue::Own {
            key: operands.key.tensor(),
            value: operands.value.tensor(),
        };
        let mut state = kernels.start(problem)?;
        for blocks in hops {
            kernels.forward(
                problem,
                operands.query.tensor(),
                &source,
                blocks,
                &mut state,
            )?;
        }
        let (output, log_sum_exp) =
            kernels.finish(problem, state, DType::F32, self.output_scale)?;
        let delta = self.delta(kernels, operands, &output, &log_sum_exp)?;
        let inputs = BackwardInputs {
            query: operands.query.tensor(),
            grad_output: operands.grad_output.tensor(),
            log_sum_exp: log_sum_exp.view(),
            delta: &delta,
        };
        let zeros = |operand: &Operand| HostBuffer::zeros(DType::F32, operand.exact.len());
        let mut grad_query = zeros(&operands.query);
        let (mut key, mut value) = (zeros(&operands.key), zeros(&operands.value));
        for blocks in hops {
            let own = KeyValueGradient::Own {
                key: &mut key,
                value: &mut value,
            };
            let scale = self.output_scale;
            kernels.backward(
                problem,
                &inputs,
                &source,
                blocks,
                scale,
                &mut grad_query,
                own,
            )?;
        }
        Ok(Computed {
            output,
            log_sum_exp,
            grad_query,
            grad_key: key,
            grad_value: value,
        })
    }

    /// `Delta` takes output and output gradient of one type; here the output stays f32, so the gradient is widened.
    pub(crate) fn delta(
        &self,
        kernels: &impl Kernels<HostBuffer>,
        operands: &Operands,
        output: &HostBuffer,
        log_sum_exp: &HostBuffer,
    ) -> Result<HostBuffer, KernelError> {
        let grad: Vec<f32> = operands
            .grad_output
            .exact
            .iter()
            .map(|&x| x as f32)
            .collect();
        let Problem {
            query_heads,
            queries,
            head_dim,
            ..
        } = self.problem;
        let layout = RowLayout::contiguous(query_heads, queries, head_dim);
        let grad_output = Tensor {
            data: HostView::F32(&grad),
            layout: &layout,
        };
        let grad_log_sum_exp = Some(operands.grad_log_sum_exp.view());
        kernels.delta(
            &self.problem,
            output.view(),
            grad_output,
            log_sum_exp.view(),
            grad_log_sum_exp,
        )
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Computed {
    pub(crate) output: HostBuffer,
    pub(crate) log_sum_exp: HostBuffer,
    pub(crate) grad_query: HostBuffer,
    pub(crate) grad_key: HostBuffer,
    pub(crate) grad_value: HostBuffer,
}

impl Computed {
    #[track_caller]
    pub(crate) fn check(&self, expected: &Answer, tolerance: f64, log_sum_exp_tolerance: f64) {
        assert_close("output", &self.output, &expected.output, tolerance);
        // A sum of weights that are not rounded, whatever the products are.
        let log_sum_exp = &expected.log_sum_exp;
        assert_close(
            "log_sum_exp",
            &self.log_sum_exp,
            log_sum_exp,
            log_sum_exp_tolerance,
        );
        assert_close(
            "grad_query",
            &self.grad_query,
            &expected.grad_query,
            tolerance,
        );
        assert_close("grad_key", &self.grad_key, &expected.grad_key, tolerance);
        assert_close(
            "grad_value",
            &self.grad_value,
            &expected.grad_value,
            tolerance,
        );
    }

    pub(crate) fn buffers(&self) -> [&HostBuffer; 5] {
        [
            &self.output,
            &self.log_sum_exp,
            &self.grad_query,
            &self.grad_key,
            &self.grad_value,
        ]
    }
}

/// The relative error of results in f32: that of sums, or where scores are large that of weights, which inherit the rounding of a
/// score and of a log-sum-exp of their size.
pub(crate) fn rounding(expected: &Answer) -> f64 {
    let finite = expected.log_sum_exp.iter().filter(|x| x.is_finite());
    let largest = finite.fold(0.0, |a: f64, b| a.max(b.abs()));
    TOLERANCE.max(f64::from(f32::EPSILON) * largest)
}

/// Relative error in the Euclidean norm. Inputs are of the order of 1, so where a result cancels (a row with one key has no
/// query gradient) its rounding errors are measured against a root mean square of 0.05.
pub(crate) fn relative_error(got: &HostBuffer, expected: &[f64]) -> f64 {
    let got = widened(got);
    assert_eq!(got.len(), expected.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &expected) in got.iter().zip(expected) {
        if expected.is_infinite() {
            assert_eq!(got, expected);
            continue;
        }
        error += (got - expected).powi(2);
        norm += expected.powi(2);
    }
    let floor = 0.05 * (expected.len() as f64).sqrt();
    if error == 0.0 {
        0.0
    } else {
        error.sqrt() / norm.sqrt().max(floor)
    }
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: &HostBuffer, expected: &[f64], tolerance: f64) {
    let error = relative_error(got, expected);
    assert!(error <= tolerance, "{what}: relative error {error:e}");
}

pub(crate) fn problem(
    batch: usize,
    heads: (usize, usize),
    head_dim: usize,
    rows: (usize, usize),
) -> Problem {
    Problem {
        batch,
        query_heads: heads.0,
        kv_heads: heads.1,
        head_dim,
        queries: rows.0,
        keys: rows.1,
        scale: 1.0 / (head_dim as f32).sqrt(),
        mask: Mask::NONE,
        scores: Scores::default(),
    }
}

pub(crate) fn causal(problem: Problem) -> Problem {
    Problem {
        mask: Mask::CAUSAL,
        ..problem
    }
}

/// Rows at positions of the same numbers.
pub(crate) fn rows(first: usize, step: usize, count: usize) -> Rows {
    Rows {
        first_row: first,
        row_step: step,
        count,
        first_position: first as i64,
        position_step: step as i64,
    }
}

pub(crate) fn at(rows: Rows, first_position: i64, position_step: i64) -> Rows {
    Rows {
        first_position,
        position_step,
        ..rows
    }
}

pub(crate) fn on_all_heads(problem: &Problem, blocks: &[(Rows, Rows)]) -> Vec<HeadBlocks> {
    let blocks = blocks
        .iter()
        .map(|&(queries, keys)| block(queries, keys))
        .collect();
    vec![on_every_entry(
        problem,
        (0..problem.kv_heads).collect(),
        blocks,
    )]
}

/// A block of the first branch.
pub(crate) fn block(queries: Rows, keys: Rows) -> Block {
    Block {
        queries,
        keys,
        branch: 0,
    }
}

pub(crate) fn on_every_entry(
    problem: &Problem,
    kv_heads: Vec<usize>,
    blocks: Vec<Block>,
) -> HeadBlocks {
    HeadBlocks {
        entries: (0..problem.batch).collect(),
        kv_heads,
        blocks,
    }
}

pub(crate) fn full(problem: Problem) -> Case {
    let block = (rows(0, 1, problem.queries), rows(0, 1, problem.keys));
    Case::new(problem.clone(), on_all_heads(&problem, &[block]))
}

/// Blocks that share rows and pairs, stride over memory and positions differently, and reach below position 0.
pub(crate) fn tangled(problem: Problem) -> Case {
    let blocks = [
        (rows(0, 1, 150), rows(0, 1, 140)),
        (rows(1, 2, 70), rows(0, 3, 45)),
        (at(rows(3, 1, 100), -20, 2), at(rows(10, 2, 60), -31, 3)),
        (rows(1, 2, 70), rows(0, 3, 45)),
    ];
    Case::new(problem.clone(), on_all_heads(&problem, &blocks))
}

prop_compose! {
    /// Rows among `limit` local rows, at any positions near 0.
    pub(crate) fn any_rows(limit: usize)(
        first_row in 0..limit,
        row_step in 1usize..5,
        first_position in -60i64..60,
        position_step in 1i64..5,
        share in 0.0..=1.0f64,
    ) -> Rows {
        let most = (limit - first_row).div_ceil(row_step);
        let count = (share * most as f64).round() as usize;
        Rows { first_row, row_step, count, first_position, position_step }
    }
}

/// Any window, causal ones and none among them.
pub(crate) fn any_mask() -> impl Strategy<Value = Mask> {
    let bound =
        || prop_oneof![2 => Just(None), 1 => Just(Some(0)), 2 => (1u64..200).prop_map(Some)];
    (bound(), bound()).prop_map(|(left, right)| Mask { left, right })
}

/// Softcap, slopes and dropout, each there or not.
pub(crate) fn any_scores(query_heads: usize) -> impl Strategy<Value = Scores> {
    let slopes = prop::collection::vec(0.0..0.5f32, query_heads);
    (
        prop::option::of(0.5..8.0f32),
        prop::option::of(slopes.prop_map(Into::into)),
        prop::option::of((0.0..0.9f32, any::<u64>(), 0u32..9)),
    )
        .prop_map(|(softcap, alibi_slopes, dropout)| Scores {
            softcap,
            alibi_slopes,
            dropout: dropout
                .map(|(probability, seed, entry)| Dropout::new(probability, seed, entry)),
        })
}

prop_compose! {
    pub(crate) fn any_case(dtypes: &'static [DType])(
        (batch, kv_heads, group) in (1usize..3, 1usize..4, 1usize..3),
        (head_dim, queries, keys) in (1usize..20, 1usize..170, 1usize..170),
        strided in any::<bool>(),
        dtype in prop::sample::select(dtypes),
        plain in any::<bool>(),
    )(
        blocks in prop::collection::vec(
            (any_rows(queries), any_rows(keys), 0..kv_heads, 0..batch, 0u32..3),
            0..5,
        ),
        mask in any_mask(),
        scores in any_scores(group * kv_heads),
        problem in Just(problem(batch, (group * kv_heads, kv_heads), head_dim, (queries, keys))),
        dtype in Just(dtype),
        order in Just(if strided { Order::RowsFirst } else { Order::HeadsFirst }),
        plain in Just(plain),
    ) -> Case {
        let problem = Problem {
            mask,
            scores: if plain { Scores::default() } else { scores },
            ..problem
        };
        let blocks = blocks.into_iter().map(|(queries, keys, first_head, first_entry, branch)| HeadBlocks {
            entries: (first_entry..problem.batch).collect(),
            kv_heads: (first_head..problem.kv_heads).collect(),
            blocks: vec![Block { queries, keys, branch }],
        });
        let blocks = blocks.collect();
        Case { order, dtype, ..Case::new(problem, blocks) }
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} {} {:?} {:?}",
            self.problem, self.dtype, self.order, self.blocks
        )
    }
}
