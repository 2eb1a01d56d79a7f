//! The golden cases, and how results are held against them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;
use half::{bf16, f16};
use ring_core::oracle::{OracleInput, attention};
use ring_examples::{
    attend::{self, Input, Options, Outcome},
    placement::Placement,
};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// What f32 kernels with f32 state owe.
pub(crate) const TOLERANCE: f64 = 2e-5;
/// Names of the results in a file.
pub(crate) const RESULTS: [&str; 5] = ["out", "lse", "grad_q", "grad_k", "grad_v"];
/// Shardings that golden numbers are tested with.
pub(crate) const SHARDINGS: [&str; 3] = ["contiguous", "zigzag", "striped:5"];
/// Rounds to a 16-bit type and back.
pub(crate) type Rounding = fn(f32) -> f32;
/// The types that inputs may be rounded to.
pub(crate) const ROUNDINGS: [(&str, Rounding); 2] = [
    ("bf16", |x| bf16::from_f32(x).to_f32()),
    ("f16", |x| f16::from_f32(x).to_f32()),
];
/// A case of `golden/index.json`.
#[derive(Deserialize)]
pub(crate) struct Case {
    /// Its name, also that of its file.
    pub(crate) name: String,
    /// What the program is asked for.
    pub(crate) options: Vec<String>,
}

impl Case {
    /// All of them.
    pub(crate) fn all() -> Vec<Self> {
        let text = fs::read_to_string(golden("index.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Some that differ much from one another.
    pub(crate) fn some_to_round() -> Vec<Self> {
        const NAMES: [&str; 8] = [
            "full_gqa_causal",
            "dilated_1_2_4_causal",
            "head_groups_causal",
            "full_cross",
            "window_both_sides",
            "documents_causal",
            "softcap",
            "alibi_causal",
        ];
        let mut cases = Self::all();
        cases.retain(|case| NAMES.contains(&case.name.as_str()));
        assert_eq!(cases.len(), NAMES.len());
        cases
    }

    /// What the oracle says of its input, rounded, asked for with `more`.
    pub(crate) fn oracle(
        &self,
        more: &[&str],
        round: Rounding,
    ) -> BTreeMap<&'static str, Vec<f32>> {
        let options = self.request(more);
        let input = Input::open(&options).unwrap();
        let spec = options.spec(&input, options.ranks.unwrap_or(1)).unwrap();
        let tensors = read(&self.file());
        let wide = |name: &str| -> Vec<f64> {
            let rounded = |&x: &f32| f64::from(round(x));
            tensors[name].iter().map(rounded).collect()
        };
        let results = attention(
            &spec,
            OracleInput {
                query: &wide("q"),
                key: &wide("k"),
                value: &wide("v"),
                grad_output: Some(&wide("grad_out")),
                grad_log_sum_exp: None,
                dropout: options.scores.seed(),
            },
        );
        let values = [
            results.output,
            results.log_sum_exp,
            results.grad_query,
            results.grad_key,
            results.grad_value,
        ];
        let narrow = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect();
        RESULTS.into_iter().zip(values.map(narrow)).collect()
    }

    /// Its input and its results.
    pub(crate) fn file(&self) -> PathBuf {
        golden(&format!("{}.safetensors", self.name))
    }

    /// What the program is asked for, with `more`.
    pub(crate) fn request(&self, more: &[&str]) -> Options {
        let file = self.file();
        let fixed = ["attend", "--output", "none", "--input", path(&file)];
        let options = fixed
            .into_iter()
            .chain(self.options.iter().map(String::as_str))
            .chain(more.iter().copied());
        Options::try_parse_from(options).unwrap()
    }

    /// Results computed on threads of this process.
    pub(crate) fn compute(&self, more: &[&str]) -> BTreeMap<&'static str, Vec<f32>> {
        let outcome = attend::compute(&self.request(more))
            .unwrap_or_else(|failure| panic!("{}: {failure}", self.name));
        values(&outcome)
    }

    /// Results computed on the ranks of `placement`, where rank 0 is.
    pub(crate) fn compute_on(
        &self,
        placement: &Placement,
        more: &[&str],
    ) -> Option<BTreeMap<&'static str, Vec<f32>>> {
        attend::compute_on(&self.request(more), placement)
            .unwrap_or_else(|failure| panic!("{}: {failure}", self.name))
            .as_ref()
            .map(values)
    }

    /// Holds `got` against the file.
    pub(crate) fn check(&self, got: &BTreeMap<&'static str, Vec<f32>>, how: &str) {
        let expected = read(&self.file());
        for name in RESULTS {
            let distance = distance(&got[name], &expected[name]);
            assert!(
                distance <= TOLERANCE,
                "{name} of {} off by {distance:e} {how}",
                self.name
            );
        }
    }
}

fn values(outcome: &Outcome) -> BTreeMap<&'static str, Vec<f32>> {
    let tensors = outcome.tensors().into_iter();
    tensors
        .map(|(name, tensor)| (name, tensor.values()))
        .collect()
}

/// A file of the golden cases.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A path as an argument.
pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The f32 tensors of a file.
pub(crate) fn read(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(file).unwrap();
    SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F32, "{name}");
            let (words, _) = view.data().as_chunks::<4>();
            let values = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
            (name.to_string(), values)
        })
        .collect()
}

/// `||got - expected|| / ||expected||`; the same `-inf` in both.
pub(crate) fn distance(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &expected) in got.iter().zip(expected) {
        if got == f32::NEG_INFINITY || expected == f32::NEG_INFINITY {
            assert_eq!(got, expected);
            continue;
        }
        assert!(got.is_finite(), "got {got}, expected {expected}");
        error += (f64::from(got) - f64::from(expected)).powi(2);
        norm += f64::from(expected).powi(2);
    }
    error.sqrt() / norm.sqrt().max(1e-12)
}
