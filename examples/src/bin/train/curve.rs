//! Losses: as a metric for the display, as a list, as a file, as a picture.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use burn::{
    tensor::{Tensor, TensorReadError},
    train::metric::{
        Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
        NumericEntry, SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};
use plotters::prelude::*;
use ring_multihead::SequenceLoss;

/// Losses in bits per byte, in the order of steps; shared by the metric and whoever reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve(Arc<Mutex<Losses>>);

#[derive(Debug, Default)]
struct Losses {
    train: Vec<f64>,
    validation: Vec<f64>,
}

impl Curve {
    fn push(&self, validation: bool, bits: f64) {
        let mut losses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if validation {
            losses.validation.push(bits);
        } else {
            losses.train.push(bits);
        }
    }

    /// Of every training step.
    pub(crate) fn train_losses(&self) -> Vec<f64> {
        let losses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        losses.train.clone()
    }

    /// Of every validation step.
    pub(crate) fn validation_losses(&self) -> Vec<f64> {
        let losses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        losses.validation.clone()
    }
}

/// Loss in bits per byte, as burn-train shows and logs it.
#[derive(Clone)]
pub(crate) struct BitsPerByteMetric {
    name: MetricName,
    state: NumericMetricState,
    curve: Curve,
    validation: bool,
}

/// What the metric reads of an output.
pub(crate) struct LossInNats(Tensor<1>);

impl Adaptor<LossInNats> for SequenceLoss {
    fn adapt(&self) -> LossInNats {
        LossInNats(self.loss.clone())
    }
}

impl BitsPerByteMetric {
    pub(crate) fn train(curve: &Curve) -> Self {
        Self::new(curve, false)
    }

    pub(crate) fn validation(curve: &Curve) -> Self {
        Self::new(curve, true)
    }

    fn new(curve: &Curve, validation: bool) -> Self {
        Self {
            name: Arc::new("Bits per byte".to_string()),
            state: NumericMetricState::default(),
            curve: curve.clone(),
            validation,
        }
    }
}

impl Metric for BitsPerByteMetric {
    type Input = LossInNats;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        MetricAttributes::Numeric(NumericAttributes {
            unit: Some("bits".into()),
            higher_is_better: false,
        })
    }

    fn update(
        &mut self,
        loss: &LossInNats,
        _: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let nats = loss.0.clone().try_into_scalar::<f64>()?;
        let bits = nats / std::f64::consts::LN_2;
        self.curve.push(self.validation, bits);
        self.state.update(bits, 1);
        Ok(self
            .state
            .compute_update(FormatOptions::new(self.name()).precision(4)))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self
            .state
            .compute_final(FormatOptions::new(self.name()).precision(4)))
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for BitsPerByteMetric {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

/// The losses of a resumed run with those that `file` has of the steps before it, if it has them all; and their first step.
pub(crate) fn whole_run(file: &Path, first_step: usize, losses: &[f64]) -> (usize, Vec<f64>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    let earlier: Option<Vec<f64>> = text
        .lines()
        .skip(1)
        .take(first_step)
        .enumerate()
        .map(|(step, line)| {
            let (number, loss) = line.split_once(',')?;
            (number.parse() == Ok(step)).then_some(loss.parse().ok()?)
        })
        .collect();
    match earlier {
        Some(earlier) if earlier.len() == first_step => (0, [&earlier, losses].concat()),
        _ => (first_step, losses.to_vec()),
    }
}

/// Writes `step,bits_per_byte` lines.
pub(crate) fn write_csv(file: &Path, first_step: usize, losses: &[f64]) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(file)?);
    writeln!(out, "step,bits_per_byte")?;
    for (index, loss) in losses.iter().enumerate() {
        writeln!(out, "{},{loss}", first_step + index)?;
    }
    out.flush()
}

/// Draws the losses of every step and their running mean.
pub(crate) fn draw(
    file: &Path,
    title: &str,
    first: usize,
    losses: &[f64],
) -> Result<(), Box<dyn std::error::Error>> {
    let top = losses.iter().copied().fold(4.0, f64::max).min(9.0);
    let root = SVGBackend::new(file, (900, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(first..first + losses.len().max(2) - 1, 1.0..top)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("bits per byte")
        .light_line_style(WHITE)
        .draw()?;
    let points = |values: &[f64]| {
        let numbered: Vec<(usize, f64)> = values
            .iter()
            .enumerate()
            .map(|(index, &loss)| (first + index, loss))
            .collect();
        numbered
    };
    let light = RGBColor(170, 190, 220);
    let dark = RGBColor(30, 70, 150);
    chart
        .draw_series(LineSeries::new(points(losses), light))?
        .label("each step")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], light));
    chart
        .draw_series(LineSeries::new(
            points(&running_mean(losses, 25)),
            dark.stroke_width(2),
        ))?
        .label("mean of 25 steps")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], dark.stroke_width(2)));
    chart
        .configure_series_labels()
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    root.present()?;
    Ok(())
}

/// Mean of each value and up to `width - 1` before it.
fn running_mean(values: &[f64], width: usize) -> Vec<f64> {
    (0..values.len())
        .map(|index| {
            let window = &values[(index + 1).saturating_sub(width)..=index];
            window.iter().sum::<f64>() / window.len() as f64
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_keeps_the_losses_before_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("losses.csv");
        assert_eq!(
            whole_run(&file, 2, &[3.0]),
            (2, vec![3.0]),
            "nothing to keep"
        );
        write_csv(&file, 0, &[5.0, 4.0, 9.0]).unwrap();
        assert_eq!(whole_run(&file, 2, &[3.0]), (0, vec![5.0, 4.0, 3.0]));
        assert_eq!(
            whole_run(&file, 4, &[3.0]),
            (4, vec![3.0]),
            "a step is missing"
        );
        assert_eq!(whole_run(&file, 0, &[3.0]), (0, vec![3.0]), "a new run");
    }

    #[test]
    fn the_running_mean_begins_with_what_there_is() {
        assert_eq!(running_mean(&[1.0, 3.0, 5.0, 7.0], 2), [1.0, 2.0, 4.0, 6.0]);
    }
}
