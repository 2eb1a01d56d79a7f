//! Rotary positions (RoFormer, arXiv 2104.09864) that are right under sharding: angles come from global positions.

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of the positions of a rank's rows, to be shared by all layers of a model.
#[derive(Clone, Debug)]
pub struct Rotary {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotary {
    /// Angles `position * base^(-2i/head_dim)` for `i` in `0..head_dim/2`. They are computed in f64: in f32 an angle of a
    /// million radians would be off by several hundredths.
    pub fn new(positions: &[i64], head_dim: usize, base: f64, device: &Device) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|i| base.powf(-2.0 * i as f64 / head_dim as f64))
            .collect();
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|&position| {
                    let angle = move |frequency: &f64| function(position as f64 * frequency) as f32;
                    frequencies.iter().map(angle)
                })
                .collect();
            Tensor::from_data(
                TensorData::new(values, [1, positions.len(), 1, half]),
                device,
            )
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.dims()[1]
    }

    /// Rotates `[batch, own positions, heads, head_dim]`; element `i` is paired with element `i + head_dim/2`.
    pub fn apply(&self, tensor: Tensor<4>) -> Tensor<4> {
        let half = tensor.dims()[3] / 2;
        let first = tensor.clone().narrow(3, 0, half);
        let second = tensor.narrow(3, half, half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos + first * sin,
            ],
            3,
        )
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};

    use super::*;

    /// Scores of a query at `n` and a key at `m` after rotation.
    fn score(query: &Tensor<4>, key: &Tensor<4>, n: i64, m: i64) -> f32 {
        let device = query.device();
        let at = |position| Rotary::new(&[position], 8, 10000.0, &device);
        (at(n).apply(query.clone()) * at(m).apply(key.clone()))
            .sum()
            .into_scalar()
    }

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let device = Device::flex();
        let draw = || Tensor::<4>::random([1, 1, 1, 8], Distribution::Default, &device);
        let (query, key) = (draw(), draw());
        let near = score(&query, &key, 5, 2);
        let far = score(&query, &key, 1_000_005, 1_000_002);
        assert!((near - far).abs() < 1e-3, "{near} {far}");
        assert!((near - score(&query, &key, 5, 4)).abs() > 1e-4);
    }

    #[test]
    fn a_shard_is_rotated_as_part_of_the_whole() {
        let device = Device::flex();
        let whole = Tensor::<4>::random([2, 10, 3, 8], Distribution::Default, &device);
        let positions: Vec<i64> = (0..10).collect();
        let rotated = Rotary::new(&positions, 8, 10000.0, &device).apply(whole.clone());
        let part = Rotary::new(&positions[6..], 8, 10000.0, &device).apply(whole.narrow(1, 6, 4));
        part.into_data()
            .assert_approx_eq::<f32>(&rotated.narrow(1, 6, 4).into_data(), Tolerance::default());
    }
}
