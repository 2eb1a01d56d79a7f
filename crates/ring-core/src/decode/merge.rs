//! Two parts of one softmax put together: [`merge`].

/// Adds part `theirs` to part `ours` of the attention of the same queries to other keys. A part is the normalised output of every row,
/// `head_dim` numbers each, followed by the log-sum-exp of every row:
/// `L = log(e^(L_a) + e^(L_b))`, `O = e^(L_a - L) O_a + e^(L_b - L) O_b`. A part that saw nothing has `L = -inf`.
pub(super) fn merge(head_dim: usize, ours: &mut [f32], theirs: &[f32]) {
    let rows = ours.len() / (head_dim + 1);
    let (output, log_sum_exp) = ours.split_at_mut(rows * head_dim);
    let (their_output, their_log_sum_exp) = theirs.split_at(rows * head_dim);
    let outputs = output
        .chunks_exact_mut(head_dim)
        .zip(their_output.chunks_exact(head_dim));
    let sums = log_sum_exp.iter_mut().zip(their_log_sum_exp);
    for ((output, their_output), (ours, &theirs)) in outputs.zip(sums) {
        merge_row(output, their_output, ours, theirs);
    }
}

fn merge_row(output: &mut [f32], their_output: &[f32], ours: &mut f32, theirs: f32) {
    if theirs == f32::NEG_INFINITY {
        return;
    }
    if *ours == f32::NEG_INFINITY {
        output.copy_from_slice(their_output);
        *ours = theirs;
        return;
    }
    let (a, b) = (f64::from(*ours), f64::from(theirs));
    let max = a.max(b);
    let (a, b) = ((a - max).exp(), (b - max).exp());
    let sum = a + b;
    for (x, y) in output.iter_mut().zip(their_output) {
        *x = ((a * f64::from(*x) + b * f64::from(*y)) / sum) as f32;
    }
    *ours = (max + sum.ln()) as f32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_saw_nothing_change_nothing() {
        let nothing = [0.0, 0.0, f32::NEG_INFINITY];
        let something = [3.0, -4.0, 1.5];
        for (mut ours, theirs, expected) in [
            (something, nothing, something),
            (nothing, something, something),
            (nothing, nothing, nothing),
        ] {
            merge(2, &mut ours, &theirs);
            assert_eq!(ours, expected);
        }
    }

    #[test]
    fn parts_are_weighed_by_what_they_saw() {
        // Two rows: one with three times as much on their side, one with so much that ours does not count.
        let mut ours = [1.0, 2.0, 1.0_f32.ln(), -1000.0];
        merge(1, &mut ours, &[5.0, 4.0, 3.0_f32.ln(), 1000.0]);
        assert_eq!(ours[0], 4.0);
        assert_eq!(ours[1], 4.0);
        assert!((ours[2] - 4.0_f32.ln()).abs() < 1e-6);
        assert_eq!(ours[3], 1000.0);
    }
}
