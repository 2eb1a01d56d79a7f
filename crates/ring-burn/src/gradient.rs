//! Sums over ranks: gradients of parameters, losses.

use std::hash::Hasher;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{DType, Tensor, TensorData},
};
use ring_comm::{Communicator, buffer::HostBuffer, checksum::Fnv1a, collective};

use crate::error::RingError;

/// The sum over all ranks of every parameter's gradient, on every rank, to the bit.
///
/// A rank's loss must be its own labels' part of the global loss: sum over owned labels divided by the *global* number of
/// labels. Then the sum of the gradients is the gradient of the global loss. The order of summation is fixed (rank 0, 1, ...),
/// so that the result depends neither on the transport nor on timing. A parameter without a gradient on some ranks counts
/// there as zero; one without a gradient on every rank stays without.
///
/// # Errors
/// [`RingError::Comm`] if the exchange fails, or the models differ in size.
pub fn sum_gradients<M: Module>(
    model: &M,
    gradients: GradientsParams,
    communicator: &Communicator<HostBuffer>,
) -> Result<GradientsParams, RingError> {
    if communicator.world_size() == 1 {
        return Ok(gradients);
    }
    let mut flatten = Flatten {
        gradients,
        values: Vec::new(),
        present: Vec::new(),
    };
    model.visit(&mut flatten);
    let Flatten {
        gradients,
        mut values,
        present,
    } = flatten;
    let parameters = present.len();
    values.extend(present);
    let summed = collective::all_reduce_sum(communicator, values)?;
    let (values, present) = summed.split_at(summed.len() - parameters);
    let mut unflatten = Unflatten {
        gradients,
        values,
        present,
    };
    model.visit(&mut unflatten);
    Ok(unflatten.gradients)
}

/// Takes every gradient out, in the order of the model's parameters.
struct Flatten {
    gradients: GradientsParams,
    values: Vec<f32>,
    present: Vec<f32>,
}

impl ModuleVisitor for Flatten {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.remove::<D>(param.id);
        self.present.push(f32::from(u8::from(gradient.is_some())));
        match gradient {
            Some(gradient) => {
                let data = gradient.cast(DType::F32).into_data();
                self.values
                    .extend_from_slice(data.as_slice::<f32>().expect("cast to f32 above"));
            }
            None => {
                let len = self.values.len() + param.lazy_shape().num_elements();
                self.values.resize(len, 0.0);
            }
        }
    }
}

/// Puts the sums back, in the same order.
struct Unflatten<'a> {
    gradients: GradientsParams,
    values: &'a [f32],
    present: &'a [f32],
}

impl ModuleVisitor for Unflatten<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let (own, rest) = self.values.split_at(value.shape().num_elements());
        self.values = rest;
        let (&present, rest) = self.present.split_first().expect("one flag a parameter");
        self.present = rest;
        if present > 0.0 {
            let data = TensorData::new(own.to_vec(), value.shape());
            let gradient =
                Tensor::<D>::from_data(data, &value.device().inner()).cast(value.dtype());
            self.gradients.register(param.id, gradient);
        }
    }
}

/// A checksum of every parameter, by which ranks can see that they hold the same model.
pub fn parameter_checksum<M: Module>(model: &M) -> u64 {
    let mut checksum = Checksum(Fnv1a::default());
    model.visit(&mut checksum);
    checksum.0.finish()
}

/// Over the bytes of the parameters, in the order of the model.
struct Checksum(Fnv1a);

impl ModuleVisitor for Checksum {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.write(param.val().into_data().bytes());
    }
}
