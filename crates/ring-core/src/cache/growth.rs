//! Who keeps the tokens that come after the prompt: [`Growth`].

use std::ops::Range;

use ring_comm::Rank;

/// Deals out new rows: chunks of them, one after the other, each to the rank with the fewest rows.
///
/// A pure function of the rows that every rank had and of the number of new ones, so that all ranks know without asking. Ranks that
/// differed by at most a chunk still do so afterwards; others come nearer with every chunk.
#[derive(Clone, Debug)]
pub(super) struct Growth {
    /// Of every rank.
    rows: Vec<usize>,
    chunk: usize,
    owner: Rank,
    /// Rows that the owner's chunk still takes.
    room: usize,
}

impl Growth {
    /// From the rows of every rank.
    pub(super) fn new(rows: Vec<usize>, chunk: usize) -> Self {
        Self {
            rows,
            chunk,
            owner: 0,
            room: 0,
        }
    }

    /// Rows of a rank.
    pub(super) fn rows(&self, rank: Rank) -> usize {
        self.rows[rank]
    }

    /// Rows that a rank gets in a row.
    pub(super) fn chunk(&self) -> usize {
        self.chunk
    }

    /// Deals out `count` rows; yields those of `rank`, as ranges of them.
    pub(super) fn deal(&mut self, count: usize, rank: Rank) -> impl Iterator<Item = Range<usize>> {
        let mut dealt = 0;
        std::iter::from_fn(move || {
            while dealt < count {
                let first = dealt;
                let owner = self.next(count, &mut dealt);
                if owner == rank {
                    return Some(first..dealt);
                }
            }
            None
        })
    }

    /// The owner of the next rows, after `dealt` of `count`; moves `dealt` past them.
    fn next(&mut self, count: usize, dealt: &mut usize) -> Rank {
        if self.room == 0 {
            let ranks = 0..self.rows.len();
            self.owner = ranks.min_by_key(|&rank| self.rows[rank]).unwrap_or(0);
            self.room = self.chunk;
        }
        let taken = self.room.min(count - *dealt);
        self.rows[self.owner] += taken;
        self.room -= taken;
        *dealt += taken;
        self.owner
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_row_has_one_owner_and_ranks_stay_balanced(
            start in prop::collection::vec(0_usize..20, 1..6),
            chunk in 1_usize..9,
            batches in prop::collection::vec(1_usize..30, 0..20),
        ) {
            let (least, most) = (*start.iter().min().unwrap(), *start.iter().max().unwrap());
            let ranks = start.len();
            let mut of_rank: Vec<Growth> =
                (0..ranks).map(|_| Growth::new(start.clone(), chunk)).collect();
            for count in batches {
                let mut owners = vec![0; count];
                for (rank, growth) in of_rank.iter_mut().enumerate() {
                    for range in growth.deal(count, rank) {
                        owners[range].iter_mut().for_each(|owners| *owners += 1);
                    }
                }
                prop_assert!(owners.iter().all(|&owners| owners == 1));
            }
            for growth in &of_rank {
                prop_assert_eq!(&growth.rows, &of_rank[0].rows, "all ranks know the same");
                let spread = growth.rows.iter().max().unwrap() - growth.rows.iter().min().unwrap();
                prop_assert!(spread <= chunk.max(most - least));
            }
        }
    }
}
