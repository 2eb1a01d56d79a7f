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

use std::{collections::BTreeMap, fmt};

use ring_comm::Rank;
use ring_kernels::{Block, HeadBlocks, HeadRows, Mask, Problem, Rows};
use serde::{Deserialize, Serialize};

use crate::{
    place::{Piece, Place, Shard},
    progression::{Progression, disjoint_cover},
    regroup::Regroup,
    schedule::{OnDemand, Schedule},
    selection::{
        EntryClass, HeadClass, Overlap, SegmentPairs, entry_classes, head_classes, overlaps,
        segment_pairs,
    },
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
    fn is_idle(&self) -> bool {
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
            regroup: Regroup::new(&spec, planner.place),
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
    /// Rows of keys that travel, if keys do.
    keys: Vec<Progression>,
}

/// What travels between two ranks of which one has queries that see keys of the other.
#[derive(Clone, Copy)]
enum Travellers {
    /// Keys and values, to the queries.
    Keys,
    /// Those, or queries to the keys, whichever is fewer bytes in a backward pass.
    FewestBytes,
}

/// What the planning of one rank has in common.
struct Planner<'a> {
    spec: &'a AttentionSpec,
    place: Place,
    classes: Vec<HeadClass>,
    entries: Vec<EntryClass>,
    queries: Shard,
    keys: Shard,
}

impl<'a> Planner<'a> {
    fn new(spec: &'a AttentionSpec, rank: Rank) -> Self {
        let place = Place::of(spec, rank);
        Self {
            spec,
            place,
            classes: head_classes(spec, place),
            entries: entry_classes(spec),
            queries: Shard::queries(spec, place),
            keys: Shard::keys(spec, place),
        }
    }

    fn steps(&self, travellers: Travellers) -> Vec<Step> {
        let mut steps = vec![Step {
            source: Source::Own,
            work: self.own_work(),
            guests: Vec::new(),
            exchange: None,
        }];
        for distance in 1..Place::ring_size(self.spec) {
            if let Some((exchange, next)) = self.hop(distance, travellers) {
                let current = steps.last_mut().expect("there is always the own step");
                current.exchange = Some(exchange);
                steps.push(next);
            }
        }
        steps.pop_if(|last| last.is_idle());
        steps
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
    fn hop(&self, distance: usize, travellers: Travellers) -> Option<(Exchange, Step)> {
        let ranks = Place::ring_size(self.spec);
        let source = self.place.further(self.spec, ranks - distance);
        let destination = self.place.further(self.spec, distance);
        let their_queries = Shard::queries(self.spec, destination);
        let outgoing = self.needs(&their_queries, &self.keys);
        let source_keys = Shard::keys(self.spec, source);
        let incoming = self.needs(&self.queries, &source_keys);
        let (source, destination) = (source.rank(self.spec), destination.rank(self.spec));

        let mut exchange = Exchange {
            distance,
            send: None,
            receive: None,
            send_queries: None,
            receive_queries: None,
        };
        let mut next = Step {
            source: Source::Nothing,
            work: Vec::new(),
            guests: Vec::new(),
            exchange: None,
        };
        if self.queries_travel(&outgoing, travellers) {
            exchange.receive_queries = self.query_message(destination, &outgoing, &their_queries);
            next.guests = self.work(|entry, class| outgoing[class].guest_blocks(entry));
        } else {
            exchange.send = self.message(destination, &outgoing, &self.keys);
        }
        if self.queries_travel(&incoming, travellers) {
            exchange.send_queries = self.query_message(source, &incoming, &self.queries);
        } else {
            exchange.receive = self.message(source, &incoming, &source_keys);
            next.work = self.work(|entry, class| incoming[class].slot_blocks(entry));
        }
        if exchange.receive.is_some() {
            next.source = Source::Slot(source);
        }
        let travels = exchange.messages().next().is_some();
        travels.then_some((exchange, next))
    }

    /// Whether queries go to the keys they see, of those that `needs` are about.
    fn queries_travel(&self, needs: &[ClassNeeds], travellers: Travellers) -> bool {
        match travellers {
            Travellers::Keys => false,
            Travellers::FewestBytes => {
                let rows =
                    |runs: &[Progression]| -> usize { runs.iter().map(Progression::count).sum() };
                let classes = || self.classes.iter().zip(needs);
                let keys: usize = classes()
                    .map(|(class, needs)| class.kv_heads.len() * rows(&needs.keys))
                    .sum();
                let queries: usize = classes()
                    .map(|(class, needs)| class.kv_heads.len() * rows(&needs.queries()))
                    .sum();
                let bytes = BackwardBytes::of(self.spec);
                queries * self.group() * bytes.query < keys * bytes.key_value
            }
        }
    }

    fn group(&self) -> usize {
        self.spec.shape.query_heads / self.spec.shape.kv_heads
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
            let keys = match self.spec.strategy {
                Strategy::AllGather => keys.pieces.iter().map(Piece::positions).collect(),
                _ => runs_of(&pairs, |pairs| (pairs.key_piece, pairs.keys)),
            };
            ClassNeeds { pairs, keys }
        };
        self.classes.iter().map(of_class).collect()
    }

    /// The message that carries the keys and values of `needs`, which are in `shard`.
    fn message(&self, peer: Rank, needs: &[ClassNeeds], shard: &Shard) -> Option<Message> {
        let of_class = |(class, needs): (&HeadClass, &ClassNeeds)| {
            head_rows(class.kv_heads.clone(), &needs.keys, shard)
        };
        let rows: Vec<HeadRows> = self
            .classes
            .iter()
            .zip(needs)
            .filter_map(of_class)
            .collect();
        (!rows.is_empty()).then_some(Message { peer, rows })
    }

    /// The message that carries the queries of `needs`, which are in `shard`.
    fn query_message(&self, peer: Rank, needs: &[ClassNeeds], shard: &Shard) -> Option<Message> {
        let group = self.group();
        let query_heads = |kv_head: &usize| kv_head * group..(kv_head + 1) * group;
        let of_class = |(class, needs): (&HeadClass, &ClassNeeds)| {
            let heads = class.kv_heads.iter().flat_map(query_heads).collect();
            head_rows(heads, &needs.queries(), shard)
        };
        let rows: Vec<HeadRows> = self
            .classes
            .iter()
            .zip(needs)
            .filter_map(of_class)
            .collect();
        (!rows.is_empty()).then_some(Message { peer, rows })
    }
}

/// What one row of one head costs on the wire in a backward pass, there and back.
struct BackwardBytes {
    /// A key and a value, and their f32 gradients.
    key_value: usize,
    /// A query and the gradient of its output, log-sum-exp and delta, and the f32 gradient of the query.
    query: usize,
}

impl BackwardBytes {
    fn of(spec: &AttentionSpec) -> Self {
        let (dim, number) = (spec.shape.head_dim, size_of::<f32>());
        let inputs = 2 * dim * spec.dtype.size();
        Self {
            key_value: inputs + 2 * dim * number,
            query: inputs + 2 * number + dim * number,
        }
    }
}

impl ClassNeeds {
    /// Rows of queries that travel, if queries do.
    fn queries(&self) -> Vec<Progression> {
        runs_of(&self.pairs, |pairs| (pairs.query_piece, pairs.queries))
    }

    /// Every set of pairs of an entry class as blocks of own queries and the packed keys.
    fn slot_blocks(&self, entry: usize) -> Vec<PlannedBlock> {
        let blocks = |pairs: &SegmentPairs| {
            let queries = rows_of(&pairs.query_piece, pairs.queries);
            let keys = packed_rows(pairs.keys, &self.keys);
            let branch = pairs.branch as u32;
            keys.into_iter()
                .map(move |keys| once(queries, keys, branch))
                .collect::<Vec<_>>()
        };
        self.pairs[entry].iter().flat_map(blocks).collect()
    }

    /// Every set of pairs of an entry class as blocks of packed queries and own keys.
    fn guest_blocks(&self, entry: usize) -> Vec<PlannedBlock> {
        let runs = self.queries();
        let blocks = |pairs: &SegmentPairs| {
            let keys = rows_of(&pairs.key_piece, pairs.keys);
            let queries = packed_rows(pairs.queries, &runs);
            let branch = pairs.branch as u32;
            queries
                .into_iter()
                .map(move |queries| once(queries, keys, branch))
                .collect::<Vec<_>>()
        };
        self.pairs[entry].iter().flat_map(blocks).collect()
    }
}

/// A block without copies.
fn once(queries: Rows, keys: Rows, branch: u32) -> PlannedBlock {
    PlannedBlock {
        block: Block {
            queries,
            keys,
            branch,
        },
        repeat: 1,
        period: 0,
    }
}

/// Rows of `runs`, packed one run after the other, at which positions of `set` are.
fn packed_rows(set: Progression, runs: &[Progression]) -> Vec<Rows> {
    let mut rows = Vec::new();
    let mut base = 0;
    for run in runs {
        let common = set.intersect(run);
        if let Some(first) = common.first() {
            let run_first = run.first().expect("a run is never empty");
            rows.push(Rows {
                first_row: base + ((first - run_first) / run.stride()) as usize,
                row_step: (common.stride() / run.stride()).max(1) as usize,
                count: common.count(),
                first_position: first,
                position_step: common.stride(),
            });
        }
        base += run.count();
    }
    rows
}

/// The rows of `runs` for `heads`; `None` if there are none.
fn head_rows(heads: Vec<usize>, runs: &[Progression], shard: &Shard) -> Option<HeadRows> {
    let rows = |run: &Progression| {
        let first = run.first().expect("a run is never empty");
        rows_of(shard.piece_of(first), *run)
    };
    (!runs.is_empty()).then(|| HeadRows {
        heads,
        runs: runs.iter().map(rows).collect(),
    })
}

/// The rows that `pairs` read on one side, which `pick` tells with their piece: each row once, ascending. Runs never cross
/// pieces: their rows are not neighbours.
fn runs_of(
    pairs: &[Vec<SegmentPairs>],
    pick: impl Fn(&SegmentPairs) -> (Piece, Progression),
) -> Vec<Progression> {
    let mut of_pieces: BTreeMap<i64, Vec<Progression>> = BTreeMap::new();
    for (piece, rows) in pairs.iter().flatten().map(pick) {
        let sets = of_pieces.entry(piece.start).or_default();
        // Several pieces of the other side want the same rows, or the first of them.
        let same =
            |set: &&mut Progression| set.first() == rows.first() && set.stride() == rows.stride();
        match sets.iter_mut().find(same) {
            Some(set) if set.last() < rows.last() => *set = rows,
            Some(_) => {}
            None => sets.push(rows),
        }
    }
    of_pieces.into_values().flat_map(disjoint_cover).collect()
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
