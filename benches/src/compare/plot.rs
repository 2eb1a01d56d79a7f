//! The ratios as a picture: a bar for each case, and a mark where it is asked to reach.

use std::{io, path::Path};

use plotters::{
    backend::SVGBackend,
    coord::Shift,
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::{PathElement, Rectangle},
    style::{
        BLACK, Color, IntoFont, RGBColor, TextStyle, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};

use crate::compare::{CompareError, Section, pairs::Outcome, report::Report};

const WIDTH: i32 = 1000;
const MARGIN: i32 = 16;
const ROW: i32 = 19;
const HEADING: i32 = 30;
/// Above the first heading: the title; below the last row: the axis.
const TITLE: i32 = 48;
const AXIS: i32 = 40;
/// Where bars begin and the axis ends.
const LEFT: i32 = 330;
const RIGHT: i32 = 930;
/// Longer bars are cut off here, and their number tells.
const LARGEST: f64 = 4.0;

const MET: RGBColor = RGBColor(58, 125, 92);
const MISSED: RGBColor = RGBColor(196, 98, 66);
const BAR_MARK: RGBColor = RGBColor(20, 20, 20);
const GRID: RGBColor = RGBColor(222, 222, 222);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T = ()> = Result<T, DrawingAreaErrorKind<io::Error>>;

/// Draws the ratios of `report`.
///
/// # Errors
/// [`CompareError::Plot`] if the file cannot be written.
pub fn draw(file: &Path, report: &Report) -> Result<(), CompareError> {
    let area = SVGBackend::new(file, (WIDTH as u32, height(report) as u32)).into_drawing_area();
    draw_on(&area, report).map_err(|error| CompareError::Plot {
        file: file.to_path_buf(),
        message: error.to_string(),
    })
}

fn draw_on(area: &Area<'_>, report: &Report) -> Drawn {
    area.fill(&WHITE)?;
    let title = "Median ratio of our rate to theirs; the black mark is the bar";
    area.draw_text(title, &text(16, BLACK, HPos::Left), (MARGIN, 24))?;
    axis(area, height(report) - AXIS)?;
    let mut top = TITLE;
    for section in Section::ALL {
        top = draw_section(area, report, section, top)?;
    }
    area.present()
}

/// The section's rows from `top` down; where the next begins.
fn draw_section(area: &Area<'_>, report: &Report, section: Section, top: i32) -> Drawn<i32> {
    let mut outcomes = report.of(section).peekable();
    if outcomes.peek().is_none() {
        return Ok(top);
    }
    let heading = text(13, BLACK, HPos::Left);
    area.draw_text(section.title(), &heading, (MARGIN, top + HEADING / 2 + 2))?;
    let mut row = top + HEADING;
    for outcome in outcomes {
        draw_row(area, outcome, row)?;
        row += ROW;
    }
    Ok(row)
}

fn draw_row(area: &Area<'_>, outcome: &Outcome, top: i32) -> Drawn {
    let ratio = outcome.ratio().median;
    let middle = top + ROW / 2;
    let label = text(12, RGBColor(70, 70, 70), HPos::Right);
    area.draw_text(&row_label(outcome), &label, (LEFT - 8, middle))?;
    let colour = if outcome.is_met() { MET } else { MISSED };
    let corners = [(LEFT, top + 3), (at(ratio), top + ROW - 3)];
    area.draw(&Rectangle::new(corners, colour.filled()))?;
    let bar = at(outcome.case.bar);
    let mark = [(bar, top), (bar, top + ROW)];
    area.draw(&PathElement::new(mark, BAR_MARK.stroke_width(2)))?;
    let number = text(12, colour, HPos::Left);
    let end = at(ratio).max(bar) + 6;
    area.draw_text(&format!("{ratio:.2}"), &number, (end, middle))
}

/// What tells a row from others of its section.
fn row_label(outcome: &Outcome) -> String {
    let case = &outcome.case;
    let threads = match case.setup().as_str() {
        "1" => "1 thread".to_string(),
        setup => format!("{setup} threads"),
    };
    match case.ours.work() {
        Some(work) => format!(
            "D={} {}, {}, {threads}",
            work.head_dim,
            work.mask_name(),
            work.pass_name()
        ),
        None => threads,
    }
}

fn axis(area: &Area<'_>, bottom: i32) -> Drawn {
    let label = text(12, RGBColor(70, 70, 70), HPos::Center);
    for half in 0..=(2.0 * LARGEST) as i32 {
        let ratio = f64::from(half) / 2.0;
        let x = at(ratio);
        let colour = if half == 2 {
            RGBColor(120, 120, 120)
        } else {
            GRID
        };
        area.draw(&PathElement::new([(x, TITLE), (x, bottom)], colour))?;
        area.draw_text(&format!("{ratio}"), &label, (x, bottom + 14))?;
    }
    Ok(())
}

fn at(ratio: f64) -> i32 {
    LEFT + (f64::from(RIGHT - LEFT) * ratio.min(LARGEST) / LARGEST).round() as i32
}

fn height(report: &Report) -> i32 {
    let sections = Section::ALL.into_iter();
    let headings = sections.filter(|&section| report.of(section).next().is_some());
    TITLE + HEADING * headings.count() as i32 + ROW * report.outcomes.len() as i32 + AXIS
}

fn text(size: i32, colour: RGBColor, across: HPos) -> TextStyle<'static> {
    let position = Pos::new(across, VPos::Center);
    ("sans-serif", size)
        .into_font()
        .color(&colour)
        .pos(position)
}
