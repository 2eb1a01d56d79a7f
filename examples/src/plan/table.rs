//! The survey as text.

use ring_core::{AttentionSpec, CommunicationEstimate, MemoryEstimate, Span};

use super::{
    comparison::Comparison,
    survey::{RankSurvey, Survey},
    units::{bytes, count, thousands, tokens},
};

/// With more ranks than this, only the first and the last few are shown.
const MANY_RANKS: usize = 16;
/// Ranks shown at either end.
const SHOWN_AT_ENDS: usize = 4;

/// The whole text.
pub(super) fn render(spec: &AttentionSpec, survey: &Survey, all: bool) -> String {
    let mut sections = vec![header(spec, survey), who_and_what(survey, all)];
    if survey.ranks > 1 {
        sections.push(what_travels(survey));
    }
    if let Some(comparison) = &survey.comparison {
        sections.push(shardings(comparison));
    }
    sections.push(memory(survey));
    if let Some(plan) = &survey.plan {
        sections.push(format!("Steps\n{}", plan.to_string().trim_end()));
    }
    sections.join("\n\n")
}

fn header(spec: &AttentionSpec, survey: &Survey) -> String {
    let model = survey.model;
    let mut lines = vec![
        format!(
            "{} tokens on {} ranks, {}, {}",
            thousands(survey.length),
            thousands(survey.ranks),
            survey.sharding,
            survey.strategy
        ),
        format!("pattern: {}", spec.pattern),
        format!(
            "model: batch {}, {} query heads, {} key/value heads, head size {}, {}",
            model.batch, model.heads, model.kv_heads, model.head_dim, survey.dtype
        ),
    ];
    if let Some(documents) = &spec.documents {
        let numbers = (0..documents.lists()).map(|entry| documents.lengths(entry).len());
        lines.push(format!("documents: {}", list(numbers)));
    }
    if let Some(lengths) = &spec.key_lengths {
        lines.push(format!("key lengths: {}", list(lengths.iter().copied())));
    }
    if let (Some(totals), Some(imbalance)) = (&survey.totals, survey.imbalance) {
        lines.push(format!(
            "work: {} pairs in all, {} per rank; imbalance (slowest / mean) {:.3}",
            count(totals.pairs),
            count(totals.pairs / survey.ranks as u128),
            imbalance.pairs
        ));
    }
    lines.join("\n")
}

/// A number for each batch entry, or one for all.
fn list(numbers: impl Iterator<Item = usize>) -> String {
    let numbers: Vec<String> = numbers.map(thousands).collect();
    match numbers.as_slice() {
        [of_all] => of_all.clone(),
        of_each => format!("{} (of each batch entry)", of_each.join("; ")),
    }
}

/// A column of the table of ranks.
struct Column {
    title: &'static str,
    value: fn(&RankSurvey) -> u128,
    show: fn(u128) -> String,
}

fn columns() -> Vec<Column> {
    let column = |title, value, show| Column { title, value, show };
    let as_bytes: fn(u128) -> String = |value| bytes(value as u64);
    let as_number: fn(u128) -> String = |value| thousands(value as usize);
    vec![
        column("tokens", |rank| rank.tokens as u128, as_number),
        column("pairs", |rank| rank.pairs, count),
        column("hops", |rank| rank.communication.hops as u128, as_number),
        column(
            "recv fwd",
            |rank| rank.communication.forward_received.into(),
            as_bytes,
        ),
        column(
            "sent fwd",
            |rank| rank.communication.forward_sent.into(),
            as_bytes,
        ),
        column(
            "recv bwd",
            |rank| rank.communication.backward_received.into(),
            as_bytes,
        ),
        column(
            "sent bwd",
            |rank| rank.communication.backward_sent.into(),
            as_bytes,
        ),
        column("mem fwd", |rank| rank.forward_memory.total.into(), as_bytes),
        column(
            "mem bwd",
            |rank| rank.backward_memory.total.into(),
            as_bytes,
        ),
    ]
}

/// Who holds what, and its numbers.
fn who_and_what(survey: &Survey, all: bool) -> String {
    let columns = columns();
    let mut rows = vec![
        ["rank", "positions"]
            .into_iter()
            .chain(columns.iter().map(|column| column.title))
            .map(str::to_string)
            .collect::<Vec<_>>(),
    ];
    let line = |rank: &RankSurvey| {
        let numbers = columns
            .iter()
            .map(|column| (column.show)((column.value)(rank)));
        [rank.rank.to_string(), positions(&rank.spans)]
            .into_iter()
            .chain(numbers)
            .collect::<Vec<_>>()
    };
    let ranks = &survey.per_rank;
    if all || ranks.len() <= MANY_RANKS {
        rows.extend(ranks.iter().map(line));
    } else {
        let last = ranks.len() - SHOWN_AT_ENDS;
        rows.extend(ranks[..SHOWN_AT_ENDS].iter().map(line));
        rows.push(vec![
            "...".to_string(),
            format!("({} more)", last - SHOWN_AT_ENDS),
        ]);
        rows.extend(ranks[last..].iter().map(line));
    }
    if ranks.len() > 1 {
        for (name, place) in [
            ("min", 0),
            ("median", ranks.len() / 2),
            ("max", ranks.len() - 1),
        ] {
            let numbers = columns.iter().map(|column| {
                let mut values: Vec<u128> = ranks.iter().map(column.value).collect();
                values.sort_unstable();
                (column.show)(values[place])
            });
            rows.push(
                [name.to_string(), String::new()]
                    .into_iter()
                    .chain(numbers)
                    .collect(),
            );
        }
    }
    aligned(&rows)
}

fn positions(spans: &[Span]) -> String {
    let span = |span: &Span| format!("{}..{}", thousands(span.start), thousands(span.end));
    match spans {
        [] => "none".to_string(),
        [one] => span(one),
        [one, other] => format!("{} + {}", span(one), span(other)),
        [first, .., last] => format!(
            "{} .. {} ({} spans)",
            span(first),
            span(last),
            thousands(spans.len())
        ),
    }
}

/// Forward bytes by branch, or by what they are for.
fn what_travels(survey: &Survey) -> String {
    let of_all = survey.totals.is_some();
    let parts = received(survey);
    let mut titles = vec!["received forward"];
    titles.extend(if of_all {
        &["min", "median", "max", "all ranks"][..]
    } else {
        &["this rank"][..]
    });
    let mut rows = vec![titles.into_iter().map(str::to_string).collect::<Vec<_>>()];
    for (name, mut values) in parts {
        values.sort_unstable();
        let mut cells = vec![format!("  {name}")];
        if of_all {
            let places = [0, values.len() / 2, values.len() - 1];
            cells.extend(places.map(|place| bytes(values[place])));
        }
        cells.push(bytes(values.iter().sum()));
        rows.push(cells);
    }
    format!(
        "{}\n  (a ring that passes all keys and values round: {} per rank)",
        aligned(&rows),
        bytes(survey.plain_ring_received)
    )
}

/// The parts of what travels, each with the bytes of every rank.
fn received(survey: &Survey) -> Vec<(String, Vec<u64>)> {
    let of_ranks = |value: &dyn Fn(&CommunicationEstimate) -> u64| -> Vec<u64> {
        let ranks = survey.per_rank.iter();
        ranks.map(|rank| value(&rank.communication)).collect()
    };
    let by_branch = survey
        .per_rank
        .iter()
        .all(|rank| rank.communication.received_per_branch.len() == survey.branches.len());
    let mut parts = Vec::new();
    for (index, branch) in survey.branches.iter().enumerate().filter(|_| by_branch) {
        let segment = match branch.segment_length {
            Some(length) => format!("segments of {}", tokens(length)),
            None => "whole sequence".to_string(),
        };
        let name = format!("{segment}, rate {}", tokens(branch.dilation_rate));
        parts.push((name, of_ranks(&|bytes| bytes.received_per_branch[index])));
    }
    if !by_branch {
        let along =
            |bytes: &CommunicationEstimate| bytes.forward_received - bytes.forward_regrouped;
        parts.push(("keys and values of all branches".into(), of_ranks(&along)));
        let among = of_ranks(&|bytes| bytes.forward_regrouped);
        parts.push(("among ranks that divide heads".into(), among));
    }
    parts.push(("all".into(), of_ranks(&|bytes| bytes.forward_received)));
    parts
}

/// What every sharding costs.
fn shardings(comparison: &Comparison) -> String {
    let title = ["sharding", "slowest rank", "slowest / mean", "received fwd"];
    let mut rows = vec![title.map(str::to_string).to_vec()];
    rows.extend(comparison.shardings.iter().map(|cost| {
        vec![
            format!("  {}", cost.sharding),
            format!("{} pairs", count(cost.slowest_pairs)),
            format!("{:.3}", cost.imbalance),
            bytes(cost.forward_received),
        ]
    }));
    format!("{}\n  best: {}", aligned(&rows), comparison.best)
}

/// Memory of the rank that needs most.
fn memory(survey: &Survey) -> String {
    let Some(largest) = survey
        .per_rank
        .iter()
        .max_by_key(|rank| rank.backward_memory.total)
    else {
        return String::new();
    };
    let title = if survey.totals.is_some() {
        format!("memory of rank {}, the largest", largest.rank)
    } else {
        format!("memory of rank {}", largest.rank)
    };
    let estimates = [&largest.forward_memory, &largest.backward_memory];
    let line = |name: &str, value: &dyn Fn(&MemoryEstimate) -> String| {
        let mut cells = vec![format!("  {name}")];
        cells.extend(estimates.map(value));
        cells
    };
    let amount = |name: &str, value: fn(&MemoryEstimate) -> u64| {
        line(name, &|estimate| bytes(value(estimate)))
    };
    aligned(&[
        vec![title, "forward".to_string(), "backward".to_string()],
        amount("query", |estimate| estimate.query),
        amount("key and value", |estimate| estimate.key_value),
        amount("output and log-sum-exp", |estimate| estimate.output),
        amount("gradients", |estimate| estimate.gradients),
        amount("rows of divided heads", |estimate| estimate.divided_heads),
        amount("exchange slots", |estimate| estimate.exchange_slots),
        amount("scratch", |estimate| estimate.scratch),
        amount("total", |estimate| estimate.total),
        amount("one device alone", |estimate| estimate.single_device_total),
        line("reduction", &|estimate| {
            format!("{:.1} x", estimate.reduction_factor)
        }),
    ])
}

/// Columns aligned: text to the left, numbers to the right. The first row decides which is which.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| {
                let text = column == 0 || rows[0][column] == "positions";
                if text {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}
