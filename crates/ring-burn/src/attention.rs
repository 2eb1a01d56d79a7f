//! The modules: [`RingAttention`] (full attention) and [`DilatedAttention`] (LongNet's).

use burn::{
    config::Config,
    module::{Flag, Module, Param},
    tensor::Tensor,
};
use ring_comm::buffer::DType;
use ring_core::{HeadOffsets, Mixing, Pattern, Shape};

use crate::{
    cache::KeyValueCache,
    computation::Attention,
    error::RingError,
    ring::Ring,
    scores::{Scores, masked},
};

/// Output of an attention with its log-sum-exp.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// `[batch, query_heads, queries, head_dim]`, in the type of the inputs.
    pub output: Tensor<4>,
    /// `[batch, query_heads, queries]`, f32, natural logarithm; `-inf` for queries that see no key. Differentiable.
    pub log_sum_exp: Tensor<3>,
}

/// Configuration of [`RingAttention`].
#[derive(Config, Debug)]
pub struct RingAttentionConfig {
    /// Whether keys after the query are hidden.
    #[config(default = false)]
    pub causal: bool,
    /// Factor on the scores; `1/sqrt(head_dim)` if absent.
    pub scale: Option<f64>,
    /// Sliding window: a query at position `n` sees keys from `n - left` to `n + right`; -1 is no bound. It counts positions,
    /// not selected ones.
    pub window: Option<(i64, i64)>,
    /// Bound `c` on the scores: `S` becomes `c tanh(S / c)`.
    pub softcap: Option<f64>,
    /// ALiBi's slope of every query head: `S` becomes `S - slope |n - m|`, after the softcap. Constants, without gradient; see
    /// [`alibi_slopes`](crate::alibi_slopes).
    pub alibi_slopes: Option<Vec<f64>>,
    /// Dropout of attention weights, in `[0, 1)`, active on autodiff devices while training. Which weights are dropped depends on
    /// the ring's seed, `dropout_stream`, batch entry, head and positions alone.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Tells the dropout of the layers of a model apart.
    #[config(default = 0)]
    pub dropout_stream: u32,
}

impl RingAttentionConfig {
    /// The module.
    ///
    /// # Panics
    /// Where [`try_init`](Self::try_init) would return an error.
    pub fn init(&self) -> RingAttention {
        self.try_init()
            .unwrap_or_else(|error| panic!("RingAttention: {error}"))
    }

    /// The module.
    ///
    /// # Errors
    /// [`RingError::Window`] for a window with a negative bound but -1; [`RingError::Spec`] for a window that reaches ahead
    /// although the attention is causal, a scale or slope that is not a finite number, a softcap that is not positive, a
    /// dropout outside `[0, 1)`.
    pub fn try_init(&self) -> Result<RingAttention, RingError> {
        let pattern = masked(Pattern::full(), self.causal, self.window)?;
        Ok(RingAttention {
            attention: Attention::new(pattern, self.scores())?,
            training: Param::from_bool(true),
        })
    }

    fn scores(&self) -> Scores {
        Scores::new(self.scale, self.softcap, self.alibi_slopes.as_deref())
            .with_dropout(self.dropout, self.dropout_stream)
    }
}

/// Full attention, exact and trainable, sharded over the ranks of a [`Ring`].
///
/// Each rank passes the rows it owns and gets the rows it owns. On one rank ([`Ring::single`]) it is a flash attention with a
/// backward: memory grows with the length of the sequence, not with its square.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use ring_burn::{Ring, RingAttentionConfig};
///
/// let device = Device::flex().autodiff();
/// let draw = || Tensor::<4>::random([1, 4, 128, 16], Distribution::Default, &device).require_grad();
/// let (query, key, value) = (draw(), draw(), draw());
/// let attention = RingAttentionConfig::new().with_causal(true).init();
/// let output = attention.forward(query.clone(), key, value, &Ring::single(128)?);
/// let gradients = output.sum().backward();
/// assert_eq!(query.grad(&gradients).unwrap().dims(), [1, 4, 128, 16]);
/// # Ok::<(), ring_burn::RingError>(())
/// ```
#[derive(Module, Debug)]
pub struct RingAttention {
    #[module(skip)]
    attention: Attention,
    /// Whether dropout is permitted; switched off where a part of a model is frozen.
    training: Param<Flag>,
}

/// Configuration of [`DilatedAttention`].
#[derive(Config, Debug)]
pub struct DilatedAttentionConfig {
    /// Positions per segment, one number for each branch.
    pub segment_lengths: Vec<usize>,
    /// Distance of selected positions, one number for each branch.
    pub dilation_rates: Vec<usize>,
    /// Whether keys after the query are hidden.
    #[config(default = false)]
    pub causal: bool,
    /// Factor on the scores; `1/sqrt(head_dim)` if absent.
    pub scale: Option<f64>,
    /// How heads are shifted against each other.
    #[config(default = "HeadOffsets::Cyclic")]
    pub offsets: HeadOffsets,
    /// How branches are mixed.
    #[config(default = "Mixing::LongNet")]
    pub mixing: Mixing,
    /// Sliding window: a query at position `n` sees keys from `n - left` to `n + right`; -1 is no bound. It counts positions,
    /// not selected ones.
    pub window: Option<(i64, i64)>,
    /// Bound `c` on the scores: `S` becomes `c tanh(S / c)`.
    pub softcap: Option<f64>,
    /// ALiBi's slope of every query head: `S` becomes `S - slope |n - m|`, after the softcap. Constants, without gradient; see
    /// [`alibi_slopes`](crate::alibi_slopes).
    pub alibi_slopes: Option<Vec<f64>>,
    /// Dropout of attention weights, in `[0, 1)`, active on autodiff devices while training. Which weights are dropped depends on
    /// the ring's seed, `dropout_stream`, batch entry, head and positions alone.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Tells the dropout of the layers of a model apart.
    #[config(default = 0)]
    pub dropout_stream: u32,
}

impl DilatedAttentionConfig {
    /// The module.
    ///
    /// # Panics
    /// Where [`try_init`](Self::try_init) would return an error.
    pub fn init(&self) -> DilatedAttention {
        self.try_init()
            .unwrap_or_else(|error| panic!("DilatedAttention: {error}"))
    }

    /// The module.
    ///
    /// # Errors
    /// [`RingError::Pattern`] for empty lists, lists of different length, zeros; the others as
    /// [`RingAttentionConfig::try_init`].
    pub fn try_init(&self) -> Result<DilatedAttention, RingError> {
        let pattern = Pattern::dilated(&self.segment_lengths, &self.dilation_rates)?
            .with_offsets(self.offsets)
            .with_mixing(self.mixing);
        let pattern = masked(pattern, self.causal, self.window)?;
        Ok(DilatedAttention {
            attention: Attention::new(pattern, self.scores())?,
            training: Param::from_bool(true),
        })
    }

    fn scores(&self) -> Scores {
        Scores::new(self.scale, self.softcap, self.alibi_slopes.as_deref())
            .with_dropout(self.dropout, self.dropout_stream)
    }
}

/// LongNet's dilated attention (arXiv 2307.02486), exact and trainable, sharded over the ranks of a [`Ring`].
///
/// All branches together are one softmax: mixing them by their denominators, as the paper does, is exact here, and so is its
/// gradient. Segments, offsets and causality are decided on global positions, whatever the sharding.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use ring_burn::{DilatedAttentionConfig, Ring};
///
/// let device = Device::flex();
/// let draw = || Tensor::<4>::random([1, 4, 256, 16], Distribution::Default, &device);
/// let attention = DilatedAttentionConfig::new(vec![64, 128, 256], vec![1, 2, 4])
///     .with_causal(true)
///     .init();
/// let output = attention.forward(draw(), draw(), draw(), &Ring::single(256)?);
/// assert_eq!(output.dims(), [1, 4, 256, 16]);
/// # Ok::<(), ring_burn::RingError>(())
/// ```
#[derive(Module, Debug)]
pub struct DilatedAttention {
    #[module(skip)]
    attention: Attention,
    /// Whether dropout is permitted; switched off where a part of a model is frozen.
    training: Param<Flag>,
}

macro_rules! attention_module {
    ($module:ident) => {
        impl $module {
            /// The pattern: which keys every query attends to.
            pub fn pattern(&self) -> &Pattern {
                self.attention.pattern()
            }

            /// How this attention, of f32 tensors of such heads, is divided among the ranks of a ring, and why: in plain words, with
            /// what other strategies would cost.
            ///
            /// # Errors
            /// [`RingError::Spec`] for a computation that is not possible, or a strategy that cannot serve.
            pub fn explain(&self, shape: Shape, ring: &Ring) -> Result<String, RingError> {
                self.attention.explain(shape, DType::F32, ring)
            }

            /// Attention of this rank's queries to all keys of the group.
            ///
            /// # Shapes
            /// - query: `[batch, query_heads, own queries, head_dim]`
            /// - key, value: `[batch, kv_heads, own keys, head_dim]`; `kv_heads` divides `query_heads`
            /// - output: as the query
            ///
            /// The backward communicates too, so it must run on every rank or on none: a rank whose loss does not depend on the
            /// output holds the others up until the deadline. Multiply by zero rather than leave it out.
            ///
            /// # Panics
            /// Where [`try_forward`](Self::try_forward) would return an error. The backward panics if its exchange fails.
            pub fn forward(
                &self,
                query: Tensor<4>,
                key: Tensor<4>,
                value: Tensor<4>,
                ring: &Ring,
            ) -> Tensor<4> {
                self.try_forward(query, key, value, ring)
                    .unwrap_or_else(|error| panic!("{}: {error}", stringify!($module)))
            }

            /// [`forward`](Self::forward) that returns its error.
            ///
            /// # Errors
            /// [`RingError`] for tensors that do not fit each other, the shard, or the backend, and for a failed exchange.
            /// In a group of several ranks an error on one reaches them all and ends the group: its other ranks could only
            /// wait for this one in vain.
            pub fn try_forward(
                &self,
                query: Tensor<4>,
                key: Tensor<4>,
                value: Tensor<4>,
                ring: &Ring,
            ) -> Result<Tensor<4>, RingError> {
                self.try_forward_with_log_sum_exp(query, key, value, ring)
                    .map(|result| result.output)
            }

            /// [`try_forward`](Self::try_forward) that returns the log-sum-exp too.
            ///
            /// # Errors
            /// As [`try_forward`](Self::try_forward).
            pub fn try_forward_with_log_sum_exp(
                &self,
                query: Tensor<4>,
                key: Tensor<4>,
                value: Tensor<4>,
                ring: &Ring,
            ) -> Result<AttentionOutput, RingError> {
                self.attention
                    .forward([query, key, value], self.training.is_enabled(), ring)
            }

            /// [`try_forward`](Self::try_forward) on a prompt, whose keys and values go to a new cache, each rank's to its own; then
            /// [`try_decode`](Self::try_decode) goes on. Without gradients or dropout.
            ///
            /// # Errors
            /// As [`try_forward`](Self::try_forward); [`RingError::Value`] for tensors on an autodiff device or a GPU and for a cache
            /// that is not empty; [`RingError::Run`] for a pattern that is not causal, documents, padding, cross-attention.
            pub fn try_prefill(
                &self,
                query: Tensor<4>,
                key: Tensor<4>,
                value: Tensor<4>,
                ring: &Ring,
                cache: &mut KeyValueCache,
            ) -> Result<Tensor<4>, RingError> {
                self.attention
                    .prefill([query, key, value], ring, cache)
                    .map(|result| result.output)
            }

            /// Attention of the next tokens to the whole sequence so far, themselves among it; what
            /// [`try_forward`](Self::try_forward) on the whole sequence would give for them, to rounding.
            ///
            /// One message in a tree of ranks and one back, whatever the length of the sequence; where the tokens stand, the cache
            /// knows, and the ring's sequence length does not matter. An empty cache begins a sequence.
            ///
            /// # Shapes
            /// - query: `[batch, query_heads, tokens, head_dim]`; key, value: `[batch, kv_heads, tokens, head_dim]`: the same on all
            ///   ranks
            /// - output: as the query, the same bits on all ranks
            ///
            /// # Errors
            /// [`RingError`] for tensors that do not fit each other or the cache, that are on an autodiff device or a GPU, for a
            /// failed exchange, and if the ranks' caches differ in length. An error on one rank reaches them all and ends the
            /// group; the caches are not to be used any more.
            pub fn try_decode(
                &self,
                query: Tensor<4>,
                key: Tensor<4>,
                value: Tensor<4>,
                ring: &Ring,
                cache: &mut KeyValueCache,
            ) -> Result<Tensor<4>, RingError> {
                self.attention.decode([query, key, value], ring, cache)
            }
        }
    };
}

attention_module!(RingAttention);
attention_module!(DilatedAttention);
