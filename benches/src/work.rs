//! What is to be computed: [`Work`], which this workspace and PyTorch understand alike.

use std::fmt;

use ring_comm::buffer::DType;
use ring_core::{AttentionSpec, HeadOffsets, Pattern, Shape, Sharding, SpecError};
use serde::{Deserialize, Serialize};

/// Self-attention of batch 1 with as many key/value heads as query heads; without segment lengths, full attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Heads.
    pub heads: usize,
    /// Positions.
    pub length: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Type of the inputs.
    pub dtype: DType,
    /// Whether keys after the query are hidden.
    pub causal: bool,
    /// Whether the backward pass follows the forward pass.
    pub backward: bool,
    /// LongNet's segment lengths.
    pub segment_lengths: Vec<usize>,
    /// LongNet's dilation rates.
    pub dilation_rates: Vec<usize>,
}

impl Work {
    /// The forward pass of full attention in f32.
    pub fn full(heads: usize, length: usize, head_dim: usize) -> Self {
        Self {
            heads,
            length,
            head_dim,
            dtype: DType::F32,
            causal: false,
            backward: false,
            segment_lengths: Vec::new(),
            dilation_rates: Vec::new(),
        }
    }

    /// The same, of LongNet's dilated attention.
    #[must_use]
    pub fn dilated(self, segment_lengths: &[usize], dilation_rates: &[usize]) -> Self {
        Self {
            segment_lengths: segment_lengths.to_vec(),
            dilation_rates: dilation_rates.to_vec(),
            ..self
        }
    }

    /// The same, with or without a causal mask.
    #[must_use]
    pub fn with_causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// The same, with or without the backward pass.
    #[must_use]
    pub fn with_backward(self, backward: bool) -> Self {
        Self { backward, ..self }
    }

    /// The same, of inputs of another type.
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The computation over `ranks`, sharded so that all have equal work.
    ///
    /// # Errors
    /// [`SpecError`] if it is not possible.
    pub fn spec(&self, ranks: usize) -> Result<AttentionSpec, SpecError> {
        let shape = Shape {
            batch: 1,
            query_heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_dim,
        };
        let sharding = if self.causal {
            Sharding::Zigzag
        } else {
            Sharding::Contiguous
        };
        AttentionSpec::new(self.pattern()?, shape, self.length)?
            .with_dtype(self.dtype)
            .sharded(sharding, ranks)
    }

    /// Offsets are torchscale's, so that outputs can be compared; the amount of work is the same with LongNet's.
    fn pattern(&self) -> Result<Pattern, SpecError> {
        let pattern = if self.segment_lengths.is_empty() {
            Pattern::full()
        } else {
            Pattern::dilated(&self.segment_lengths, &self.dilation_rates)?
                .with_offsets(HeadOffsets::Blocked)
        };
        Ok(if self.causal {
            pattern.causal()
        } else {
            pattern
        })
    }

    /// Floating-point operations by the usual count: four a pair, head and element forward, 2.5 times that backward; half of it
    /// if causal. Of dilated attention, the pairs of its branches.
    pub fn flops(&self) -> f64 {
        let pairs = self.length as f64 * self.keys_per_query();
        let mask = if self.causal { 0.5 } else { 1.0 };
        let passes = if self.backward { 3.5 } else { 1.0 };
        4.0 * self.heads as f64 * self.head_dim as f64 * pairs * mask * passes
    }

    /// Mean over queries, without a mask: in a branch, one query in r has the keys of w / r positions.
    fn keys_per_query(&self) -> f64 {
        if self.segment_lengths.is_empty() {
            return self.length as f64;
        }
        let branches = self.segment_lengths.iter().zip(&self.dilation_rates);
        branches
            .map(|(&length, &rate)| length.min(self.length) as f64 / (rate * rate) as f64)
            .sum()
    }

    /// `full` or `causal`.
    pub fn mask_name(&self) -> &'static str {
        if self.causal { "causal" } else { "full" }
    }

    /// The passes, in words.
    pub fn pass_name(&self) -> &'static str {
        if self.backward {
            "forward + backward"
        } else {
            "forward"
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            heads,
            length,
            head_dim,
            dtype,
            ..
        } = self;
        write!(f, "N={length} H={heads} D={head_dim} {dtype}, ")?;
        if self.segment_lengths.is_empty() {
            write!(f, "{}", self.mask_name())?;
        } else {
            let causal = if self.causal { ", causal" } else { "" };
            let (lengths, rates) = (list(&self.segment_lengths), list(&self.dilation_rates));
            write!(f, "{lengths} / {rates}{causal}")?;
        }
        write!(f, ", {}", self.pass_name())
    }
}

fn list(numbers: &[usize]) -> String {
    let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
    format!("[{}]", numbers.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_are_counted_as_is_usual() {
        let full = Work::full(8, 4096, 64);
        assert_eq!(full.flops(), 4.0 * 8.0 * 4096.0 * 4096.0 * 64.0);
        assert_eq!(
            full.clone().with_causal(true).flops(),
            0.5 * full.flops(),
            "half of the pairs"
        );
        assert_eq!(full.clone().with_backward(true).flops(), 3.5 * full.flops());
    }

    #[test]
    fn the_count_of_dilated_attention_is_that_of_its_pairs() {
        let work = Work::full(4, 512, 8).dilated(&[64, 128, 256], &[1, 2, 4]);
        let plan = ring_core::Plan::new(&work.spec(1).unwrap(), 0).unwrap();
        assert_eq!(work.flops(), 4.0 * 8.0 * plan.pairs() as f64);
    }

    #[test]
    fn a_work_says_what_it_is() {
        let work = Work::full(4, 512, 8)
            .dilated(&[64, 128], &[1, 2])
            .with_causal(true)
            .with_backward(true)
            .with_dtype(DType::BF16);
        assert_eq!(
            work.to_string(),
            "N=512 H=4 D=8 bf16, [64,128] / [1,2], causal, forward + backward"
        );
    }
}
