//! Mutable memory, carved into disjoint pieces for the tasks: no locks, no copies, no `unsafe`.

use std::mem;
use std::ops::Range;

use crate::KernelError;

/// The pieces `spans` of `buffer`. Spans ascend; they are checked to be disjoint and inside.
pub(super) fn carve<'a>(
    what: &'static str,
    mut buffer: &'a mut [f32],
    spans: impl IntoIterator<Item = Range<usize>>,
) -> Result<Vec<&'a mut [f32]>, KernelError> {
    let mut taken = 0;
    spans
        .into_iter()
        .map(|span| {
            let start = span.start.checked_sub(taken);
            let (_, rest) = start
                .and_then(|start| mem::take(&mut buffer).split_at_mut_checked(start))
                .ok_or_else(|| overlap(what, &span))?;
            let (piece, rest) = rest
                .split_at_mut_checked(span.len())
                .ok_or_else(|| overlap(what, &span))?;
            (buffer, taken) = (rest, span.end);
            Ok(piece)
        })
        .collect()
}

fn overlap(what: &'static str, span: &Range<usize>) -> KernelError {
    KernelError::Invalid(format!(
        "{what}: elements {}..{} of a head overlap another head's or exceed the buffer",
        span.start, span.end
    ))
}

/// Some rows of one head that one task alone may write.
pub(super) struct RowsMut<'a> {
    pub(super) data: &'a mut [f32],
    /// Local index of the row that `data` starts with.
    pub(super) first_row: usize,
    pub(super) stride: usize,
}

impl<'a> RowsMut<'a> {
    /// Row `row` (local index).
    pub(super) fn row_mut(&mut self, row: usize, head_dim: usize) -> &mut [f32] {
        &mut self.data[(row - self.first_row) * self.stride..][..head_dim]
    }

    /// Row `row` (local index).
    pub(super) fn row(&self, row: usize, head_dim: usize) -> &[f32] {
        &self.data[(row - self.first_row) * self.stride..][..head_dim]
    }

    /// One piece for each of `ranges`, which follow one another from the first row on.
    pub(super) fn split(self, ranges: &[Range<usize>]) -> Vec<RowsMut<'a>> {
        let mut rest = self.data;
        ranges
            .iter()
            .map(|range| {
                // The last row ends with its last element, not with its stride.
                let len = rest.len().min(range.len() * self.stride);
                let (data, tail) = mem::take(&mut rest).split_at_mut(len);
                rest = tail;
                RowsMut {
                    data,
                    first_row: range.start,
                    stride: self.stride,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carved_pieces_are_the_spans() {
        let mut buffer: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let pieces = carve("x", &mut buffer, [0..2, 2..2, 4..7, 9..10]).unwrap();
        assert_eq!(pieces, [&[0.0, 1.0][..], &[], &[4.0, 5.0, 6.0], &[9.0]]);
    }

    #[test]
    fn overlap_and_excess_are_refused() {
        let mut buffer = vec![0.0; 10];
        for spans in [vec![0..3, 2..4], vec![0..1, 1..11], vec![11..12, 12..13]] {
            let refused = carve("x", &mut buffer, spans);
            assert!(matches!(refused, Err(KernelError::Invalid(_))));
        }
    }
}
