//! Which positions a rank attends to, as columns of a picture: as many as it is wide, however long the sequence.

use ring_core::{AttentionSpec, Mask, Pattern, Plan, PlannedBlock, Shape, Source, Span, SpecError};

/// A line of a picture: what is in every column, if anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PixelLine {
    pixels: Vec<Option<Pixel>>,
    length: usize,
}

/// Positions of one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pixel {
    /// The rank that owns them.
    pub(super) owner: usize,
    /// Every so many-th of the column's positions.
    pub(super) stride: usize,
}

/// Neighbouring columns that look alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PixelRun<T> {
    /// First column.
    pub(super) start: usize,
    /// One past the last column.
    pub(super) end: usize,
    /// How they look.
    pub(super) look: T,
}

/// Positions closer than this many columns are drawn as one bar.
const FINEST: f64 = 3.0;

impl PixelLine {
    fn new(columns: usize, length: usize) -> Self {
        Self {
            pixels: vec![None; columns],
            length: length.max(1),
        }
    }

    /// Who owns which positions: `ranks` of them.
    pub(super) fn owners(
        spec: &AttentionSpec,
        ranks: impl Iterator<Item = usize>,
        columns: usize,
    ) -> Self {
        let mut line = Self::new(columns, spec.key_length);
        for rank in ranks {
            for span in spec
                .key_sharding
                .spans(spec.key_length, spec.world_size, rank)
            {
                line.mark(
                    span,
                    Pixel {
                        owner: rank,
                        stride: 1,
                    },
                );
            }
        }
        line
    }

    /// The key positions that `rank` attends to in the heads of key/value head `kv_head`, by owner.
    pub(super) fn attended(
        spec: &AttentionSpec,
        rank: usize,
        kv_head: usize,
        columns: usize,
    ) -> Result<Self, SpecError> {
        let plan = Plan::new(spec, rank)?;
        let mut line = Self::new(columns, spec.key_length);
        for step in plan.steps() {
            let owner = match step.source {
                Source::Own => rank,
                Source::Slot(owner) => owner,
                Source::Nothing => continue,
            };
            for work in &step.work {
                if work.kv_heads.contains(&kv_head) {
                    for block in &work.blocks {
                        line.mark_keys(block, owner);
                    }
                }
            }
        }
        Ok(line)
    }

    fn mark_keys(&mut self, planned: &PlannedBlock, owner: usize) {
        let keys = planned.block.keys;
        let copies = if self.columns_of(planned.period) < FINEST {
            // The copies run together; whole segments with little between them.
            1
        } else {
            planned.repeat
        };
        let tail = (planned.repeat - copies) * planned.period;
        for copy in 0..copies {
            let first = keys.first_position.max(0) as usize + copy * planned.period;
            let last = keys.position(keys.count - 1).max(0) as usize + copy * planned.period + tail;
            let stride = keys.position_step as usize;
            if self.columns_of(stride) < FINEST {
                let end = last + stride;
                self.mark(Span { start: first, end }, Pixel { owner, stride });
            } else {
                // Each for itself, in full colour.
                for start in (first..=last).step_by(stride) {
                    let end = start + 1;
                    self.mark(Span { start, end }, Pixel { owner, stride: 1 });
                }
            }
        }
    }

    /// Columns that so many positions take.
    fn columns_of(&self, positions: usize) -> f64 {
        positions as f64 * self.pixels.len() as f64 / self.length as f64
    }

    /// Marks a span: at least one column. What is denser stays visible.
    fn mark(&mut self, span: Span, pixel: Pixel) {
        let columns = self.pixels.len();
        let start = (self.columns_of(span.start).round() as usize).min(columns - 1);
        let end = (self.columns_of(span.end).round() as usize).clamp(start + 1, columns);
        for place in &mut self.pixels[start..end] {
            if place.is_none_or(|there| pixel.stride <= there.stride) {
                *place = Some(pixel);
            }
        }
    }

    /// The line as few runs as possible, for pixels that look as `look` says.
    pub(super) fn runs<T: Copy + PartialEq>(&self, look: impl Fn(Pixel) -> T) -> Vec<PixelRun<T>> {
        let mut runs: Vec<PixelRun<T>> = Vec::new();
        for (column, pixel) in self.pixels.iter().enumerate() {
            let Some(look) = pixel.map(&look) else {
                continue;
            };
            match runs.last_mut() {
                Some(run) if run.end == column && run.look == look => run.end += 1,
                _ => runs.push(PixelRun {
                    start: column,
                    end: column + 1,
                    look,
                }),
            }
        }
        runs
    }
}

/// The same computation for one head of one branch alone; `None` if no head has it. Also the head's number in the original.
pub(super) fn branch_alone(
    spec: &AttentionSpec,
    branch: usize,
) -> Result<Option<(usize, AttentionSpec)>, SpecError> {
    let heads = spec.shape.kv_heads;
    let found = (0..heads).find_map(|head| Some((head, spec.pattern.offset(branch, head, heads)?)));
    let Some((head, offset)) = found else {
        return Ok(None);
    };
    let rule = spec.pattern.branches()[branch];
    let pattern = match rule.segment_length {
        Some(length) => Pattern::dilated(&[length], &[rule.dilation_rate])?,
        None => Pattern::full(),
    };
    let Mask { left, right } = spec.pattern.mask();
    // With cyclic offsets, head `offset` is the one with that offset.
    let alone = AttentionSpec {
        pattern: pattern.with_window(left, right),
        shape: Shape {
            query_heads: offset + 1,
            kv_heads: offset + 1,
            ..spec.shape
        },
        ..spec.clone()
    };
    Ok(Some((head, alone)))
}

#[cfg(test)]
mod tests {
    use ring_core::Sharding;

    use super::*;

    const SHAPE: Shape = Shape {
        batch: 1,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 8,
    };

    #[test]
    fn a_short_sequence_is_drawn_position_by_position() {
        let pattern = Pattern::dilated(&[8], &[4]).unwrap();
        let spec = AttentionSpec::new(pattern, SHAPE, 16)
            .and_then(|spec| spec.sharded(Sharding::Contiguous, 4))
            .unwrap();
        let line = PixelLine::attended(&spec, 0, 0, 160).unwrap();
        let run = |start, end, look| PixelRun { start, end, look };
        assert_eq!(
            line.runs(|pixel| pixel.owner),
            [run(0, 10, 0), run(40, 50, 1)]
        );
    }

    #[test]
    fn the_number_of_runs_does_not_depend_on_the_length() {
        let pattern = Pattern::dilated(&[2048, 1_000_000_000], &[1, 512]).unwrap();
        let spec = AttentionSpec::new(pattern, SHAPE, 1_000_000_000)
            .and_then(|spec| spec.sharded(Sharding::Contiguous, 8))
            .unwrap();
        let line = PixelLine::attended(&spec, 3, 0, 800).unwrap();
        let runs = line.runs(|pixel| pixel.owner);
        let owners: Vec<usize> = runs.iter().map(|run| run.look).collect();
        assert_eq!(owners, [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
