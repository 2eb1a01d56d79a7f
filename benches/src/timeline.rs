//! Traces of processes, put together and drawn: a row for what each rank does, and one for its transfers.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use plotters::{
    backend::SVGBackend,
    coord::Shift,
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::Rectangle,
    style::{
        BLACK, Color, IntoFont, RGBColor, TextStyle, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};
use serde_json::{Value, json};
use thiserror::Error;

const WIDTH: i32 = 1200;
const LEFT: i32 = 110;
const RIGHT: i32 = 1180;
const TOP: i32 = 60;
const ROW: i32 = 26;
/// Between ranks.
const GAP: i32 = 18;

const COMPUTE: RGBColor = RGBColor(58, 125, 92);
const WAIT: RGBColor = RGBColor(196, 98, 66);
const TRANSFER: RGBColor = RGBColor(84, 120, 176);

/// Why there is no picture.
#[derive(Debug, Error)]
pub enum TimelineError {
    /// A file cannot be read or written.
    #[error("{file}: {error}")]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file is no trace.
    #[error("{0} is not a trace")]
    NoTrace(PathBuf),
    /// It cannot be drawn.
    #[error("cannot draw: {0}")]
    Draw(String),
}

/// The events of several files, their clocks set to that of the first.
///
/// # Errors
/// [`TimelineError`] for a file that cannot be read or is no trace.
pub fn merged(files: &[PathBuf]) -> Result<Vec<Value>, TimelineError> {
    let mut all = Vec::new();
    let mut origin = None;
    for file in files {
        let no_trace = || TimelineError::NoTrace(file.clone());
        let text = fs::read_to_string(file).map_err(|error| TimelineError::File {
            file: file.clone(),
            error,
        })?;
        let mut trace: Value = serde_json::from_str(&text).map_err(|_| no_trace())?;
        let events = trace.get_mut("traceEvents").map(Value::take);
        let Some(Value::Array(mut events)) = events else {
            return Err(no_trace());
        };
        // When the process was named, by the clock of the day and by that of the trace.
        let named = events.first().ok_or_else(no_trace)?;
        let unix = named["args"]["named_at_unix_us"].as_f64();
        let started = unix.ok_or_else(no_trace)? - named["ts"].as_f64().unwrap_or(0.0);
        let shift = started - *origin.get_or_insert(started);
        for event in &mut events {
            if let Some(time) = event["ts"].as_f64() {
                event["ts"] = json!(time + shift);
            }
        }
        all.append(&mut events);
    }
    Ok(all)
}

/// Writes events as one trace.
///
/// # Errors
/// [`TimelineError::File`].
pub fn write(file: &Path, events: &[Value]) -> Result<(), TimelineError> {
    let lines: Vec<String> = events.iter().map(Value::to_string).collect();
    let text = format!(
        "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n",
        lines.join(",\n")
    );
    fs::write(file, text).map_err(|error| TimelineError::File {
        file: file.to_path_buf(),
        error,
    })
}

/// Something that lasts, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    rank: usize,
    color: RGBColor,
    start: f64,
    end: f64,
}

/// Draws the last forward and backward of every rank.
///
/// # Errors
/// [`TimelineError::Draw`].
pub fn draw(file: &Path, title: &str, events: &[Value]) -> Result<(), TimelineError> {
    let passes = named_spans(events, "pass", BLACK);
    let ranks = passes.iter().map(|pass| pass.rank + 1).max().unwrap_or(0);
    let start = last_forward(events).unwrap_or(0.0);
    let end = passes.iter().map(|pass| pass.end).fold(start, f64::max);
    let in_time = |span: &Span| span.end >= start && span.start <= end;
    let mut spans = transfers(events);
    spans.extend(named_spans(events, "compute", COMPUTE));
    spans.extend(named_spans(events, "wait", WAIT));
    spans.retain(in_time);
    let height = TOP + ranks as i32 * (2 * ROW + GAP) + 40;
    let area = SVGBackend::new(file, (WIDTH as u32, height as u32)).into_drawing_area();
    draw_on(&area, title, &spans, ranks, (start, end))
        .map_err(|error| TimelineError::Draw(error.to_string()))
}

/// The beginning of the last forward pass of the rank that is first to begin it.
fn last_forward(events: &[Value]) -> Option<f64> {
    let forwards = events
        .iter()
        .filter(|event| event["cat"] == "pass" && event["name"] == "forward");
    let last = forwards
        .clone()
        .filter_map(|event| event["args"]["operation"].as_u64())
        .max()?;
    forwards
        .filter(|event| event["args"]["operation"].as_u64() == Some(last))
        .filter_map(|event| event["ts"].as_f64())
        .min_by(f64::total_cmp)
}

fn named_spans(events: &[Value], category: &str, color: RGBColor) -> Vec<Span> {
    let span = |event: &Value| {
        let start = event["ts"].as_f64()?;
        Some(Span {
            rank: event["pid"].as_u64()? as usize,
            color,
            start,
            end: start + event["dur"].as_f64()?,
        })
    };
    events
        .iter()
        .filter(|event| event["cat"] == category)
        .filter_map(span)
        .collect()
}

/// From posted until the message has arrived or was taken, or else until the wait for it was over.
fn transfers(events: &[Value]) -> Vec<Span> {
    let of = |phase: &'static str| {
        events
            .iter()
            .filter(move |event| event["cat"] == "transfer" && event["ph"] == phase)
    };
    let time_of = |phase: &'static str, begun: &Value| {
        let same = |event: &&Value| event["id"] == begun["id"] && event["pid"] == begun["pid"];
        of(phase).find(same).and_then(|event| event["ts"].as_f64())
    };
    let span = |begun: &Value| {
        Some(Span {
            rank: begun["pid"].as_u64()? as usize,
            color: TRANSFER,
            start: begun["ts"].as_f64()?,
            end: time_of("n", begun).or_else(|| time_of("e", begun))?,
        })
    };
    of("b").filter_map(span).collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw_on(
    area: &Area<'_>,
    title: &str,
    spans: &[Span],
    ranks: usize,
    (start, end): (f64, f64),
) -> Result<(), DrawingAreaErrorKind<io::Error>> {
    area.fill(&WHITE)?;
    area.draw_text(title, &text(16, BLACK, HPos::Left), (16, 22))?;
    let mut left = LEFT;
    for (color, what) in [
        (COMPUTE, "computing"),
        (WAIT, "waiting"),
        (TRANSFER, "transfers on their way"),
    ] {
        area.draw(&Rectangle::new(
            [(left, 36), (left + 12, 48)],
            color.filled(),
        ))?;
        area.draw_text(what, &text(13, BLACK, HPos::Left), (left + 18, 43))?;
        left += 130;
    }
    let scale = f64::from(RIGHT - LEFT) / (end - start).max(1.0);
    let place = |time: f64| LEFT + ((time.clamp(start, end) - start) * scale).round() as i32;
    for rank in 0..ranks {
        let top = TOP + rank as i32 * (2 * ROW + GAP);
        let label = text(14, BLACK, HPos::Right);
        area.draw_text(&format!("rank {rank}"), &label, (LEFT - 10, top + ROW / 2))?;
    }
    for span in spans {
        let line = i32::from(span.color == TRANSFER);
        let top = TOP + span.rank as i32 * (2 * ROW + GAP) + line * ROW;
        let from = (place(span.start), top + 3);
        // A wait of no visible length is none.
        let to = (place(span.end), top + ROW - 3);
        area.draw(&Rectangle::new([from, to], span.color.mix(0.85).filled()))?;
    }
    let bottom = TOP + ranks as i32 * (2 * ROW + GAP) + 8;
    let total = (end - start) / 1e3;
    for (time, label, anchor) in [
        (start, "0 ms".to_owned(), HPos::Left),
        (end, format!("{total:.0} ms"), HPos::Right),
    ] {
        area.draw_text(&label, &text(13, BLACK, anchor), (place(time), bottom))?;
    }
    area.present()
}

fn text(size: u32, color: RGBColor, anchor: HPos) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&color)
        .pos(Pos::new(anchor, VPos::Center))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_set_and_transfers_end_when_they_arrive() {
        let directory = tempfile::tempdir().unwrap();
        let file = |rank: u64, unix: f64| {
            let file = directory.path().join(format!("{rank}"));
            let events = [
                json!({"ph": "M", "pid": rank, "ts": 0.0, "args": {"named_at_unix_us": unix}}),
                json!({"ph": "b", "cat": "transfer", "pid": rank, "id": 3, "ts": 10.0}),
                json!({"ph": "n", "cat": "transfer", "pid": rank, "id": 3, "ts": 15.0}),
                json!({"ph": "e", "cat": "transfer", "pid": rank, "id": 3, "ts": 20.0}),
            ];
            write(&file, &events).unwrap();
            file
        };
        let events = merged(&[file(0, 1000.0), file(1, 1500.0)]).unwrap();
        let spans = transfers(&events);
        let times: Vec<_> = spans.iter().map(|span| (span.start, span.end)).collect();
        assert_eq!(times, [(10.0, 15.0), (510.0, 515.0)]);
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        assert!(matches!(
            merged(std::slice::from_ref(&file)),
            Err(TimelineError::File { .. })
        ));
        for text in [
            "",
            "[]",
            "{}",
            "{\"traceEvents\":[]}",
            "{\"traceEvents\":[{}]}",
        ] {
            fs::write(&file, text).unwrap();
            let result = merged(std::slice::from_ref(&file));
            assert!(matches!(result, Err(TimelineError::NoTrace(_))), "{text}");
        }
    }
}
