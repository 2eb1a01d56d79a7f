//! What makes the steps of a plan: [`Planner`].

use std::collections::BTreeMap;

use ring_comm::Rank;
use ring_kernels::{Block, HeadRows, Rows};

use crate::{
    estimate::{QueryBytes, key_bytes},
    place::{Piece, Place, Shard},
    plan::{Exchange, HeadWork, Message, PlannedBlock, Source, Step},
    progression::{Progression, disjoint_cover},
    selection::{
        EntryClass, HeadClass, Overlap, SegmentPairs, entry_classes, head_classes, overlaps,
        segment_pairs,
    },
    spec::AttentionSpec,
    strategy::Strategy,
};

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
pub(crate) enum Travellers {
    /// Keys and values, to the queries.
    Keys,
    /// Those, or queries to the keys, whichever is fewer bytes in a backward pass.
    FewestBytes,
}

/// What the planning of one rank has in common.
pub(crate) struct Planner<'a> {
    spec: &'a AttentionSpec,
    place: Place,
    classes: Vec<HeadClass>,
    entries: Vec<EntryClass>,
    queries: Shard,
    keys: Shard,
}

impl<'a> Planner<'a> {
    pub(crate) fn new(spec: &'a AttentionSpec, rank: Rank) -> Self {
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

    /// Where the rank stands.
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// The steps of a pass in which `travellers` travel.
    pub(crate) fn steps(&self, travellers: Travellers) -> Vec<Step> {
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
        if self.queries_travel(&outgoing, (&their_queries, &self.keys), travellers) {
            exchange.receive_queries = self.query_message(destination, &outgoing, &their_queries);
            next.guests = self.work(|entry, class| outgoing[class].guest_blocks(entry));
        } else {
            exchange.send = self.message(destination, &outgoing, &self.keys);
        }
        if self.queries_travel(&incoming, (&self.queries, &source_keys), travellers) {
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

    /// Whether those of `queries` that `needs` are about go to the keys they see.
    fn queries_travel(
        &self,
        needs: &[ClassNeeds],
        (queries, keys): (&Shard, &Shard),
        travellers: Travellers,
    ) -> bool {
        match travellers {
            Travellers::Keys => false,
            Travellers::FewestBytes => {
                // The sizes of messages do not depend on the rank.
                let rank = self.place.rank(self.spec);
                let problem = self.spec.problem(rank);
                let size = self.spec.dtype.size();
                let queries = self.query_message(rank, needs, queries);
                let queries = QueryBytes::of(&queries, &problem, size);
                let keys = self.message(rank, needs, keys);
                let there = key_bytes(&keys, &problem, size);
                let back = key_bytes(&keys, &problem, size_of::<f32>());
                queries.there + queries.back < there + back
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
