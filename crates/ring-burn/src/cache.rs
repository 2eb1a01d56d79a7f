//! Decoding token by token: [`KeyValueCache`], and the ways of an attention into it and out of it.

use burn::tensor::{DType, Device, Tensor, TensorData};
use ring_comm::buffer::{self, Buffer, HostBuffer};
use ring_core::{AttentionSpec, NewTokens, Shape, decode};
use ring_kernels::RowLayout;

use crate::{
    attention::AttentionOutput,
    computation::{Attention, element_type},
    error::RingError,
    ring::Ring,
};

/// The keys and values of one attention, as far as this rank holds them: its shard of the prompt, and its share of the tokens
/// decoded since, which ranks take in turn so that each holds about as many.
///
/// It lies in host memory, of which a rank needs O(N/P), and keeps no gradients. After an error it is not to be used any more.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use ring_burn::{DilatedAttentionConfig, KeyValueCache, Ring};
///
/// let draw = |rows| Tensor::<4>::random([1, 4, rows, 16], Distribution::Default, &Device::flex());
/// let attention = DilatedAttentionConfig::new(vec![64, 256], vec![1, 4]).with_causal(true).init();
/// let ring = Ring::single(100)?;
/// let mut cache = KeyValueCache::new();
/// attention.try_prefill(draw(100), draw(100), draw(100), &ring, &mut cache)?;
/// for _ in 0..3 {
///     let next = attention.try_decode(draw(1), draw(1), draw(1), &ring, &mut cache)?;
///     assert_eq!(next.dims(), [1, 4, 1, 16]);
/// }
/// assert_eq!(cache.length(), 103);
/// # Ok::<(), ring_burn::RingError>(())
/// ```
#[derive(Debug, Default)]
pub struct KeyValueCache {
    /// None before the first tokens.
    rows: Option<ring_core::KeyValueCache>,
}

impl KeyValueCache {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions of the sequence so far, over all ranks: where the next token stands.
    pub fn length(&self) -> usize {
        self.rows
            .as_ref()
            .map_or(0, ring_core::KeyValueCache::length)
    }

    /// Bytes of keys and values that this rank has room for.
    pub fn bytes(&self) -> usize {
        self.rows
            .as_ref()
            .map_or(0, ring_core::KeyValueCache::bytes)
    }

    /// Positions whose keys and values a rank holds.
    pub fn rows(&self, rank: usize) -> usize {
        self.rows.as_ref().map_or(0, |rows| rows.rows(rank))
    }

    /// Has the ranks compare `note` when they decode the next tokens: a checksum of the tokens so far, say. Without it a rank
    /// that missed a token is found out, but not one that chose another.
    pub fn note(&mut self, note: u64) {
        if let Some(rows) = &mut self.rows {
            rows.note(note);
        }
    }
}

impl Attention {
    /// Attention of a prompt, whose keys and values go to the cache.
    pub(crate) fn prefill(
        &self,
        [query, key, value]: [Tensor<4>; 3],
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<AttentionOutput, RingError> {
        let refused = |error: &RingError| ring.tell_others(error);
        check_place(&query).inspect_err(refused)?;
        if cache.length() > 0 {
            let error = RingError::Value(format!(
                "the cache holds {} positions already; a prompt needs a new one",
                cache.length()
            ));
            ring.tell_others(&error);
            return Err(error);
        }
        let tensors = [query, key.clone(), value.clone()];
        let job = self.job(tensors.each_ref(), false, ring);
        let job = job.inspect_err(refused)?;
        let spec = job.plan.spec().clone();
        let output = self.run(job, tensors)?;
        let filled = filled(&spec, key, value, ring).inspect_err(refused)?;
        cache.rows = Some(filled);
        Ok(output)
    }

    /// Attention of new tokens, the same on all ranks, to the cache and themselves; their keys and values go to the cache.
    pub(crate) fn decode(
        &self,
        tensors: [Tensor<4>; 3],
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<4>, RingError> {
        self.try_decode(tensors, ring, cache)
            .inspect_err(|error| ring.tell_others(error))
    }

    fn try_decode(
        &self,
        tensors: [Tensor<4>; 3],
        ring: &Ring,
        cache: &mut KeyValueCache,
    ) -> Result<Tensor<4>, RingError> {
        tensors.iter().try_for_each(check_place)?;
        let (device, shape) = (tensors[0].device(), new_shape(tensors.each_ref())?);
        let count = tensors[0].dims()[2];
        let dtype = element_type(tensors.each_ref())?;
        let rows = match &mut cache.rows {
            Some(rows) => rows,
            none => none.insert(self.empty(shape, dtype, ring)?),
        };
        self.check_cache(rows.spec(), shape, dtype)?;
        let layout = |heads| RowLayout::contiguous(heads, count, shape.head_dim);
        let (of_queries, of_keys) = (layout(shape.query_heads), layout(shape.kv_heads));
        let [query, key, value] = tensors.map(host_buffer);
        let (query, key, value) = (query?, key?, value?);
        let tokens = NewTokens {
            count,
            query: view(&query, &of_queries),
            key: view(&key, &of_keys),
            value: view(&value, &of_keys),
        };
        let decoded = decode(ring.kernels(), ring.communicator(), rows, tokens)?;
        let shape = [shape.batch, shape.query_heads, count, shape.head_dim];
        Ok(tensor(decoded.output, shape, &device))
    }

    /// The cache of an empty prompt.
    fn empty(
        &self,
        shape: Shape,
        dtype: buffer::DType,
        ring: &Ring,
    ) -> Result<ring_core::KeyValueCache, RingError> {
        let spec = self.spec(shape, dtype, false, &ring.clone().with_sequence_length(0))?;
        let nothing = HostBuffer::zeros(dtype, 0);
        let layout = RowLayout::contiguous(shape.kv_heads, 0, shape.head_dim);
        let rows = view(&nothing, &layout);
        let cache = ring_core::KeyValueCache::new(ring.kernels(), &spec, ring.rank(), rows, rows);
        Ok(cache?)
    }

    /// Checks that new tokens go on with what the cache holds.
    fn check_cache(
        &self,
        cached: &AttentionSpec,
        shape: Shape,
        dtype: buffer::DType,
    ) -> Result<(), RingError> {
        if cached.pattern != *self.pattern() {
            return Err(RingError::Value(format!(
                "the cache was filled by another attention ({}) than this one ({})",
                cached.pattern,
                self.pattern()
            )));
        }
        if cached.shape != shape {
            let Shape {
                batch,
                query_heads,
                kv_heads,
                head_dim,
            } = shape;
            return Err(RingError::Shape {
                what: "the new tokens",
                got: vec![batch, query_heads, kv_heads, head_dim],
                expected: format!(
                    "batch, query heads, key/value heads and head size of the cache: {:?}",
                    cached.shape
                ),
            });
        }
        let own = self.of_shape(shape, dtype, false)?;
        if (own.scale, own.softcap, &own.alibi_slopes)
            != (cached.scale, cached.softcap, &cached.alibi_slopes)
        {
            let message =
                "the cache was filled by another attention: scale, softcap or ALiBi slopes differ";
            return Err(RingError::Value(message.into()));
        }
        Ok(())
    }
}

/// The cache of a prompt.
fn filled(
    spec: &AttentionSpec,
    key: Tensor<4>,
    value: Tensor<4>,
    ring: &Ring,
) -> Result<ring_core::KeyValueCache, RingError> {
    let [_, heads, rows, head_dim] = key.dims();
    let layout = RowLayout::contiguous(heads, rows, head_dim);
    let (key, value) = (host_buffer(key)?, host_buffer(value)?);
    let (key, value) = (view(&key, &layout), view(&value, &layout));
    let cache = ring_core::KeyValueCache::new(ring.kernels(), spec, ring.rank(), key, value);
    Ok(cache?)
}

/// Decoding is for tensors without gradients, in host memory.
fn check_place(tensor: &Tensor<4>) -> Result<(), RingError> {
    let device = tensor.device();
    if device.is_autodiff() {
        let message = "decoding keeps no gradients: give tensors of a plain device, as those of a model after `valid()` are";
        return Err(RingError::Value(message.into()));
    }
    if device != Device::flex() {
        return Err(RingError::Value(format!(
            "decoding runs on Burn's Flex backend (`Device::flex()`) alone so far; the tensors are on {device:?}"
        )));
    }
    Ok(())
}

/// The shape that new tokens have in common.
fn new_shape([query, key, value]: [&Tensor<4>; 3]) -> Result<Shape, RingError> {
    let [batch, query_heads, count, head_dim] = query.dims();
    let kv_heads = key.dims()[1];
    let expected = [batch, kv_heads, count, head_dim];
    for (what, tensor) in [("key", key), ("value", value)] {
        if tensor.dims() != expected {
            return Err(RingError::Shape {
                what,
                got: tensor.dims().to_vec(),
                expected: format!(
                    "{expected:?}: batch, tokens and head size of the query, heads of the key"
                ),
            });
        }
    }
    Ok(Shape {
        batch,
        query_heads,
        kv_heads,
        head_dim,
    })
}

fn view<'a>(buffer: &'a HostBuffer, layout: &'a RowLayout) -> ring_kernels::Tensor<'a, HostBuffer> {
    ring_kernels::Tensor {
        data: buffer.view(),
        layout,
    }
}

/// The elements of a tensor in order.
fn host_buffer(tensor: Tensor<4>) -> Result<HostBuffer, RingError> {
    let unreadable = |error: &dyn std::fmt::Display| {
        RingError::Value(format!("a tensor could not be read: {error}"))
    };
    let dtype = tensor.dtype();
    let data = tensor.try_into_data().map_err(|error| unreadable(&error))?;
    let buffer = match dtype {
        DType::F16 => data.try_into_vec().map(HostBuffer::F16),
        DType::BF16 => data.try_into_vec().map(HostBuffer::BF16),
        _ => data.try_into_vec().map(HostBuffer::F32),
    };
    buffer.map_err(|error| unreadable(&error))
}

fn tensor(buffer: HostBuffer, shape: [usize; 4], device: &Device) -> Tensor<4> {
    let (data, dtype) = match buffer {
        HostBuffer::F32(values) => (TensorData::new(values, shape), DType::F32),
        HostBuffer::F16(values) => (TensorData::new(values, shape), DType::F16),
        HostBuffer::BF16(values) => (TensorData::new(values, shape), DType::BF16),
    };
    Tensor::from_data(data, (device, dtype))
}
