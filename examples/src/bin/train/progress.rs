//! Progress as lines of text, where there is no terminal for burn-train's dashboard.

use std::time::Instant;

use burn::train::{
    LearnerSummary,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::MetricDefinition,
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
        MetricsRendererTraining,
    },
};

use crate::{args::Args, curve::Curve};

/// Lines over a whole run.
const LINES: usize = 40;

/// A renderer that prints a line now and then.
pub(crate) struct Lines {
    curve: Curve,
    started: Instant,
    first_step: usize,
    steps: usize,
    tokens_per_step: usize,
    every: usize,
    printed: usize,
}

impl Lines {
    pub(crate) fn new(args: &Args, curve: &Curve) -> Self {
        Self {
            curve: curve.clone(),
            started: Instant::now(),
            first_step: args.first_step(),
            steps: args.steps,
            tokens_per_step: args.batch * args.seq_length,
            every: (args.steps / LINES).max(1),
            printed: 0,
        }
    }

    fn report(&mut self) {
        let losses = self.curve.train_losses();
        if losses.len() < self.printed + self.every {
            return;
        }
        let recent = &losses[self.printed..];
        self.printed = losses.len();
        let seconds = self.started.elapsed().as_secs_f64();
        let left = self.steps.saturating_sub(self.first_step + losses.len());
        println!(
            "step {:>6} of {}: {:.3} bits per byte, {:.0} tokens/s, {:.0} s left",
            self.first_step + losses.len(),
            self.steps,
            recent.iter().sum::<f64>() / recent.len() as f64,
            (losses.len() * self.tokens_per_step) as f64 / seconds,
            seconds / losses.len() as f64 * left as f64,
        );
    }
}

impl MetricsRendererTraining for Lines {
    fn update_train(&mut self, _: MetricState) {
        self.report();
    }

    fn update_valid(&mut self, _: MetricState) {}

    fn on_train_end(
        &mut self,
        _: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn core::error::Error>> {
        Ok(())
    }
}

impl TrainingProgressLogger for Lines {
    fn start(&mut self, _: usize, _: usize, _: Option<usize>, _: Option<&str>) {
        self.started = Instant::now();
    }

    fn update_epoch(&mut self, epoch: usize) {
        let losses = self.curve.validation_losses();
        if let Some(last) = losses.last_chunk::<4>() {
            println!(
                "checkpoint {epoch}: {:.3} bits per byte on a few held-out windows",
                last.iter().sum::<f64>() / 4.0
            );
        }
    }

    fn start_split(&mut self, _: &str, _: usize) {}

    fn update_split(&mut self, _: usize) {}

    fn end_split(&mut self) {}

    fn end(&mut self) {}

    fn log_event_training(&mut self, _: String) {}
}

impl EvaluationProgressLogger for Lines {
    fn start_global_progress(&mut self, _: usize) {}

    fn start_test(&mut self, _: &str, _: usize) {}

    fn update_test_progress(&mut self, _: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, _: String) {}
}

impl MetricsRendererEvaluation for Lines {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
}

impl MetricsRenderer for Lines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, _: MetricDefinition) {}
}
