//! Alternation, and its statistics.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::compare::{Case, CompareError, Section, Unit, side::Side, stage::Stage};

/// Fewest pairs whose median counts.
pub const FEWEST_PAIRS: usize = 5;

/// Bytes hardly differ from run to run, and each run takes a fresh process.
const PAIRS_OF_BYTES: usize = 3;

/// A case that has taken longer is content with [`FEWEST_PAIRS`].
const PATIENCE: Duration = Duration::from_secs(40);

/// Rest before every run: threads that spin for more work have gone to sleep by then.
const PAUSE: Duration = Duration::from_millis(50);

/// What came of a case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was compared.
    pub case: Case,
    /// Seconds or bytes of each run of ours.
    pub ours: Vec<f64>,
    /// Seconds or bytes of each run of theirs.
    pub theirs: Vec<f64>,
    /// Largest share of a core that PyTorch's waiting processes used during our runs.
    pub disturbance: f64,
    /// Most memory this process ever held, in bytes, when the case was done.
    pub peak_bytes: Option<u64>,
}

/// The middle, and both ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one number.
    ///
    /// # Panics
    /// If there is none.
    pub fn of(numbers: &[f64]) -> Self {
        let mut sorted = numbers.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Self {
            min: sorted[0],
            median: (low + high) / 2.0,
            max: sorted[sorted.len() - 1],
        }
    }
}

impl Outcome {
    /// Of each pair, how much better ours was: the ratio of rates, or of bytes.
    pub fn ratios(&self) -> Vec<f64> {
        let amounts = self.amounts();
        let pairs = self.ours.iter().zip(&self.theirs);
        pairs
            .map(|(ours, theirs)| (amounts[0] / ours) / (amounts[1] / theirs))
            .collect()
    }

    /// Their spread.
    pub fn ratio(&self) -> Spread {
        Spread::of(&self.ratios())
    }

    /// Whether the median reaches the bar.
    pub fn is_met(&self) -> bool {
        self.ratio().median >= self.case.bar
    }

    /// Rates of the median runs, ours and theirs.
    pub fn rates(&self) -> [f64; 2] {
        let [ours, theirs] = self.amounts();
        [
            ours / Spread::of(&self.ours).median,
            theirs / Spread::of(&self.theirs).median,
        ]
    }

    fn amounts(&self) -> [f64; 2] {
        let unit = self.case.unit();
        [&self.case.ours, &self.case.theirs].map(|contender| contender.amount(unit))
    }
}

/// Runs `case`, `pairs` times each side, and tells `progress` the ratio of every pair.
///
/// The side that goes first changes from pair to pair.
///
/// # Errors
/// [`CompareError`] of either side.
pub fn run(
    case: &Case,
    pairs: usize,
    stage: &mut Stage,
    mut progress: impl FnMut(f64),
) -> Result<Outcome, CompareError> {
    let mut theirs = Side::ready(&case.theirs, case.unit(), stage)?;
    let mut ours = Side::ready(&case.ours, case.unit(), stage)?;
    let mut outcome = Outcome {
        case: case.clone(),
        ours: Vec::new(),
        theirs: Vec::new(),
        disturbance: 0.0,
        peak_bytes: None,
    };
    let pairs = match (case.unit(), case.section) {
        (Unit::Bytes, _) => pairs.min(PAIRS_OF_BYTES),
        // A few percent are looked for, in runs that differ by ten.
        (_, Section::Module) => 3 * pairs,
        _ => pairs,
    };
    let start = Instant::now();
    for pair in 0..pairs {
        if pair >= FEWEST_PAIRS && start.elapsed() > PATIENCE {
            break;
        }
        if pair % 2 == 0 {
            outcome.theirs.push(rested(&mut theirs)?);
        }
        let (cost, disturbance) = watched(&mut ours, stage)?;
        outcome.ours.push(cost);
        outcome.disturbance = outcome.disturbance.max(disturbance);
        if pair % 2 == 1 {
            outcome.theirs.push(rested(&mut theirs)?);
        }
        progress(outcome.ratios()[pair]);
    }
    outcome.peak_bytes = crate::machine::peak_bytes();
    Ok(outcome)
}

fn rested(side: &mut Side) -> Result<f64, CompareError> {
    thread::sleep(PAUSE);
    side.run()
}

/// A run, and the share of a core that PyTorch's waiting processes used meanwhile.
fn watched(side: &mut Side, stage: &Stage) -> Result<(f64, f64), CompareError> {
    const TICK: f64 = 0.01;
    thread::sleep(PAUSE);
    let (ticks, start) = (stage.processor_ticks(), Instant::now());
    let cost = side.run()?;
    let used = stage.processor_ticks().saturating_sub(ticks) as f64 * TICK;
    Ok((cost, used / start.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::{Contender, Section},
        work::Work,
    };

    fn outcome(ours: &[f64], theirs: &[f64]) -> Outcome {
        let contender = |length| Contender::Ranks {
            work: Work::full(4, length, 64),
            ranks: 1,
            threads: 2,
        };
        let case = Case {
            section: Section::Growth,
            ours: contender(4096),
            theirs: contender(1024),
            bar: 0.8,
        };
        Outcome {
            case,
            ours: ours.to_vec(),
            theirs: theirs.to_vec(),
            disturbance: 0.0,
            peak_bytes: None,
        }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_middle_two() {
        let odd = Spread::of(&[3.0, 1.0, 2.0]);
        assert_eq!((odd.min, odd.median, odd.max), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(Spread::of(&[7.0]).median, 7.0);
    }

    #[test]
    fn ratios_compare_rates_pair_by_pair() {
        // Four times the positions in four times, five times and twice the time.
        let outcome = outcome(&[4.0, 5.0, 4.0], &[1.0, 1.0, 2.0]);
        assert_eq!(outcome.ratios(), [1.0, 0.8, 2.0]);
        assert_eq!(outcome.ratio().median, 1.0);
        assert_eq!(outcome.rates(), [1024.0, 1024.0]);
    }

    #[test]
    fn a_bar_is_met_when_it_is_reached() {
        assert!(outcome(&[5.0], &[1.0]).is_met());
        assert!(!outcome(&[5.1], &[1.0]).is_met());
    }
}
