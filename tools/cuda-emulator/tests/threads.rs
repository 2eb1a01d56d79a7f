//! Threads of a block: barriers, shuffles, orders, and accesses beyond memory.

use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_emulator::{Order, client, client_with_order};

const ORDERS: [Order; 4] = [
    Order::Ascending,
    Order::Descending,
    Order::Random { seed: 1 },
    Order::Random { seed: 2 },
];

fn words(client: &cubecl::client::Client, handle: Handle) -> Vec<u32> {
    let bytes = client.read_one(handle).unwrap();
    u32::from_bytes(&bytes).to_vec()
}

fn argument(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: the tests make their memory of `len` elements.
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}

/// Every thread reads what its neighbour wrote to shared memory.
#[cube(launch)]
fn neighbours(output: &mut [u32], #[comptime] threads: usize, #[comptime] with_barrier: bool) {
    let mut shared = Shared::<[u32]>::new_slice(threads);
    let own = UNIT_POS as usize;
    shared[own] = UNIT_POS;
    if comptime!(with_barrier) {
        sync_cube();
    }
    output[own] = shared[(own + 1) % threads];
}

fn run_neighbours(order: Order, with_barrier: bool) -> Vec<u32> {
    let client = client_with_order(order);
    let output = client.empty(4 * 64);
    neighbours::launch(
        &client,
        CubeCount::new_single(),
        CubeDim::new_1d(64),
        argument(&output, 64),
        64,
        with_barrier,
    );
    words(&client, output)
}

#[test]
fn a_barrier_gives_the_same_in_every_order() {
    let expected: Vec<u32> = (0..64).map(|thread| (thread + 1) % 64).collect();
    for order in ORDERS {
        assert_eq!(run_neighbours(order, true), expected, "{order:?}");
    }
}

#[test]
fn a_missing_barrier_shows_by_the_order() {
    let expected: Vec<u32> = (0..64).map(|thread| (thread + 1) % 64).collect();
    for order in ORDERS {
        assert_ne!(run_neighbours(order, false), expected, "{order:?}");
    }
    assert_ne!(
        run_neighbours(Order::Ascending, false),
        run_neighbours(Order::Descending, false)
    );
}

#[test]
fn blocks_have_shared_memory_full_of_nan() {
    let results = run_neighbours(Order::Ascending, false);
    assert_eq!(results[..63], [u32::MAX; 63]);
}

/// Only some threads come to the barrier, the others return.
#[cube(launch)]
fn some_return(output: &mut [u32]) {
    if UNIT_POS >= 10 {
        terminate!();
    }
    sync_cube();
    output[UNIT_POS as usize] = UNIT_POS;
}

/// Some threads wait at a barrier, others at a shuffle.
#[cube(launch)]
fn different_waits(output: &mut [u32]) {
    if UNIT_POS < 10 {
        sync_cube();
    } else {
        output[UNIT_POS as usize] = plane_shuffle(UNIT_POS, 0);
    }
}

#[test]
fn barriers_that_not_all_threads_reach_are_errors() {
    for order in ORDERS {
        let client = client_with_order(order);
        let output = client.create_from_slice(u32::as_bytes(&[0; 64]));
        some_return::launch(
            &client,
            CubeCount::new_single(),
            CubeDim::new_1d(64),
            argument(&output, 64),
        );
        let error = client.read_one(output).unwrap_err().to_string();
        assert!(error.contains("returned"), "{order:?}: {error}");

        let output = client.create_from_slice(u32::as_bytes(&[0; 64]));
        different_waits::launch(
            &client,
            CubeCount::new_single(),
            CubeDim::new_1d(64),
            argument(&output, 64),
        );
        let error = client.read_one(output).unwrap_err().to_string();
        let found = error.contains("wait for each other for ever") || error.contains("returned");
        assert!(found, "{order:?}: {error}");
    }
}

#[cube(launch)]
fn shuffles(output: &mut [u32]) {
    let own = UNIT_POS as usize;
    let value = UNIT_POS * 10;
    output[own] = plane_shuffle(value, 5);
    output[64 + own] = plane_shuffle_xor(value, 3);
    output[128 + own] = plane_shuffle_up(value, 2);
    output[192 + own] = plane_shuffle_down(value, 2);
    output[256 + own] = plane_sum(value);
    output[320 + own] = plane_max(value);
    let ballot = plane_ballot(UNIT_POS % 3 == 0);
    output[384 + own] = ballot.extract(0usize);
}

#[test]
fn lanes_exchange_values() {
    for order in ORDERS {
        let client = client_with_order(order);
        let output = client.empty(4 * 448);
        shuffles::launch(
            &client,
            CubeCount::new_single(),
            CubeDim::new_1d(64),
            argument(&output, 448),
        );
        let results = words(&client, output);
        for thread in 0..64u32 {
            let (warp, lane) = (thread / 32 * 32, thread % 32);
            let at = |row: usize| results[row * 64 + thread as usize];
            let of = |lane: u32| (warp + lane) * 10;
            assert_eq!(at(0), of(5));
            assert_eq!(at(1), of(lane ^ 3));
            assert_eq!(at(2), of(if lane < 2 { lane } else { lane - 2 }));
            assert_eq!(at(3), of(if lane > 29 { lane } else { lane + 2 }));
            assert_eq!(at(4), (0..32).map(of).sum::<u32>());
            assert_eq!(at(5), of(31));
            let third = (0..32).filter(|lane| (warp + lane) % 3 == 0);
            assert_eq!(at(6), third.map(|lane| 1 << lane).sum::<u32>());
        }
    }
}

/// Reads `index`, which the length that the kernel was told allows.
#[cube(launch)]
fn read_at(input: &[u32], output: &mut [u32], index: u32) {
    output[0] = input[index as usize];
}

/// Another length than the memory has.
fn read(index: u32) -> Result<Vec<u32>, String> {
    let client = client();
    let input = client.create_from_slice(u32::as_bytes(&[7; 8]));
    let output = client.create_from_slice(u32::as_bytes(&[0; 8]));
    read_at::launch(
        &client,
        CubeCount::new_single(),
        CubeDim::new_1d(1),
        argument(&input, 1 << 20),
        argument(&output, 8),
        index,
    );
    match client.read_one(output) {
        Ok(bytes) => Ok(u32::from_bytes(&bytes).to_vec()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn reading_beyond_an_allocation_is_an_error() {
    assert_eq!(read(7).unwrap()[0], 7);
    for index in [8, 9, 1000] {
        let error = read(index).unwrap_err();
        assert!(error.contains("outside of every allocation"), "{error}");
    }
    // The device goes on.
    assert_eq!(read(0).unwrap()[0], 7);
}

#[cube(launch)]
fn much_shared_memory(output: &mut [u32], #[comptime] words: usize) {
    let mut shared = Shared::<[u32]>::new_slice(words);
    shared[UNIT_POS as usize] = UNIT_POS;
    sync_cube();
    output[UNIT_POS as usize] = shared[0];
}

#[test]
fn more_than_the_device_has_is_an_error() {
    let client = client();
    let run = |words: usize, threads: u32| {
        let output = client.create_from_slice(u32::as_bytes(&[9; 2048]));
        let dimensions = CubeDim::new_1d(threads);
        let output_argument = argument(&output, 2048);
        much_shared_memory::launch(
            &client,
            CubeCount::new_single(),
            dimensions,
            output_argument,
            words,
        );
        client.read_one(output).map_err(|error| error.to_string())
    };
    assert!(run(227 * 256, 1024).is_ok());
    assert!(
        run(227 * 256 + 4, 1024)
            .unwrap_err()
            .contains("shared memory")
    );
    assert!(run(2048, 1025).unwrap_err().contains("Cube dim"));
}
