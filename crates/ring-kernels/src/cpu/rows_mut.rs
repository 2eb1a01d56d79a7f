//! Rows that one task alone may write.

/// Some rows of one head, or of several heads that follow one another.
pub(super) struct RowsMut<'a> {
    pub(super) data: &'a mut [f32],
    /// Index of the row that `data` starts with.
    pub(super) first_row: usize,
    pub(super) stride: usize,
}

impl RowsMut<'_> {
    /// Row `row`.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize, head_dim: usize) -> &mut [f32] {
        &mut self.data[(row - self.first_row) * self.stride..][..head_dim]
    }

    /// Row `row`.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, head_dim: usize) -> &[f32] {
        &self.data[(row - self.first_row) * self.stride..][..head_dim]
    }
}
