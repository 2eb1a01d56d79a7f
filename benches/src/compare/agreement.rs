//! Whether both sides compute the same: results of one input, before anything is timed.
//!
//! torchscale passes no gradient through the weights of its branches, so only the output and the gradient of the values, which
//! are the same with and without it, are compared.

use ring_comm::buffer::HostBuffer;

use crate::{
    compare::{
        CompareError,
        protocol::{Numbers, Request},
        stage::Stage,
    },
    work::Work,
    workload::{Rank, on_all_ranks},
};

/// What the rounding of f32 explains, of results that are sums of some hundred numbers below one.
const ALLOWED: f32 = 2e-5;

/// A work that was computed on both sides.
#[derive(Clone, Debug)]
pub struct Agreement {
    /// What.
    pub work: Work,
    /// On how many ranks.
    pub ranks: usize,
    /// Largest difference.
    pub difference: f32,
}

/// Full and dilated attention, and rings of two.
///
/// # Errors
/// [`CompareError::Disagreement`], or whatever keeps either side from its results.
pub fn check(stage: &mut Stage) -> Result<Vec<Agreement>, CompareError> {
    let full = Work::full(4, 256, 16).with_backward(true);
    let causal = full.clone().with_causal(true);
    let dilated = full.clone().dilated(&[64, 128, 256], &[1, 2, 4]);
    let cases = [
        (full.clone(), 1),
        (causal.clone(), 1),
        (dilated, 1),
        (full, 2),
        (causal, 2),
    ];
    cases
        .into_iter()
        .map(|(work, ranks)| {
            let difference = difference(stage, &work, ranks)?;
            Ok(Agreement {
                work,
                ranks,
                difference,
            })
        })
        .collect()
}

fn difference(stage: &mut Stage, work: &Work, ranks: usize) -> Result<f32, CompareError> {
    let (requests, ours): (Vec<Request>, Vec<Numbers>) = compute(work, ranks)?.into_iter().unzip();
    let theirs = stage.workers(ranks, 1)?.borrow_mut().compute(&requests)?;
    let mut largest: f32 = 0.0;
    for (ours, theirs) in ours.iter().zip(&theirs) {
        for (what, ours, theirs) in [
            ("outputs", &ours.output, &theirs.output),
            ("value gradients", &ours.grad_value, &theirs.grad_value),
        ] {
            let difference = largest_difference(ours, theirs);
            // Not a number is a disagreement too.
            if difference.is_nan() || difference > ALLOWED {
                return Err(CompareError::Disagreement {
                    work: work.to_string(),
                    what,
                    difference,
                    allowed: ALLOWED,
                });
            }
            largest = largest.max(difference);
        }
    }
    Ok(largest)
}

/// Every rank's input, as a request to the other side, and its results.
fn compute(work: &Work, ranks: usize) -> Result<Vec<(Request, Numbers)>, CompareError> {
    let spec = work.spec(ranks)?;
    let results = on_all_ranks(ranks, |endpoint| {
        let rank = Rank::new(&spec, endpoint, 1);
        let result = rank.forward()?;
        let gradients = rank.backward(&result)?;
        let [query, key, value, grad_output] = rank.tensors().map(numbers);
        let request = Request::Compute {
            work: work.clone(),
            query,
            key,
            value,
            grad_output,
        };
        let numbers = Numbers {
            output: numbers(&result.output),
            grad_value: numbers(&gradients.value),
        };
        Ok((request, numbers))
    });
    results.into_iter().collect()
}

fn numbers(buffer: &HostBuffer) -> Vec<f32> {
    let numbers = buffer.as_f32().expect("f32 goes in, so f32 comes out");
    numbers.to_vec()
}

fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    if ours.len() != theirs.len() {
        return f32::INFINITY;
    }
    let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |largest, difference| {
        // `max` would drop what is not a number.
        if difference.is_nan() || difference > largest {
            difference
        } else {
            largest
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_wherever_they_are() {
        assert_eq!(largest_difference(&[1.0, 2.0], &[1.0, 2.5]), 0.5);
        assert_eq!(largest_difference(&[1.0], &[1.0, 2.0]), f32::INFINITY);
        assert!(largest_difference(&[f32::NAN, 1.0], &[0.0, 0.0]).is_nan());
    }
}
