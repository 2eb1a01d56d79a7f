//! The options that describe a model, the same in `train` and `generate`.

use clap::Args;
use ring_burn::Pattern;
use ring_multihead::LongNetConfig;

use crate::{command_line::Failure, pattern_options::Window};

/// What kind of LongNet the model is.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// Segment lengths of the branches
    #[arg(long, value_delimiter = ',', default_value = "512,1024,2048")]
    pub segment_lengths: Vec<usize>,

    /// Dilation rates of the branches, one for each segment length
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    pub dilation_rates: Vec<usize>,

    /// Sliding window: a position sees those from L before it on, -1 is no bound; R is 0 or -1, since the model is causal
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    pub window: Option<Window>,

    /// Bound on attention scores: S becomes C tanh(S/C)
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    pub softcap: Option<f64>,

    /// Tell positions by ALiBi's biases in place of rotary embeddings
    #[arg(long)]
    pub alibi: bool,

    /// Size of the model's vectors
    #[arg(long, default_value_t = 128)]
    pub embed_dim: usize,

    /// Query heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,

    /// Key/value heads [default: as many as query heads]
    #[arg(long)]
    pub kv_heads: Option<usize>,

    /// Transformer blocks
    #[arg(long, default_value_t = 4)]
    pub layers: usize,

    /// Hidden size of the feed-forward parts [default: 4 times the embedding]
    #[arg(long)]
    pub feed_forward_dim: Option<usize>,

    /// Add MAGNETO's sub-layer norms
    #[arg(long)]
    pub sub_layer_norm: bool,
}

impl ModelOptions {
    /// Checks that there is such a pattern.
    ///
    /// # Errors
    /// [`Failure::Input`] that says why there is none.
    pub fn check(&self) -> Result<(), Failure> {
        Pattern::dilated(&self.segment_lengths, &self.dilation_rates)
            .map(drop)
            .map_err(Failure::input)
    }

    /// The bounds of the window, -1 for none.
    pub fn bounds(&self) -> Option<(i64, i64)> {
        self.window.map(Window::bounds)
    }

    /// The model of bytes that they describe, without dropout.
    pub fn config(&self) -> LongNetConfig {
        LongNetConfig::new(self.segment_lengths.clone(), self.dilation_rates.clone())
            .with_embed_dim(self.embed_dim)
            .with_num_heads(self.heads)
            .with_num_kv_heads(self.kv_heads)
            .with_num_layers(self.layers)
            .with_feed_forward_dim(self.feed_forward_dim)
            .with_window(self.bounds())
            .with_softcap(self.softcap)
            .with_alibi(self.alibi)
            .with_sub_layer_norm(self.sub_layer_norm)
    }
}
