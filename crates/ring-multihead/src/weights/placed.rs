//! Which tensor of a file goes into which parameter of a module.

use std::collections::BTreeMap;

use burn::tensor::{DType, Shape, TensorData};
use burn_store::{
    BurnToPyTorchAdapter, ModuleAdapter, ModuleContext, ModuleSnapshot, bridge, burn_pack,
};

use super::{Layout, WeightsError};

/// Parameters of a module by name, in PyTorch's layout, without their data.
pub(super) type Needed = BTreeMap<String, burn_pack::Tensor>;

/// The parameters of a module.
pub(super) fn needed<M: ModuleSnapshot>(module: &M) -> Needed {
    let tensors = module.collect(None, Some(Box::new(BurnToPyTorchAdapter)), true);
    tensors
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect()
}

/// Tensors that have found their parameters, in PyTorch's layout.
#[derive(Default)]
pub(super) struct Placed {
    parameters: BTreeMap<String, Stored>,
    /// Names of tensors that have no place.
    pub(super) unused: Vec<String>,
}

/// A tensor of a file.
struct Stored {
    name: String,
    tensor: burn_pack::Tensor,
}

impl Placed {
    /// A tensor has found its parameter.
    ///
    /// # Errors
    /// [`WeightsError::Ambiguous`] if another one has before.
    pub(super) fn add(
        &mut self,
        parameter: String,
        name: &str,
        tensor: burn_pack::Tensor,
    ) -> Result<(), WeightsError> {
        let name = name.to_string();
        if let Some(first) = self.parameters.get(&parameter) {
            return Err(WeightsError::Ambiguous {
                first: first.name.clone(),
                second: name,
                parameter,
            });
        }
        self.parameters.insert(parameter, Stored { name, tensor });
        Ok(())
    }

    /// A head that has no bias adds nothing.
    pub(super) fn fill_head_bias(&mut self, needed: &Needed) {
        const BIAS: &str = "head.bias";
        if let (Some(bias), true) = (
            needed.get(BIAS),
            self.parameters.contains_key("head.weight"),
        ) {
            let zeros = TensorData::zeros::<f32, _>(bias.shape.clone());
            self.parameters
                .entry(BIAS.into())
                .or_insert_with(|| Stored {
                    name: BIAS.into(),
                    tensor: bridge::from_data(zeros, BIAS.into(), None),
                });
        }
    }

    /// Whether all fits.
    ///
    /// # Errors
    /// [`WeightsError`] for a type or shape that does not fit, for what is missing and for what is too much.
    pub(super) fn check(&self, needed: &Needed, allow_unused: bool) -> Result<(), WeightsError> {
        self.check_tensors(needed)?;
        let missing = needed
            .keys()
            .filter(|parameter| !self.parameters.contains_key(*parameter));
        let missing: Vec<String> = missing.cloned().collect();
        if !missing.is_empty() {
            return Err(WeightsError::Missing {
                parameters: missing,
                unused: self.unused.clone(),
            });
        }
        if !self.unused.is_empty() && !allow_unused {
            return Err(WeightsError::Unused {
                names: self.unused.clone(),
            });
        }
        Ok(())
    }

    fn check_tensors(&self, needed: &Needed) -> Result<(), WeightsError> {
        for (parameter, Stored { name, tensor }) in &self.parameters {
            if !tensor.dtype.is_float() {
                return Err(WeightsError::Type {
                    name: name.clone(),
                    got: format!("{:?}", tensor.dtype),
                });
            }
            let expected = &needed[parameter].shape;
            if tensor.shape != *expected {
                return Err(shape_error(name, tensor, parameter, expected.to_vec()));
            }
        }
        Ok(())
    }

    /// The tensors in the types of their parameters.
    pub(super) fn into_tensors(self, needed: &Needed) -> Vec<burn_pack::Tensor> {
        let typed = |(parameter, stored): (String, Stored)| {
            with_type(stored.tensor, needed[&parameter].dtype)
        };
        self.parameters.into_iter().map(typed).collect()
    }
}

/// Splits the rows of a fused projection into those of query, key and value.
///
/// # Errors
/// [`WeightsError::Shape`] if the rows are not as many as needed.
pub(super) fn split(
    name: &str,
    tensor: &burn_pack::Tensor,
    parts: [String; 3],
    needed: &Needed,
) -> Result<Vec<(String, burn_pack::Tensor)>, WeightsError> {
    let shapes = parts.each_ref().map(|part| needed[part].shape.to_vec());
    let mut fused = shapes[0].clone();
    fused[0] = shapes.iter().map(|shape| shape[0]).sum();
    if tensor.shape.to_vec() != fused {
        let parameter = parts.join(", ");
        return Err(shape_error(name, tensor, &parameter, fused));
    }
    let mut first = 0;
    let parts = parts.into_iter().zip(shapes).map(|(part, shape)| {
        let rows = first..first + shape[0];
        first = rows.end;
        let select = {
            let (shape, dtype) = (Shape::from(shape.clone()), tensor.dtype);
            move |data: TensorData| {
                let row = data.as_bytes().len() / data.shape()[0];
                let bytes = data.as_bytes()[rows.start * row..rows.end * row].to_vec();
                TensorData::from_bytes_vec(bytes, shape.clone(), dtype)
            }
        };
        let tensor = bridge::map_data(
            tensor.clone(),
            part.clone(),
            tensor.dtype,
            shape.into(),
            select,
        );
        (part, tensor)
    });
    Ok(parts.collect())
}

fn shape_error(
    name: &str,
    tensor: &burn_pack::Tensor,
    parameter: &str,
    expected: Vec<usize>,
) -> WeightsError {
    WeightsError::Shape {
        name: name.into(),
        got: tensor.shape.to_vec(),
        parameter: parameter.into(),
        expected,
    }
}

/// A tensor as PyTorch would have it, under a parameter's name.
pub(super) fn as_pytorch(
    mut tensor: burn_pack::Tensor,
    parameter: &str,
    layout: Layout,
) -> burn_pack::Tensor {
    tensor.name = parameter.into();
    // An embedding's rows are tokens on both sides; all other matrices are those of linear layers.
    if layout == Layout::PyTorch || parameter.ends_with("embedding.weight") {
        return tensor;
    }
    let linear = ["Struct:Linear".to_string()];
    BurnToPyTorchAdapter.adapt(tensor, ModuleContext::new(&linear))
}

/// The tensor with elements of another floating-point type.
fn with_type(tensor: burn_pack::Tensor, target: DType) -> burn_pack::Tensor {
    if tensor.dtype == target {
        return tensor;
    }
    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
    bridge::map_data(tensor, name, target, shape, move |data| {
        data.convert_dtype(target)
    })
}
