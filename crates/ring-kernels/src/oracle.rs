//! The judge of the kernels: attention in f64, one pair of rows at a time, exactly as the equations say.

use crate::{HeadBlocks, Mask, Problem};

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

/// Every admitted pair of rows, as often as blocks admit it: `(query row, key row)` over all heads and batch entries.
fn pairs(problem: &Problem, blocks: &[HeadBlocks]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for batch in 0..problem.batch {
        for head in 0..problem.query_heads {
            let kv_head = head / (problem.query_heads / problem.kv_heads);
            for entry in blocks
                .iter()
                .filter(|entry| entry.kv_heads.contains(&kv_head))
            {
                for block in &entry.blocks {
                    for i in 0..block.queries.count {
                        for j in 0..block.keys.count {
                            let (query, key) = (block.queries.position(i), block.keys.position(j));
                            if problem.mask == Mask::Causal && key > query {
                                continue;
                            }
                            let queries = (batch * problem.query_heads + head) * problem.queries;
                            let keys = (batch * problem.kv_heads + kv_head) * problem.keys;
                            pairs.push((queries + block.queries.row(i), keys + block.keys.row(j)));
                        }
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
    let scores: Vec<f64> = pairs
        .iter()
        .map(|&(n, m)| {
            f64::from(problem.scale) * dot(row(&inputs.query, n, d), row(&inputs.key, m, d))
        })
        .collect();

    let mut max = vec![f64::NEG_INFINITY; rows];
    for (&(n, _), &score) in pairs.iter().zip(&scores) {
        max[n] = max[n].max(score);
    }
    let mut sum = vec![0.0; rows];
    for (&(n, _), &score) in pairs.iter().zip(&scores) {
        sum[n] += (score - max[n]).exp();
    }
    let log_sum_exp: Vec<f64> = max
        .iter()
        .zip(&sum)
        .map(|(max, sum)| max + sum.ln())
        .collect();

    let mut output = vec![0.0; rows * d];
    for (&(n, m), &score) in pairs.iter().zip(&scores) {
        let p = (score - log_sum_exp[n]).exp();
        add(&mut output, n, output_scale * p, row(&inputs.value, m, d));
    }

    let mut grad_query = vec![0.0; inputs.query.len()];
    let mut grad_key = vec![0.0; inputs.key.len()];
    let mut grad_value = vec![0.0; inputs.value.len()];
    for (&(n, m), &score) in pairs.iter().zip(&scores) {
        let p = (score - log_sum_exp[n]).exp();
        let grad_output = row(&inputs.grad_output, n, d);
        let delta = dot(grad_output, row(&output, n, d)) - inputs.grad_log_sum_exp[n];
        let ds = p * (output_scale * dot(grad_output, row(&inputs.value, m, d)) - delta);
        add(&mut grad_value, m, output_scale * p, grad_output);
        add(
            &mut grad_query,
            n,
            f64::from(problem.scale) * ds,
            row(&inputs.key, m, d),
        );
        add(
            &mut grad_key,
            m,
            f64::from(problem.scale) * ds,
            row(&inputs.query, n, d),
        );
    }
    Answer {
        output,
        log_sum_exp,
        grad_query,
        grad_key,
        grad_value,
    }
}
