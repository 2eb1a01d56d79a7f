//! Heads divided among ranks: [`Regroup`], who holds which rows and heads while attention is computed, and the exchange that
//! brings them there and back.

use std::ops::Range;

use ring_comm::{
    Payload, Rank,
    buffer::{Buffer, DType},
};
use ring_kernels::{HeadRows, Kernels, PackedRows, Problem, Rows, Tensor, TensorShape};
use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    exchange::{Exchanger, Letter},
    place::{Place, Shard},
    sharding::{Sharding, Span},
    spec::AttentionSpec,
};

/// What the ranks that hold the same positions exchange: each gives every other its own rows of the other's heads, computes with
/// all rows of its heads, and gives the results back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regroup {
    /// These ranks in order, this one among them.
    pub members: Vec<Member>,
}

/// One of the ranks that hold the same positions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The rank.
    pub rank: Rank,
    /// The key/value heads that it computes with.
    pub kv_heads: Range<usize>,
    /// Where its own queries are among those of all members.
    pub queries: Vec<Rows>,
    /// Where its own keys are among those of all members.
    pub keys: Vec<Rows>,
}

impl Regroup {
    /// The exchange at a place; `None` if heads are not divided.
    pub(crate) fn new(spec: &AttentionSpec, place: Place) -> Option<Self> {
        let ranks = place.ranks(spec);
        if ranks.len() == 1 {
            return None;
        }
        let (queries, keys) = (Shard::queries(spec, place), Shard::keys(spec, place));
        let member = |(index, rank): (usize, Rank)| {
            let own = |sharding: Sharding, length, offset, all: &Shard| {
                let spans = sharding.spans(length, spec.world_size, rank);
                let rows = |span: &Span| all.rows(span.start as i64 + offset, span.len());
                spans.iter().map(rows).collect()
            };
            Member {
                rank,
                kv_heads: Place { index, ..place }.kv_heads(spec),
                queries: own(
                    spec.query_sharding,
                    spec.query_length,
                    spec.query_offset,
                    &queries,
                ),
                keys: own(spec.key_sharding, spec.key_length, 0, &keys),
            }
        };
        Some(Self {
            members: ranks.enumerate().map(member).collect(),
        })
    }

    /// Makes the problem of a rank's own tensors that of its part of the heads.
    pub(crate) fn divide(&self, problem: &mut Problem, rank: Rank) {
        let group = problem.group_size();
        let own = self.member(rank);
        let rows = |pick: fn(&Member) -> &Vec<Rows>| -> usize {
            let runs = self.members.iter().flat_map(pick);
            runs.map(|run| run.count).sum()
        };
        problem.kv_heads = own.kv_heads.len();
        problem.query_heads = own.kv_heads.len() * group;
        problem.queries = rows(|member| &member.queries);
        problem.keys = rows(|member| &member.keys);
        if let Some(slopes) = &problem.scores.alibi_slopes {
            let heads = own.kv_heads.start * group..own.kv_heads.end * group;
            problem.scores.alibi_slopes = Some(slopes[heads].into());
        }
    }

    fn member(&self, rank: Rank) -> &Member {
        let found = self.members.iter().find(|member| member.rank == rank);
        found.expect("a rank is a member of its own place")
    }
}

/// Which way rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// To those who compute with their heads.
    There,
    /// To those who own their positions.
    Back,
}

/// What rows are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Queries, outputs, and gradients of either.
    Queries,
    /// One number for each query.
    Statistics,
    /// Keys, values, and their gradients.
    Keys,
}

/// Tensors of one shape whose rows change ranks together.
pub(crate) struct Cargo<'a, B: Buffer> {
    pub(crate) payload: Payload,
    pub(crate) dtype: DType,
    pub(crate) kind: Kind,
    pub(crate) tensors: Vec<Tensor<'a, B>>,
}

/// The exchange, as one rank makes it.
pub(crate) struct Regrouping<'a, B: Buffer, K> {
    pub(crate) regroup: &'a Regroup,
    pub(crate) exchanger: &'a Exchanger<'a, B, K>,
    /// The sizes of the rank's own tensors.
    pub(crate) own: &'a Problem,
}

impl<B: Buffer, K: Kernels<B>> Regrouping<'_, B, K> {
    /// Moves rows; yields for every cargo the contiguous tensors that they arrive in.
    ///
    /// All receives are posted before the first send, so that every message is taken as soon as it is sent, and no rank waits for
    /// one that waits for it.
    pub(crate) fn exchange(
        &self,
        direction: Direction,
        cargos: &[Cargo<'_, B>],
    ) -> Result<Vec<Vec<B>>, Error> {
        let exchanger = self.exchanger;
        let rank = exchanger.communicator.rank();
        let mut receives = Vec::new();
        for member in self.others() {
            for (index, cargo) in cargos.iter().enumerate() {
                let rows = self.arriving(direction, member, cargo);
                if !rows.is_empty() {
                    let letter = letter(member.rank, cargo, &rows);
                    receives.push((index, rows, exchanger.receive_into(letter, None)?));
                }
            }
        }
        let mut sends = Vec::new();
        for member in self.others() {
            for cargo in cargos {
                let rows = self.leaving(direction, member, cargo);
                if !rows.is_empty() {
                    let letter = letter(member.rank, cargo, &rows);
                    sends.push(exchanger.send(letter, self.pack(direction, cargo, &rows)?)?);
                }
            }
        }
        let mut arrived: Vec<Vec<B>> = Vec::with_capacity(cargos.len());
        for cargo in cargos {
            arrived.push(self.targets(direction, cargo)?);
        }
        let own = self.regroup.member(rank);
        for (cargo, targets) in cargos.iter().zip(&mut arrived) {
            let message = self.pack(direction, cargo, &self.leaving(direction, own, cargo))?;
            let rows = self.arriving(direction, own, cargo);
            self.place(direction, cargo, &message, &rows, targets)?;
        }
        for (index, rows, posted) in receives {
            let message = exchanger.received(posted)?;
            let (cargo, targets) = (&cargos[index], &mut arrived[index]);
            self.place(direction, cargo, &message, &rows, targets)?;
        }
        for posted in sends {
            exchanger.sent(posted)?;
        }
        Ok(arrived)
    }

    /// The other members, beginning after this rank, so that not all send to the same one first.
    fn others(&self) -> impl Iterator<Item = &Member> {
        let rank = self.exchanger.communicator.rank();
        let members = &self.regroup.members;
        let later = members.iter().filter(move |member| member.rank > rank);
        later.chain(members.iter().filter(move |member| member.rank < rank))
    }

    fn pack(
        &self,
        direction: Direction,
        cargo: &Cargo<'_, B>,
        rows: &PackedRows,
    ) -> Result<B, Error> {
        let shape = self.shape(cargo.kind, direction == Direction::There);
        let kernels = self.exchanger.kernels;
        self.exchanger.compute("pack", None, || {
            kernels.pack(shape, &cargo.tensors, rows, None)
        })
    }

    fn targets(&self, direction: Direction, cargo: &Cargo<'_, B>) -> Result<Vec<B>, Error> {
        let len = self
            .shape(cargo.kind, direction == Direction::Back)
            .elements();
        let kernels = self.exchanger.kernels;
        let target = |_| {
            self.exchanger.compute("allocate", None, || {
                kernels.allocate(cargo.dtype, len, None)
            })
        };
        cargo.tensors.iter().map(target).collect()
    }

    fn place(
        &self,
        direction: Direction,
        cargo: &Cargo<'_, B>,
        message: &B,
        rows: &PackedRows,
        targets: &mut [B],
    ) -> Result<(), Error> {
        let shape = self.shape(cargo.kind, direction == Direction::Back);
        let kernels = self.exchanger.kernels;
        let mut targets: Vec<&mut B> = targets.iter_mut().collect();
        self.exchanger.compute("place rows", None, || {
            kernels.place_rows(shape, message, rows, &mut targets)
        })
    }

    /// The rows that a member gets from this rank.
    fn leaving(&self, direction: Direction, to: &Member, cargo: &Cargo<'_, B>) -> PackedRows {
        match direction {
            Direction::There => self.own_rows(to, cargo),
            Direction::Back => self.rows_of(to, cargo),
        }
    }

    /// The rows that this rank gets from a member.
    fn arriving(&self, direction: Direction, from: &Member, cargo: &Cargo<'_, B>) -> PackedRows {
        match direction {
            Direction::There => self.rows_of(from, cargo),
            Direction::Back => self.own_rows(from, cargo),
        }
    }

    /// All own rows of a member's heads.
    fn own_rows(&self, member: &Member, cargo: &Cargo<'_, B>) -> PackedRows {
        let shape = self.shape(cargo.kind, true);
        let heads = member.kv_heads.clone();
        let group = self.own.group_size();
        let heads = match cargo.kind {
            Kind::Keys => heads,
            Kind::Queries | Kind::Statistics => heads.start * group..heads.end * group,
        };
        let all = Rows {
            first_row: 0,
            row_step: 1,
            count: shape.rows,
            first_position: 0,
            position_step: 1,
        };
        packed(shape, heads, vec![all], cargo.tensors.len())
    }

    /// A member's rows among those of all members, of this rank's heads.
    fn rows_of(&self, member: &Member, cargo: &Cargo<'_, B>) -> PackedRows {
        let shape = self.shape(cargo.kind, false);
        let runs = match cargo.kind {
            Kind::Keys => member.keys.clone(),
            Kind::Queries | Kind::Statistics => member.queries.clone(),
        };
        packed(shape, 0..shape.heads, runs, cargo.tensors.len())
    }

    /// The shape of the rank's own tensors, or of those that attention is computed with.
    fn shape(&self, kind: Kind, own: bool) -> TensorShape {
        let problem = if own {
            self.own
        } else {
            &self.exchanger.problem
        };
        match kind {
            Kind::Queries => problem.query_shape(),
            Kind::Statistics => problem.statistic_shape(),
            Kind::Keys => problem.key_shape(),
        }
    }
}

fn letter<B: Buffer>(peer: Rank, cargo: &Cargo<'_, B>, rows: &PackedRows) -> Letter {
    Letter::new(peer, 0, cargo.payload, cargo.dtype, rows.len())
}

fn packed(shape: TensorShape, heads: Range<usize>, runs: Vec<Rows>, parts: usize) -> PackedRows {
    let heads = heads.collect();
    PackedRows::new(shape, vec![HeadRows { heads, runs }], parts)
}
