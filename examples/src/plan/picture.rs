//! The survey as a picture: what one rank owns and attends to, branch by branch, and, below, every rank's row of the same.
//!
//! Everything is drawn by columns of pixels, so that the picture's size does not depend on the length of the sequence.

use std::fmt::Display;

use plotters::{
    coord::Shift,
    prelude::*,
    style::{
        HSLColor, RGBColor, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};
use rayon::prelude::*;
use ring_core::{AttentionSpec, HeadOffsets, Mask, Mixing, Shape, SpecError, Strategy};

use super::{
    pixels::{Pixel, PixelLine, branch_alone},
    units::{thousands, tokens},
};
use crate::command_line::Failure;

/// Pixels of the part that shows positions.
const COLUMNS: usize = 840;
const LEFT: i32 = 230;
const RIGHT: i32 = 40;
const LANE: i32 = 22;
const LANE_GAP: i32 = 8;
const AXIS: i32 = 42;
/// Ranks that the lower part shows; with more, every so many-th.
const MOST_ROWS: usize = 64;
/// Owners that have a colour of their own in the legend.
const MOST_SWATCHES: usize = 10;
/// Shades of all owners together: neighbours that nobody could tell apart are drawn as one.
const MOST_SHADES: usize = 96;

const INK: RGBColor = RGBColor(40, 40, 40);
const FAINT: RGBColor = RGBColor(110, 110, 110);
const LANE_GROUND: RGBColor = RGBColor(242, 242, 242);
const OWN_GROUND: RGBColor = RGBColor(214, 214, 214);
const PALETTE: [RGBColor; MOST_SWATCHES] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
    RGBColor(188, 189, 34),
    RGBColor(23, 190, 207),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A lane of the upper part.
struct Lane {
    title: String,
    subtitle: String,
    line: PixelLine,
}

/// Everything to be drawn.
struct Picture<'a> {
    spec: &'a AttentionSpec,
    rank: usize,
    own: PixelLine,
    lanes: Vec<Lane>,
    /// The rows of the lower part.
    rows: Vec<(usize, PixelLine)>,
}

/// The picture for one rank, as SVG. Which positions its own attend to does not depend on who computes what.
///
/// # Errors
/// [`Failure::Input`] for a computation that cannot be.
pub(super) fn draw(spec: &AttentionSpec, rank: usize) -> Result<String, Failure> {
    let ring = AttentionSpec {
        strategy: Strategy::Ring,
        ..spec.clone()
    };
    let picture = Picture::new(&ring, rank).map_err(Failure::input)?;
    let mut svg = String::new();
    let size = (
        (LEFT + COLUMNS as i32 + RIGHT) as u32,
        picture.height() as u32,
    );
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    picture
        .paint(&area)
        .and_then(|()| area.present().map_err(|error| error.to_string()))
        .map_err(|error| Failure::Run(format!("the picture could not be drawn: {error}")))?;
    drop(area);
    Ok(svg)
}

impl<'a> Picture<'a> {
    fn new(spec: &'a AttentionSpec, rank: usize) -> Result<Self, SpecError> {
        let ranks = spec.world_size;
        let mut lanes = vec![Lane {
            title: "owner of each position".to_string(),
            subtitle: format!("{}, {} ranks", spec.key_sharding, thousands(ranks)),
            line: PixelLine::owners(spec, 0..ranks, COLUMNS),
        }];
        for (branch, rule) in spec.pattern.branches().iter().enumerate() {
            let segment = match rule.segment_length {
                Some(length) => format!("segments of {}", tokens(length)),
                None => "whole sequence".to_string(),
            };
            let title = format!("{segment}, rate {}", tokens(rule.dilation_rate));
            let Some((head, alone)) = branch_alone(spec, branch)? else {
                continue;
            };
            let head_alone = alone.shape.kv_heads - 1;
            lanes.push(Lane {
                title,
                subtitle: format!("keys attended to by head {head}"),
                line: PixelLine::attended(&alone, rank, head_alone, COLUMNS)?,
            });
        }
        Ok(Self {
            spec,
            rank,
            own: PixelLine::owners(spec, std::iter::once(rank), COLUMNS),
            lanes,
            rows: rows(spec, rank)?,
        })
    }

    fn height(&self) -> i32 {
        self.matrix_top() + self.row_height() * self.rows.len() as i32 + AXIS + 12
    }

    fn lanes_top(&self) -> i32 {
        128
    }

    fn lanes_bottom(&self) -> i32 {
        self.lanes_top() + (LANE + LANE_GAP) * self.lanes.len() as i32
    }

    fn matrix_top(&self) -> i32 {
        self.lanes_bottom() + AXIS + 40
    }

    /// Pixels of one row of the lower part.
    fn row_height(&self) -> i32 {
        (320 / self.rows.len() as i32).clamp(5, 24)
    }

    fn paint(&self, area: &Area<'_>) -> Result<(), String> {
        area.fill(&WHITE).map_err(text_of)?;
        self.paint_title(area)?;
        self.paint_legend(area)?;
        let bottom = self.lanes_bottom();
        for run in self.own.runs(|_| ()) {
            fill(
                area,
                run.start,
                run.end,
                self.lanes_top() - 4,
                bottom,
                &OWN_GROUND,
            )?;
        }
        for (index, lane) in self.lanes.iter().enumerate() {
            self.paint_lane(
                area,
                lane,
                self.lanes_top() + (LANE + LANE_GAP) * index as i32,
            )?;
        }
        self.paint_axis(area, bottom)?;
        self.paint_matrix(area)
    }

    fn paint_title(&self, area: &Area<'_>) -> Result<(), String> {
        let title = format!(
            "Rank {} of {}: the positions it owns and those it attends to",
            thousands(self.rank),
            thousands(self.spec.world_size)
        );
        write(area, &title, (20, 26), 18, &INK, HPos::Left)?;
        let pattern = &self.spec.pattern;
        let mut about = format!(
            "{} tokens, {}",
            thousands(self.spec.key_length),
            self.spec.key_sharding
        );
        for (holds, word) in [
            (pattern.is_causal(), ", causal"),
            (
                pattern.offsets() == HeadOffsets::Blocked,
                ", blocked offsets",
            ),
            (pattern.mixing() == Mixing::HeadGroups, ", head groups"),
        ] {
            about.push_str(if holds { word } else { "" });
        }
        let Mask { left, right } = pattern.window();
        if left.is_some() || right.is_some() {
            let bound = |bound: Option<u64>| bound.map_or("-1".to_string(), |n| n.to_string());
            about.push_str(&format!(", window {},{}", bound(left), bound(right)));
        }
        if self.spec.documents.is_some() {
            about.push_str(", documents");
        }
        write(area, &about, (20, 48), 12, &FAINT, HPos::Left)
    }

    fn paint_legend(&self, area: &Area<'_>) -> Result<(), String> {
        let ranks = self.spec.world_size;
        let y = 74;
        write(
            area,
            "colour: the rank that owns the position",
            (20, y),
            12,
            &INK,
            HPos::Left,
        )?;
        let mut x = 270;
        if ranks <= MOST_SWATCHES {
            for rank in 0..ranks {
                rectangle(area, (x, y - 6), (x + 12, y + 6), &self.colour(rank))?;
                write(area, &rank.to_string(), (x + 16, y), 12, &INK, HPos::Left)?;
                x += 40;
            }
        } else {
            write(area, "0", (x, y), 12, &INK, HPos::Right)?;
            x += 6;
            for column in 0..240 {
                let colour = self.colour(column as usize * ranks / 240);
                rectangle(area, (x + column, y - 6), (x + column + 1, y + 6), &colour)?;
            }
            x += 246;
            let last = thousands(ranks - 1);
            write(area, &last, (x, y), 12, &INK, HPos::Left)?;
            x += 8 * last.len() as i32 + 20;
        }
        x += 14;
        rectangle(area, (x, y - 6), (x + 12, y + 6), &OWN_GROUND)?;
        let own = format!("owned by rank {}", thousands(self.rank));
        write(area, &own, (x + 18, y), 12, &INK, HPos::Left)?;
        let y = y + 22;
        let about = "paler: fewer of the positions; attended to are";
        write(area, about, (20, y), 12, &INK, HPos::Left)?;
        let mut x = 300;
        for (stride, name) in [
            (1, "all"),
            (4, "1/4"),
            (16, "1/16"),
            (256, "1/256"),
            (4096, "1/4,096"),
        ] {
            let pixel = Pixel {
                owner: self.rank,
                stride,
            };
            rectangle(area, (x, y - 6), (x + 12, y + 6), &self.look(pixel))?;
            write(area, name, (x + 18, y), 12, &INK, HPos::Left)?;
            x += 34 + 8 * name.len() as i32;
        }
        Ok(())
    }

    fn paint_lane(&self, area: &Area<'_>, lane: &Lane, top: i32) -> Result<(), String> {
        write(
            area,
            &lane.title,
            (LEFT - 12, top + 6),
            12,
            &INK,
            HPos::Right,
        )?;
        write(
            area,
            &lane.subtitle,
            (LEFT - 12, top + 19),
            10,
            &FAINT,
            HPos::Right,
        )?;
        fill(area, 0, COLUMNS, top, top + LANE, &LANE_GROUND)?;
        for run in self.own.runs(|_| ()) {
            fill(area, run.start, run.end, top, top + LANE, &OWN_GROUND)?;
        }
        self.paint_line(area, &lane.line, top, top + LANE)
    }

    fn paint_line(
        &self,
        area: &Area<'_>,
        line: &PixelLine,
        top: i32,
        bottom: i32,
    ) -> Result<(), String> {
        for run in line.runs(|pixel| self.look(pixel)) {
            fill(area, run.start, run.end, top, bottom, &run.look)?;
        }
        Ok(())
    }

    /// The axis of positions, in tokens.
    fn paint_axis(&self, area: &Area<'_>, y: i32) -> Result<(), String> {
        let length = self.spec.key_length;
        let right = LEFT + COLUMNS as i32;
        rectangle(area, (LEFT, y), (right, y + 1), &INK)?;
        for tick in ticks(length) {
            let x = LEFT + (tick as f64 / length.max(1) as f64 * COLUMNS as f64).round() as i32;
            rectangle(area, (x, y), (x + 1, y + 6), &INK)?;
            write(area, &tokens(tick), (x, y + 15), 11, &INK, HPos::Center)?;
        }
        write(
            area,
            "position (tokens)",
            (LEFT + COLUMNS as i32 / 2, y + 32),
            11,
            &FAINT,
            HPos::Center,
        )
    }

    fn paint_matrix(&self, area: &Area<'_>) -> Result<(), String> {
        let (top, height) = (self.matrix_top(), self.row_height());
        let shown = if self.rows.len() < self.spec.world_size {
            format!(
                "{} of {} ranks",
                self.rows.len(),
                thousands(self.spec.world_size)
            )
        } else {
            "all ranks".to_string()
        };
        let title = format!("All branches together, head 0: a row for each rank ({shown})");
        write(area, &title, (LEFT, top - 16), 13, &INK, HPos::Left)?;
        let labels_every = (14 / height + 1).max(1) as usize;
        let gap = i32::from(height > 8);
        for (index, (rank, line)) in self.rows.iter().enumerate() {
            let y = top + height * index as i32;
            let is_chosen = *rank == self.rank;
            fill(area, 0, COLUMNS, y, y + height - gap, &LANE_GROUND)?;
            self.paint_line(area, line, y, y + height - gap)?;
            if is_chosen {
                let right = LEFT + COLUMNS as i32;
                outline(area, (LEFT - 2, y - 1), (right + 2, y + height - gap), &INK)?;
            }
            let near_chosen = self
                .rows
                .iter()
                .position(|row| row.0 == self.rank)
                .is_some_and(|chosen| chosen.abs_diff(index) < labels_every);
            if is_chosen || (index % labels_every == 0 && !near_chosen) {
                let label = format!("rank {}", thousands(*rank));
                let (size, colour) = if is_chosen { (12, &INK) } else { (11, &FAINT) };
                write(
                    area,
                    &label,
                    (LEFT - 12, y + height / 2),
                    size,
                    colour,
                    HPos::Right,
                )?;
            }
        }
        self.paint_axis(area, top + height * self.rows.len() as i32 + 2)
    }

    /// Colour for the owner; the paler, the fewer of the positions.
    fn look(&self, pixel: Pixel) -> RGBColor {
        let ground = f64::from(LANE_GROUND.0);
        let weight = weight(pixel.stride);
        let blend = |full: u8| (ground + weight * (f64::from(full) - ground)).round() as u8;
        let RGBColor(r, g, b) = self.colour(pixel.owner);
        RGBColor(blend(r), blend(g), blend(b))
    }

    fn colour(&self, rank: usize) -> RGBColor {
        let ranks = self.spec.world_size;
        if ranks <= MOST_SWATCHES {
            return PALETTE[rank];
        }
        // Violet and red, the ends, stay apart. Neighbours differ in lightness where they can be told apart at all.
        let shade = rank * (MOST_SHADES.min(ranks)) / ranks;
        let hue = 0.8 * shade as f64 / (MOST_SHADES.min(ranks) - 1) as f64;
        let lightness = if ranks <= MOST_ROWS && rank % 2 == 1 {
            0.62
        } else {
            0.48
        };
        let (r, g, b) = HSLColor(hue, 0.75, lightness).to_backend_color().rgb;
        RGBColor(r, g, b)
    }
}

/// How much colour positions get of which every `stride`-th is attended to.
fn weight(stride: usize) -> f64 {
    (stride as f64).powf(-0.13).max(0.25)
}

/// The rows of the lower part: every so many-th rank, and the chosen one.
fn rows(spec: &AttentionSpec, chosen: usize) -> Result<Vec<(usize, PixelLine)>, SpecError> {
    let shown = spec.world_size.min(MOST_ROWS);
    let mut ranks: Vec<usize> = (0..shown)
        .map(|row| row * spec.world_size / shown)
        .collect();
    if !ranks.contains(&chosen) {
        let nearest = ranks.partition_point(|&rank| rank < chosen) - 1;
        ranks[nearest] = chosen;
    }
    // One head is enough, and quicker. Head groups need one for each branch, and divide the heads among them.
    let kv_heads = match spec.pattern.mixing() {
        Mixing::LongNet => 1,
        Mixing::HeadGroups => spec.shape.kv_heads,
    };
    let one_head = AttentionSpec {
        shape: Shape {
            query_heads: kv_heads,
            kv_heads,
            ..spec.shape
        },
        ..spec.clone()
    };
    ranks
        .into_par_iter()
        .map(|rank| Ok((rank, PixelLine::attended(&one_head, rank, 0, COLUMNS)?)))
        .collect()
}

/// Four to ten round positions from 0 on.
fn ticks(length: usize) -> Vec<usize> {
    let step = if length.is_multiple_of(1024) {
        (length / 5).max(1).next_power_of_two()
    } else {
        let power = 10_usize.pow((length / 5).max(1).ilog10());
        [1, 2, 5, 10]
            .map(|factor| factor * power)
            .into_iter()
            .find(|step| length / step <= 10)
            .unwrap_or(length.max(1))
    };
    (0..=length).step_by(step).collect()
}

fn text_of(error: impl Display) -> String {
    error.to_string()
}

/// Columns of the part that shows positions.
fn fill(
    area: &Area<'_>,
    start: usize,
    end: usize,
    top: i32,
    bottom: i32,
    colour: &RGBColor,
) -> Result<(), String> {
    let (left, right) = (LEFT + start as i32, LEFT + end as i32);
    rectangle(area, (left, top), (right, bottom), colour)
}

fn rectangle(
    area: &Area<'_>,
    from: (i32, i32),
    to: (i32, i32),
    colour: &RGBColor,
) -> Result<(), String> {
    area.draw(&Rectangle::new([from, to], colour.filled()))
        .map_err(text_of)
}

fn outline(
    area: &Area<'_>,
    from: (i32, i32),
    to: (i32, i32),
    colour: &RGBColor,
) -> Result<(), String> {
    area.draw(&Rectangle::new([from, to], colour.stroke_width(2)))
        .map_err(text_of)
}

fn write(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    size: i32,
    colour: &RGBColor,
    horizontal: HPos,
) -> Result<(), String> {
    let style = TextStyle::from(("sans-serif", size).into_font())
        .color(colour)
        .pos(Pos::new(horizontal, VPos::Center));
    area.draw(&Text::new(text.to_string(), at, style))
        .map_err(text_of)
}
