//! The results as a page of Markdown.

use crate::{
    compare::{
        Section, Unit,
        agreement::Agreement,
        fma::Instructions,
        pairs::{Outcome, Spread},
    },
    machine,
};

/// All that a comparison found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Results held against each other.
    pub agreements: Vec<Agreement>,
    /// Cases in the order of their sections.
    pub outcomes: Vec<Outcome>,
    /// Version of PyTorch, if it took part.
    pub torch: Option<String>,
    /// How long it all took.
    pub minutes: f64,
}

/// The fewest bytes that a growing sequence must fit in, in GB of 10^9 bytes.
const GROWTH_GIGABYTES: f64 = 24.0;

const COMMAND: &str = "cargo run --release -p ring-benches --bin compare";

impl Report {
    /// The page; `plot` is a picture to show on it.
    pub fn markdown(&self, plot: Option<&str>) -> String {
        let mut page = self.head();
        if let Some(plot) = plot {
            page += &format!("\n![ratios of all cases and their bars]({plot})\n");
        }
        for section in Section::ALL {
            page += &self.section(section);
        }
        page + &self.agreement()
    }

    /// The cases of one section.
    pub fn of(&self, section: Section) -> impl Iterator<Item = &Outcome> {
        let outcomes = self.outcomes.iter();
        outcomes.filter(move |outcome| outcome.case.section == section)
    }

    fn head(&self) -> String {
        format!(
            "# Side by side, on the CPU\n\n\
             Both sides of a case run in alternation, in the same minutes, and the side that goes first changes from pair to pair; one run\n\
             of each before the first pair does not count. A ratio is that of one pair: our rate to theirs (of memory, their bytes to ours),\n\
             so more is better everywhere. It is the median of the ratios that must reach the bar. Timings themselves depend on what\n\
             else the machine does. GFLOP/s count 4 H N² D, half of it if causal, 3.5 times that forward + backward. Batch 1.\n\n\
             - Bars met: {} of {}\n\
             - Machine: {}, {} cores, {} memory, {}, {}\n\
             - PyTorch: {}\n\
             - Date: {}; the comparison took {:.0} minutes\n\
             - Command: `{COMMAND}`\n\
             - Threads of PyTorch's processes slept during our runs: they used {:.1}% of a core at most\n",
            self.outcomes
                .iter()
                .filter(|outcome| outcome.is_met())
                .count(),
            self.outcomes.len(),
            machine::processor(),
            machine::cores(),
            machine::memory_bytes().map_or("unknown".into(), |bytes| memory(bytes as f64)),
            machine::operating_system(),
            Instructions::detect().name(),
            self.torch.as_deref().unwrap_or("not used"),
            machine::date(),
            self.minutes,
            100.0
                * self
                    .outcomes
                    .iter()
                    .map(|outcome| outcome.disturbance)
                    .fold(0.0, f64::max),
        )
    }

    fn section(&self, section: Section) -> String {
        let rows: String = self.of(section).map(row).collect();
        if rows.is_empty() {
            return String::new();
        }
        let rates = match section.unit() {
            Unit::Flops => "GFLOP/s, ours / theirs",
            Unit::Tokens => "tokens/s, ours / theirs",
            Unit::Bytes => "saved",
        };
        let (title, explanation) = (section.title(), section.explanation());
        format!(
            "\n## {title}\n\n{explanation}\n\n\
             | work | threads | ours, median (best) | theirs, median (best) | {rates} | pairs | ratio, median (least - most) | bar | |\n\
             |---|---|---|---|---|---|---|---|---|\n{rows}{}",
            self.footnote(section)
        )
    }

    fn footnote(&self, section: Section) -> String {
        let peaks = self.of(section).filter_map(|outcome| outcome.peak_bytes);
        match (section, peaks.max()) {
            (Section::Growth, Some(peak)) => {
                let peak = peak as f64;
                let met = verdict(peak <= GROWTH_GIGABYTES * 1e9);
                format!(
                    "\nMost memory the process ever held, inputs and both lengths included: {} (bar: {GROWTH_GIGABYTES} GB, {met}).\n",
                    memory(peak)
                )
            }
            _ => String::new(),
        }
    }

    fn agreement(&self) -> String {
        if self.agreements.is_empty() {
            return String::new();
        }
        let rows: String = self.agreements.iter().map(agreement_row).collect();
        format!(
            "\n## The same work on both sides\n\n\
             Outputs and value gradients of one input, computed by both sides before anything was timed. Gradients of queries and keys\n\
             are not compared: torchscale passes none through the weights of its branches, this workspace does.\n\n\
             | work | ranks | largest difference |\n|---|---|---|\n{rows}"
        )
    }
}

fn row(outcome: &Outcome) -> String {
    let case = &outcome.case;
    let ratio = outcome.ratio();
    format!(
        "| {} | {} | {} | {} | {} | {} | **{:.2}** ({:.2} - {:.2}) | {:.2} | {} |\n",
        case.description(),
        case.setup(),
        costs(case.unit(), &outcome.ours),
        costs(case.unit(), &outcome.theirs),
        rates(outcome),
        outcome.ours.len(),
        ratio.median,
        ratio.min,
        ratio.max,
        case.bar,
        verdict(outcome.is_met()),
    )
}

fn agreement_row(agreement: &Agreement) -> String {
    format!(
        "| {} | {} | {:.1e} |\n",
        agreement.work, agreement.ranks, agreement.difference
    )
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "**missed**" }
}

fn costs(unit: Unit, costs: &[f64]) -> String {
    let Spread { min, median, .. } = Spread::of(costs);
    let [median, min] = [median, min].map(|cost| match unit {
        Unit::Bytes => memory(cost),
        Unit::Flops | Unit::Tokens => seconds(cost),
    });
    format!("{median} ({min})")
}

fn rates(outcome: &Outcome) -> String {
    let [ours, theirs] = outcome.rates();
    match outcome.case.unit() {
        Unit::Flops => format!("{:.0} / {:.0}", ours / 1e9, theirs / 1e9),
        Unit::Tokens => format!("{:.1}k / {:.1}k", ours / 1e3, theirs / 1e3),
        Unit::Bytes => format!("{:.0}%", 100.0 * (1.0 - theirs / ours)),
    }
}

fn seconds(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", 1e3 * seconds)
    } else {
        format!("{seconds:.2} s")
    }
}

fn memory(bytes: f64) -> String {
    if bytes < 1e9 {
        format!("{:.0} MB", bytes / 1e6)
    } else {
        format!("{:.2} GB", bytes / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::{Case, Contender},
        work::Work,
    };

    fn outcome(section: Section, ours: &[f64], theirs: &[f64]) -> Outcome {
        let work = Work::full(8, 4096, 64);
        let case = Case {
            section,
            ours: Contender::Ranks {
                work: work.clone(),
                ranks: 1,
                threads: 2,
            },
            theirs: Contender::Torch { work, threads: 2 },
            bar: 1.15,
        };
        Outcome {
            case,
            ours: ours.to_vec(),
            theirs: theirs.to_vec(),
            disturbance: 0.001,
            peak_bytes: Some(9_000_000_000),
        }
    }

    fn report(outcomes: Vec<Outcome>) -> Report {
        Report {
            outcomes,
            torch: Some("2.15.0".into()),
            ..Report::default()
        }
    }

    #[test]
    fn a_row_has_medians_bests_rates_ratios_and_the_verdict() {
        let met = outcome(Section::Sdpa, &[0.25, 0.2, 0.5], &[0.5, 0.4, 0.4]);
        assert_eq!(
            row(&met),
            "| N=4096 H=8 D=64 f32, full, forward | 2 | 250 ms (200 ms) | 400 ms (400 ms) | 137 / 86 | 3 \
             | **2.00** (0.80 - 2.00) | 1.15 | met |\n"
        );
        let missed = outcome(Section::Sdpa, &[1.25], &[1.25]);
        assert!(row(&missed).contains("| 1.25 s (1.25 s) |"));
        assert!(row(&missed).ends_with("| **missed** |\n"));
    }

    #[test]
    fn bytes_are_compared_the_other_way_round() {
        let memory = outcome(Section::LongNetMemory, &[1e8], &[1e9]);
        let row = row(&memory);
        assert!(
            row.contains("| 100 MB (100 MB) | 1.00 GB (1.00 GB) | 90% | 1 | **10.00**"),
            "{row}"
        );
    }

    #[test]
    fn a_page_has_the_sections_that_have_cases_and_says_how_many_bars_are_met() {
        let page = report(vec![
            outcome(Section::Sdpa, &[1.0], &[2.0]),
            outcome(Section::Growth, &[2.0], &[1.0]),
        ])
        .markdown(Some("cpu.svg"));
        assert!(page.contains("- Bars met: 1 of 2\n"));
        assert!(page.contains("(cpu.svg)"));
        assert!(page.contains("- PyTorch: 2.15.0\n"));
        assert!(page.contains("they used 0.1% of a core at most"));
        assert!(page.contains(Section::Sdpa.title()) && page.contains(Section::Growth.title()));
        assert!(!page.contains(Section::Bf16.title()));
        assert!(page.contains("9.00 GB (bar: 24 GB, met)"));
    }

    #[test]
    fn every_row_has_as_many_cells_as_the_heading() {
        let page = report(vec![outcome(Section::Sdpa, &[1.0], &[2.0])]).markdown(None);
        let cells: Vec<usize> = page
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(cells, [10; 3]);
    }
}
