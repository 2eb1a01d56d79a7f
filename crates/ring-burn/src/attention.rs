//! The modules: [`RingAttention`] (full attention) and [`DilatedAttention`] (LongNet's).

#[cfg(feature = "cube")]
use burn::backend::DispatchDevice;
use burn::{
    backend::Dispatch,
    config::Config,
    module::Module,
    tensor::{DType, Device, Tensor},
};
use ring_comm::buffer;
use ring_core::{AttentionSpec, HeadOffsets, Mixing, Pattern, Shape};

use crate::{
    error::RingError,
    op::{Job, RingAttentionOps},
    ring::Ring,
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
    /// [`RingError::Spec`] for a scale that is not a finite number.
    pub fn try_init(&self) -> Result<RingAttention, RingError> {
        let pattern = Pattern::full();
        Ok(RingAttention {
            attention: Attention::new(masked(pattern, self.causal), self.scale)?,
        })
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
    /// [`RingError::Pattern`] for empty lists, lists of different length, zeros; [`RingError::Spec`] for a scale that is not
    /// a finite number.
    pub fn try_init(&self) -> Result<DilatedAttention, RingError> {
        let pattern = Pattern::dilated(&self.segment_lengths, &self.dilation_rates)?
            .with_offsets(self.offsets)
            .with_mixing(self.mixing);
        Ok(DilatedAttention {
            attention: Attention::new(masked(pattern, self.causal), self.scale)?,
        })
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
}

macro_rules! attention_module {
    ($module:ident) => {
        impl $module {
            /// The pattern: which keys every query attends to.
            pub fn pattern(&self) -> &Pattern {
                &self.attention.pattern
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
                self.attention.forward(query, key, value, ring)
            }
        }
    };
}

attention_module!(RingAttention);
attention_module!(DilatedAttention);

fn masked(pattern: Pattern, causal: bool) -> Pattern {
    if causal { pattern.causal() } else { pattern }
}

/// What both modules are.
#[derive(Clone, Debug)]
struct Attention {
    pattern: Pattern,
    scale: Option<f32>,
}

impl Attention {
    fn new(pattern: Pattern, scale: Option<f64>) -> Result<Self, RingError> {
        let scale = scale.map(|scale| scale as f32);
        if let Some(scale) = scale.filter(|scale| !scale.is_finite()) {
            return Err(ring_core::SpecError::Scale(scale).into());
        }
        Ok(Self { pattern, scale })
    }

    fn forward(
        &self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        ring: &Ring,
    ) -> Result<AttentionOutput, RingError> {
        let job = self
            .job(&query, &key, &value, ring)
            .inspect_err(|error| ring.tell_others(error))?;
        let (output, log_sum_exp) = Dispatch::ring_attention(
            query.into_dispatch(),
            key.into_dispatch(),
            value.into_dispatch(),
            job.clone(),
        );
        match job.failure() {
            Some(error) => Err(error.into()),
            None => Ok(AttentionOutput {
                output: Tensor::from_dispatch(output),
                log_sum_exp: Tensor::from_dispatch(log_sum_exp),
            }),
        }
    }

    /// Checks the tensors and plans the computation.
    fn job(
        &self,
        query: &Tensor<4>,
        key: &Tensor<4>,
        value: &Tensor<4>,
        ring: &Ring,
    ) -> Result<Job, RingError> {
        let named = [("query", query), ("key", key), ("value", value)];
        for (what, tensor) in named {
            check_device(what, tensor, &query.device())?;
        }
        if named
            .iter()
            .any(|(_, tensor)| tensor.device().is_autodiff() != query.device().is_autodiff())
        {
            return Err(RingError::MixedAutodiff);
        }
        let dtype = element_type(&named)?;
        let shape = shape_of(query, key, value, ring)?;
        let mut spec = AttentionSpec::new(self.pattern.clone(), shape, 0)?.with_dtype(dtype);
        if let Some(scale) = self.scale {
            spec = spec.with_scale(scale)?;
        }
        let spec = ring.spec(spec)?;
        let plan = ring.plan(&spec)?;
        Ok(Job::new(ring.clone(), plan))
    }
}

/// Tensors must be where there are kernels, and all in one place.
fn check_device(
    what: &'static str,
    tensor: &Tensor<4>,
    of_query: &Device,
) -> Result<(), RingError> {
    let device = tensor.device();
    if !has_kernels(&device) {
        return Err(RingError::Backend {
            what,
            device: format!("{device:?}"),
        });
    }
    if device != *of_query {
        return Err(RingError::Device {
            what,
            got: format!("{device:?}"),
            expected: format!("{of_query:?}"),
        });
    }
    Ok(())
}

fn has_kernels(device: &Device) -> bool {
    let device = device.clone().inner();
    #[cfg(feature = "cube")]
    if matches!(device.as_dispatch(), DispatchDevice::Cube(_)) {
        return true;
    }
    device == Device::flex()
}

fn element_type(named: &[(&'static str, &Tensor<4>); 3]) -> Result<buffer::DType, RingError> {
    let first = named[0].1.dtype();
    for (what, tensor) in named {
        let dtype = tensor.dtype();
        if dtype != first || !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(RingError::DType {
                what,
                got: format!("{dtype:?}"),
            });
        }
    }
    Ok(match first {
        DType::F16 => buffer::DType::F16,
        DType::BF16 => buffer::DType::BF16,
        _ => buffer::DType::F32,
    })
}

fn shape_of(
    query: &Tensor<4>,
    key: &Tensor<4>,
    value: &Tensor<4>,
    ring: &Ring,
) -> Result<Shape, RingError> {
    let [batch, query_heads, queries, head_dim] = query.dims();
    let [_, kv_heads, ..] = key.dims();
    let wrong = |what, tensor: &Tensor<4>, expected: String| RingError::Shape {
        what,
        got: tensor.dims().to_vec(),
        expected,
    };
    let rank = ring.rank();
    if queries != ring.shard_len() {
        let expected = format!(
            "[batch, heads, {}, head_dim]: rank {rank} owns {} of {} positions",
            ring.shard_len(),
            ring.shard_len(),
            ring.sequence_length()
        );
        return Err(wrong("query", query, expected));
    }
    let keys = [batch, kv_heads, ring.key_shard_len(), head_dim];
    for (what, tensor) in [("key", key), ("value", value)] {
        if tensor.dims() != keys {
            let expected = format!(
                "{keys:?}: batch and head size of the query, heads of the key, and the {} of {} keys that rank {rank} owns",
                keys[2],
                ring.key_length()
            );
            return Err(wrong(what, tensor, expected));
        }
    }
    Ok(Shape {
        batch,
        query_heads,
        kv_heads,
        head_dim,
    })
}
