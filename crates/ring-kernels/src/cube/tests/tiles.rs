//! Sizes that do not fit the tiles, every kind of tile, and sums of many tiles.

use super::on_device::OnDevice;
use super::*;
#[cfg(not(feature = "emulated-cuda"))]
use crate::cube::tiling::Room;

/// Kernels for the emulator are compiled one by one, by a C++ compiler.
const FEW: bool = cfg!(feature = "emulated-cuda");

const HEAD_SIZES: &[usize] = match FEW {
    true => &[7, 128, 256],
    false => &[
        1, 2, 4, 6, 7, 9, 12, 31, 33, 48, 65, 100, 127, 160, 192, 255, 256,
    ],
};

const ROWS: &[usize] = match FEW {
    true => &[1, 33],
    false => &[1, 15, 17, 31, 32, 33, 65],
};

#[test]
fn head_sizes_from_1_to_256_match_the_oracle() {
    for &head_dim in HEAD_SIZES {
        check(&full(causal(problem(1, (2, 1), head_dim, (37, 70)))));
    }
}

#[test]
fn rows_around_the_borders_of_tiles_match_the_oracle() {
    for head_dim in [64, 65] {
        for &rows in ROWS {
            check(&full(problem(1, (1, 1), head_dim, (rows, 33))));
            check(&full(problem(1, (1, 1), head_dim, (33, rows))));
            check(&full(causal(problem(1, (1, 1), head_dim, (rows, rows)))));
        }
    }
}

#[test]
fn rows_that_begin_anywhere_match_the_oracle() {
    for dtype in [DType::F32, DType::F16] {
        for order in [Order::HeadsFirst, Order::Bordered(4), Order::Bordered(1)] {
            for head_dim in [16, 64] {
                let mut case = tangled(causal(problem(2, (4, 2), head_dim, (150, 140))));
                (case.order, case.dtype) = (order, dtype);
                check(&case);
            }
        }
    }
}

#[cfg(not(feature = "emulated-cuda"))]
#[test]
fn tiles_for_less_room_match_the_oracle() {
    for (units, shared_bytes) in [
        (256, 16 << 10),
        (64, 16 << 10),
        (256, 32 << 10),
        (16, 8 << 10),
    ] {
        let kernels = OnDevice::with_room(Room {
            units,
            shared_bytes,
        });
        for head_dim in [3, 64, 80, 128] {
            let case = tangled(causal(problem(1, (2, 1), head_dim, (150, 140))));
            let computed = case.run(&kernels).unwrap();
            computed.check(&case.oracle(), TOLERANCE, TOLERANCE);
        }
    }
    let least = Room {
        units: 256,
        shared_bytes: 16 << 10,
    };
    let case = full(causal(problem(1, (1, 1), 256, (37, 70))));
    let computed = case.run(&OnDevice::with_room(least)).unwrap();
    computed.check(&case.oracle(), TOLERANCE, TOLERANCE);
}

/// Terms that are added one by one to a sum of 8192 of them lose digits: gradients of keys then are off by 1.7e-6.
#[test]
fn sums_over_long_rows_stay_accurate() {
    for (queries, keys) in [(8, 8192), (8192, 8)] {
        let mut case = full(problem(1, (1, 1), 16, (queries, keys)));
        case.temperature = 0.5;
        let computed = case.run(&OnDevice::new()).unwrap();
        computed.check(&case.oracle(), 1e-6, 1e-6);
    }
}
