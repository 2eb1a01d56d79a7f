//! The golden cases, and how results are held against them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;
use ring_examples::{
    attend::{self, Options, Outcome},
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
/// Options of features that do not exist yet.
const NOT_YET: [&str; 3] = ["--window", "--document-lengths", "--softcap"];

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

    /// Its input and its results.
    pub(crate) fn file(&self) -> PathBuf {
        golden(&format!("{}.safetensors", self.name))
    }

    /// Whether the program can do it yet.
    pub(crate) fn is_supported(&self) -> bool {
        let asks_for = |feature: &str| {
            self.options
                .iter()
                .any(|option| option.starts_with(feature))
        };
        !NOT_YET.into_iter().any(asks_for) && !self.name.starts_with("alibi")
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
