//! Counts how near in space the tokens of a grid lie by the order of their sequence, and writes `benches/results/hilbert.md` and
//! `docs/hilbert.svg`. Fails if a bar is missed.
//!
//!     cargo run --release -p ring-benches --bin hilbert

use std::{error::Error, fmt::Write as _, fs, path::Path};

use ring_benches::hilbert::{Order, Sequence, picture};

/// Grids of the tables.
const GRIDS: [&[usize]; 6] = [
    &[64, 64],
    &[256, 256],
    &[100, 300],
    &[1024, 16],
    &[32, 32, 32],
    &[16, 64, 64],
];
/// Tokens of a segment.
const SEGMENTS: [usize; 3] = [256, 1024, 4096];
/// How far a cell's neighbours are, along every axis.
const RADII: [usize; 2] = [1, 8];
/// Positions before and after a token that a window has.
const REACHES: [usize; 3] = [64, 256, 1024];
/// The most that the mean distance in segments of 256 may be, as a factor of row-major's.
const DISTANCE_BAR: f64 = 0.5;
/// The most rows that ranks may need within radius 1, as a factor of row-major's, where rows are the longer side.
const ROWS_BAR: f64 = 0.75;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let mut missed = Vec::new();
    let report = [
        head(),
        distances(&mut missed)?,
        shards(&mut missed)?,
        windows()?,
    ]
    .concat();
    print!("{report}");
    let benches = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir_all(benches.join("results"))?;
    fs::write(benches.join("results/hilbert.md"), report)?;
    let svg = picture::draw(24, 36, 6)?;
    fs::write(benches.join("../docs/hilbert.svg"), svg)?;
    match missed.as_slice() {
        [] => Ok(()),
        missed => Err(missed.join("; ").into()),
    }
}

fn head() -> String {
    let bar = 100.0 * DISTANCE_BAR;
    format!(
        "# Grids in the order of a Hilbert curve\n\n\
         Where the tokens of an image or a volume stand in the sequence, row by row, along the curve, or by chance, decides how near \
         in space those of one segment, or of one rank, lie. All of this is counted, nothing timed: it is the same on every machine. \
         Sides are height x width or depth x height x width; a cell's neighbours within R are the cells at most R away along every \
         axis. Bars: in segments of {} the curve's mean distance is at most {bar}% of row-major's, and within 1 ranks need at most {}% \
         of its rows, in every grid but the tall one. Made by `cargo run --release -p ring-benches --bin hilbert`.\n\n\
         ![row-major order and the curve, in the colours of ranks](../../docs/hilbert.svg)\n\n\
         These are properties of the order, not of attention. Patterns count positions: in another order a segment, a dilated branch, a \
         window or a causal mask selects other pairs of tokens, while the rows that travel for a given pattern stay the same in \
         number. Full attention without a mask gives every token the same in any order. Whether the pairs that the curve selects \
         serve a model better was not measured.\n",
        SEGMENTS[0],
        100.0 * ROWS_BAR,
    )
}

/// A grid as its sides.
fn name(sides: &[usize]) -> String {
    let sides: Vec<String> = sides.iter().map(usize::to_string).collect();
    sides.join("x")
}

/// In the tall grid rows are so short that row-major order is compact too.
fn is_tall(sides: &[usize]) -> bool {
    sides[0] > 10 * sides[1]
}

/// The grid's cells in row-major order, along the curve, and by chance.
fn sequences(sides: &[usize]) -> Outcome<Vec<(Order, Sequence)>> {
    let of = |order| Ok((order, Sequence::new(sides, order)?));
    Order::ALL.into_iter().map(of).collect()
}

fn distances(missed: &mut Vec<String>) -> Outcome<String> {
    let mut report = format!(
        "\n## Distance within a segment\n\n\
         Of two tokens of one segment, over all pairs, in sides of a cell: mean / 90th percentile.\n\n\
         | grid | order | segments of {} | {} | {} |\n|---|---|---|---|---|\n",
        SEGMENTS[0], SEGMENTS[1], SEGMENTS[2]
    );
    for sides in GRIDS {
        let mut of_rows = f64::INFINITY;
        for (order, sequence) in sequences(sides)? {
            let of_segments = SEGMENTS.map(|length| sequence.distances(length));
            let mean = of_segments[0].0;
            match order {
                Order::RowMajor => of_rows = mean,
                Order::Hilbert if mean > DISTANCE_BAR * of_rows && !is_tall(sides) => {
                    missed.push(format!(
                        "{}: mean distance {mean:.2}, row-major {of_rows:.2}",
                        name(sides)
                    ));
                }
                _ => {}
            }
            let cells = of_segments.map(|(mean, ninetieth)| format!("{mean:.1} / {ninetieth:.1}"));
            let _ = writeln!(
                report,
                "| {} | {order} | {} |",
                name(sides),
                cells.join(" | ")
            );
        }
    }
    Ok(report)
}

fn shards(missed: &mut Vec<String>) -> Outcome<String> {
    let mut report = "\n## What ranks own of a neighbourhood, and what they would need\n\n\
         Contiguous shards. *Own*: share of a cell's neighbours that its own rank owns. *Rows*: cells of other ranks within R of a \
         rank's cells, each counted once, mean / most over ranks: what would travel to it for a window in space.\n\n\
         | grid | ranks | cells a rank | order | own, R = 1 | rows, R = 1 | own, R = 8 | rows, R = 8 |\n\
         |---|---|---|---|---|---|---|---|\n"
        .to_string();
    for sides in GRIDS {
        let sequences = sequences(sides)?;
        for ranks in [4, 16] {
            let mut of_rows = f64::INFINITY;
            for (order, sequence) in &sequences {
                let halos = RADII.map(|radius| sequence.halo(ranks, radius));
                let rows = halos[0].mean_rows;
                match order {
                    Order::RowMajor => of_rows = rows,
                    Order::Hilbert if rows > ROWS_BAR * of_rows && !is_tall(sides) => {
                        missed.push(format!(
                            "{}, {ranks} ranks: {rows} rows, row-major {of_rows}",
                            name(sides)
                        ));
                    }
                    _ => {}
                }
                let cells = halos.map(|halo| {
                    let own = 100.0 * halo.own_neighbours;
                    format!("{own:.1}% | {:.0} / {}", halo.mean_rows, halo.most_rows)
                });
                let _ = writeln!(
                    report,
                    "| {} | {ranks} | {} | {order} | {} |",
                    name(sides),
                    sides.iter().product::<usize>() / ranks,
                    cells.join(" | ")
                );
            }
        }
    }
    Ok(report)
}

fn windows() -> Outcome<String> {
    let mut report = "\n## What a window of positions sees of a window in space\n\n\
         Share of a cell's neighbours within R that stand at most so many positions before or after it: a sliding window of attention \
         sees these. Row-major order reaches all of them once the window spans R rows (in a volume, R layers); \
         along the curve some stay far away.\n\n\
         | grid | order | R | ±64 | ±256 | ±1024 |\n|---|---|---|---|---|---|\n"
        .to_string();
    for sides in GRIDS {
        for (order, sequence) in sequences(sides)? {
            for radius in RADII {
                let shares =
                    REACHES.map(|reach| format!("{:.1}%", 100.0 * sequence.seen(reach, radius)));
                let _ = writeln!(
                    report,
                    "| {} | {order} | {radius} | {} |",
                    name(sides),
                    shares.join(" | ")
                );
            }
        }
    }
    Ok(report)
}
