//! One attention of a module: its options, checked, and its way to the kernels.

#[cfg(feature = "cube")]
use burn::backend::DispatchDevice;
use burn::{
    backend::Dispatch,
    tensor::{DType, Device, Tensor},
};
use ring_comm::buffer;
use ring_core::{AttentionSpec, Pattern, Shape};

use crate::{
    attention::AttentionOutput,
    error::RingError,
    op::{Job, RingAttentionOps},
    ring::Ring,
    scores::Scores,
};

/// What all attention modules are.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pattern: Pattern,
    scores: Scores,
}

impl Attention {
    /// Refuses options that no tensors could make sense of.
    pub(crate) fn new(pattern: Pattern, scores: Scores) -> Result<Self, RingError> {
        scores.check(&pattern)?;
        Ok(Self { pattern, scores })
    }

    pub(crate) fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Attention of the ring's queries; weights are dropped if `training` and the tensors are on an autodiff device.
    pub(crate) fn forward(
        &self,
        [query, key, value]: [Tensor<4>; 3],
        training: bool,
        ring: &Ring,
    ) -> Result<AttentionOutput, RingError> {
        let job = self
            .job([&query, &key, &value], training, ring)
            .inspect_err(|error| ring.tell_others(error))?;
        self.run(job, [query, key, value])
    }

    /// Does a job.
    pub(crate) fn run(
        &self,
        job: Job,
        [query, key, value]: [Tensor<4>; 3],
    ) -> Result<AttentionOutput, RingError> {
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

    /// The computation over the ring's group, on its batch, as yet undivided; weights are dropped if it `drops`.
    pub(crate) fn spec(
        &self,
        shape: Shape,
        dtype: buffer::DType,
        drops: bool,
        ring: &Ring,
    ) -> Result<AttentionSpec, RingError> {
        ring.spec(self.of_shape(shape, dtype, drops)?)
    }

    /// The computation as yet without a length, on one rank.
    pub(crate) fn of_shape(
        &self,
        shape: Shape,
        dtype: buffer::DType,
        drops: bool,
    ) -> Result<AttentionSpec, RingError> {
        let spec = AttentionSpec::new(self.pattern.clone(), shape, 0)?.with_dtype(dtype);
        Ok(self.scores.of(spec, drops)?)
    }

    /// How the ring divides this attention of tensors of a shape, and why.
    pub(crate) fn explain(
        &self,
        shape: Shape,
        dtype: buffer::DType,
        ring: &Ring,
    ) -> Result<String, RingError> {
        ring.explain(&self.spec(shape, dtype, false, ring)?)
    }

    /// Checks the tensors and plans the computation.
    pub(crate) fn job(
        &self,
        [query, key, value]: [&Tensor<4>; 3],
        training: bool,
        ring: &Ring,
    ) -> Result<Job, RingError> {
        let named = [("query", query), ("key", key), ("value", value)];
        for (what, tensor) in named {
            check_device(what, tensor, &query.device())?;
        }
        let autodiff = query.device().is_autodiff();
        if named
            .iter()
            .any(|(_, tensor)| tensor.device().is_autodiff() != autodiff)
        {
            return Err(RingError::MixedAutodiff);
        }
        let dtype = element_type([query, key, value])?;
        let shape = shape_of(query, key, value, ring)?;
        let drops = training && autodiff;
        let spec = ring.divided(self.spec(shape, dtype, drops, ring)?)?;
        let seed = self.scores.seed(&spec, ring)?;
        let plan = ring.plan(&spec)?;
        Ok(Job::new(ring.clone(), plan, seed))
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

/// The element type that query, key and value have in common.
pub(crate) fn element_type(tensors: [&Tensor<4>; 3]) -> Result<buffer::DType, RingError> {
    let first = tensors[0].dtype();
    for (what, tensor) in ["query", "key", "value"].into_iter().zip(tensors) {
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
