//! A decoder-only language model of LongNet blocks: [`LongNet`].

use burn::{
    config::Config,
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig,
    },
    tensor::{Device, Int, Tensor, activation::log_softmax},
};
use ring_burn::{Ring, RingError};

use crate::{
    block::{LongNetBlock, LongNetBlockConfig},
    multihead::MultiheadDilatedAttentionConfig,
};

/// Configuration of [`LongNet`].
#[derive(Config, Debug)]
pub struct LongNetConfig {
    /// Number of different tokens.
    #[config(default = 256)]
    pub vocab_size: usize,
    /// Size of the model's vectors.
    #[config(default = 128)]
    pub embed_dim: usize,
    /// Query heads.
    #[config(default = 4)]
    pub num_heads: usize,
    /// Key/value heads, a divisor of `num_heads`; `num_heads` if absent.
    pub num_kv_heads: Option<usize>,
    /// Number of blocks.
    #[config(default = 4)]
    pub num_layers: usize,
    /// Hidden size of the feed-forward parts; four times `embed_dim` if absent.
    pub feed_forward_dim: Option<usize>,
    /// Positions per segment, one number for each branch; empty for full attention.
    pub segment_lengths: Vec<usize>,
    /// Distance of selected positions, one number for each branch.
    pub dilation_rates: Vec<usize>,
    /// Sliding window `(left, right)`: a position sees those from `left` before it on; `right` is 0 or -1, which are the same in
    /// a causal model. `left` -1 is no bound.
    pub window: Option<(i64, i64)>,
    /// Bound `c` on the scores of all attentions: `S` becomes `c tanh(S / c)`.
    pub softcap: Option<f64>,
    /// Whether ALiBi's biases tell positions, in place of rotary ones (arXiv 2108.12409).
    #[config(default = false)]
    pub alibi: bool,
    /// Dropout of attention weights, in `[0, 1)`.
    #[config(default = 0.0)]
    pub attention_dropout: f64,
    /// Dropout after attention and feed-forward, in `[0, 1)`.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// MAGNETO's sub-layer norms.
    #[config(default = false)]
    pub sub_layer_norm: bool,
    /// Base of the rotary positions; not used with `alibi`.
    #[config(default = 10000.0)]
    pub rotary_base: f64,
}

impl LongNetConfig {
    /// The model with newly drawn parameters.
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttentionConfig::try_init`], and [`RingError::Value`] for a size of 0.
    pub fn try_init(&self, device: &Device) -> Result<LongNet, RingError> {
        for (what, size) in [
            ("the vocabulary", self.vocab_size),
            ("the number of layers", self.num_layers),
        ] {
            if size == 0 {
                return Err(RingError::Value(format!("{what} must be at least 1")));
            }
        }
        let blocks = (0..self.num_layers)
            .map(|layer| self.block(layer).try_init(device))
            .collect::<Result<Vec<LongNetBlock>, RingError>>()?;
        Ok(LongNet {
            embedding: EmbeddingConfig::new(self.vocab_size, self.embed_dim)
                .with_initializer(Initializer::Normal {
                    mean: 0.0,
                    std: 0.1,
                })
                .init(device),
            blocks,
            norm: LayerNormConfig::new(self.embed_dim).init(device),
            head: LinearConfig::new(self.embed_dim, self.vocab_size).init(device),
        })
    }

    fn block(&self, layer: usize) -> LongNetBlockConfig {
        let attention = MultiheadDilatedAttentionConfig::new(
            self.embed_dim,
            self.num_heads,
            self.segment_lengths.clone(),
            self.dilation_rates.clone(),
        )
        .with_num_kv_heads(self.num_kv_heads)
        .with_causal(true)
        .with_window(self.window)
        .with_softcap(self.softcap)
        .with_alibi(self.alibi)
        .with_attention_dropout(self.attention_dropout)
        .with_dropout(self.dropout)
        .with_dropout_stream(layer as u32)
        .with_sub_layer_norm(self.sub_layer_norm)
        .with_rotary_base((!self.alibi).then_some(self.rotary_base));
        let feed_forward_dim = self.feed_forward_dim.unwrap_or(4 * self.embed_dim);
        LongNetBlockConfig::new(attention, feed_forward_dim)
    }
}

/// A causal language model that reads token `i` at position `i` and predicts token `i + 1`, its sequence sharded over ranks.
#[derive(Module, Debug)]
pub struct LongNet {
    pub(crate) embedding: Embedding,
    /// The blocks, first to last.
    pub blocks: Vec<LongNetBlock>,
    pub(crate) norm: LayerNorm,
    pub(crate) head: Linear,
}

impl LongNet {
    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.head.weight.val().device()
    }

    /// Scores of the next token at every position this rank owns.
    ///
    /// # Shapes
    /// - tokens: `[batch, own positions]`
    /// - output: `[batch, own positions, vocab_size]`
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) would return an error. The backward panics if its exchange fails.
    pub fn forward(&self, tokens: Tensor<2, Int>, ring: &Ring) -> Tensor<3> {
        self.try_forward(tokens, ring)
            .unwrap_or_else(|error| panic!("LongNet: {error}"))
    }

    /// [`forward`](Self::forward) that returns its error.
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttention::try_forward`](crate::MultiheadDilatedAttention::try_forward).
    pub fn try_forward(&self, tokens: Tensor<2, Int>, ring: &Ring) -> Result<Tensor<3>, RingError> {
        let mut hidden = self.embedding.forward(tokens);
        let first = self.blocks.first().expect("a model has a block");
        let rotary = first.attention.rotary(ring, &hidden.device())?;
        for block in &self.blocks {
            hidden = block.try_forward(hidden, rotary.as_ref(), ring)?;
        }
        Ok(self.head.forward(self.norm.forward(hidden)))
    }
}

/// A rank's part of the loss: cross-entropy in nats, summed over its own positions, divided by the *global* number of labels.
///
/// Summed over ranks it is the mean over all labels, and so is its gradient: see
/// [`sum_gradients`](ring_burn::sum_gradients).
///
/// # Shapes
/// - logits: `[batch, own positions, vocab_size]`
/// - labels: `[batch, own positions]`
/// - output: `[1]`
pub fn next_token_loss(
    logits: Tensor<3>,
    labels: Tensor<2, Int>,
    global_labels: usize,
) -> Tensor<1> {
    log_softmax(logits, 2)
        .gather(2, labels.unsqueeze_dim(2))
        .sum()
        .neg()
        .div_scalar(global_labels as f64)
}
