//! Validation: after it, every index a kernel forms lies inside its buffer.

use ring_comm::buffer::DType;

use crate::{
    HeadBlocks, HeadRows, KernelError, PackedRows, Problem, RowLayout, Rows, Scores, TensorShape,
};

/// The sizes of a problem, known not to overflow.
pub(crate) struct Sizes {
    /// Query rows of all heads and batch entries.
    pub(crate) query_rows: usize,
    /// Elements of all of them.
    pub(crate) query_elements: usize,
    /// Elements of the key rows of all key/value heads and batch entries.
    pub(crate) key_elements: usize,
}

fn invalid<T>(message: String) -> Result<T, KernelError> {
    Err(KernelError::Invalid(message))
}

fn product(factors: &[usize]) -> Result<usize, KernelError> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .ok_or_else(|| {
            KernelError::Invalid(format!("the product of the sizes {factors:?} overflows"))
        })
}

/// Checks that the sizes fit together and in memory.
pub(crate) fn problem(problem: &Problem) -> Result<Sizes, KernelError> {
    let Problem {
        batch,
        query_heads,
        kv_heads,
        head_dim,
        queries,
        keys,
        ..
    } = *problem;
    if head_dim == 0 {
        return invalid("the head size is 0; it must be at least 1".into());
    }
    if kv_heads == 0 || query_heads % kv_heads != 0 {
        return invalid(format!(
            "{query_heads} query heads cannot share {kv_heads} key/value heads evenly; the number of query heads must be a multiple"
        ));
    }
    scores(problem)?;
    let query_rows = product(&[batch, query_heads, queries])?;
    Ok(Sizes {
        query_rows,
        query_elements: product(&[query_rows, head_dim])?,
        key_elements: product(&[batch, kv_heads, keys, head_dim])?,
    })
}

/// Largest ALiBi slope: times any distance it is a number that no other number hides in.
const MAX_SLOPE: f32 = 1_048_576.0;

/// Checks what scores go through.
fn scores(problem: &Problem) -> Result<(), KernelError> {
    let Scores {
        softcap,
        alibi_slopes,
        ..
    } = &problem.scores;
    if let Some(cap) = softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return invalid(format!(
            "the softcap is {cap}; it must be positive and finite"
        ));
    }
    let Some(slopes) = alibi_slopes else {
        return Ok(());
    };
    if slopes.len() != problem.query_heads {
        return invalid(format!(
            "{} ALiBi slopes for {} query heads; every query head has one",
            slopes.len(),
            problem.query_heads
        ));
    }
    let is_sound = |slope: &&f32| slope.abs() <= MAX_SLOPE;
    match slopes.iter().find(|slope| !is_sound(slope)) {
        Some(slope) => invalid(format!(
            "an ALiBi slope is {slope}; slopes are numbers from -2^20 to 2^20"
        )),
        None => Ok(()),
    }
}

/// Checks that a buffer holds at least `expected` elements.
pub(crate) fn size(what: &'static str, got: usize, expected: usize) -> Result<(), KernelError> {
    if got < expected {
        return Err(KernelError::Size {
            what,
            got,
            expected,
        });
    }
    Ok(())
}

/// Checks the element type of a buffer.
pub(crate) fn dtype(what: &'static str, got: DType, expected: DType) -> Result<(), KernelError> {
    if got != expected {
        return Err(KernelError::DType {
            what,
            got,
            expected: expected.to_string(),
        });
    }
    Ok(())
}

/// Elements that a layout spans for `rows(h)` rows of every head `h` of `heads`.
fn span(
    layout: &RowLayout,
    batch: usize,
    heads: usize,
    rows: impl Fn(usize) -> usize,
    head_dim: usize,
) -> Result<usize, KernelError> {
    if layout.head_base.len() < heads {
        return invalid(format!(
            "the layout places {} heads, {heads} are needed",
            layout.head_base.len(),
        ));
    }
    let end = |base: usize, rows: usize| {
        let last_batch = layout.batch_stride.checked_mul(batch - 1)?;
        let last_row = layout.row_stride.checked_mul(rows - 1)?;
        last_batch
            .checked_add(base)?
            .checked_add(last_row)?
            .checked_add(head_dim)
    };
    let mut span = 0;
    for (head, &base) in layout.head_base.iter().enumerate().take(heads) {
        let rows = rows(head);
        if batch > 0 && rows > 0 {
            let Some(end) = end(base, rows) else {
                return invalid(format!("the layout {layout:?} overflows"));
            };
            span = span.max(end);
        }
    }
    Ok(span)
}

/// Checks that a tensor of `len` elements holds `rows(h)` rows of every head `h` of `heads`.
fn tensor(
    what: &'static str,
    (len, layout): (usize, &RowLayout),
    problem: &Problem,
    heads: usize,
    rows: impl Fn(usize) -> usize,
) -> Result<(), KernelError> {
    let span = span(layout, problem.batch, heads, rows, problem.head_dim)?;
    size(what, len, span)
}

/// Checks a tensor of the problem's queries.
pub(crate) fn query_tensor(
    what: &'static str,
    len: usize,
    layout: &RowLayout,
    problem: &Problem,
) -> Result<(), KernelError> {
    let heads = problem.query_heads;
    tensor(what, (len, layout), problem, heads, |_| problem.queries)
}

/// Checks the keys or the values of checked blocks, own ones or those of a slot.
pub(crate) fn source_tensor(
    what: &'static str,
    len: usize,
    layout: &RowLayout,
    problem: &Problem,
    blocks: &[HeadBlocks],
) -> Result<(), KernelError> {
    let rows = |head| key_rows(blocks, head);
    tensor(what, (len, layout), problem, problem.kv_heads, rows)
}

/// Checks that the gradients of the rows that `blocks` need fit into `len` elements, and that they follow one another there
/// without overlap, by batch entry and head.
pub(crate) fn gradient_layout(
    problem: &Problem,
    layout: &RowLayout,
    blocks: &[HeadBlocks],
    len: usize,
) -> Result<(), KernelError> {
    if layout.row_stride < problem.head_dim {
        return invalid(format!(
            "gradient rows of {} elements overlap at a row stride of {}",
            problem.head_dim, layout.row_stride
        ));
    }
    let rows = |head| key_rows(blocks, head);
    size(
        "gradient",
        len,
        span(
            layout,
            problem.batch,
            problem.kv_heads,
            rows,
            problem.head_dim,
        )?,
    )?;
    let mut taken = 0;
    for batch in 0..problem.batch {
        for head in (0..problem.kv_heads).filter(|&head| rows(head) > 0) {
            let start = layout.offset(batch, head, 0);
            if start < taken {
                return invalid(format!(
                    "gradients of head {head} of batch entry {batch} start at element {start}, but those of another head end at {taken}: they overlap, or heads are not in order"
                ));
            }
            taken = layout.offset(batch, head, rows(head) - 1) + problem.head_dim;
        }
    }
    Ok(())
}

/// One more than the last row; 0 for no rows.
fn end(what: &str, rows: &Rows) -> Result<usize, KernelError> {
    if rows.count == 0 {
        return Ok(0);
    }
    let steps = rows.count - 1;
    if steps > 0 && (rows.row_step == 0 || rows.position_step < 1) {
        return invalid(format!("{what}: {rows:?} has a step that is not positive"));
    }
    let last_position = i64::try_from(steps)
        .ok()
        .and_then(|steps| steps.checked_mul(rows.position_step))
        .and_then(|distance| rows.first_position.checked_add(distance));
    let last_row = rows
        .row_step
        .checked_mul(steps)
        .and_then(|distance| rows.first_row.checked_add(distance));
    match (last_position, last_row.and_then(|last| last.checked_add(1))) {
        (Some(_), Some(end)) => Ok(end),
        _ => invalid(format!("{what}: {rows:?} overflows")),
    }
}

fn inside(what: &str, end: usize, owned: usize) -> Result<(), KernelError> {
    if end > owned {
        return invalid(format!(
            "{what} reach to row {}, but there are {owned} rows",
            end - 1
        ));
    }
    Ok(())
}

fn heads(listed: &[usize], kv_heads: usize) -> Result<(), KernelError> {
    match listed.iter().find(|&&head| head >= kv_heads) {
        Some(head) => invalid(format!("head {head} is listed, but there are {kv_heads}")),
        None => Ok(()),
    }
}

/// Checks the blocks.
pub(crate) fn blocks(problem: &Problem, blocks: &[HeadBlocks]) -> Result<(), KernelError> {
    for entry in blocks {
        heads(&entry.kv_heads, problem.kv_heads)?;
        if let Some(batch) = entry.entries.iter().find(|&&batch| batch >= problem.batch) {
            return invalid(format!(
                "batch entry {batch} is listed, but there are {}",
                problem.batch
            ));
        }
        for block in &entry.blocks {
            inside(
                "the queries of a block",
                end("queries", &block.queries)?,
                problem.queries,
            )?;
            end("keys", &block.keys)?;
        }
    }
    Ok(())
}

/// Rows that the key source of checked `blocks` must have for a head, in any batch entry.
pub(crate) fn key_rows(blocks: &[HeadBlocks], head: usize) -> usize {
    let end = |rows: &Rows| {
        rows.count
            .checked_sub(1)
            .map_or(0, |last| rows.row(last) + 1)
    };
    blocks
        .iter()
        .filter(|of| of.kv_heads.contains(&head))
        .flat_map(|of| &of.blocks)
        .map(|block| end(&block.keys))
        .max()
        .unwrap_or(0)
}

/// Checks that the problem has the keys of checked blocks.
pub(crate) fn own_keys(problem: &Problem, blocks: &[HeadBlocks]) -> Result<(), KernelError> {
    for head in 0..problem.kv_heads {
        inside("the keys of a block", key_rows(blocks, head), problem.keys)?;
    }
    Ok(())
}

/// Checks a contiguous tensor; returns its elements.
pub(crate) fn elements(shape: TensorShape) -> Result<usize, KernelError> {
    let TensorShape {
        batch,
        heads,
        rows,
        head_dim,
    } = shape;
    product(&[batch, heads, rows, head_dim])
}

/// Checks a tensor whose rows travel.
pub(crate) fn shaped_tensor(
    what: &'static str,
    len: usize,
    layout: &RowLayout,
    shape: TensorShape,
) -> Result<(), KernelError> {
    elements(shape)?;
    let span = span(
        layout,
        shape.batch,
        shape.heads,
        |_| shape.rows,
        shape.head_dim,
    )?;
    size(what, len, span)
}

/// Checks the rows of a message that is made of `tensors` tensors: that the owner has them, and that the message has room for
/// them.
pub(crate) fn packed_rows(
    shape: TensorShape,
    packed: &PackedRows,
    tensors: usize,
) -> Result<(), KernelError> {
    if shape.head_dim == 0 {
        return invalid("rows of a message have no elements; they must have at least 1".into());
    }
    if packed.parts != tensors {
        return invalid(format!(
            "a message of {} parts cannot hold rows of {tensors} tensors",
            packed.parts
        ));
    }
    for entry in &packed.rows {
        heads(&entry.heads, shape.heads)?;
        for run in &entry.runs {
            inside(
                "the rows of a message",
                end("rows of a message", run)?,
                shape.rows,
            )?;
        }
    }
    let of_head = |head| {
        let entries = packed.rows.iter();
        entries.filter(move |entry| entry.heads.contains(&head) && entry.count() > 0)
    };
    if let Some(head) = (0..shape.heads).find(|&head| of_head(head).count() > 1) {
        return invalid(format!("head {head} is listed twice in one message"));
    }
    let rows = |head| of_head(head).map(HeadRows::count).sum();
    let span = span(
        &packed.layout,
        shape.batch,
        shape.heads,
        rows,
        shape.head_dim,
    )?;
    product(&[packed.parts, packed.part_len])?;
    size("a part of a message", packed.part_len, span)
}
