//! Weights of models made with PyTorch, from their files: [`Weights`].
//!
//! ```no_run
//! use burn::tensor::Device;
//! use ring_multihead::{MultiheadDilatedAttentionConfig, Weights};
//!
//! let config = MultiheadDilatedAttentionConfig::new(768, 12, vec![2048, 4096], vec![1, 2]);
//! let mut attention = config.with_sub_layer_norm(true).init(&Device::flex());
//! let weights = Weights::from_file("model.pt")?.with_prefix("encoder.layers.3.self_attn");
//! weights.load_attention(&mut attention)?;
//! # Ok::<(), ring_multihead::WeightsError>(())
//! ```
//!
//! A tensor of the file that has no place in the module is an error, and so is a parameter for which there is none, or one of another
//! shape. Code in a PyTorch file is not run.
//!
//! # Names
//!
//! | here | PyTorch, dilated-attention-pytorch | torchscale |
//! |---|---|---|
//! | attention: `query`, `key`, `value`, `output` | `q_proj`, `k_proj`, `v_proj`, `out_proj` | the same |
//! | `query`, `key` and `value` at once | `qkv_proj`; `in_proj_weight` and `in_proj_bias` | |
//! | `norm` | `norm` | `inner_attn_ln` |
//! | block: `attention_norm`, `attention` | `norm1`, `self_attn` | `self_attn_layer_norm`, `self_attn` |
//! | `feed_forward_norm` | `norm2` | `final_layer_norm` |
//! | `expand`, `sub_norm`, `contract` | `linear1`, `norm3`, `linear2` | `ffn.fc1`, `ffn.ffn_layernorm`, `ffn.fc2`; `fc1`, `fc2` |
//! | model: `blocks.0` | `layers.0`, `encoder.layers.0` | `layers.0` |
//! | `embedding`, `norm`, `head` | `token_embedding`, `norm`, `out` or `lm_head` | `embed_tokens`, `layer_norm`, `output_projection` |
//!
//! The names on the left are understood too, with [`Weights::with_layout`]. `module`, `model`, `state_dict`, `model_state_dict` and
//! `decoder` before all names, and `_orig_mod` anywhere, are passed over.
//!
//! # Layout
//!
//! PyTorch's matrices are `[out, in]`, Burn's `[in, out]`: they are transposed. Heads follow each other in the elements of a vector on
//! all sides, so nothing is permuted. The rows of a fused projection are those of the query, then the key, then the value. With
//! `num_kv_heads` the key's and the value's are as many as those heads have elements. Numbers are converted to the type
//! that the parameter has.
//!
//! # Are the numbers the same then?
//!
//! | from | into | the same |
//! |---|---|---|
//! | `torch.nn.MultiheadAttention` | an attention without segments | yes |
//! | `torch.nn.TransformerEncoderLayer` with `norm_first=True`, `activation="gelu"` | a block without segments | yes |
//! | LongNet layers of torchscale (`subln`, `activation_fn="gelu"`) | blocks with `sub_layer_norm` and `HeadOffsets::Blocked` | yes, without `xpos_rel_pos` |
//! | a LongNet decoder of torchscale (`no_scale_embedding`) | a [`LongNet`] | no: positions are rotary here, offsets of heads cyclic |
//! | attention of DarcStar's dilated-attention-pytorch, kind "standard", `layer_norm=False` | `Mixing::HeadGroups` | yes |
//! | the same with `q_ln`, `k_ln`, `q_norm`, `gamma_q` and the like, and its encoder layers | | an error: norms of queries and keys do not exist here |
//! | its kind "improved" and what rests on it (`qkv_proj`) | | no: it attends over heads, not over positions |
//! | attention and encoder layers of fkodom's dilated-attention-pytorch | `sub_layer_norm`, `Mixing::HeadGroups` | no: there every channel is divided by its sum over all positions |
//! | decoder layers with cross-attention | | an error |
//!
//! Dropout has no weights. Activations other than GELU (the default of the layers of PyTorch and fkodom is ReLU), and layers that norm
//! after the residual (PyTorch's default) have the same names and shapes, so that nothing can notice them: look at how the
//! model was made. `scale` and `layer_norm_eps` of [`MultiheadDilatedAttentionConfig`](crate::MultiheadDilatedAttentionConfig) are there to
//! match what it was made with.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use burn_store::{
    ApplyError, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, PytorchStore, SafetensorsStore,
    burn_pack,
};

use crate::{block::LongNetBlock, language_model::LongNet, multihead::MultiheadDilatedAttention};

mod error;
mod names;
mod placed;

pub use error::WeightsError;
use names::{Grammar, Place};
use placed::{Needed, Placed, as_pytorch, needed, split};

/// How the matrices of a file lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// `[out, in]`, norms with `weight` and `bias`: as PyTorch writes them.
    #[default]
    PyTorch,
    /// `[in, out]`, norms with `gamma` and `beta`: as Burn writes them.
    Burn,
}

/// The tensors of a file, to be loaded into modules.
///
/// Nothing is read but names, types and shapes, until a module is loaded.
#[derive(Clone, Debug)]
pub struct Weights {
    tensors: BTreeMap<String, burn_pack::Tensor>,
    prefix: Option<String>,
    layout: Option<Layout>,
    allow_unused: bool,
}

impl Weights {
    /// The tensors of a file of PyTorch (`.pt`, `.pth`, `.bin`, `.ckpt`) or of safetensors (`.safetensors`).
    ///
    /// # Errors
    /// [`WeightsError::UnknownFormat`] for another ending, else as [`from_pytorch`](Self::from_pytorch).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, WeightsError> {
        let path = path.as_ref();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("pt" | "pth" | "bin" | "ckpt") => Self::from_pytorch(path),
            Some("safetensors") => Self::from_safetensors(path),
            _ => Err(WeightsError::UnknownFormat { path: path.into() }),
        }
    }

    /// The tensors of a file that `torch.save` wrote. What lies in dictionaries within dictionaries has their keys in its name,
    /// with dots between.
    ///
    /// # Errors
    /// [`WeightsError::File`] for a file that cannot be read, or is not of that format.
    pub fn from_pytorch(path: impl Into<PathBuf>) -> Result<Self, WeightsError> {
        let path = path.into();
        let store = PytorchStore::from_file(&path).map_indices_contiguous(false);
        Self::from_store(store, path)
    }

    /// The tensors of a safetensors file.
    ///
    /// # Errors
    /// As [`from_pytorch`](Self::from_pytorch).
    pub fn from_safetensors(path: impl Into<PathBuf>) -> Result<Self, WeightsError> {
        let path = path.into();
        let store = SafetensorsStore::from_file(&path).map_indices_contiguous(false);
        Self::from_store(store, path)
    }

    fn from_store<S>(mut store: S, path: PathBuf) -> Result<Self, WeightsError>
    where
        S: ModuleStore,
        S::Error: std::error::Error + Send + Sync + 'static,
    {
        let tensors = store
            .get_all_tensors()
            .map_err(|error| WeightsError::File {
                path,
                source: Box::new(error),
            })?;
        Ok(Self {
            tensors: tensors.clone(),
            prefix: None,
            layout: None,
            allow_unused: false,
        })
    }

    /// The names of all tensors of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Takes only the tensors whose names begin so, up to a dot: `"model"`, `"encoder.layers.3.self_attn"`. A top-level key of a
    /// PyTorch file is such a prefix. `state_dict`, `model_state_dict`, `model`, `module` and `decoder` before all names are
    /// found without it.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// How matrices lie; needed only for files with this library's own names.
    #[must_use]
    pub fn with_layout(mut self, layout: Layout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Whether tensors that have no place in the module are left out; otherwise they are an error. What an optimizer keeps
    /// (top-level keys `optimizer`, `optimizer_state_dict`, `optimizer_states`, `optim`) is always left out.
    #[must_use]
    pub fn allow_unused(mut self, allow: bool) -> Self {
        self.allow_unused = allow;
        self
    }

    /// Loads an attention: all its parameters, or none if there is an error. They keep their device, their type and whether they
    /// are trained. Yields the names of tensors that were left out ([`allow_unused`](Self::allow_unused)).
    ///
    /// # Errors
    /// [`WeightsError`], which names the tensors: missing, without a place, of a wrong shape.
    pub fn load_attention(
        &self,
        attention: &mut MultiheadDilatedAttention,
    ) -> Result<Vec<String>, WeightsError> {
        self.load(attention, names::attention)
    }

    /// Loads a block, otherwise as [`load_attention`](Self::load_attention).
    ///
    /// # Errors
    /// As [`load_attention`](Self::load_attention).
    pub fn load_block(&self, block: &mut LongNetBlock) -> Result<Vec<String>, WeightsError> {
        self.load(block, names::block)
    }

    /// Loads a stack of blocks, for example the `blocks` of a [`LongNet`], otherwise as [`load_attention`](Self::load_attention).
    ///
    /// # Errors
    /// As [`load_attention`](Self::load_attention).
    pub fn load_blocks(&self, blocks: &mut Vec<LongNetBlock>) -> Result<Vec<String>, WeightsError> {
        self.load(blocks, names::blocks)
    }

    /// Loads a language model, otherwise as [`load_attention`](Self::load_attention). Where the file's head has no bias it is 0.
    ///
    /// # Errors
    /// As [`load_attention`](Self::load_attention).
    pub fn load_model(&self, model: &mut LongNet) -> Result<Vec<String>, WeightsError> {
        self.load(model, names::model)
    }

    fn load<M: ModuleSnapshot>(
        &self,
        module: &mut M,
        grammar: Grammar,
    ) -> Result<Vec<String>, WeightsError> {
        let needed = needed(module);
        let placed = self.place(grammar, &needed)?;
        placed.check(&needed, self.allow_unused)?;
        let unused = placed.unused.clone();
        // Applied to a copy: what fails halfway leaves no trace.
        let mut loaded = module.clone();
        let tensors = placed.into_tensors(&needed);
        let result = loaded.apply(tensors, None, Some(Box::new(PyTorchToBurnAdapter)), true);
        if let Some(error) = result.errors.into_iter().next() {
            return Err(not_applied(error));
        }
        *module = loaded;
        Ok(unused)
    }

    /// Finds the place of every tensor.
    fn place(&self, grammar: Grammar, needed: &Needed) -> Result<Placed, WeightsError> {
        let mut placed = Placed::default();
        for (relative, name, tensor) in self.chosen()? {
            let place = grammar(&relative);
            if self.layout.is_none() && place.is_some() && names::is_own(&relative) {
                return Err(WeightsError::UnknownLayout { name: name.clone() });
            }
            let layout = self.layout.unwrap_or_default();
            match place {
                Some(Place::Parameter(parameter)) if needed.contains_key(&parameter) => {
                    let tensor = as_pytorch(tensor.clone(), &parameter, layout);
                    placed.add(parameter, name, tensor)?;
                }
                Some(Place::Fused {
                    attention,
                    parameter,
                }) if needed.contains_key(&format!("{attention}query.{parameter}")) => {
                    let parts = ["query", "key", "value"]
                        .map(|part| format!("{attention}{part}.{parameter}"));
                    for (part, tensor) in split(name, tensor, parts, needed)? {
                        placed.add(part, name, tensor)?;
                    }
                }
                _ => placed.unused.push(name.clone()),
            }
        }
        placed.fill_head_bias(needed);
        Ok(placed)
    }

    /// The tensors to be loaded: name without prefix and wrappers, name, tensor.
    fn chosen(&self) -> Result<Vec<(String, &String, &burn_pack::Tensor)>, WeightsError> {
        let (mut relative, mut chosen) = (Vec::new(), Vec::new());
        for (name, tensor) in &self.tensors {
            let rest = match &self.prefix {
                Some(prefix) => name
                    .strip_prefix(prefix.as_str())
                    .and_then(|rest| rest.strip_prefix('.')),
                None => (!names::is_optimizer(name)).then_some(name.as_str()),
            };
            if let Some(rest) = rest {
                relative.push(rest.to_string());
                chosen.push((name, tensor));
            }
        }
        if let (Some(prefix), true) = (&self.prefix, chosen.is_empty()) {
            return Err(self.no_such_prefix(prefix));
        }
        names::unwrap(&mut relative);
        let named = relative.into_iter().zip(chosen);
        Ok(named
            .map(|(relative, (name, tensor))| (relative, name, tensor))
            .collect())
    }

    fn no_such_prefix(&self, prefix: &str) -> WeightsError {
        let first = |name: &str| name.split('.').next().unwrap_or(name).to_string();
        let mut beginnings: Vec<String> = self.names().map(first).collect();
        beginnings.dedup();
        WeightsError::Prefix {
            prefix: prefix.into(),
            beginnings,
        }
    }
}

/// Types and shapes have been checked before, so what is left is data that cannot be read.
fn not_applied(error: ApplyError) -> WeightsError {
    let (ApplyError::ShapeMismatch { path, .. }
    | ApplyError::DTypeMismatch { path, .. }
    | ApplyError::AdapterError { path, .. }
    | ApplyError::LoadError { path, .. }) = &error;
    WeightsError::Data {
        parameter: path.clone(),
        message: error.to_string(),
    }
}
