//! Which strategy pays: the time that plans would take on a machine ([`MachineModel`]), and the choice of the least ([`Auto`]).

mod measure;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    estimate::CommunicationEstimate,
    memory::MemoryEstimate,
    plan::{Plan, Step},
    spec::{AttentionSpec, SpecError},
    strategy::Strategy,
};

/// How fast a machine is, as far as the choice of a strategy depends on it. All ranks must have the same, or they choose
/// differently (and are told so, by the comparison of plans).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineModel {
    /// Seconds that one rank's kernels take in a forward pass for a pair of query and key, for each element of the head.
    pub forward_pair_seconds: f64,
    /// The same in a backward pass.
    pub backward_pair_seconds: f64,
    /// Bytes that a rank receives in a second while others send and receive too.
    pub bytes_per_second: f64,
    /// Seconds from the sending of a small message to its arrival.
    pub latency_seconds: f64,
    /// Bytes that a rank copies in a second within its memory: rows into messages and out of them.
    pub copy_bytes_per_second: f64,
    /// Ranks that can compute at the same time: all of them, unless they share cores.
    pub parallel_ranks: f64,
}

impl MachineModel {
    /// Figures that are no positive numbers would make every comparison meaningless.
    fn check(&self) -> Result<(), SpecError> {
        let figures = [
            ("the seconds of a pair forward", self.forward_pair_seconds),
            ("the seconds of a pair backward", self.backward_pair_seconds),
            ("the bytes per second", self.bytes_per_second),
            ("the latency", self.latency_seconds + f64::MIN_POSITIVE),
            ("the bytes per second of copies", self.copy_bytes_per_second),
            ("the number of parallel ranks", self.parallel_ranks),
        ];
        match figures
            .into_iter()
            .find(|&(_, value)| value.is_nan() || value <= 0.0)
        {
            Some((what, value)) => Err(SpecError::Machine { what, value }),
            None => Ok(()),
        }
    }
}

impl Default for MachineModel {
    /// Ranks of one thread, each with a processor core of its own, within one machine: figures of a common server, rounded.
    /// For a choice that holds on yours, measure ([`measure`](Self::measure)) or fill in what you know.
    fn default() -> Self {
        Self {
            forward_pair_seconds: 4e-11,
            backward_pair_seconds: 1e-10,
            bytes_per_second: 4e9,
            latency_seconds: 2e-5,
            copy_bytes_per_second: 4e9,
            // Not infinity, which JSON cannot tell.
            parallel_ranks: f64::MAX,
        }
    }
}

/// Chooses a strategy by its cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Auto {
    /// The machine.
    pub machine: MachineModel,
    /// Sequences of fewer queries and fewer keys stay on one rank, whatever they would cost; 0 for none.
    pub one_rank_below: usize,
    /// Whether a backward pass follows.
    pub training: bool,
    /// Bytes that one rank may need for one computation, kernels' tiles aside; strategies that need more are not chosen, unless all do.
    pub memory_limit: Option<u64>,
}

impl Default for Auto {
    /// Training on the default machine; sequences below 256 positions stay on one rank.
    fn default() -> Self {
        Self {
            machine: MachineModel::default(),
            one_rank_below: 256,
            training: true,
            memory_limit: None,
        }
    }
}

/// What one strategy would cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds of the slowest rank of the forward pass and of the slowest of the backward pass, or of the cores if ranks share
    /// them.
    pub seconds: f64,
    /// Seconds that the rank with most work in the forward pass computes there, and that with most in the backward pass there.
    pub compute_seconds: f64,
    /// Seconds that the slowest rank waits for messages or copies rows.
    pub exchange_seconds: f64,
    /// Bytes that the rank receives that receives most.
    pub bytes_received: u64,
    /// Rounds of messages of the rank that has most.
    pub hops: usize,
    /// Work of the ranks with most in each pass, over the mean.
    pub imbalance: f64,
    /// Bytes that the rank needs that needs most ([`MemoryEstimate`], without the kernels' tiles).
    pub memory_bytes: u64,
}

/// What was chosen, and why. As text it is [`explain`](Self::explain).
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The strategy.
    pub strategy: Strategy,
    /// What was compared, in the order of [`Strategy::candidates`].
    pub candidates: Vec<(Strategy, Cost)>,
    reason: String,
}

/// Ranks whose plans are looked at: all, or if there are more as many, evenly spaced.
const LOOKED_AT: usize = 16;
/// Memory of a strategy that is chosen, at most, as a multiple of what [`Strategy::Ring`] needs: so that it stays O(N/P).
const MOST_MEMORY: u64 = 2;
/// A strategy must be this much faster than an earlier one to be preferred: what is closer is noise, and the earlier ones need less
/// memory.
const CLEARLY_FASTER: f64 = 0.98;

impl Auto {
    /// The strategy for a computation. Every rank that asks the same gets the same.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible; [`SpecError::Machine`].
    pub fn choose(&self, spec: &AttentionSpec) -> Result<Choice, SpecError> {
        self.machine.check()?;
        let spec = spec.clone().with_strategy(Strategy::Ring)?;
        let ranks = spec.world_size;
        let settled = |strategy, reason: String| Choice {
            strategy,
            candidates: Vec::new(),
            reason,
        };
        if ranks == 1 {
            return Ok(settled(Strategy::Ring, "there is one rank".into()));
        }
        let longest = spec.query_length.max(spec.key_length);
        if longest < self.one_rank_below {
            let reason = format!(
                "{longest} positions are fewer than {}, from where on a sequence is divided",
                self.one_rank_below
            );
            return Ok(settled(Strategy::OneRank, reason));
        }
        let mut candidates = Vec::new();
        for strategy in Strategy::candidates(&spec) {
            let spec = spec.clone().with_strategy(strategy)?;
            candidates.push((strategy, self.cost(&spec)?));
        }
        let of_ring = candidates[0].1.memory_bytes;
        let most = (MOST_MEMORY * of_ring).min(self.memory_limit.unwrap_or(u64::MAX));
        let fits = |candidate: &&(Strategy, Cost)| candidate.1.memory_bytes <= most;
        let mut fitting = candidates.iter().filter(fits);
        let least = || candidates.iter().min_by_key(|(_, cost)| cost.memory_bytes);
        let mut best = (fitting.next().or_else(least)).expect("a ring can always serve");
        for candidate in fitting {
            if candidate.1.seconds < best.1.seconds * CLEARLY_FASTER {
                best = candidate;
            }
        }
        Ok(Choice {
            strategy: best.0,
            reason: reason(best, &candidates),
            candidates,
        })
    }

    /// What a computation costs by its strategy.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible.
    pub fn cost(&self, spec: &AttentionSpec) -> Result<Cost, SpecError> {
        let ranks = spec.world_size;
        let looked_at = ranks.min(LOOKED_AT);
        let mut passes = [Slowest::default(), Slowest::default()];
        let mut compute = 0.0;
        let (mut bytes_received, mut hops, mut memory_bytes) = (0, 0, 0);
        for index in 0..looked_at {
            let rank = index * (ranks - 1) / (looked_at - 1).max(1);
            let plan = Plan::new(spec, rank)?;
            let stands_for = stands_for(spec, index, looked_at);
            for (slowest, time) in passes.iter_mut().zip(self.times(&plan)) {
                slowest.look_at(time, stands_for);
                compute += time.compute * stands_for;
            }
            let estimate = CommunicationEstimate::new(&plan);
            let mut bytes = estimate.forward_received;
            if self.training {
                bytes += estimate.backward_received;
            }
            bytes_received = bytes_received.max(bytes);
            hops = hops.max(estimate.hops);
            let memory = match self.training {
                true => MemoryEstimate::backward(&plan, 0),
                false => MemoryEstimate::forward(&plan, 0),
            };
            memory_bytes = memory_bytes.max(memory.total);
        }
        let [forward, backward] = passes;
        let mean = compute / ranks as f64;
        let most = forward.compute + backward.compute;
        let cores = self.machine.parallel_ranks;
        Ok(Cost {
            seconds: forward.seconds_on(cores) + backward.seconds_on(cores),
            compute_seconds: most,
            exchange_seconds: forward.exchange + backward.exchange,
            bytes_received,
            hops,
            imbalance: if mean > 0.0 { most / mean } else { 1.0 },
            memory_bytes,
        })
    }

    /// The times of one rank, of a forward pass and of a backward pass if one follows.
    fn times(&self, plan: &Plan) -> [Time; 2] {
        let mut passes = [Time::default(); 2];
        for (time, (steps, backward)) in passes
            .iter_mut()
            .zip([(plan.steps(), false), (plan.backward_steps(), true)])
        {
            if backward && !self.training {
                continue;
            }
            *time = self.walk(plan, steps, backward);
            if plan.regroup().is_some() {
                *time += self.regrouping(plan, backward);
            }
        }
        passes
    }

    /// The time of the steps of one pass.
    fn walk(&self, plan: &Plan, steps: &[Step], backward: bool) -> Time {
        let machine = &self.machine;
        let pair = if backward {
            machine.backward_pair_seconds
        } else {
            machine.forward_pair_seconds
        } * plan.spec().shape.head_dim as f64;
        let mut time = Time::default();
        let compute = |step: &Step| plan.pairs_of(step) as f64 * pair;
        let exchanges = steps.iter().filter_map(|step| step.exchange.as_ref());
        let all_at_once = plan.lookahead() > 1;
        let mut ahead: f64 = 0.0;
        for exchange in exchanges {
            let (received, sent) = CommunicationEstimate::of_hop(plan, exchange, backward);
            time.copying += sent as f64 / machine.copy_bytes_per_second;
            if all_at_once {
                ahead += received as f64 / machine.bytes_per_second;
            }
        }
        if all_at_once {
            ahead += machine.latency_seconds;
        }
        for step in steps {
            let compute = compute(step);
            let exchange = match &step.exchange {
                _ if all_at_once => std::mem::take(&mut ahead),
                None => 0.0,
                Some(exchange) => {
                    let (received, _) = CommunicationEstimate::of_hop(plan, exchange, backward);
                    machine.latency_seconds + received as f64 / machine.bytes_per_second
                }
            };
            time.compute += compute;
            time.seconds += compute.max(exchange);
        }
        // Packing is done by whoever computes.
        time.seconds += time.copying;
        time
    }

    /// The time of one pass among the ranks that divide heads, there and back; nothing is computed meanwhile.
    fn regrouping(&self, plan: &Plan, backward: bool) -> Time {
        let machine = &self.machine;
        let (own, divided) = (plan.problem(), plan.ring_problem());
        let size = plan.spec().dtype.size();
        let rows = |problem: &ring_kernels::Problem| {
            let queries = problem.query_heads * problem.queries;
            let keys = problem.kv_heads * problem.keys;
            (problem.batch * problem.head_dim * size) as f64 * (queries + keys) as f64
        };
        // Forward: query, key, value, output. Backward: those but output, its gradient, three gradients back.
        let times = if backward { 3.5 } else { 2.0 };
        let ranks = plan.regroup().map_or(1, |regroup| regroup.members.len()) as f64;
        let own_share = 1.0 / ranks;
        let received = times * rows(&divided).max(rows(&own)) * (1.0 - own_share);
        let copied = times * (rows(&own) + rows(&divided));
        let copying = copied / machine.copy_bytes_per_second;
        let exchange = 2.0 * machine.latency_seconds + received / machine.bytes_per_second;
        Time {
            seconds: copying + exchange,
            compute: 0.0,
            copying,
        }
    }
}

/// What a rank does for how long.
#[derive(Clone, Copy, Debug, Default)]
struct Time {
    /// From beginning to end.
    seconds: f64,
    /// In kernels.
    compute: f64,
    /// Copying rows into messages and out of them.
    copying: f64,
}

impl std::ops::AddAssign for Time {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.compute += other.compute;
        self.copying += other.copying;
    }
}

/// The slowest of the ranks in one pass: those that are faster wait for it before they begin the next one.
#[derive(Clone, Debug, Default)]
struct Slowest {
    /// Seconds of the slowest rank.
    seconds: f64,
    /// Of these, those in which it does not compute.
    exchange: f64,
    /// Seconds that the rank with most work computes.
    compute: f64,
    /// Seconds that ranks keep a core busy, and how many ranks do so.
    busy: Vec<(f64, f64)>,
}

impl Slowest {
    fn look_at(&mut self, time: Time, stands_for: f64) {
        if time.seconds > self.seconds {
            self.seconds = time.seconds;
            self.exchange = time.seconds - time.compute;
        }
        self.compute = self.compute.max(time.compute);
        self.busy.push((time.compute + time.copying, stands_for));
    }

    /// Seconds until the last rank is done, if no more of them than there are `cores` get ahead at full speed.
    fn seconds_on(&self, cores: f64) -> f64 {
        let mut busy = self.busy.clone();
        busy.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut at_work: f64 = busy.iter().map(|(_, ranks)| ranks).sum();
        let (mut seconds, mut done) = (0.0, 0.0);
        for (work, ranks) in busy {
            // Those that are at work share the cores evenly, until the one with least left is done.
            seconds += (work - done) * (at_work / cores).max(1.0);
            done = work;
            at_work -= ranks;
        }
        self.seconds.max(seconds)
    }
}

/// How many ranks the one that is looked at stands for. Alone in what it does is only the rank that computes everything.
fn stands_for(spec: &AttentionSpec, index: usize, looked_at: usize) -> f64 {
    let ranks = spec.world_size as f64;
    match (spec.strategy, index) {
        (Strategy::OneRank, 0) => 1.0,
        (Strategy::OneRank, _) => (ranks - 1.0) / (looked_at as f64 - 1.0),
        _ => ranks / looked_at as f64,
    }
}

/// Why the best candidate is the best.
fn reason(best: &(Strategy, Cost), candidates: &[(Strategy, Cost)]) -> String {
    let (_, cost) = best;
    let runner_up = candidates
        .iter()
        .filter(|(strategy, _)| *strategy != best.0)
        .min_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
    let mut reason = format!(
        "it takes the least time, {}: the rank with most work computes for {}, waits and copies take {}",
        seconds(cost.seconds),
        seconds(cost.compute_seconds),
        seconds(cost.exchange_seconds)
    );
    if let Some((strategy, other)) = runner_up {
        let because = if other.seconds < cost.seconds && other.memory_bytes > cost.memory_bytes {
            "it needs more memory"
        } else if other.imbalance > cost.imbalance * 1.02 {
            "its work is divided less evenly"
        } else if other.bytes_received > cost.bytes_received {
            "more bytes travel"
        } else if other.hops > cost.hops {
            "it takes more rounds of messages"
        } else {
            "it is no clear gain"
        };
        reason += &format!(
            "; the next best is {strategy} with {}, {because}",
            seconds(other.seconds)
        );
    }
    reason
}

/// A time in units that people read.
fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

impl Choice {
    /// In plain words: what was chosen, why, and what the others would have cost.
    pub fn explain(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, because {}", self.strategy, self.reason)?;
        for (strategy, cost) in &self.candidates {
            write!(
                f,
                "\n  {strategy}: {} ({} received by the rank that receives most, {} rounds of messages, most work over mean {:.2}, {} of memory)",
                seconds(cost.seconds),
                bytes(cost.bytes_received),
                cost.hops,
                cost.imbalance,
                bytes(cost.memory_bytes)
            )?;
        }
        Ok(())
    }
}

fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.2} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pattern, Shape, Sharding};

    fn spec(pattern: Pattern, length: usize, ranks: usize, heads: usize) -> AttentionSpec {
        let shape = Shape {
            batch: 1,
            query_heads: heads,
            kv_heads: heads,
            head_dim: 64,
        };
        AttentionSpec::new(pattern, shape, length)
            .and_then(|spec| spec.sharded(Sharding::Contiguous, ranks))
            .unwrap()
    }

    fn chosen(auto: Auto, spec: &AttentionSpec) -> Strategy {
        auto.choose(spec).unwrap().strategy
    }

    #[test]
    fn one_rank_needs_no_division_and_short_sequences_stay_on_one() {
        let auto = Auto::default();
        let full = Pattern::full;
        assert_eq!(chosen(auto, &spec(full(), 100_000, 1, 8)), Strategy::Ring);
        assert_eq!(chosen(auto, &spec(full(), 255, 4, 8)), Strategy::OneRank);
        assert_ne!(chosen(auto, &spec(full(), 256, 4, 8)), Strategy::OneRank);
        let explained = auto.choose(&spec(full(), 255, 4, 8)).unwrap().explain();
        assert!(explained.contains("255 positions"), "{explained}");
    }

    #[test]
    fn what_stays_within_shards_stays_a_ring() {
        let local = Pattern::dilated(&[1024, 4096], &[1, 2]).unwrap();
        let choice = Auto::default().choose(&spec(local, 1 << 15, 8, 8)).unwrap();
        assert_eq!(choice.strategy, Strategy::Ring);
        assert_eq!(choice.candidates[0].1.bytes_received, 0);
    }

    #[test]
    fn uneven_causal_work_is_divided_by_heads_unless_ranks_share_cores() {
        let causal = spec(Pattern::full().causal(), 1 << 14, 4, 8);
        let auto = Auto::default();
        let choice = auto.choose(&causal).unwrap();
        assert_eq!(choice.strategy, Strategy::HeadParallel, "{choice}");
        let explained = choice.explain();
        assert!(explained.contains("less evenly"), "{explained}");
        let zigzag = causal.sharded(Sharding::Zigzag, 4).unwrap();
        let cost = auto.cost(&zigzag).unwrap();
        assert!(cost.imbalance < 1.01);
    }

    #[test]
    fn a_network_without_latency_but_narrow_favours_what_sends_least() {
        let machine = MachineModel {
            bytes_per_second: 1e6,
            latency_seconds: 0.0,
            ..MachineModel::default()
        };
        let auto = Auto {
            machine,
            ..Auto::default()
        };
        // All heads are wanted by all ranks: of every row 3/4 travel in a ring, 3/16 there and back by heads.
        let dense = spec(Pattern::full(), 1 << 13, 4, 8);
        let choice = auto.choose(&dense).unwrap();
        let least = choice.candidates.iter();
        let least = least.min_by_key(|(_, cost)| cost.bytes_received).unwrap();
        assert_eq!(choice.strategy, least.0, "{choice}");
    }

    #[test]
    fn nothing_is_chosen_that_needs_much_more_memory_than_a_ring() {
        // Nothing but rounds of messages costs anything here.
        let machine = MachineModel {
            forward_pair_seconds: 1e-18,
            backward_pair_seconds: 1e-18,
            latency_seconds: 1e-2,
            ..MachineModel::default()
        };
        let auto = Auto {
            machine,
            ..Auto::default()
        };
        let full = spec(Pattern::full(), 1 << 16, 16, 1);
        let choice = auto.choose(&full).unwrap();
        let least = choice.candidates.iter();
        let least = least.min_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
        assert_eq!(least.unwrap().0, Strategy::AllGather, "{choice}");
        let ring = choice.candidates[0].1.memory_bytes;
        let chosen = choice.candidates.iter();
        let mut chosen = chosen.filter(|(strategy, _)| *strategy == choice.strategy);
        assert!(
            chosen.next().unwrap().1.memory_bytes <= 2 * ring,
            "{choice}"
        );
        // A limit below what all need is kept as well as can be.
        let limited = Auto {
            memory_limit: Some(1),
            ..auto
        };
        let choice = limited.choose(&full).unwrap();
        let least = choice.candidates.iter();
        let least = least.min_by_key(|(_, cost)| cost.memory_bytes).unwrap();
        assert_eq!(choice.strategy, least.0);
    }

    #[test]
    fn ranks_that_share_cores_hold_each_other_up() {
        let mut pass = Slowest::default();
        for compute in [7.0, 1.0, 5.0, 3.0] {
            let seconds = compute;
            let time = Time {
                seconds,
                compute,
                ..Time::default()
            };
            pass.look_at(time, 1.0);
        }
        assert_eq!(pass.seconds_on(4.0), 7.0);
        // Until all have 1: 2 s; until three more have 3: 3 s; then two at full speed to 5, and one to 7.
        assert_eq!(pass.seconds_on(2.0), 9.0);
        assert_eq!(pass.seconds_on(1.0), 16.0);
    }

    #[test]
    fn figures_that_are_no_numbers_are_refused() {
        for value in [f64::NAN, 0.0, -1.0] {
            let machine = MachineModel {
                bytes_per_second: value,
                ..MachineModel::default()
            };
            let auto = Auto {
                machine,
                ..Auto::default()
            };
            let refused = auto.choose(&spec(Pattern::full(), 4096, 4, 8));
            assert!(matches!(refused, Err(SpecError::Machine { .. })));
        }
    }

    #[test]
    fn every_rank_chooses_alike_whatever_the_spec_said_before() {
        let ring = spec(Pattern::full(), 4096, 4, 8);
        let mesh = Strategy::Mesh { head_ranks: 2 };
        let other = ring.clone().with_strategy(mesh).unwrap();
        let auto = Auto::default();
        assert_eq!(auto.choose(&ring).unwrap(), auto.choose(&other).unwrap());
    }

    #[test]
    fn many_queries_of_few_keys_are_divided() {
        let cross = spec(Pattern::full(), 77, 4, 8).with_lengths(100_000, 77);
        let cross = cross.unwrap();
        assert_ne!(chosen(Auto::default(), &cross), Strategy::OneRank);
    }

    #[test]
    fn a_pass_ends_with_its_slowest_rank() {
        let causal = spec(Pattern::full().causal(), 1 << 16, 8, 8);
        let query = causal.with_strategy(Strategy::RingQuery).unwrap();
        let plans: Vec<Plan> = (0..8)
            .map(|rank| Plan::new(&query, rank).unwrap())
            .collect();
        let most = |steps: fn(&Plan) -> &[Step], pair_seconds: f64| {
            let pairs = |plan: &Plan| -> u128 {
                let steps = steps(plan).iter();
                steps.map(|step| plan.pairs_of(step)).sum()
            };
            let most = plans.iter().map(pairs).max().unwrap();
            most as f64 * pair_seconds * query.shape.head_dim as f64
        };
        let auto = Auto::default();
        let forward = most(Plan::steps, auto.machine.forward_pair_seconds);
        let backward = most(Plan::backward_steps, auto.machine.backward_pair_seconds);
        let cost = auto.cost(&query).unwrap();
        assert!((cost.compute_seconds / (forward + backward) - 1.0).abs() < 1e-9);
        assert!(cost.seconds >= forward + backward, "{cost:?}");
    }

    #[test]
    fn one_rank_computes_for_all_however_many_are_looked_at() {
        let short = spec(Pattern::full(), 1 << 12, 64, 8);
        let auto = Auto::default();
        let ring = auto.cost(&short).unwrap();
        let one = short.with_strategy(Strategy::OneRank).unwrap();
        let one = auto.cost(&one).unwrap();
        assert!((one.imbalance - 64.0).abs() < 1e-6, "{one:?}");
        assert!((one.compute_seconds / ring.compute_seconds - 64.0).abs() < 1e-6);
    }

    #[test]
    fn a_machine_can_be_stored() {
        let machine = MachineModel::default();
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(
            serde_json::from_str::<MachineModel>(&text).unwrap(),
            machine
        );
    }
}
