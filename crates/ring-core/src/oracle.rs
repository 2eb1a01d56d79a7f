//! The judge of everything else: attention as its definition says, O(N^2), float64, on one rank.
//!
//! Written to be obviously correct, not fast. Nothing here is shared with the code it judges, but for the definition of which
//! weights dropout drops.

use ring_kernels::Dropout;

use crate::{
    driver::DropoutSeed,
    pattern::{HeadOffsets, Mixing},
    spec::AttentionSpec,
};

/// Results of [`attention`], contiguous, f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OracleOutput {
    /// `[batch, query_heads, query_length, head_dim]`
    pub output: Vec<f64>,
    /// `[batch, query_heads, query_length]`; `-inf` for rows that see nothing.
    pub log_sum_exp: Vec<f64>,
    /// Gradient of the queries; empty without `grad_output`.
    pub grad_query: Vec<f64>,
    /// Gradient of the keys.
    pub grad_key: Vec<f64>,
    /// Gradient of the values.
    pub grad_value: Vec<f64>,
}

/// Inputs of [`attention`]: whole tensors, contiguous `[batch, heads, length, head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct OracleInput<'a> {
    /// Queries.
    pub query: &'a [f64],
    /// Keys.
    pub key: &'a [f64],
    /// Values.
    pub value: &'a [f64],
    /// Gradient that reaches the output, if gradients are wanted.
    pub grad_output: Option<&'a [f64]>,
    /// Gradient that reaches the log-sum-exp, zero if absent.
    pub grad_log_sum_exp: Option<&'a [f64]>,
    /// What chooses the weights that dropout drops.
    pub dropout: DropoutSeed,
}

/// How many branches hold the pair of query position `n` and key `m` in the heads of `kv_head` of a batch entry: `M[h,n,m]`.
pub fn multiplicity(spec: &AttentionSpec, entry: usize, kv_head: usize, n: i64, m: i64) -> usize {
    branches(spec, entry, kv_head, n, m).count()
}

/// The branches that hold a pair.
fn branches(
    spec: &AttentionSpec,
    entry: usize,
    kv_head: usize,
    n: i64,
    m: i64,
) -> impl Iterator<Item = usize> + '_ {
    let visible = sees(spec, entry, n, m);
    let branches = spec.pattern.branches();
    (0..branches.len()).filter(move |&branch| {
        let Some(offset) = head_offset(spec, branch, kv_head) else {
            return false;
        };
        let rate = branches[branch].dilation_rate as i64;
        // Segment of a position, and the position within it.
        let place = |position: i64| match branches[branch].segment_length {
            None => (0, position),
            Some(length) => (
                position.div_euclid(length as i64),
                position.rem_euclid(length as i64),
            ),
        };
        let selected = |within: i64| {
            let steps = within - offset as i64;
            steps % rate == 0 && (steps >= 0 || branches[branch].segment_length.is_none())
        };
        let ((query_segment, query), (key_segment, key)) = (place(n), place(m));
        visible && query_segment == key_segment && selected(query) && selected(key)
    })
}

/// Whether causality, window, documents and padding let a query see a key, whatever the branches.
fn sees(spec: &AttentionSpec, entry: usize, n: i64, m: i64) -> bool {
    let window = spec.pattern.window();
    let far = |bound: Option<u64>| bound.is_some_and(|bound| n.abs_diff(m) > bound);
    let hidden = (spec.pattern.is_causal() && m > n)
        || (m < n && far(window.left))
        || (m > n && far(window.right));
    let padding = spec
        .key_lengths
        .as_ref()
        .is_some_and(|lengths| m >= lengths[entry] as i64);
    let one_document = spec.documents.as_ref().is_none_or(|documents| {
        let mut start = 0;
        documents.lengths(entry).iter().any(|&length| {
            let end = start + length as i64;
            let both = (start..end).contains(&n) && (start..end).contains(&m);
            start = end;
            both
        })
    });
    !hidden && !padding && one_document
}

/// Offset of a key/value head in a branch; `None` if it does not have the branch.
fn head_offset(spec: &AttentionSpec, branch: usize, kv_head: usize) -> Option<usize> {
    let (heads, branches) = (spec.shape.kv_heads, spec.pattern.branches());
    let rate = branches[branch].dilation_rate;
    match (spec.pattern.mixing(), spec.pattern.offsets()) {
        (Mixing::LongNet, HeadOffsets::Cyclic) => Some(kv_head % rate),
        // Blocks of ceil(heads / rate) neighbouring heads.
        (Mixing::LongNet, HeadOffsets::Blocked) => {
            let block = (heads as f64 / rate as f64).ceil() as usize;
            Some(kv_head / block)
        }
        // Deal the heads out, one group after the other, the first groups one more.
        (Mixing::HeadGroups, _) => {
            let groups = branches.len();
            let mut first = 0;
            for group in 0..groups {
                let size = heads / groups + usize::from(group < heads % groups);
                if (first..first + size).contains(&kv_head) {
                    return (group == branch).then_some(branch % rate);
                }
                first += size;
            }
            None
        }
    }
}

/// Attention and, if `grad_output` is given, its gradients.
pub fn attention(spec: &AttentionSpec, input: OracleInput<'_>) -> OracleOutput {
    let shape = spec.shape;
    let (nq, nk, dim) = (spec.query_length, spec.key_length, shape.head_dim);
    let group = shape.query_heads / shape.kv_heads;
    let scale = f64::from(spec.scale);
    let kept = 1.0 / (1.0 - f64::from(spec.dropout));
    let output_scale = match spec.pattern.mixing() {
        Mixing::LongNet => kept,
        Mixing::HeadGroups => kept / spec.pattern.branches().len() as f64,
    };
    let DropoutSeed { seed, first_entry } = input.dropout;
    let dropout = Dropout::new(spec.dropout, seed, first_entry);
    // What a product of query and key becomes, and its derivative.
    let score_of = |product: f64, head: usize, distance: u64| {
        let (score, derivative) = match spec.softcap.map(f64::from) {
            None => (scale * product, 1.0),
            Some(cap) => {
                let tanh = (scale * product / cap).tanh();
                (cap * tanh, 1.0 - tanh * tanh)
            }
        };
        let slope = spec
            .alibi_slopes
            .as_ref()
            .map_or(0.0, |slopes| f64::from(slopes[head]));
        (score - slope * distance as f64, derivative)
    };
    let rows = shape.batch * shape.query_heads * nq;
    let mut result = OracleOutput {
        output: vec![0.0; rows * dim],
        log_sum_exp: vec![f64::NEG_INFINITY; rows],
        ..Default::default()
    };
    if input.grad_output.is_some() {
        result.grad_query = vec![0.0; input.query.len()];
        result.grad_key = vec![0.0; input.key.len()];
        result.grad_value = vec![0.0; input.value.len()];
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    for row in 0..rows {
        let (batch_head, n) = (row / nq, row % nq);
        let (batch, head) = (
            batch_head / shape.query_heads,
            batch_head % shape.query_heads,
        );
        let kv_head = head / group;
        let query = &input.query[row * dim..][..dim];
        let key_at = |m: usize| ((batch * shape.kv_heads + kv_head) * nk + m) * dim;
        let position = n as i64 + spec.query_offset;
        let stream = dropout.stream(batch, shape.query_heads, head);
        let counted: Vec<Counted> = (0..nk)
            .filter_map(|m| {
                let of_pair = || branches(spec, batch, kv_head, position, m as i64);
                let is_kept = |&branch: &usize| {
                    spec.dropout == 0.0 || dropout.keeps(stream, branch as u32, position, m as i64)
                };
                let count = of_pair().count() as f64;
                let product = dot(query, &input.key[key_at(m)..][..dim]);
                let (score, derivative) = score_of(product, head, position.abs_diff(m as i64));
                (count > 0.0).then(|| Counted {
                    m,
                    count,
                    kept: of_pair().filter(is_kept).count() as f64,
                    score,
                    derivative,
                })
            })
            .collect();
        if counted.is_empty() {
            continue;
        }
        let max = counted
            .iter()
            .map(|entry| entry.score)
            .fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = counted
            .iter()
            .map(|entry| entry.count * (entry.score - max).exp())
            .sum();
        let lse = max + sum.ln();
        result.log_sum_exp[row] = lse;
        for entry in &counted {
            let weight = entry.kept * (entry.score - lse).exp();
            let value = key_at(entry.m);
            for d in 0..dim {
                result.output[row * dim + d] += output_scale * weight * input.value[value + d];
            }
        }
        let Some(grad_output) = input.grad_output else {
            continue;
        };
        let grad_output = &grad_output[row * dim..][..dim];
        let delta = dot(grad_output, &result.output[row * dim..][..dim])
            - input.grad_log_sum_exp.map_or(0.0, |grad| grad[row]);
        for entry in &counted {
            let weight = (entry.score - lse).exp();
            let at = key_at(entry.m);
            let product = output_scale * dot(grad_output, &input.value[at..][..dim]);
            let grad_score = weight * (entry.kept * product - entry.count * delta);
            let grad_score = scale * entry.derivative * grad_score;
            for d in 0..dim {
                result.grad_value[at + d] += output_scale * entry.kept * weight * grad_output[d];
                result.grad_query[row * dim + d] += grad_score * input.key[at + d];
                result.grad_key[at + d] += grad_score * query[d];
            }
        }
    }
    result
}

/// A key that branches hold with a query.
struct Counted {
    m: usize,
    /// By how many.
    count: f64,
    /// Of these, how many dropout keeps.
    kept: f64,
    score: f64,
    /// Of the score, by the product of query and key times the scale.
    derivative: f64,
}
