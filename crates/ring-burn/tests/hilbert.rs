//! Grids in the order of a Hilbert curve: what attention gives for the same pairs does not change, and pairs are chosen by position.

use std::{sync::Arc, time::Duration};

use burn::tensor::{Device, Int, Tensor, TensorData};
use ring_burn::{
    Communicator, DilatedAttentionConfig, HilbertOrder, HostBuffer, Loopback, Pattern, Ring,
    RingAttentionConfig, RingError, Sharding, from_hilbert_order, shard_cells, shard_tensor,
    to_hilbert_order,
};
use ring_core::{
    AttentionSpec, DropoutSeed, Shape,
    oracle::{OracleInput, attention},
};

const DEADLINE: Duration = Duration::from_secs(60);
const HEADS: usize = 2;
const DIM: usize = 8;

/// Output, and gradients of query, key and value, of the whole grid, row by row.
type Results = [Vec<f64>; 4];

/// Query, key, value and gradient of the output, `[1, heads, cells, head size]`.
fn numbers(cells: usize) -> [Vec<f64>; 4] {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f64::from((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 1.7
    };
    [(); 4].map(|()| (0..HEADS * cells * DIM).map(|_| next()).collect())
}

fn tensor(numbers: &[f64], device: &Device) -> Tensor<4> {
    let cells = numbers.len() / HEADS / DIM;
    let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
    Tensor::from_data(TensorData::new(numbers, [1, HEADS, cells, DIM]), device)
}

/// What stands at each of these rows, of every head.
fn rows(whole: &[f64], rows: &[usize]) -> Vec<f64> {
    let of_head = |head: &[f64]| -> Vec<f64> {
        let row = |&row: &usize| head[row * DIM..][..DIM].to_vec();
        rows.iter().flat_map(row).collect()
    };
    whole.chunks(rows.len() * DIM).flat_map(of_head).collect()
}

/// Every rank brings the grid into the order of the curve and attends with its shard; results are put back.
fn along_the_curve(
    order: &HilbertOrder,
    ranks: usize,
    sharding: Sharding,
    module: impl Fn([Tensor<4>; 3], &Ring) -> Tensor<4> + Sync,
) -> Results {
    let inputs = numbers(order.length());
    let parts = Loopback::run::<HostBuffer, _>(ranks, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, sharding, order.length()).unwrap();
        let device = Device::flex().autodiff();
        let own = |whole: Tensor<4>| {
            shard_tensor(to_hilbert_order(whole, 2, order).unwrap(), 2, &ring).unwrap()
        };
        let leaves = [0, 1, 2].map(|index| tensor(&inputs[index], &device).require_grad());
        let output = module(leaves.clone().map(own), &ring);
        let weights = own(tensor(&inputs[3], &device));
        let mut gradients = (output.clone() * weights).sum().backward();
        let gradients = leaves.map(|leaf| leaf.grad_remove(&mut gradients).unwrap().into_data());
        (
            ring.positions(),
            output.inner().into_data(),
            gradients.map(|data| data.iter::<f64>().collect::<Vec<_>>()),
        )
    });
    let length = order.length();
    let mut output = Tensor::<4>::full([1, HEADS, length, DIM], f32::NAN, &Device::flex());
    let mut gradients = [(); 3].map(|()| vec![0.0; HEADS * length * DIM]);
    for part in parts {
        let (positions, own_output, own_gradients) = part.unwrap();
        let own_output = Tensor::<4>::from_data(own_output, &Device::flex());
        for (row, position) in positions.into_iter().enumerate() {
            let place = [0..1, 0..HEADS, position..position + 1, 0..DIM];
            output = output.slice_assign(place, own_output.clone().narrow(2, row, 1));
        }
        // A rank's gradients are zero in cells that are not its own.
        for (sum, own) in gradients.iter_mut().zip(own_gradients) {
            sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        }
    }
    let output = from_hilbert_order(output, 2, order).unwrap().into_data();
    let [query, key, value] = gradients;
    [output.iter().collect(), query, key, value]
}

/// What the definition says of the cells in this order; results are put back.
fn defined(pattern: Pattern, order: &[usize]) -> Results {
    let inputs = numbers(order.len());
    let [query, key, value, grad_output] = inputs.each_ref().map(|whole| rows(whole, order));
    let shape = Shape {
        batch: 1,
        query_heads: HEADS,
        kv_heads: HEADS,
        head_dim: DIM,
    };
    let results = attention(
        &AttentionSpec::new(pattern, shape, order.len()).unwrap(),
        OracleInput {
            query: &query,
            key: &key,
            value: &value,
            grad_output: Some(&grad_output),
            grad_log_sum_exp: None,
            dropout: DropoutSeed::default(),
        },
    );
    let mut inverse = vec![0; order.len()];
    for (position, &cell) in order.iter().enumerate() {
        inverse[cell] = position;
    }
    [
        results.output,
        results.grad_query,
        results.grad_key,
        results.grad_value,
    ]
    .map(|along| rows(&along, &inverse))
}

/// Relative distance of the result that is farthest off.
fn distance(got: &Results, expected: &Results) -> f64 {
    let of = |(got, expected): (&Vec<f64>, &Vec<f64>)| {
        let square = |x: f64| x * x;
        let pairs = got.iter().zip(expected);
        let error: f64 = pairs.map(|(got, expected)| square(got - expected)).sum();
        let norm: f64 = expected.iter().map(|&x| square(x)).sum();
        assert_eq!(got.len(), expected.len());
        (error / norm).sqrt()
    };
    got.iter().zip(expected).map(of).fold(0.0, f64::max)
}

fn grids() -> [HilbertOrder; 3] {
    [&[8, 8][..], &[6, 7], &[3, 4, 5]].map(|sides| HilbertOrder::new(sides).unwrap())
}

fn places() -> [(usize, Sharding); 3] {
    [
        (1, Sharding::Contiguous),
        (3, Sharding::Contiguous),
        (3, Sharding::Zigzag),
    ]
}

#[test]
fn attention_to_everything_gives_every_cell_what_it_gives_in_rows() {
    for order in grids() {
        let in_rows: Vec<usize> = (0..order.length()).collect();
        let expected = defined(Pattern::full(), &in_rows);
        for (ranks, sharding) in places() {
            let got = along_the_curve(&order, ranks, sharding, |[query, key, value], ring| {
                let attention = RingAttentionConfig::new().init();
                attention.forward(query, key, value, ring)
            });
            let distance = distance(&got, &expected);
            assert!(
                distance < 2e-5,
                "off by {distance:e}, {order:?}, {ranks} ranks"
            );
        }
    }
}

#[test]
fn a_dilated_pattern_chooses_by_position_on_the_curve() {
    let pattern = || Pattern::dilated(&[16, 64], &[1, 2]).unwrap().causal();
    for order in grids() {
        let expected = defined(pattern(), &order.order());
        let in_rows: Vec<usize> = (0..order.length()).collect();
        assert!(distance(&defined(pattern(), &in_rows), &expected) > 0.1);
        for (ranks, sharding) in places() {
            let got = along_the_curve(&order, ranks, sharding, |[query, key, value], ring| {
                let config = DilatedAttentionConfig::new(vec![16, 64], vec![1, 2]);
                let attention = config.with_causal(true).init();
                attention.forward(query, key, value, ring)
            });
            let distance = distance(&got, &expected);
            assert!(
                distance < 2e-5,
                "off by {distance:e}, {order:?}, {ranks} ranks"
            );
        }
    }
}

#[test]
fn a_rank_can_load_its_cells_alone() {
    let order = HilbertOrder::new(&[5, 9]).unwrap();
    let device = Device::flex();
    let parts = Loopback::run::<HostBuffer, _>(4, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Zigzag, 45).unwrap();
        let numbers = Tensor::<1, Int>::arange(0..45, &device);
        let along = to_hilbert_order(numbers, 0, &order).unwrap().float();
        let own = shard_tensor(along, 0, &ring).unwrap().into_data();
        let cells = shard_cells(&order, &ring).unwrap();
        assert_eq!(
            own.iter::<i64>()
                .map(|cell| cell as usize)
                .collect::<Vec<_>>(),
            cells
        );
        cells
    });
    let mut seen: Vec<usize> = parts.into_iter().flat_map(Result::unwrap).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..45).collect::<Vec<_>>());
}

#[test]
fn what_is_not_as_long_as_the_grid_is_refused() {
    let order = HilbertOrder::new(&[2, 4]).unwrap();
    let tensor = Tensor::<2>::zeros([8, 7], &Device::flex());
    assert!(to_hilbert_order(tensor.clone(), 0, &order).is_ok());
    for dim in [1, 2] {
        assert!(to_hilbert_order(tensor.clone(), dim, &order).is_err());
        assert!(from_hilbert_order(tensor.clone(), dim, &order).is_err());
    }
    let error = shard_cells(&order, &Ring::single(9).unwrap()).unwrap_err();
    assert!(matches!(error, RingError::Shape { .. }), "{error}");
    assert!(error.to_string().contains("9 cells"), "{error}");
}
