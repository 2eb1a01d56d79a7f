//! What one rank does, as data: [`Plan`].
//!
//! A plan is a pure function of the computation and the rank. It is the one source for execution, for estimates and for
//! simulation; every rank can derive every other rank's plan. Row sets are arithmetic progressions, so its size does not
//! depend on the length of the sequence (for self-attention under contiguous or zigzag sharding); it grows with the number of
//! documents packed into it, and of batch entries that have others.
//!
//! In a ring, rows go straight from their owner to whoever needs them: in the hop of distance `d`, rank `p` sends to `p + d` and
//! receives from `p - d` (modulo the number of places in the ring). That needs no forwarding, moves each row once, and is the least
//! number of bytes of keys and values for every pattern, as long as batch entries do not differ (a row that one of them needs
//! travels for all); relaying from neighbour to neighbour would move rows through ranks that do not need them. What else there is
//! than [`Strategy::Ring`] walks the same hops, with other rows, or with all rows of a part of the heads ([`Regroup`]).

use std::fmt;

use ring_comm::Rank;
use ring_kernels::{Block, HeadBlocks, HeadRows, Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    pairs::block_pairs,
    planner::{Planner, Travellers},
    regroup::Regroup,
    schedule::{OnDemand, Schedule},
    spec::{AttentionSpec, SpecError},
    strategy::Strategy,
};

/// A block, or `repeat` copies of it, each `period` rows and positions after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedBlock {
    /// The first block.
    pub block: Block,
    /// Number of copies.
    pub repeat: usize,
    /// Rows, and positions, between copies; of queries and keys alike.
    pub period: usize,
}

impl PlannedBlock {
    /// The copies.
    pub fn blocks(&self) -> impl Iterator<Item = Block> + '_ {
        (0..self.repeat).map(|copy| {
            let shift = |rows: Rows| Rows {
                first_row: rows.first_row + copy * self.period,
                first_position: rows.first_position + (copy * self.period) as i64,
                ..rows
            };
            Block {
                queries: shift(self.block.queries),
                keys: shift(self.block.keys),
                branch: self.block.branch,
            }
        })
    }
}

/// Blocks that a set of key/value heads has in common, in a set of batch entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadWork {
    /// Batch entries.
    pub entries: Vec<usize>,
    /// Key/value heads, counted from the first one that the rank computes with.
    pub kv_heads: Vec<usize>,
    /// Their blocks.
    pub blocks: Vec<PlannedBlock>,
}

/// Where the keys and values of a step's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// In the rank's own tensors.
    Own,
    /// In the slot that the exchange of the step before filled, with rows of this rank.
    Slot(Rank),
    /// Nowhere: the exchange of the step before only sent.
    Nothing,
}

/// Rows that travel between this rank and a peer, numbered as in their owner's tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The other rank.
    pub peer: Rank,
    /// The rows, in the order in which they are packed; none twice.
    pub rows: Vec<HeadRows>,
}

impl Message {
    /// Rows of all heads, of one batch entry.
    pub fn row_count(&self) -> usize {
        self.rows
            .iter()
            .map(|entry| entry.heads.len() * entry.count())
            .sum()
    }
}

/// The messages to post before a step's blocks are computed, and to wait for afterwards.
///
/// Between two ranks either keys and values travel to the queries, or queries to the keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Distance of the hop: receive from `rank - distance`, send to `rank + distance` (places of the ring, if heads are
    /// divided). Also the step in message tags.
    pub distance: usize,
    /// Own keys and values that a peer needs.
    pub send: Option<Message>,
    /// A peer's keys and values that this rank needs.
    pub receive: Option<Message>,
    /// Own queries that go to a peer whose keys they see; in a backward pass only.
    pub send_queries: Option<Message>,
    /// A peer's queries that see keys of this rank; in a backward pass only.
    pub receive_queries: Option<Message>,
}

impl Exchange {
    /// All its messages.
    pub fn messages(&self) -> impl Iterator<Item = &Message> {
        let rows = [&self.send, &self.receive];
        let queries = [&self.send_queries, &self.receive_queries];
        rows.into_iter().chain(queries).flatten()
    }
}

/// One step: post `exchange`, compute `work` and `guests` meanwhile, wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where the keys and values of `work` are.
    pub source: Source,
    /// What to compute for own queries.
    pub work: Vec<HeadWork>,
    /// What to compute with own keys and values for the queries that the exchange of the step before brought.
    pub guests: Vec<HeadWork>,
    /// What to exchange meanwhile.
    pub exchange: Option<Exchange>,
}

impl Step {
    /// Whether there is nothing to compute and nothing to send home.
    pub(crate) fn is_idle(&self) -> bool {
        self.source == Source::Nothing && self.guests.is_empty()
    }

    /// The blocks of `work`, written out one by one.
    pub fn head_blocks(work: &[HeadWork]) -> Vec<HeadBlocks> {
        work.iter()
            .map(|work| {
                let count = work.blocks.iter().map(|planned| planned.repeat).sum();
                let mut blocks = Vec::with_capacity(count);
                blocks.extend(work.blocks.iter().flat_map(PlannedBlock::blocks));
                HeadBlocks {
                    entries: work.entries.clone(),
                    kv_heads: work.kv_heads.clone(),
                    blocks,
                }
            })
            .collect()
    }
}

/// Everything one rank does in one attention computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    spec: AttentionSpec,
    rank: Rank,
    regroup: Option<Regroup>,
    steps: Vec<Step>,
    /// Those of the backward pass, if they are others.
    backward: Option<Vec<Step>>,
    #[serde(skip)]
    schedule: OnDemand,
}

impl Plan {
    /// The plan of `rank`.
    ///
    /// # Errors
    /// [`SpecError`] if the computation is not possible or the rank does not exist.
    pub fn new(spec: &AttentionSpec, rank: Rank) -> Result<Self, SpecError> {
        let spec = spec.clone().checked()?;
        if rank >= spec.world_size {
            return Err(SpecError::Rank {
                rank,
                world_size: spec.world_size,
            });
        }
        let planner = Planner::new(&spec, rank);
        let steps = planner.steps(Travellers::Keys);
        let backward = (spec.strategy == Strategy::RingQuery)
            .then(|| planner.steps(Travellers::FewestBytes))
            .filter(|backward| *backward != steps);
        Ok(Self {
            regroup: Regroup::new(&spec, planner.place()),
            spec,
            rank,
            steps,
            backward,
            schedule: OnDemand::default(),
        })
    }

    /// The computation.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// The rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// What this rank exchanges with those that hold the same positions, before the steps and after them; `None` if heads are
    /// not divided.
    pub fn regroup(&self) -> Option<&Regroup> {
        self.regroup.as_ref()
    }

    /// The steps of the forward pass, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The steps of the backward pass, in order.
    pub fn backward_steps(&self) -> &[Step] {
        self.backward.as_deref().unwrap_or(&self.steps)
    }

    /// The steps of the backward pass, if they are not those of the forward pass.
    pub(crate) fn own_backward_steps(&self) -> Option<&[Step]> {
        self.backward.as_deref()
    }

    /// Exchanges that are under way at the same time.
    pub fn lookahead(&self) -> usize {
        match self.spec.strategy {
            Strategy::AllGather => self.spec.world_size,
            _ => 1,
        }
    }

    /// The sizes of this rank's own tensors.
    pub fn problem(&self) -> Problem {
        self.spec.problem(self.rank)
    }

    /// The sizes this rank's kernels see: if heads are divided, those of its part of the heads, with all rows of its place.
    pub fn ring_problem(&self) -> Problem {
        let mut problem = self.problem();
        if let Some(regroup) = &self.regroup {
            regroup.divide(&mut problem, self.rank);
        }
        problem
    }

    /// The steps as they are executed; made when first asked for.
    pub(crate) fn schedule(&self) -> &Schedule {
        self.schedule.of(self)
    }

    /// The exchanges of the forward pass, in order.
    pub fn exchanges(&self) -> impl Iterator<Item = &Exchange> {
        self.steps.iter().filter_map(|step| step.exchange.as_ref())
    }

    /// Admitted (query, key) pairs over all query heads and batch entries: the work of this rank. Each takes `2 head_dim`
    /// multiplications and additions in a forward pass, `5 head_dim` in a backward pass.
    pub fn pairs(&self) -> u128 {
        self.steps.iter().map(|step| self.pairs_of(step)).sum()
    }

    /// The pairs of one step.
    pub fn pairs_of(&self, step: &Step) -> u128 {
        let group = self.spec.shape.query_heads / self.spec.shape.kv_heads;
        let mask = self.spec.pattern.mask();
        let pairs = |work: &HeadWork| {
            let of_block =
                |planned: &PlannedBlock| planned.repeat as u128 * block_pairs(&planned.block, mask);
            let pairs: u128 = work.blocks.iter().map(of_block).sum();
            pairs * (work.entries.len() * work.kv_heads.len() * group) as u128
        };
        step.work.iter().chain(&step.guests).map(pairs).sum()
    }
}

impl fmt::Display for Plan {
    /// One line a step, and one for each exchange among ranks that divide heads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "rank {} of {}, {}: {}",
            self.rank, self.spec.world_size, self.spec.strategy, self.spec.pattern
        )?;
        let Some(regroup) = &self.regroup else {
            return self.describe_steps(f);
        };
        for member in &regroup.members {
            let (rank, heads) = (member.rank, &member.kv_heads);
            match (rank == self.rank, heads.is_empty()) {
                (true, true) => writeln!(f, "  before: all own rows leave")?,
                (true, false) => writeln!(f, "  before: gather key/value heads {heads:?}")?,
                (false, true) => {}
                (false, false) => {
                    writeln!(
                        f,
                        "  before: own rows of key/value heads {heads:?} to rank {rank}"
                    )?;
                }
            }
        }
        self.describe_steps(f)?;
        writeln!(f, "  after: outputs return to the owners of their rows")
    }
}

impl Plan {
    fn describe_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "  step {index}: {step}")?;
        }
        for (index, step) in self.backward.iter().flatten().enumerate() {
            writeln!(f, "  backward step {index}: {step}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |work: &[HeadWork]| -> usize {
            let planned = work.iter().flat_map(|work| &work.blocks);
            planned.map(|planned| planned.repeat).sum()
        };
        write!(f, "{} blocks on {:?}", count(&self.work), self.source)?;
        if !self.guests.is_empty() {
            write!(f, ", {} of queries from elsewhere", count(&self.guests))?;
        }
        match &self.exchange {
            Some(exchange) => write!(f, "; meanwhile {exchange}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let describe = |message: &Option<Message>| match message {
            Some(message) => format!("{} rows with rank {}", message.row_count(), message.peer),
            None => "nothing".to_string(),
        };
        let (send, receive) = (describe(&self.send), describe(&self.receive));
        write!(f, "send {send}, receive {receive}")?;
        for (verb, message) in [
            ("send", &self.send_queries),
            ("receive", &self.receive_queries),
        ] {
            if message.is_some() {
                write!(f, ", {verb} queries: {}", describe(message))?;
            }
        }
        Ok(())
    }
}
