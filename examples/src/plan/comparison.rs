//! Which sharding spreads the work best: [`Comparison`].

use rayon::prelude::*;
use ring_core::{AttentionSpec, CommunicationEstimate, Plan, Sharding, SpecError};
use serde::{Deserialize, Serialize};

use super::survey::Survey;

/// What a sharding costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardingCost {
    /// The sharding.
    pub sharding: String,
    /// (Query, key) pairs of the rank that computes most, over all query heads and batch entries.
    pub slowest_pairs: u128,
    /// The same over the mean of all ranks.
    pub imbalance: f64,
    /// Bytes that travel in a forward pass, over all ranks.
    pub forward_received: u64,
}

/// The same computation under every sharding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The shardings.
    pub shardings: Vec<ShardingCost>,
    /// The one whose slowest rank has the least work; of several, the one that receives the fewest bytes.
    pub best: String,
}

impl Comparison {
    /// Plans all ranks under every sharding but that of `survey`, which is known.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible.
    pub fn new(spec: &AttentionSpec, survey: &Survey) -> Result<Self, SpecError> {
        let known = spec.query_sharding;
        let mut candidates = vec![
            Sharding::Contiguous,
            Sharding::Zigzag,
            Sharding::Striped { chunk_size: None },
        ];
        if !candidates.contains(&known) {
            candidates.push(known);
        }
        let shardings = candidates
            .into_iter()
            .map(|sharding| match sharding == known {
                true => Ok(ShardingCost::of_survey(survey)),
                false => ShardingCost::new(spec, sharding),
            })
            .collect::<Result<Vec<_>, SpecError>>()?;
        let best = shardings
            .iter()
            .min_by_key(|cost| (cost.slowest_pairs, cost.forward_received));
        Ok(Self {
            best: best.map(|cost| cost.sharding.clone()).unwrap_or_default(),
            shardings,
        })
    }
}

impl ShardingCost {
    fn new(spec: &AttentionSpec, sharding: Sharding) -> Result<Self, SpecError> {
        let spec = spec.clone().sharded(sharding, spec.world_size)?;
        let ranks = (0..spec.world_size)
            .into_par_iter()
            .map(|rank| {
                let plan = Plan::new(&spec, rank)?;
                let bytes = CommunicationEstimate::new(&plan).forward_received;
                Ok((plan.pairs(), bytes))
            })
            .collect::<Result<Vec<_>, SpecError>>()?;
        Ok(Self::of_ranks(sharding.to_string(), &ranks))
    }

    fn of_survey(survey: &Survey) -> Self {
        let numbers = survey.per_rank.iter();
        let ranks: Vec<_> = numbers
            .map(|rank| (rank.pairs, rank.communication.forward_received))
            .collect();
        Self::of_ranks(survey.sharding.clone(), &ranks)
    }

    /// Of every rank's pairs and bytes.
    fn of_ranks(sharding: String, ranks: &[(u128, u64)]) -> Self {
        let slowest_pairs = ranks.iter().map(|rank| rank.0).max().unwrap_or(0);
        let pairs: u128 = ranks.iter().map(|rank| rank.0).sum();
        Self {
            sharding,
            slowest_pairs,
            imbalance: over_mean(slowest_pairs as f64, pairs as f64, ranks.len()),
            forward_received: ranks.iter().map(|rank| rank.1).sum(),
        }
    }
}

/// The largest of `count` numbers over their mean; 1 if all are 0.
pub(super) fn over_mean(largest: f64, total: f64, count: usize) -> f64 {
    match total {
        0.0 => 1.0,
        _ => largest * count as f64 / total,
    }
}
