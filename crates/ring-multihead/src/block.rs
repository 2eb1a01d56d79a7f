//! A transformer block with dilated attention, as LongNet stacks them.

use burn::{
    config::Config,
    module::Module,
    nn::{LayerNorm, Linear, LinearConfig},
    tensor::{Device, Tensor, activation::gelu},
};
use ring_burn::{KeyValueCache, Ring, RingError};

use crate::{
    dropout::PositionDropout,
    multihead::{MultiheadDilatedAttention, MultiheadDilatedAttentionConfig},
    rotary::Rotary,
};

/// Configuration of [`LongNetBlock`].
#[derive(Config, Debug)]
pub struct LongNetBlockConfig {
    /// The attention; its sub-layer norm, `layer_norm_eps` and dropout go for the feed-forward part too.
    pub attention: MultiheadDilatedAttentionConfig,
    /// Hidden size of the feed-forward part.
    pub feed_forward_dim: usize,
}

impl LongNetBlockConfig {
    /// The module.
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttentionConfig::try_init`], and [`RingError::Value`] for a hidden size of 0.
    pub fn try_init(&self, device: &Device) -> Result<LongNetBlock, RingError> {
        let dim = self.attention.embed_dim;
        if self.feed_forward_dim == 0 {
            let message = "the hidden size of the feed-forward part must be at least 1";
            return Err(RingError::Value(message.into()));
        }
        let norm = |size: usize| self.attention.layer_norm(size, device);
        Ok(LongNetBlock {
            attention_norm: norm(dim),
            attention: self.attention.try_init(device)?,
            feed_forward_norm: norm(dim),
            expand: LinearConfig::new(dim, self.feed_forward_dim).init(device),
            sub_norm: self
                .attention
                .sub_layer_norm
                .then(|| norm(self.feed_forward_dim)),
            contract: LinearConfig::new(self.feed_forward_dim, dim).init(device),
            dropout: PositionDropout::new(
                self.attention.dropout,
                // Another stream than the attention's.
                !self.attention.dropout_stream,
            ),
        })
    }
}

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Module, Debug)]
pub struct LongNetBlock {
    attention_norm: LayerNorm,
    /// The attention.
    pub attention: MultiheadDilatedAttention,
    feed_forward_norm: LayerNorm,
    expand: Linear,
    sub_norm: Option<LayerNorm>,
    contract: Linear,
    dropout: PositionDropout,
}

impl LongNetBlock {
    /// Runs the block on this rank's positions.
    ///
    /// # Shapes
    /// - input, output: `[batch, own positions, embed_dim]`
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttention::try_forward`].
    pub fn try_forward(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
    ) -> Result<Tensor<3>, RingError> {
        let attend = |normed| self.attention.try_forward_rotated(normed, rotary, ring);
        let (residual, output) = self.around(input, attend)?;
        Ok(residual + self.dropout.forward(output, ring))
    }

    /// Runs the block on a prompt, whose keys and values go to a new cache.
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttention::try_prefill`].
    pub fn try_prefill(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<3>, RingError> {
        let attend = |normed| self.attention.try_prefill(normed, rotary, ring, cache);
        let (residual, output) = self.around(input, attend)?;
        Ok(residual + output)
    }

    /// Runs the block on the next tokens.
    ///
    /// # Shapes
    /// - input, output: `[batch, tokens, embed_dim]`, the same on all ranks
    ///
    /// # Errors
    /// As [`MultiheadDilatedAttention::try_decode`].
    pub fn try_decode(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<3>, RingError> {
        let attend = |normed| self.attention.try_decode(normed, rotary, ring, cache);
        let (residual, output) = self.around(input, attend)?;
        Ok(residual + output)
    }

    /// What is around the attention: the input with the attention added, and what the feed-forward part would add to it.
    fn around(
        &self,
        input: Tensor<3>,
        attend: impl FnOnce(Tensor<3>) -> Result<Tensor<3>, RingError>,
    ) -> Result<(Tensor<3>, Tensor<3>), RingError> {
        let attended = attend(self.attention_norm.forward(input.clone()))?;
        let residual = input + attended;
        let hidden = gelu(
            self.expand
                .forward(self.feed_forward_norm.forward(residual.clone())),
        );
        let hidden = match &self.sub_norm {
            Some(norm) => norm.forward(hidden),
            None => hidden,
        };
        Ok((residual, self.contract.forward(hidden)))
    }
}
