//! The keys and values of a sequence that grows token by token: [`KeyValueCache`].

mod error;
mod growth;
mod rows;
mod terms;

use ring_comm::{CommError, Communicator, Rank, buffer::HostBuffer};
use ring_kernels::{Block, HeadBlocks, Kernels, KeyValue, Problem, Tensor};

pub use self::error::CacheError;
use self::{
    growth::Growth,
    rows::GrowingRows,
    terms::{checksum, fields},
};
use crate::{
    error::Error,
    pattern::MAX_LENGTH,
    place::{Piece, Place, Shard},
    plan::{PlannedBlock, rows_of},
    selection::{EntryClass, HeadClass, entry_classes, head_classes, overlaps, segment_pairs},
    spec::{AttentionSpec, SpecError},
    strategy::Strategy,
};

/// Rows that one rank takes in a row, unless said otherwise.
const CHUNK: usize = 64;

/// A rank's part of the keys and values of a sequence: its shard of the prompt, and then its share of the tokens after it.
///
/// New tokens go to the rank with the fewest rows, a chunk of them at a time; all ranks know by themselves whose turn it is. So a rank
/// holds O(N/P) rows however long the sequence grows, and [`decode`](crate::decode) attends to all of them.
#[derive(Debug)]
pub struct KeyValueCache {
    /// That of the prompt, without dropout.
    spec: AttentionSpec,
    rank: Rank,
    entries: Vec<EntryClass>,
    heads: Vec<HeadClass>,
    growth: Growth,
    /// What the own rows are, ascending.
    pieces: Vec<Piece>,
    key: GrowingRows,
    value: GrowingRows,
    /// Positions of all ranks.
    length: usize,
    /// The blocks of the tokens at hand; kept for their memory.
    work: Vec<HeadBlocks>,
    /// With the queries and keys of the tokens at hand.
    problem: Problem,
    computation: u64,
    note: u64,
    /// Whether the ranks have compared the computation in words.
    agreed: bool,
    failed: bool,
}

impl KeyValueCache {
    /// The cache of a prompt, from this rank's keys and values of it, `[batch, kv_heads, own positions, head_dim]`: those that the
    /// attention of the prompt had. `spec` is that of the prompt, which may be empty; its dropout is not used.
    ///
    /// # Errors
    /// [`Error::Cache`] for a pattern that is not causal, documents, padding, cross-attention, tensors that are too short;
    /// [`Error::DType`], [`Error::Spec`], and [`Error::Kernel`] if there is no memory.
    pub fn new(
        kernels: &impl Kernels<HostBuffer>,
        spec: &AttentionSpec,
        rank: Rank,
        key: Tensor<'_, HostBuffer>,
        value: Tensor<'_, HostBuffer>,
    ) -> Result<Self, Error> {
        // However the prompt was divided, its cache is by positions.
        let spec = AttentionSpec {
            dropout: 0.0,
            strategy: Strategy::Ring,
            ..spec.clone()
        };
        let mut cache = Self::empty(spec.checked()?, rank)?;
        let rows = cache.problem.keys;
        cache.check_tensor("key", key, rows)?;
        cache.check_tensor("value", value, rows)?;
        cache.make_room(kernels, 0, rows)?;
        cache.key.write(key, 0..rows, 0);
        cache.value.write(value, 0..rows, 0);
        Ok(cache)
    }

    /// Knows its rows of the prompt, but does not have them.
    fn empty(spec: AttentionSpec, rank: Rank) -> Result<Self, Error> {
        error::check(&spec)?;
        let ranks = spec.world_size;
        if rank >= ranks {
            return Err(SpecError::Rank {
                rank,
                world_size: ranks,
            }
            .into());
        }
        let rows = |rank| spec.key_sharding.shard_len(spec.key_length, ranks, rank);
        let growth = Growth::new((0..ranks).map(rows).collect(), CHUNK);
        // Positions of any later token too.
        let entries = entry_classes(&AttentionSpec {
            key_length: MAX_LENGTH,
            ..spec.clone()
        });
        let place = Place::of(&spec, rank);
        let heads = head_classes(&spec, place);
        let work = |(entries, heads): (&EntryClass, &HeadClass)| HeadBlocks {
            entries: entries.entries.clone(),
            kv_heads: heads.kv_heads.clone(),
            blocks: Vec::new(),
        };
        let pairs = entries
            .iter()
            .flat_map(|entries| heads.iter().map(move |heads| (entries, heads)));
        let shape = [spec.shape.batch, spec.shape.kv_heads, spec.shape.head_dim];
        Ok(Self {
            rank,
            work: pairs.map(work).collect(),
            growth,
            pieces: Shard::keys(&spec, place).pieces,
            key: GrowingRows::new(shape, spec.dtype),
            value: GrowingRows::new(shape, spec.dtype),
            length: spec.key_length,
            problem: spec.problem(rank),
            computation: checksum(&fields(&spec, CHUNK)),
            note: 0,
            agreed: false,
            failed: false,
            entries,
            heads,
            spec,
        })
    }

    /// The same cache, new tokens dealt out to ranks in chunks of so many (at least 1; 64 by default). Ranks must give the same.
    #[must_use]
    pub fn with_chunk(self, chunk: usize) -> Self {
        let chunk = chunk.max(1);
        let ranks = 0..self.spec.world_size;
        let rows = ranks.map(|rank| self.growth.rows(rank)).collect();
        Self {
            growth: Growth::new(rows, chunk),
            computation: checksum(&fields(&self.spec, chunk)),
            ..self
        }
    }

    /// Positions of the sequence so far, over all ranks: where the next token stands.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Rows that a rank holds of it.
    pub fn rows(&self, rank: Rank) -> usize {
        self.growth.rows(rank)
    }

    /// Bytes of keys and values that this rank has room for.
    pub fn bytes(&self) -> usize {
        self.key.bytes() + self.value.bytes()
    }

    /// The computation of the prompt.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Has the ranks compare `note` with the next tokens: a checksum of all tokens so far, say, so that a rank that missed one, or
    /// chose another, is found out. Without notes they compare the number of positions.
    pub fn note(&mut self, note: u64) {
        self.note = note;
    }

    /// Has the ranks compare the computation, before the first tokens: for an error that says in what they differ.
    pub(crate) fn agree(
        &mut self,
        communicator: &Communicator<HostBuffer>,
    ) -> Result<(), CommError> {
        if !self.agreed {
            let fields = fields(&self.spec, self.growth.chunk());
            communicator.agree_once("decoding", &fields)?;
            self.agreed = true;
        }
        Ok(())
    }

    /// What ranks compare whenever they decode.
    pub(crate) fn terms(&self) -> [(&'static str, u64); 3] {
        [
            ("checksum of the computation", self.computation),
            ("positions in the cache", self.length as u64),
            ("note on the tokens", self.note),
        ]
    }

    /// What kernels see of the tokens at hand.
    pub(crate) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The blocks of the tokens at hand.
    pub(crate) fn work(&self) -> &[HeadBlocks] {
        &self.work
    }

    /// The own rows.
    pub(crate) fn source(&self) -> KeyValue<'_, HostBuffer> {
        KeyValue::Own {
            key: self.key.tensor(),
            value: self.value.tensor(),
        }
    }

    /// Whether a decoding failed; marks this one as failed until it is known not to have.
    pub(crate) fn begin(&mut self) -> Result<(), CacheError> {
        match std::mem::replace(&mut self.failed, true) {
            true => Err(CacheError::Failed),
            false => Ok(()),
        }
    }

    /// Takes note of a decoding that did not fail, or that failed before anything was done.
    pub(crate) fn end(&mut self) {
        self.failed = false;
    }

    /// Takes the own rows of `count` tokens that stand after all others, and finds the blocks of their queries.
    pub(crate) fn append(
        &mut self,
        kernels: &impl Kernels<HostBuffer>,
        key: Tensor<'_, HostBuffer>,
        value: Tensor<'_, HostBuffer>,
        count: usize,
    ) -> Result<(), Error> {
        let used = self.problem.keys;
        let own: Vec<_> = self.growth.deal(count, self.rank).collect();
        let rows = used + own.iter().map(ExactSizeIterator::len).sum::<usize>();
        self.make_room(kernels, used, rows)?;
        for range in own {
            let at = self.problem.keys;
            self.key.write(key, range.clone(), at);
            self.value.write(value, range.clone(), at);
            self.problem.keys += range.len();
            self.add_piece(Piece {
                start: (self.length + range.start) as i64,
                end: (self.length + range.end) as i64,
                first_row: at,
            });
        }
        self.problem.queries = count;
        self.find_blocks(count);
        self.length += count;
        Ok(())
    }

    fn make_room(
        &mut self,
        kernels: &impl Kernels<HostBuffer>,
        used: usize,
        rows: usize,
    ) -> Result<(), Error> {
        let rank = self.rank;
        let failed = |source| Error::Kernel { rank, source };
        self.key.reserve(kernels, used, rows).map_err(failed)?;
        self.value.reserve(kernels, used, rows).map_err(failed)
    }

    fn add_piece(&mut self, piece: Piece) {
        match self.pieces.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => self.pieces.push(piece),
        }
    }

    /// What `count` queries after the cached positions see of the own rows, by the rules of all plans.
    fn find_blocks(&mut self, count: usize) {
        let first = self.length as i64;
        let queries = Shard {
            pieces: vec![Piece {
                start: first,
                end: first + count as i64,
                first_row: 0,
            }],
        };
        let reach = self.reach(first);
        let seen = self.pieces.partition_point(|piece| piece.end <= reach);
        let keys = Shard {
            pieces: self.pieces[seen..].to_vec(),
        };
        let mut work = self.work.iter_mut();
        for entries in &self.entries {
            let overlaps = overlaps(&self.spec, entries, &queries, &keys);
            for (class, work) in self.heads.iter().zip(&mut work) {
                work.blocks.clear();
                for pairs in segment_pairs(&self.spec, class, &overlaps) {
                    let planned = PlannedBlock {
                        block: Block {
                            queries: rows_of(&pairs.query_piece, pairs.queries),
                            keys: rows_of(&pairs.key_piece, pairs.keys),
                            branch: pairs.branch as u32,
                        },
                        repeat: pairs.repeat,
                        period: pairs.period as usize,
                    };
                    work.blocks.extend(planned.blocks());
                }
            }
        }
    }

    /// No query at `first` or after it sees a key before this position.
    fn reach(&self, first: i64) -> i64 {
        let pattern = &self.spec.pattern;
        let segment = |length: Option<usize>| {
            length.map_or(0, |length| first.div_euclid(length as i64) * length as i64)
        };
        let branches = pattern.branches().iter();
        let segments = branches.map(|branch| segment(branch.segment_length)).min();
        let window = pattern.mask().left.map_or(0, |left| {
            first.saturating_sub(i64::try_from(left).unwrap_or(i64::MAX))
        });
        segments.unwrap_or(0).max(window)
    }

    /// Checks that a tensor has so many rows of the cache's heads.
    pub(crate) fn check_tensor(
        &self,
        what: &'static str,
        tensor: Tensor<'_, HostBuffer>,
        rows: usize,
    ) -> Result<(), Error> {
        let (got, expected) = (tensor.data.dtype(), self.spec.dtype);
        if got != expected {
            return Err(Error::DType {
                what,
                got,
                expected,
            });
        }
        let shape = self.spec.shape;
        let (layout, got) = (tensor.layout, tensor.data.len());
        let bases = layout.head_base.iter().take(shape.kv_heads);
        if shape.batch == 0 || rows == 0 {
            return Ok(());
        }
        let end = |&base: &usize| {
            let last_batch = layout.batch_stride.checked_mul(shape.batch - 1)?;
            let last_row = layout.row_stride.checked_mul(rows - 1)?;
            base.checked_add(last_batch)?
                .checked_add(last_row)?
                .checked_add(shape.head_dim)
        };
        let all_heads = layout.head_base.len() >= shape.kv_heads;
        let ends = bases.map(|base| end(base).unwrap_or(usize::MAX));
        let expected = match all_heads {
            true => ends.max().unwrap_or(0),
            false => usize::MAX,
        };
        if expected > got {
            return Err(CacheError::Size {
                what,
                got,
                expected,
            }
            .into());
        }
        Ok(())
    }
}
