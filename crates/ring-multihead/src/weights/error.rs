//! What can go wrong when weights are loaded.

use std::{error::Error, fmt, path::PathBuf};

use thiserror::Error;

/// Weights that could not be loaded. The module is as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file's name does not tell its format.
    #[error(
        "{} ends neither in .pt, .pth, .bin or .ckpt (PyTorch) nor in .safetensors; use `from_pytorch` or `from_safetensors`",
        path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be read, or is not of that format.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        source: Box<dyn Error + Send + Sync>,
    },
    /// No tensor has the prefix that was asked for.
    #[error(
        "no tensor's name begins with \"{prefix}.\"; names begin with: {}",
        List(beginnings)
    )]
    Prefix {
        /// The prefix.
        prefix: String,
        /// The first parts of the names that there are.
        beginnings: Vec<String>,
    },
    /// Names of this library, which do not tell whether Burn or PyTorch wrote the matrices.
    #[error(
        "\"{name}\" is a name of this library, so its matrix may be [in, out], as Burn has them, or [out, in], as PyTorch has them; \
         say which with `with_layout`"
    )]
    UnknownLayout {
        /// The first such name.
        name: String,
    },
    /// Two tensors for one parameter.
    #[error(
        "\"{first}\" and \"{second}\" are both for {parameter}; choose a part of the file with `with_prefix`"
    )]
    Ambiguous {
        /// The parameter.
        parameter: String,
        /// One tensor.
        first: String,
        /// The other.
        second: String,
    },
    /// Parameters for which the file has nothing.
    #[error(
        "the file has nothing for {}; without a place in the module: {}{}",
        List(parameters),
        List(unused),
        Advice(unused)
    )]
    Missing {
        /// The parameters.
        parameters: Vec<String>,
        /// Tensors of the file that have no place in the module.
        unused: Vec<String>,
    },
    /// Tensors without a place in the module, where that was not allowed.
    #[error(
        "the file has more than the module: {}{}. `allow_unused(true)` leaves that out, `with_prefix` chooses a part of the file",
        List(names),
        Advice(names)
    )]
    Unused {
        /// Their names in the file.
        names: Vec<String>,
    },
    /// A tensor of another shape than its parameter; both shapes as PyTorch has them.
    #[error("\"{name}\" has shape {got:?}, {parameter} needs {expected:?}")]
    Shape {
        /// The tensor's name in the file.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The parameter.
        parameter: String,
        /// The shape that would fit.
        expected: Vec<usize>,
    },
    /// A tensor that does not hold floating-point numbers.
    #[error("\"{name}\" holds {got}, weights are floating-point numbers")]
    Type {
        /// The tensor's name in the file.
        name: String,
        /// Its type.
        got: String,
    },
    /// The data of a tensor could not be read.
    #[error("the data of {parameter} could not be read: {message}")]
    Data {
        /// The parameter.
        parameter: String,
        /// What the reader says.
        message: String,
    },
}

/// The first names of a list, and how many follow.
struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        if self.0.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What parts of names say about tensors that have no place.
const ADVICE: [(&[&str], &str); 6] = [
    (
        &["q_ln", "k_ln", "q_norm", "k_norm", "gamma_q", "gamma_k"],
        "norms of queries and keys do not exist here, and without them the numbers are others",
    ),
    (
        &["multihead_attn", "encoder_attn", "decoder", "norm4"],
        "there is no cross-attention here: of an encoder and a decoder one can be loaded",
    ),
    (
        &["pos_embedding", "embed_positions", "xpos"],
        "positions are rotary or ALiBi here, and without the file's own the numbers are others",
    ),
    (
        &[
            "norm",
            "inner_attn_ln",
            "norm3",
            "ffn_layernorm",
            "sub_norm",
        ],
        "norms inside attention and feed-forward need `sub_layer_norm` in the configuration",
    ),
    (
        &["A", "B"],
        "of torchscale's multiway networks neither way can be loaded",
    ),
    (
        &["bias"],
        "biases of projections need `bias` in the configuration",
    ),
];

/// What to say about tensors that have no place, after a semicolon each.
struct Advice<'a>(&'a [String]);

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = |name: &String, parts: &[&str]| name.split('.').any(|part| parts.contains(&part));
        let mut said = [false; ADVICE.len()];
        for name in self.0 {
            let Some(index) = ADVICE.iter().position(|(parts, _)| has(name, parts)) else {
                continue;
            };
            if !said[index] {
                write!(f, "; {}", ADVICE[index].1)?;
                said[index] = true;
            }
        }
        Ok(())
    }
}
