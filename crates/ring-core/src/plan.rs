//! What one rank does, as data: [`Plan`].
//!
//! A plan is a pure function of the computation and the rank. It is the one source for execution, for estimates and for
//! simulation; every rank can derive every other rank's plan. Row sets are arithmetic progressions, so its size does not
//! depend on the length of the sequence (for self-attention under contiguous or zigzag sharding); it grows with the number of
//! documents packed into it, and of batch entries that have others.
//!
//! Rows go straight from their owner to whoever needs them: in the hop of distance `d`, rank `p` sends to `p + d` and receives
//! from `p - d` (modulo the number of ranks). That needs no forwarding, moves each row once, and is the least number of bytes
//! for every pattern, as long as batch entries do not differ (a row that one of them needs travels for all); relaying from neighbour to neighbour would move rows through ranks that do not need them.

use std::fmt;

use ring_comm::Rank;
use ring_kernels::{Block, HeadBlocks, HeadRows, Mask, PackedRows, Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    progression::{Progression, disjoint_cover},
    schedule::{OnDemand, Schedule},
    selection::{
        EntryClass, HeadClass, Overlap, Piece, SegmentPairs, Shard, entry_classes, head_classes,
        overlaps, segment_pairs,
    },
    spec::{AttentionSpec, SpecError},
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
    /// Key/value heads.
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
    /// How the rows lie in the message.
    pub fn packed(&self, problem: &Problem) -> PackedRows {
        PackedRows::new(problem, self.rows.clone())
    }

    /// Rows of all heads, of one batch entry.
    pub fn row_count(&self) -> usize {
        self.rows
            .iter()
            .map(|entry| entry.kv_heads.len() * entry.count())
            .sum()
    }
}

/// The messages to post before a step's blocks are computed, and to wait for afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Distance of the hop: receive from `rank - distance`, send to `rank + distance`. Also the step in message tags.
    pub distance: usize,
    /// Own rows that a peer needs.
    pub send: Option<Message>,
    /// A peer's rows that this rank needs.
    pub receive: Option<Message>,
}

/// One step: post `exchange`, compute `work` meanwhile, wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where the keys and values of `work` are.
    pub source: Source,
    /// What to compute.
    pub work: Vec<HeadWork>,
    /// What to exchange meanwhile.
    pub exchange: Option<Exchange>,
}

impl Step {
    /// The blocks to compute, written out one by one.
    pub fn head_blocks(&self) -> Vec<HeadBlocks> {
        self.work
            .iter()
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
    steps: Vec<Step>,
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
        let mut steps = vec![Step {
            source: Source::Own,
            work: planner.own_work(),
            exchange: None,
        }];
        for distance in 1..spec.world_size {
            if let Some((exchange, next)) = planner.hop(distance) {
                let current = steps.last_mut().expect("there is always the own step");
                current.exchange = Some(exchange);
                steps.push(next);
            }
        }
        if steps
            .last()
            .is_some_and(|step| step.source == Source::Nothing)
            && steps.len() > 1
        {
            steps.pop();
        }
        Ok(Self {
            spec,
            rank,
            steps,
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

    /// The steps, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The sizes this rank's kernels see.
    pub fn problem(&self) -> Problem {
        self.spec.problem(self.rank)
    }

    /// The steps as they are executed; made when first asked for.
    pub(crate) fn schedule(&self) -> &Schedule {
        self.schedule.of(self)
    }

    /// The exchanges, in order.
    pub fn exchanges(&self) -> impl Iterator<Item = &Exchange> {
        self.steps.iter().filter_map(|step| step.exchange.as_ref())
    }

    /// Admitted (query, key) pairs over all query heads and batch entries: the work of this rank. Each takes `2 head_dim`
    /// multiplications and additions in a forward pass, `5 head_dim` in a backward pass.
    pub fn pairs(&self) -> u128 {
        let group = self.spec.shape.query_heads / self.spec.shape.kv_heads;
        let mask = self.spec.pattern.mask();
        self.steps
            .iter()
            .flat_map(|step| &step.work)
            .map(|work| {
                let pairs: u128 = work
                    .blocks
                    .iter()
                    .map(|planned| planned.repeat as u128 * block_pairs(&planned.block, mask))
                    .sum();
                pairs * (work.entries.len() * work.kv_heads.len() * group) as u128
            })
            .sum()
    }
}

impl fmt::Display for Plan {
    /// One line a step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let describe = |message: &Option<Message>| match message {
            Some(message) => format!("{} rows with rank {}", message.row_count(), message.peer),
            None => "nothing".to_string(),
        };
        writeln!(
            f,
            "rank {} of {}: {}",
            self.rank, self.spec.world_size, self.spec.pattern
        )?;
        for (index, step) in self.steps.iter().enumerate() {
            let blocks: usize = step
                .work
                .iter()
                .flat_map(|work| &work.blocks)
                .map(|planned| planned.repeat)
                .sum();
            write!(f, "  step {index}: {blocks} blocks on {:?}", step.source)?;
            if let Some(exchange) = &step.exchange {
                write!(
                    f,
                    "; meanwhile send {}, receive {}",
                    describe(&exchange.send),
                    describe(&exchange.receive)
                )?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Rows of one hop for one head class, with what each set of pairs reads of them. Rows travel for all batch entries if one
/// needs them.
struct ClassNeeds {
    /// Of each entry class.
    pairs: Vec<Vec<SegmentPairs>>,
    runs: Vec<Progression>,
}

/// What the planning of one rank has in common.
struct Planner<'a> {
    spec: &'a AttentionSpec,
    rank: Rank,
    classes: Vec<HeadClass>,
    entries: Vec<EntryClass>,
    queries: Shard,
    keys: Shard,
}

impl<'a> Planner<'a> {
    fn new(spec: &'a AttentionSpec, rank: Rank) -> Self {
        Self {
            spec,
            rank,
            classes: head_classes(spec),
            entries: entry_classes(spec),
            queries: Shard::queries(spec, rank),
            keys: Shard::keys(spec, rank),
        }
    }

    /// The blocks of the rank's own keys.
    fn own_work(&self) -> Vec<HeadWork> {
        let overlaps = self.overlaps(&self.queries, &self.keys);
        self.work(|entry, class| {
            segment_pairs(self.spec, &self.classes[class], &overlaps[entry])
                .iter()
                .map(|pairs| PlannedBlock {
                    block: Block {
                        queries: rows_of(&pairs.query_piece, pairs.queries),
                        keys: rows_of(&pairs.key_piece, pairs.keys),
                        branch: pairs.branch as u32,
                    },
                    repeat: pairs.repeat,
                    period: pairs.period as usize,
                })
                .collect()
        })
    }

    /// What two shards have in common, in each entry class.
    fn overlaps(&self, queries: &Shard, keys: &Shard) -> Vec<Vec<Overlap>> {
        let of_class = |class| overlaps(self.spec, class, queries, keys);
        self.entries.iter().map(of_class).collect()
    }

    /// Work of every entry class and head class that has blocks; `blocks` is given their indices.
    fn work(&self, blocks: impl Fn(usize, usize) -> Vec<PlannedBlock>) -> Vec<HeadWork> {
        let mut all = Vec::new();
        for (entry, entries) in self.entries.iter().enumerate() {
            for (index, class) in self.classes.iter().enumerate() {
                let blocks = blocks(entry, index);
                if !blocks.is_empty() {
                    all.push(HeadWork {
                        entries: entries.entries.clone(),
                        kv_heads: class.kv_heads.clone(),
                        blocks,
                    });
                }
            }
        }
        all
    }

    /// The exchange of a hop and the step that computes what it brought; `None` if nothing travels.
    fn hop(&self, distance: usize) -> Option<(Exchange, Step)> {
        let ranks = self.spec.world_size;
        let source = (self.rank + ranks - distance) % ranks;
        let destination = (self.rank + distance) % ranks;
        let outgoing = self.needs(&Shard::queries(self.spec, destination), &self.keys);
        let source_keys = Shard::keys(self.spec, source);
        let incoming = self.needs(&self.queries, &source_keys);
        let send = self.message(destination, &outgoing, &self.keys);
        let receive = self.message(source, &incoming, &source_keys);
        if send.is_none() && receive.is_none() {
            return None;
        }
        let next = Step {
            source: match receive {
                Some(_) => Source::Slot(source),
                None => Source::Nothing,
            },
            work: self.slot_work(&incoming),
            exchange: None,
        };
        let exchange = Exchange {
            distance,
            send,
            receive,
        };
        Some((exchange, next))
    }

    /// What `queries` need of `keys`, for every head class.
    fn needs(&self, queries: &Shard, keys: &Shard) -> Vec<ClassNeeds> {
        let overlaps = self.overlaps(queries, keys);
        let of_class = |class| {
            let pairs: Vec<Vec<SegmentPairs>> = overlaps
                .iter()
                .map(|overlaps| segment_pairs(self.spec, class, overlaps))
                .map(|pairs| pairs.iter().flat_map(copies).collect())
                .collect();
            let pieces = keys.pieces.iter();
            ClassNeeds {
                runs: pieces.flat_map(|piece| runs_in(piece, &pairs)).collect(),
                pairs,
            }
        };
        self.classes.iter().map(of_class).collect()
    }

    /// The message that carries `needs` of the rows in `keys`.
    fn message(&self, peer: Rank, needs: &[ClassNeeds], keys: &Shard) -> Option<Message> {
        let rows: Vec<HeadRows> = self
            .classes
            .iter()
            .zip(needs)
            .filter(|(_, needs)| !needs.runs.is_empty())
            .map(|(class, needs)| HeadRows {
                kv_heads: class.kv_heads.clone(),
                runs: needs
                    .runs
                    .iter()
                    .map(|run| rows_of(piece_of(keys, *run), *run))
                    .collect(),
            })
            .collect();
        (!rows.is_empty()).then_some(Message { peer, rows })
    }

    /// The blocks of a slot that holds `needs`.
    fn slot_work(&self, needs: &[ClassNeeds]) -> Vec<HeadWork> {
        self.work(|entry, class| needs[class].slot_blocks(entry))
    }
}

impl ClassNeeds {
    /// Every set of pairs of an entry class as blocks on the packed runs.
    fn slot_blocks(&self, entry: usize) -> Vec<PlannedBlock> {
        let mut blocks = Vec::new();
        for pairs in &self.pairs[entry] {
            let mut base = 0;
            for run in &self.runs {
                let keys = pairs.keys.intersect(run);
                if let Some(first) = keys.first() {
                    let run_first = run.first().expect("a run is never empty");
                    blocks.push(PlannedBlock {
                        block: Block {
                            queries: rows_of(&pairs.query_piece, pairs.queries),
                            keys: Rows {
                                first_row: base + ((first - run_first) / run.stride()) as usize,
                                row_step: (keys.stride() / run.stride()).max(1) as usize,
                                count: keys.count(),
                                first_position: first,
                                position_step: keys.stride(),
                            },
                            branch: pairs.branch as u32,
                        },
                        repeat: 1,
                        period: 0,
                    });
                }
                base += run.count();
            }
        }
        blocks
    }
}

/// The rows of one piece that `pairs` read, each once. Runs never cross pieces: their rows are not neighbours.
fn runs_in(piece: &Piece, pairs: &[Vec<SegmentPairs>]) -> Vec<Progression> {
    let mut sets: Vec<Progression> = Vec::new();
    let pairs = pairs.iter().flatten();
    for pairs in pairs.filter(|pairs| pairs.key_piece == *piece) {
        // Several pieces of queries want the same rows, or the first of them.
        let same = |set: &&mut Progression| {
            set.first() == pairs.keys.first() && set.stride() == pairs.keys.stride()
        };
        match sets.iter_mut().find(same) {
            Some(set) if set.last() < pairs.keys.last() => *set = pairs.keys,
            Some(_) => {}
            None => sets.push(pairs.keys),
        }
    }
    disjoint_cover(sets)
}

/// A progression of positions as rows of the piece that holds them.
pub(crate) fn rows_of(piece: &Piece, positions: Progression) -> Rows {
    let first = positions.first().expect("pruned sets are never empty");
    Rows {
        first_row: piece.row(first),
        row_step: positions.stride() as usize,
        count: positions.count(),
        first_position: first,
        position_step: positions.stride(),
    }
}

/// The piece that holds a run.
fn piece_of(shard: &Shard, run: Progression) -> &Piece {
    let first = run.first().expect("a run is never empty");
    let after = shard.pieces.partition_point(|piece| piece.start <= first);
    &shard.pieces[after - 1]
}

/// Repeated pairs, written out.
fn copies(pairs: &SegmentPairs) -> impl Iterator<Item = SegmentPairs> + use<> {
    let pairs = *pairs;
    (0..pairs.repeat as i64).map(move |copy| SegmentPairs {
        queries: pairs.queries.shifted(copy * pairs.period),
        keys: pairs.keys.shifted(copy * pairs.period),
        repeat: 1,
        period: 0,
        ..pairs
    })
}

/// Admitted pairs of a block.
fn block_pairs(block: &Block, mask: Mask) -> u128 {
    let all = block.queries.count as u128 * block.keys.count as u128;
    let up_to = |bound: Option<u64>| bound.map(|bound| i64::try_from(bound).unwrap_or(i64::MAX));
    let seen = up_to(mask.right).map_or(all, |right| pairs_up_to(block, right));
    // Those further back than the left bound.
    let left = up_to(mask.left).and_then(|left| left.checked_add(1));
    seen - left.map_or(0, |left| pairs_up_to(block, -left))
}

/// Pairs of a block whose key stands at most `ahead` positions after the query.
fn pairs_up_to(block: &Block, ahead: i64) -> u128 {
    let (queries, keys) = (&block.queries, &block.keys);
    if queries.count == 0 || keys.count == 0 {
        return 0;
    }
    // In the order of positions all below 2^42, so that no sum overflows.
    let ahead = ahead.clamp(-(1 << 50), 1 << 50);
    let reach = |i: usize| queries.position(i) + ahead;
    // Queries below the first key see nothing, queries at or after the last key see all; between, floor((q - k0)/ks) + 1.
    let first_query_at = |position: i64| {
        let distance = (position - reach(0)).max(0);
        let steps = (distance + queries.position_step - 1) / queries.position_step;
        (steps as usize).min(queries.count)
    };
    let some = first_query_at(keys.first_position);
    let all = first_query_at(keys.position(keys.count - 1));
    let between = (all - some) as u128;
    let first = (reach(some) - keys.first_position).max(0) as u128;
    between
        + floor_sum(
            between,
            keys.position_step as u128,
            queries.position_step as u128,
            first,
        )
        + (queries.count - all) as u128 * keys.count as u128
}

/// `sum of floor((a i + b) / m) for i in 0..n`, in the time of Euclid's algorithm.
fn floor_sum(n: u128, m: u128, a: u128, b: u128) -> u128 {
    if n == 0 {
        return 0;
    }
    let mut sum = 0;
    if a >= m {
        sum += n * (n - 1) / 2 * (a / m);
    }
    if b >= m {
        sum += n * (b / m);
    }
    let (a, b) = (a % m, b % m);
    let last = a * n + b;
    if last >= m {
        sum += floor_sum(last / m, a, m, last % m);
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(first_position: i64, position_step: i64, count: usize) -> Rows {
        Rows {
            first_row: 0,
            row_step: 1,
            count,
            first_position,
            position_step,
        }
    }

    proptest! {
        #[test]
        fn pairs_are_counted_without_enumeration(
            q0 in -20_i64..40, qs in 1_i64..7, nq in 1_usize..30,
            k0 in -20_i64..40, ks in 1_i64..7, nk in 1_usize..30,
            left in prop::option::of(0_u64..60), right in prop::option::of(0_u64..60),
        ) {
            let block = Block { queries: rows(q0, qs, nq), keys: rows(k0, ks, nk), branch: 0 };
            let mask = Mask { left, right };
            let brute = (0..nq)
                .flat_map(|i| (0..nk).map(move |j| (i, j)))
                .filter(|&(i, j)| mask.admits(block.queries.position(i), block.keys.position(j)))
                .count();
            prop_assert_eq!(block_pairs(&block, mask), brute as u128);
        }
    }

    #[test]
    fn bounds_beyond_all_positions_bound_nothing() {
        let block = Block {
            queries: rows(-5, 3, 40),
            keys: rows(2, 2, 50),
            branch: 0,
        };
        for far in [1 << 41, i64::MAX as u64, u64::MAX] {
            let mask = Mask {
                left: Some(far),
                right: Some(far),
            };
            assert_eq!(block_pairs(&block, mask), 2000);
        }
    }
}
