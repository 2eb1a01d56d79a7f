//! The judge of the kernels: attention in f64, one pair of rows at a time, exactly as the equations say.

use crate::{HeadBlocks, Problem};

/// Contiguous `[batch, heads, rows, head_dim]` tensors, and `[batch, query_heads, queries]` rows.
pub(crate) struct Inputs {
    pub(crate) query: Vec<f64>,
    pub(crate) key: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) grad_output: Vec<f64>,
    pub(crate) grad_log_sum_exp: Vec<f64>,
}

/// What attention gives back, forward and backward.
pub(crate) struct Answer {
    pub(crate) output: Vec<f64>,
    pub(crate) log_sum_exp: Vec<f64>,
    pub(crate) grad_query: Vec<f64>,
    pub(crate) grad_key: Vec<f64>,
    pub(crate) grad_value: Vec<f64>,
}

/// An admitted pair of rows, counted over all heads and batch entries.
struct Pair {
    query: usize,
    key: usize,
    /// `-slope |n - m|`
    bias: f64,
    /// 0 if dropped, else 1.
    kept: f64,
}

/// Every admitted pair of rows, as often as blocks admit it.
fn pairs(problem: &Problem, blocks: &[HeadBlocks]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for batch in 0..problem.batch {
        for head in 0..problem.query_heads {
            let kv_head = head / (problem.query_heads / problem.kv_heads);
            let of_head = |entry: &&HeadBlocks| {
                entry.kv_heads.contains(&kv_head) && entry.entries.contains(&batch)
            };
            for block in blocks.iter().filter(of_head).flat_map(|of| &of.blocks) {
                for i in 0..block.queries.count {
                    for j in 0..block.keys.count {
                        let (n, m) = (block.queries.position(i), block.keys.position(j));
                        let far = |bound: Option<u64>| bound.is_some_and(|far| n.abs_diff(m) > far);
                        if (m < n && far(problem.mask.left)) || (m > n && far(problem.mask.right)) {
                            continue;
                        }
                        let scores = &problem.scores;
                        let slope = scores.alibi_slopes.as_ref().map_or(0.0, |all| all[head]);
                        let kept = scores.dropout.is_none_or(|dropout| {
                            let stream = dropout.stream(batch, problem.query_heads, head);
                            dropout.keeps(stream, block.branch, n, m)
                        });
                        let queries = (batch * problem.query_heads + head) * problem.queries;
                        let keys = (batch * problem.kv_heads + kv_head) * problem.keys;
                        pairs.push(Pair {
                            query: queries + block.queries.row(i),
                            key: keys + block.keys.row(j),
                            bias: -f64::from(slope) * n.abs_diff(m) as f64,
                            kept: f64::from(u8::from(kept)),
                        });
                    }
                }
            }
        }
    }
    pairs
}

fn row(tensor: &[f64], row: usize, head_dim: usize) -> &[f64] {
    &tensor[row * head_dim..(row + 1) * head_dim]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(target: &mut [f64], row: usize, factor: f64, term: &[f64]) {
    let target = &mut target[row * term.len()..(row + 1) * term.len()];
    target
        .iter_mut()
        .zip(term)
        .for_each(|(x, term)| *x += factor * term);
}

/// Attention and its gradients. `output_scale` multiplies the output.
pub(crate) fn attention(
    problem: &Problem,
    blocks: &[HeadBlocks],
    inputs: &Inputs,
    output_scale: f64,
) -> Answer {
    let d = problem.head_dim;
    let rows = problem.batch * problem.query_heads * problem.queries;
    let pairs = pairs(problem, blocks);
    // What a score becomes, and its derivative.
    let capped = |score: f64| match problem.scores.softcap.map(f64::from) {
        Some(cap) => {
            let tanh = (score / cap).tanh();
            (cap * tanh, 1.0 - tanh * tanh)
        }
        None => (score, 1.0),
    };
    let scores: Vec<(f64, f64)> = pairs
        .iter()
        .map(|pair| {
            let product = dot(
                row(&inputs.query, pair.query, d),
                row(&inputs.key, pair.key, d),
            );
            let (score, derivative) = capped(f64::from(problem.scale) * product);
            (score + pair.bias, derivative)
        })
        .collect();

    let mut max = vec![f64::NEG_INFINITY; rows];
    for (pair, &(score, _)) in pairs.iter().zip(&scores) {
        max[pair.query] = max[pair.query].max(score);
    }
    let mut sum = vec![0.0; rows];
    for (pair, &(score, _)) in pairs.iter().zip(&scores) {
        sum[pair.query] += (score - max[pair.query]).exp();
    }
    let log_sum_exp: Vec<f64> = max
        .iter()
        .zip(&sum)
        .map(|(max, sum)| max + sum.ln())
        .collect();

    let mut output = vec![0.0; rows * d];
    for (pair, &(score, _)) in pairs.iter().zip(&scores) {
        let p = output_scale * pair.kept * (score - log_sum_exp[pair.query]).exp();
        add(&mut output, pair.query, p, row(&inputs.value, pair.key, d));
    }

    let mut grad_query = vec![0.0; inputs.query.len()];
    let mut grad_key = vec![0.0; inputs.key.len()];
    let mut grad_value = vec![0.0; inputs.value.len()];
    for (pair, &(score, derivative)) in pairs.iter().zip(&scores) {
        let &Pair {
            query: n, key: m, ..
        } = pair;
        let p = (score - log_sum_exp[n]).exp();
        let factor = output_scale * pair.kept;
        let grad_output = row(&inputs.grad_output, n, d);
        let delta = dot(grad_output, row(&output, n, d)) - inputs.grad_log_sum_exp[n];
        let ds = p * (factor * dot(grad_output, row(&inputs.value, m, d)) - delta);
        let ds = f64::from(problem.scale) * derivative * ds;
        add(&mut grad_value, m, factor * p, grad_output);
        add(&mut grad_query, n, ds, row(&inputs.key, m, d));
        add(&mut grad_key, m, ds, row(&inputs.query, n, d));
    }
    Answer {
        output,
        log_sum_exp,
        grad_query,
        grad_key,
        grad_value,
    }
}
