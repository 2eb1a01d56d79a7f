//! A language model that continues a text token by token: [`LongNetCache`].

use std::hash::Hasher;

use burn::tensor::{Int, Tensor};
use ring_burn::{Fnv1a, KeyValueCache, Ring, RingError};

use crate::{language_model::LongNet, multihead::tell_others, rotary::Rotary};

/// The keys and values of all blocks of a [`LongNet`], as far as this rank holds them, and a checksum of the tokens decoded so far, by
/// which ranks that chose different ones find out. After an error it is not to be used any more.
#[derive(Debug, Default)]
pub struct LongNetCache {
    blocks: Vec<KeyValueCache>,
    tokens: Fnv1a,
}

impl LongNetCache {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions of the sequence so far, over all ranks: where the next token stands.
    pub fn length(&self) -> usize {
        self.blocks.first().map_or(0, KeyValueCache::length)
    }

    /// Bytes of keys and values that this rank has room for.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(KeyValueCache::bytes).sum()
    }

    /// Positions whose keys and values a rank holds.
    pub fn rows(&self, rank: usize) -> usize {
        self.blocks.first().map_or(0, |block| block.rows(rank))
    }

    /// The caches of a model's blocks.
    fn blocks_of(&mut self, model: &LongNet) -> Result<&mut [KeyValueCache], RingError> {
        let blocks = model.blocks.len();
        if self.blocks.is_empty() {
            self.blocks.resize_with(blocks, KeyValueCache::new);
        }
        if self.blocks.len() != blocks {
            return Err(RingError::Value(format!(
                "the cache is of a model of {} blocks, this one has {blocks}",
                self.blocks.len()
            )));
        }
        if self
            .blocks
            .iter()
            .any(|block| block.length() != self.length())
        {
            let message = "a prompt or token failed halfway through the blocks of this cache: start again with a new one";
            return Err(RingError::Value(message.into()));
        }
        Ok(&mut self.blocks)
    }

    /// Has the ranks compare these tokens too.
    fn note(&mut self, tokens: &Tensor<2, Int>) {
        for token in tokens.to_data().iter::<i64>() {
            self.tokens.write(&token.to_le_bytes());
        }
        let note = self.tokens.finish();
        self.blocks.iter_mut().for_each(|block| block.note(note));
    }
}

impl LongNet {
    /// [`try_forward`](Self::try_forward) on a prompt, its keys and values kept in a new cache, each rank's own; then
    /// [`try_decode`](Self::try_decode) goes on. Without gradients or dropout.
    ///
    /// The scores of the last position are with the rank that owns it. To have them everywhere, leave the last token of the
    /// prompt to `try_decode`.
    ///
    /// # Shapes
    /// - tokens: `[batch, own positions]`
    /// - output: `[batch, own positions, vocab_size]`
    ///
    /// # Errors
    /// As [`RingAttention::try_prefill`](ring_burn::RingAttention::try_prefill); [`RingError::Value`] for a cache of another model.
    pub fn try_prefill(
        &self,
        tokens: Tensor<2, Int>,
        ring: &Ring,
        cache: &mut LongNetCache,
    ) -> Result<Tensor<3>, RingError> {
        let caches = cache.blocks_of(self);
        let caches = caches.inspect_err(|error| tell_others(ring, error))?;
        let hidden = self.embedding.forward(tokens);
        let first = self.blocks.first().expect("a model has a block");
        let rotary = first.attention.rotary(ring, &hidden.device())?;
        let hidden = self
            .blocks
            .iter()
            .zip(caches)
            .try_fold(hidden, |hidden, (block, cache)| {
                block.try_prefill(hidden, rotary.as_ref(), ring, cache)
            })?;
        Ok(self.head.forward(self.norm.forward(hidden)))
    }

    /// Scores of what follows each of the next tokens: what [`try_forward`](Self::try_forward) on the whole sequence would give for
    /// them, to rounding, at a cost that depends on what they see alone. Positions go on where the cache ends; there is no
    /// longest sequence.
    ///
    /// ```
    /// use burn::tensor::{Device, Int, Tensor};
    /// use ring_burn::Ring;
    /// use ring_multihead::{LongNetCache, LongNetConfig};
    ///
    /// let device = Device::flex();
    /// let model = LongNetConfig::new(vec![64, 256], vec![1, 4])
    ///     .with_num_layers(2)
    ///     .try_init(&device)?;
    /// let (ring, mut cache) = (Ring::single(100)?, LongNetCache::new());
    /// model.try_prefill(Tensor::<2, Int>::zeros([1, 100], &device), &ring, &mut cache)?;
    /// let next = Tensor::<2, Int>::from_ints([[104]], &device);
    /// assert_eq!(model.try_decode(next, &ring, &mut cache)?.dims(), [1, 1, 256]);
    /// assert_eq!(cache.length(), 101);
    /// # Ok::<(), ring_burn::RingError>(())
    /// ```
    ///
    /// # Shapes
    /// - tokens: `[batch, tokens]`, the same on all ranks
    /// - output: `[batch, tokens, vocab_size]`, on all ranks
    ///
    /// # Errors
    /// As [`RingAttention::try_decode`](ring_burn::RingAttention::try_decode), and if ranks come with different tokens;
    /// [`RingError::Value`] for a cache of another model.
    pub fn try_decode(
        &self,
        tokens: Tensor<2, Int>,
        ring: &Ring,
        cache: &mut LongNetCache,
    ) -> Result<Tensor<3>, RingError> {
        let rotary = self.rotary_of_next(tokens.dims()[1], cache);
        cache
            .blocks_of(self)
            .inspect_err(|error| tell_others(ring, error))?;
        cache.note(&tokens);
        let hidden = self.embedding.forward(tokens);
        let caches = cache.blocks_of(self)?;
        let hidden = self
            .blocks
            .iter()
            .zip(caches)
            .try_fold(hidden, |hidden, (block, cache)| {
                block.try_decode(hidden, rotary.as_ref(), ring, cache)
            })?;
        Ok(self.head.forward(self.norm.forward(hidden)))
    }

    /// The rotary table of the next positions.
    fn rotary_of_next(&self, count: usize, cache: &LongNetCache) -> Option<Rotary> {
        let first = cache.length() as i64;
        let positions: Vec<i64> = (first..first + count as i64).collect();
        let block = self.blocks.first().expect("a model has a block");
        block.attention.rotary_at(&positions, &self.device())
    }
}
