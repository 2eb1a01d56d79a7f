//! Layers on grids in the order of a Hilbert curve.

use std::{sync::Arc, time::Duration};

use burn::tensor::{Device, Distribution, Tensor};
use ring_burn::{
    Communicator, HilbertOrder, HostBuffer, Loopback, Ring, Sharding, collective, shard_cells,
    shard_tensor, to_hilbert_order,
};
use ring_multihead::MultiheadDilatedAttentionConfig;

const DEADLINE: Duration = Duration::from_secs(60);

/// Tokens of a grid in the order of a curve, over ranks: with the positions of their cells they get what they get in rows.
#[test]
fn positions_travel_with_reordered_tokens() {
    let device = Device::flex();
    let order = HilbertOrder::new(&[5, 8]).unwrap();
    let layer = MultiheadDilatedAttentionConfig::new(24, 4, vec![], vec![])
        .with_num_kv_heads(Some(2))
        .with_rotary_base(Some(100.0))
        .init(&device);
    let input = Tensor::<3>::random([2, 40, 24], Distribution::Default, &device);
    let in_rows = layer.forward(input.clone(), &Ring::single(40).unwrap());
    let parts = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let ring = Ring::new(Communicator::new(Arc::new(endpoint)), Sharding::Zigzag, 40).unwrap();
        let own = |whole: &Tensor<3>| {
            let along = to_hilbert_order(whole.clone(), 1, &order).unwrap();
            shard_tensor(along, 1, &ring).unwrap()
        };
        let off = |output: Tensor<3>| (output - own(&in_rows)).abs().max().into_scalar::<f32>();
        let cells = shard_cells(&order, &ring).unwrap();
        let cells: Vec<i64> = cells.into_iter().map(|cell| cell as i64).collect();
        let rotary = layer.rotary_at(&cells, &device);
        let output = layer.try_forward_rotated(own(&input), rotary.as_ref(), &ring);
        let by_place = layer.forward(own(&input), &ring);
        collective::barrier(ring.communicator()).unwrap();
        // What one rank refuses ends the group.
        let few = layer.rotary_at(&cells[1..], &device);
        let refused = layer.try_forward_rotated(own(&input), few.as_ref(), &ring);
        assert!(refused.unwrap_err().to_string().contains("rotary table"));
        (off(output.unwrap()), off(by_place))
    });
    for part in parts {
        let (of_cells, by_place) = part.unwrap();
        assert!(of_cells < 1e-5, "{of_cells}");
        assert!(by_place > 1e-3, "{by_place}");
    }
}
