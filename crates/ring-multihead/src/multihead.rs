//! Multi-head dilated attention with its projections: [`MultiheadDilatedAttention`].

use burn::{
    config::Config,
    module::Module,
    nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig},
    tensor::{Device, Tensor},
};
use ring_burn::{
    DilatedAttention, DilatedAttentionConfig, HeadOffsets, HilbertOrder, KeyValueCache, Mixing,
    Ring, RingAttention, RingAttentionConfig, RingError, Shape, alibi_slopes, shard_cells,
};

use crate::{dropout::PositionDropout, factory::AttentionKind, rotary::Rotary};

/// Configuration of [`MultiheadDilatedAttention`].
#[derive(Config, Debug)]
pub struct MultiheadDilatedAttentionConfig {
    /// Size of the model's vectors; `num_heads` divides it.
    pub embed_dim: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Positions per segment, one number for each branch; empty for full attention.
    pub segment_lengths: Vec<usize>,
    /// Distance of selected positions, one number for each branch.
    pub dilation_rates: Vec<usize>,
    /// Key/value heads, a divisor of `num_heads`; `num_heads` if absent.
    pub num_kv_heads: Option<usize>,
    /// Whether keys after the query are hidden.
    #[config(default = false)]
    pub causal: bool,
    /// Whether the projections have a bias.
    #[config(default = true)]
    pub bias: bool,
    /// Factor on the scores; `1/sqrt(head size)` if absent.
    pub scale: Option<f64>,
    /// Sliding window `(left, right)`: a query at position `n` sees keys from `n - left` to `n + right`; -1 is no bound.
    pub window: Option<(i64, i64)>,
    /// Bound `c` on the scores: `S` becomes `c tanh(S / c)`.
    pub softcap: Option<f64>,
    /// Whether scores get ALiBi's biases, with the usual slopes ([`alibi_slopes`](ring_burn::alibi_slopes)). They tell positions,
    /// so that rotary ones can be left out.
    #[config(default = false)]
    pub alibi: bool,
    /// Dropout of attention weights, in `[0, 1)`.
    #[config(default = 0.0)]
    pub attention_dropout: f64,
    /// Dropout on the output, in `[0, 1)`.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Tells the dropout of the layers of a model apart.
    #[config(default = 0)]
    pub dropout_stream: u32,
    /// Layer norm between attention and output projection (MAGNETO, arXiv 2210.06423).
    #[config(default = false)]
    pub sub_layer_norm: bool,
    /// What layer norms add to the variance.
    #[config(default = 1e-5)]
    pub layer_norm_eps: f64,
    /// Base of rotary positions; no positions if absent.
    pub rotary_base: Option<f64>,
    /// How heads are shifted against each other.
    #[config(default = "HeadOffsets::Cyclic")]
    pub offsets: HeadOffsets,
    /// How branches are mixed.
    #[config(default = "Mixing::LongNet")]
    pub mixing: Mixing,
    /// The grid whose tokens the sequence holds in the order of its Hilbert curve: rotary positions are then those of the cells.
    pub grid: Option<HilbertOrder>,
}

impl MultiheadDilatedAttentionConfig {
    /// The module, for any number of ranks.
    ///
    /// # Panics
    /// Where [`try_init`](Self::try_init) would return an error.
    pub fn init(&self, device: &Device) -> MultiheadDilatedAttention {
        self.try_init(device)
            .unwrap_or_else(|error| panic!("MultiheadDilatedAttention: {error}"))
    }

    /// The module, for any number of ranks.
    ///
    /// # Errors
    /// [`RingError::Value`] for heads that do not divide, an odd head size with rotary positions, a dropout outside `[0, 1)`, a
    /// `layer_norm_eps` that is not positive;
    /// [`RingError::Pattern`] for bad lists; [`RingError::Window`] and [`RingError::Spec`] as
    /// [`RingAttentionConfig::try_init`](ring_burn::RingAttentionConfig::try_init).
    pub fn try_init(&self, device: &Device) -> Result<MultiheadDilatedAttention, RingError> {
        self.init_kind(AttentionKind::Ring, device)
    }

    pub(crate) fn init_kind(
        &self,
        kind: AttentionKind,
        device: &Device,
    ) -> Result<MultiheadDilatedAttention, RingError> {
        let kv_heads = self.check()?;
        if kind == AttentionKind::Hilbert && self.grid.is_none() {
            let message = "attention of kind hilbert needs the grid in its configuration";
            return Err(RingError::Value(message.into()));
        }
        let head_dim = self.embed_dim / self.num_heads;
        let kv_dim = kv_heads * head_dim;
        let linear = |output: usize| {
            LinearConfig::new(self.embed_dim, output)
                .with_bias(self.bias)
                .init(device)
        };
        Ok(MultiheadDilatedAttention {
            query: linear(self.embed_dim),
            key: linear(kv_dim),
            value: linear(kv_dim),
            output: linear(self.embed_dim),
            norm: self
                .sub_layer_norm
                .then(|| self.layer_norm(self.embed_dim, device)),
            dropout: PositionDropout::new(self.dropout, self.dropout_stream),
            attention: self.attention()?,
            num_heads: self.num_heads,
            num_kv_heads: kv_heads,
            head_dim,
            rotary_base: self.rotary_base,
            grid: self.grid.clone(),
            kind,
        })
    }

    /// A layer norm over so many elements.
    pub(crate) fn layer_norm(&self, size: usize, device: &Device) -> LayerNorm {
        LayerNormConfig::new(size)
            .with_epsilon(self.layer_norm_eps)
            .init(device)
    }

    /// Checks the sizes; yields the number of key/value heads.
    fn check(&self) -> Result<usize, RingError> {
        let refuse = |message: String| Err(RingError::Value(message));
        let kv_heads = self.num_kv_heads.unwrap_or(self.num_heads);
        let (embed_dim, heads) = (self.embed_dim, self.num_heads);
        if heads == 0 || embed_dim == 0 || embed_dim % heads != 0 {
            return refuse(format!(
                "embed_dim {embed_dim} cannot be split into {heads} heads: not a multiple"
            ));
        }
        if kv_heads == 0 || heads % kv_heads != 0 {
            return refuse(format!(
                "{heads} heads cannot share {kv_heads} key/value heads: not a multiple"
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format!("dropout is {}, must be in [0, 1)", self.dropout));
        }
        let eps = self.layer_norm_eps;
        if !(eps.is_finite() && eps > 0.0) {
            return refuse(format!("layer_norm_eps is {eps}, must be positive"));
        }
        if let Some(base) = self.rotary_base {
            if !(base.is_finite() && base > 0.0) {
                return refuse(format!("the rotary base is {base}, must be positive"));
            }
            if (embed_dim / heads) % 2 != 0 {
                return refuse(format!(
                    "rotary positions need an even head size, it is {}",
                    embed_dim / heads
                ));
            }
        }
        Ok(kv_heads)
    }

    fn attention(&self) -> Result<Attention, RingError> {
        let slopes = self.alibi.then(|| alibi_slopes(self.num_heads));
        if self.segment_lengths.is_empty() && self.dilation_rates.is_empty() {
            return Ok(Attention::Full(
                RingAttentionConfig::new()
                    .with_causal(self.causal)
                    .with_scale(self.scale)
                    .with_window(self.window)
                    .with_softcap(self.softcap)
                    .with_alibi_slopes(slopes)
                    .with_dropout(self.attention_dropout)
                    .with_dropout_stream(self.dropout_stream)
                    .try_init()?,
            ));
        }
        let config =
            DilatedAttentionConfig::new(self.segment_lengths.clone(), self.dilation_rates.clone());
        Ok(Attention::Dilated(
            config
                .with_causal(self.causal)
                .with_scale(self.scale)
                .with_offsets(self.offsets)
                .with_mixing(self.mixing)
                .with_window(self.window)
                .with_softcap(self.softcap)
                .with_alibi_slopes(slopes)
                .with_dropout(self.attention_dropout)
                .with_dropout_stream(self.dropout_stream)
                .try_init()?,
        ))
    }
}

/// Multi-head attention whose heads attend by a dilated pattern (or to everything), sharded over the ranks of a [`Ring`].
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use ring_burn::Ring;
/// use ring_multihead::MultiheadDilatedAttentionConfig;
///
/// let device = Device::flex();
/// let attention = MultiheadDilatedAttentionConfig::new(64, 4, vec![32, 128], vec![1, 2])
///     .with_causal(true)
///     .init(&device);
/// let input = Tensor::<3>::random([1, 128, 64], Distribution::Default, &device);
/// assert_eq!(attention.forward(input, &Ring::single(128)?).dims(), [1, 128, 64]);
/// # Ok::<(), ring_burn::RingError>(())
/// ```
#[derive(Module, Debug)]
pub struct MultiheadDilatedAttention {
    /// Projection to the queries.
    pub query: Linear,
    /// Projection to the keys.
    pub key: Linear,
    /// Projection to the values.
    pub value: Linear,
    /// Projection of the output.
    pub output: Linear,
    /// Layer norm before the output projection.
    pub norm: Option<LayerNorm>,
    dropout: PositionDropout,
    attention: Attention,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    rotary_base: Option<f64>,
    #[module(skip)]
    grid: Option<HilbertOrder>,
    #[module(skip)]
    kind: AttentionKind,
}

/// The pattern's module.
#[derive(Module, Debug)]
enum Attention {
    Full(RingAttention),
    Dilated(DilatedAttention),
}

impl MultiheadDilatedAttention {
    /// What kind of attention this is.
    pub fn kind(&self) -> AttentionKind {
        self.kind
    }

    /// The rotary table of this rank's positions, or of its cells of the grid, if the module has rotary positions. Layers of the
    /// same head size can share one.
    ///
    /// # Errors
    /// [`RingError::Shape`] for a grid of another number of cells than there are positions.
    pub fn rotary(&self, ring: &Ring, device: &Device) -> Result<Option<Rotary>, RingError> {
        let positions = match &self.grid {
            Some(grid) => shard_cells(grid, ring)?,
            None => ring.positions(),
        };
        let positions: Vec<i64> = positions.iter().map(|&at| at as i64).collect();
        Ok(self.rotary_at(&positions, device))
    }

    /// How attention of a batch of so many entries is divided among the ranks, and why, in plain words.
    ///
    /// # Errors
    /// [`RingError`] for a computation that is not possible, or a strategy that cannot serve.
    pub fn explain(&self, batch: usize, ring: &Ring) -> Result<String, RingError> {
        let shape = Shape {
            batch,
            query_heads: self.num_heads,
            kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
        };
        let ring = self.kind.on(ring)?;
        match &self.attention {
            Attention::Full(attention) => attention.explain(shape, &ring),
            Attention::Dilated(attention) => attention.explain(shape, &ring),
        }
    }

    /// The rotary table of positions of one's own, one for each of this rank's rows: of tokens that stand elsewhere in the
    /// sequence than they count, as in the order of a curve ([`shard_cells`](ring_burn::shard_cells)). Rotated keys travel, so
    /// their positions travel with them.
    pub fn rotary_at(&self, positions: &[i64], device: &Device) -> Option<Rotary> {
        self.rotary_base
            .map(|base| Rotary::new(positions, self.head_dim, base, device))
    }

    /// Self-attention.
    ///
    /// # Shapes
    /// - input, output: `[batch, own positions, embed_dim]`
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) would return an error. The backward panics if its exchange fails.
    pub fn forward(&self, input: Tensor<3>, ring: &Ring) -> Tensor<3> {
        self.try_forward(input, ring)
            .unwrap_or_else(|error| panic!("MultiheadDilatedAttention: {error}"))
    }

    /// [`forward`](Self::forward) that returns its error.
    ///
    /// # Errors
    /// [`RingError`] for an input that does not fit the shard or the module, and for a failed exchange.
    pub fn try_forward(&self, input: Tensor<3>, ring: &Ring) -> Result<Tensor<3>, RingError> {
        let rotary = self.rotary(ring, &input.device())?;
        self.try_forward_rotated(input, rotary.as_ref(), ring)
    }

    /// [`try_forward`](Self::try_forward) with a rotary table made before ([`rotary`](Self::rotary), [`rotary_at`](Self::rotary_at)).
    ///
    /// # Errors
    /// As [`try_forward`](Self::try_forward), and [`RingError::Shape`] for a table of another number of positions.
    pub fn try_forward_rotated(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
    ) -> Result<Tensor<3>, RingError> {
        self.check(&input, rotary, ring)
            .inspect_err(|error| tell_others(ring, error))?;
        let [query, key, value] = self.project(input, rotary);
        let on = self.kind.on(ring)?;
        let attended = match &self.attention {
            Attention::Full(attention) => attention.try_forward(query, key, value, &on)?,
            Attention::Dilated(attention) => attention.try_forward(query, key, value, &on)?,
        };
        Ok(self.dropout.forward(self.conclude(attended), ring))
    }

    /// [`try_forward_rotated`](Self::try_forward_rotated) on a prompt, whose keys and values go to a new cache. Without gradients or
    /// dropout.
    ///
    /// # Errors
    /// As [`try_forward`](Self::try_forward), and as [`RingAttention::try_prefill`].
    pub fn try_prefill(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<3>, RingError> {
        self.check(&input, rotary, ring)
            .inspect_err(|error| tell_others(ring, error))?;
        let [query, key, value] = self.project(input, rotary);
        let on = self.kind.on(ring)?;
        let attended = match &self.attention {
            Attention::Full(attention) => attention.try_prefill(query, key, value, &on, cache)?,
            Attention::Dilated(attention) => {
                attention.try_prefill(query, key, value, &on, cache)?
            }
        };
        Ok(self.conclude(attended))
    }

    /// Attention of the next tokens to all before them: what [`try_forward`](Self::try_forward) on the whole sequence would give, to
    /// rounding. `rotary` is that of their positions ([`rotary_at`](Self::rotary_at)).
    ///
    /// # Shapes
    /// - input, output: `[batch, tokens, embed_dim]`, the same on all ranks
    ///
    /// # Errors
    /// [`RingError::Shape`] for another size of vectors; else as [`RingAttention::try_decode`].
    pub fn try_decode(
        &self,
        input: Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<3>, RingError> {
        self.check_next(&input, rotary)
            .inspect_err(|error| tell_others(ring, error))?;
        let [query, key, value] = self.project(input, rotary);
        let attended = match &self.attention {
            Attention::Full(attention) => attention.try_decode(query, key, value, ring, cache)?,
            Attention::Dilated(attention) => {
                attention.try_decode(query, key, value, ring, cache)?
            }
        };
        Ok(self.conclude(attended))
    }

    /// Queries, keys and values, `[batch, heads, rows, head_dim]`.
    fn project(&self, input: Tensor<3>, rotary: Option<&Rotary>) -> [Tensor<4>; 3] {
        let [batch, rows, _] = input.dims();
        let heads = |projected: Tensor<3>, heads: usize| {
            projected.reshape([batch, rows, heads, self.head_dim])
        };
        let rotate = |tensor: Tensor<4>| match rotary {
            Some(rotary) => rotary.apply(tensor),
            None => tensor,
        };
        let query = rotate(heads(self.query.forward(input.clone()), self.num_heads));
        let key = rotate(heads(self.key.forward(input.clone()), self.num_kv_heads));
        let value = heads(self.value.forward(input), self.num_kv_heads);
        // The kernels read strided rows: no copy for the swapped dimensions.
        [query, key, value].map(|tensor| tensor.swap_dims(1, 2))
    }

    /// From what the heads attended to, to the output, `[batch, rows, embed_dim]`.
    fn conclude(&self, attended: Tensor<4>) -> Tensor<3> {
        let [batch, heads, rows, head_dim] = attended.dims();
        let attended = attended
            .swap_dims(1, 2)
            .reshape([batch, rows, heads * head_dim]);
        self.output.forward(match &self.norm {
            Some(norm) => norm.forward(attended),
            None => attended,
        })
    }

    /// Whether these are vectors of the next tokens.
    fn check_next(&self, input: &Tensor<3>, rotary: Option<&Rotary>) -> Result<(), RingError> {
        let embed_dim = self.num_heads * self.head_dim;
        if input.dims()[2] != embed_dim {
            return Err(RingError::Shape {
                what: "the input",
                got: input.dims().to_vec(),
                expected: format!("[batch, tokens, {embed_dim}]"),
            });
        }
        if self.grid.is_some() {
            let message = "tokens after those of a grid have no cell: it cannot be decoded further";
            return Err(RingError::Value(message.into()));
        }
        check_positions(rotary, input.dims()[1])
    }

    fn check(
        &self,
        input: &Tensor<3>,
        rotary: Option<&Rotary>,
        ring: &Ring,
    ) -> Result<(), RingError> {
        let [_, rows, embed_dim] = input.dims();
        let expected = (ring.shard_len(), self.num_heads * self.head_dim);
        if (rows, embed_dim) != expected {
            return Err(RingError::Shape {
                what: "the input",
                got: input.dims().to_vec(),
                expected: format!(
                    "[batch, {}, {}]: rank {} owns {} of {} positions",
                    expected.0,
                    expected.1,
                    ring.rank(),
                    expected.0,
                    ring.sequence_length()
                ),
            });
        }
        let keys = (ring.key_sharding(), ring.key_length());
        if keys != (ring.sharding(), ring.sequence_length())
            || ring.query_offset().is_some_and(|offset| offset != 0)
        {
            return Err(RingError::Value(
                "self-attention has its keys where its queries are, but the ring has keys of another sharding or length, or a query offset"
                    .into(),
            ));
        }
        self.kind.on(ring)?;
        check_positions(rotary, rows)
    }
}

/// Ends the group because this rank cannot go on: the others must not wait for it.
pub(crate) fn tell_others(ring: &Ring, error: &RingError) {
    if ring.world_size() > 1 {
        ring.communicator().abort(&error.to_string());
    }
}

fn check_positions(rotary: Option<&Rotary>, rows: usize) -> Result<(), RingError> {
    match rotary.map(Rotary::positions) {
        Some(positions) if positions != rows => Err(RingError::Shape {
            what: "the rotary table",
            got: vec![positions],
            expected: format!("{rows} positions, one for each row"),
        }),
        _ => Ok(()),
    }
}
