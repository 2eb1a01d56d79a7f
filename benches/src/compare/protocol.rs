//! What is said between this process and those it starts: one JSON message a line. `benches/python/worker.py` is the other end.

use serde::{Deserialize, Serialize};

use crate::{compare::CompareError, work::Work};

/// What a process is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Draw tensors for this work.
    Prepare {
        /// What to compute from now on.
        work: Work,
    },
    /// One pass of the prepared work, not timed.
    WarmUp,
    /// One pass of the prepared work: seconds.
    Time,
    /// One pass of the prepared work: bytes of memory that it needed.
    Peak,
    /// Both passes over these numbers: the results.
    Compute {
        /// What to compute.
        work: Work,
        /// Queries, own rows.
        query: Vec<f32>,
        /// Keys, own rows.
        key: Vec<f32>,
        /// Values, own rows.
        value: Vec<f32>,
        /// Gradient that reaches the output, own rows.
        grad_output: Vec<f32>,
    },
}

/// What a process says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Unasked, when it is there: the version of PyTorch.
    Torch(String),
    /// Done.
    Ready,
    /// How long it took.
    Seconds(f64),
    /// How much memory it took.
    Bytes(u64),
    /// What came out.
    Numbers(Numbers),
    /// It could not be done.
    Error(String),
}

/// Results of both passes, own rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// `[1, heads, rows, head_dim]`
    pub output: Vec<f32>,
    /// `[1, heads, rows, head_dim]`
    pub grad_value: Vec<f32>,
}

impl Answer {
    /// Reads a line that `process` said.
    ///
    /// # Errors
    /// [`CompareError::Answer`] for what is no answer, [`CompareError::Failed`] for an answer that says so.
    pub fn parse(process: &'static str, line: &str) -> Result<Self, CompareError> {
        match serde_json::from_str(line) {
            Ok(Answer::Error(message)) => Err(CompareError::Failed { process, message }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(CompareError::Answer {
                process,
                answer: line.trim_end().to_string(),
                expected: "an answer",
            }),
        }
    }

    /// The error of an answer to something else.
    pub fn unexpected(self, process: &'static str, expected: &'static str) -> CompareError {
        CompareError::Answer {
            process,
            answer: format!("{self:?}"),
            expected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_lines_that_the_other_end_reads() {
        let work = Work::full(2, 128, 64).with_causal(true);
        let prepare = serde_json::to_string(&Request::Prepare { work: work.clone() }).unwrap();
        assert_eq!(
            prepare,
            r#"{"do":"prepare","work":{"heads":2,"length":128,"head_dim":64,"dtype":"f32","causal":true,"#.to_string()
                + r#""backward":false,"segment_lengths":[],"dilation_rates":[]}}"#
        );
        assert_eq!(
            serde_json::from_str::<Request>(&prepare).unwrap(),
            Request::Prepare { work }
        );
        assert_eq!(
            serde_json::to_string(&Request::WarmUp).unwrap(),
            r#"{"do":"warm_up"}"#
        );
    }

    #[test]
    fn answers_are_the_lines_that_the_other_end_writes() {
        let parse = |line| Answer::parse("test", line).unwrap();
        assert_eq!(parse("\"ready\"\n"), Answer::Ready);
        assert_eq!(parse("{\"seconds\": 0.25}\n"), Answer::Seconds(0.25));
        assert_eq!(parse("{\"bytes\": 7}\n"), Answer::Bytes(7));
        assert_eq!(
            parse("{\"torch\": \"2.15.0\"}\n"),
            Answer::Torch("2.15.0".into())
        );
    }

    #[test]
    fn a_failure_and_a_muddle_are_errors_that_quote_the_process() {
        let error = |line| Answer::parse("test", line).unwrap_err().to_string();
        assert_eq!(
            error("{\"error\": \"RuntimeError: no memory\"}"),
            "the test process failed: RuntimeError: no memory"
        );
        assert!(error("Segmentation fault").contains("Segmentation fault"));
    }
}
