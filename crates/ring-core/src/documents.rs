//! Documents packed one after the other into a sequence: [`Documents`].

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// Lengths of the documents of a sequence, in order from position 0: the same for all batch entries, or of each its own.
///
/// A query sees keys of its own document alone. Documents restart nothing: positions, and with them segments, offsets, windows
/// and slopes, stay those of the whole sequence. A query at a position outside of all documents (in cross-attention) sees
/// nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Documents {
    /// One list for all entries, or one for each.
    lengths: Arc<[Vec<usize>]>,
}

impl Documents {
    /// The same documents in all batch entries.
    pub fn new(lengths: Vec<usize>) -> Self {
        Self {
            lengths: Arc::new([lengths]),
        }
    }

    /// Documents of each batch entry.
    pub fn per_entry(lengths: Vec<Vec<usize>>) -> Self {
        Self {
            lengths: lengths.into(),
        }
    }

    /// How many lists there are: 1 if all entries have the same documents.
    pub fn lists(&self) -> usize {
        self.lengths.len()
    }

    /// The lengths of an entry's documents.
    pub fn lengths(&self, entry: usize) -> &[usize] {
        match &*self.lengths {
            [of_all] => of_all,
            of_each => &of_each[entry],
        }
    }

    /// The documents of an entry as ranges of positions; empty ones are left out.
    pub fn ranges(&self, entry: usize) -> impl Iterator<Item = (i64, i64)> + '_ {
        let mut start = 0;
        self.lengths(entry).iter().filter_map(move |&length| {
            let range = (start, start + length as i64);
            start = range.1;
            (length > 0).then_some(range)
        })
    }
}

impl fmt::Display for Documents {
    /// The lengths, separated by commas; entries by semicolons.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, lengths) in self.lengths.iter().enumerate() {
            if index > 0 {
                f.write_str(";")?;
            }
            let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
            f.write_str(&lengths.join(","))?;
        }
        Ok(())
    }
}
