//! What pools of memory tell of themselves: [`PoolStatistics`].

/// What a pool of memory has lent and kept since it was made.
///
/// `borrows` is `reuses` plus `allocations`, unless memory was refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatistics {
    /// Bytes that wait for the next borrower.
    pub kept_bytes: usize,
    /// Bytes that are lent now.
    pub lent_bytes: usize,
    /// The most bytes that were lent at one time.
    pub most_lent_bytes: usize,
    /// How often memory was asked for.
    pub borrows: u64,
    /// How often memory that was kept served.
    pub reuses: u64,
    /// How often memory had to be allocated.
    pub allocations: u64,
    /// Bytes that were given back to the system instead of being kept.
    pub released_bytes: u64,
}

impl PoolStatistics {
    /// Counts memory that was kept and is lent now.
    pub fn reuse(&mut self, bytes: usize) {
        self.kept_bytes = self.kept_bytes.saturating_sub(bytes);
        self.reuses += 1;
        self.lend(bytes);
    }

    /// Counts memory that was allocated to be lent.
    pub fn allocate(&mut self, bytes: usize) {
        self.allocations += 1;
        self.lend(bytes);
    }

    /// Counts memory that comes back; whether it is kept, of which there may be `limit` bytes at one time.
    pub fn take_back(&mut self, bytes: usize, limit: usize) -> bool {
        self.lent_bytes = self.lent_bytes.saturating_sub(bytes);
        let keep = self.kept_bytes.saturating_add(bytes) <= limit;
        if keep {
            self.kept_bytes += bytes;
        } else {
            self.released_bytes += bytes as u64;
        }
        keep
    }

    /// Counts memory that was kept and is given back to the system.
    pub fn release(&mut self, bytes: usize) {
        self.kept_bytes = self.kept_bytes.saturating_sub(bytes);
        self.released_bytes += bytes as u64;
    }

    fn lend(&mut self, bytes: usize) {
        self.lent_bytes += bytes;
        self.most_lent_bytes = self.most_lent_bytes.max(self.lent_bytes);
    }
}
