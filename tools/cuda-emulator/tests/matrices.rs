//! Products of matrices, and copies that go on by themselves.

use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::prelude::barrier::{Barrier, copy_async};
use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_emulator::{Order, client_with_order};
use half::{bf16, f16};

const ORDERS: [Order; 3] = [
    Order::Ascending,
    Order::Descending,
    Order::Random { seed: 3 },
];

fn argument(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: the tests make their memory of `len` elements.
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}

/// D = A B + C by `mma.sync`, of 16x16, 16x8 and 16x8, elements fetched one by one.
#[cube(launch)]
fn product<E: Numeric>(a: &[E], b: &[E], c: &[f32], d: &mut [f32]) {
    let definition = cmma::MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lane = UNIT_POS_PLANE;
    let size!(NA) = definition.vector_size(MatrixIdent::A);
    let size!(NB) = definition.vector_size(MatrixIdent::B);
    let size!(NC) = definition.vector_size(MatrixIdent::Accumulator);
    let count_a = definition.vectors_per_lane(MatrixIdent::A);
    let count_b = definition.vectors_per_lane(MatrixIdent::B);
    let count_c = definition.vectors_per_lane(MatrixIdent::Accumulator);
    let mut registers_a = Array::<Vector<E, NA>>::new(count_a);
    let mut registers_b = Array::<Vector<E, NB>>::new(count_b);
    let mut registers_c = Array::<Vector<f32, NC>>::new(count_c);
    let width_a = definition.vector_size(MatrixIdent::A);
    let width_b = definition.vector_size(MatrixIdent::B);
    let width_c = definition.vector_size(MatrixIdent::Accumulator);
    #[unroll]
    for i in 0..count_a {
        let mut register = Vector::empty();
        #[unroll]
        for k in 0..width_a {
            let nth = i * width_a + k;
            let (row, column) = definition.position_of_nth(lane, nth as u32, MatrixIdent::A);
            register.insert(k, a[(row * 16 + column) as usize]);
        }
        registers_a[i] = register;
    }
    #[unroll]
    for i in 0..count_b {
        let mut register = Vector::empty();
        #[unroll]
        for k in 0..width_b {
            let nth = i * width_b + k;
            let (row, column) = definition.position_of_nth(lane, nth as u32, MatrixIdent::B);
            register.insert(k, b[(row * 8 + column) as usize]);
        }
        registers_b[i] = register;
    }
    #[unroll]
    for i in 0..count_c {
        let mut register = Vector::empty();
        #[unroll]
        for k in 0..width_c {
            let nth = i * width_c + k;
            let (row, column) =
                definition.position_of_nth(lane, nth as u32, MatrixIdent::Accumulator);
            register.insert(k, c[(row * 8 + column) as usize]);
        }
        registers_c[i] = register;
    }
    let registers_d = definition.execute(&registers_a, &registers_b, &registers_c);
    #[unroll]
    for i in 0..count_c {
        let register = registers_d[i];
        #[unroll]
        for k in 0..width_c {
            let nth = i * width_c + k;
            let (row, column) =
                definition.position_of_nth(lane, nth as u32, MatrixIdent::Accumulator);
            d[(row * 8 + column) as usize] = register.extract(k);
        }
    }
}

/// The same with A and B by way of shared memory and `ldmatrix`.
#[cube(launch)]
fn product_by_ldmatrix<E: Numeric>(a: &[E], b: &[E], c: &[f32], d: &mut [f32]) {
    let definition = cmma::MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lane = UNIT_POS_PLANE as usize;
    let mut shared_a = Shared::new_aligned_slice(256usize, 16usize);
    let mut shared_b = Shared::new_aligned_slice(128usize, 16usize);
    for i in 0..8usize {
        shared_a[i * 32 + lane] = a[i * 32 + lane];
    }
    for i in 0..4usize {
        shared_b[i * 32 + lane] = b[i * 32 + lane];
    }
    sync_cube();
    let size!(NA) = definition.vector_size(MatrixIdent::A);
    let size!(NB) = definition.vector_size(MatrixIdent::B);
    let size!(NC) = definition.vector_size(MatrixIdent::Accumulator);
    let row = lane % 16;
    let at = row * 16 + lane / 16 * 8;
    let registers_a = definition.load_matrix::<_, NA>(
        &shared_a[at..at + 8],
        MatrixIdent::A,
        definition.vectors_per_lane(MatrixIdent::A),
        false,
    );
    let registers_b = definition.load_matrix::<_, NB>(
        &shared_b[row * 8..row * 8 + 8],
        MatrixIdent::B,
        definition.vectors_per_lane(MatrixIdent::B),
        true,
    );
    let count_c = definition.vectors_per_lane(MatrixIdent::Accumulator);
    let width_c = definition.vector_size(MatrixIdent::Accumulator);
    let mut registers_c = Array::<Vector<f32, NC>>::new(count_c);
    #[unroll]
    for i in 0..count_c {
        let mut register = Vector::empty();
        #[unroll]
        for k in 0..width_c {
            let nth = i * width_c + k;
            let (row, column) =
                definition.position_of_nth(lane as u32, nth as u32, MatrixIdent::Accumulator);
            register.insert(k, c[(row * 8 + column) as usize]);
        }
        registers_c[i] = register;
    }
    let registers_d = definition.execute(&registers_a, &registers_b, &registers_c);
    #[unroll]
    for i in 0..count_c {
        let register = registers_d[i];
        #[unroll]
        for k in 0..width_c {
            let nth = i * width_c + k;
            let (row, column) =
                definition.position_of_nth(lane as u32, nth as u32, MatrixIdent::Accumulator);
            d[(row * 8 + column) as usize] = register.extract(k);
        }
    }
}

/// D = A B + C by `wmma`, of 16x16 each.
#[cube(launch)]
fn product_by_wmma<E: Numeric>(a: &[E], b: &[E], c: &[f32], d: &mut [f32]) {
    let fragment_a = cmma::Matrix::<E>::from_slice(
        MatrixIdent::A,
        16usize,
        16usize,
        16usize,
        MatrixLayout::RowMajor,
        a,
        16,
    );
    let fragment_b = cmma::Matrix::<E>::from_slice(
        MatrixIdent::B,
        16usize,
        16usize,
        16usize,
        MatrixLayout::RowMajor,
        b,
        16,
    );
    let mut sum = cmma::Matrix::<f32>::from_value(
        MatrixIdent::Accumulator,
        16usize,
        16usize,
        16usize,
        MatrixLayout::Undefined,
        0.0,
    );
    cmma::load_with_layout(&mut sum, c, 16, MatrixLayout::RowMajor);
    cmma::execute(&fragment_a, &fragment_b, &sum, &sum);
    cmma::store(d, &sum, 16, MatrixLayout::RowMajor);
}

/// Whole numbers, so that every sum is exact; no two rows or columns are alike.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * i * 7 + i * 13 + seed * 5) % 31) as f32 - 15.0)
        .collect()
}

fn expected(a: &[f32], b: &[f32], c: &[f32], columns: usize) -> Vec<f32> {
    (0..16 * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            let terms = (0..16).map(|k| a[row * 16 + k] * b[k * columns + column]);
            terms.sum::<f32>() + c[i]
        })
        .collect()
}

#[derive(Clone, Copy)]
enum By {
    Elements,
    LoadMatrix,
    Wmma,
}

fn check<E: Numeric + CubeElement>(by: By, round: impl Fn(f32) -> E) {
    let columns = if matches!(by, By::Wmma) { 16 } else { 8 };
    let (a, b, c) = (
        numbers(256, 1),
        numbers(16 * columns, 2),
        numbers(16 * columns, 3),
    );
    let rounded = |numbers: &[f32]| numbers.iter().map(|&x| round(x)).collect::<Vec<E>>();
    for order in ORDERS {
        let client = client_with_order(order);
        let on_a = client.create_from_slice(E::as_bytes(&rounded(&a)));
        let on_b = client.create_from_slice(E::as_bytes(&rounded(&b)));
        let on_c = client.create_from_slice(f32::as_bytes(&c));
        let on_d = client.empty(64 * columns);
        let (count, dimensions) = (CubeCount::new_single(), CubeDim::new_1d(32));
        let in_a = argument(&on_a, 256);
        let in_b = argument(&on_b, 16 * columns);
        let in_c = argument(&on_c, 16 * columns);
        let out = argument(&on_d, 16 * columns);
        match by {
            By::Elements => product::launch::<E>(&client, count, dimensions, in_a, in_b, in_c, out),
            By::LoadMatrix => {
                product_by_ldmatrix::launch::<E>(&client, count, dimensions, in_a, in_b, in_c, out)
            }
            By::Wmma => {
                product_by_wmma::launch::<E>(&client, count, dimensions, in_a, in_b, in_c, out)
            }
        }
        let bytes = client.read_one(on_d).unwrap();
        assert_eq!(f32::from_bytes(&bytes), expected(&a, &b, &c, columns));
    }
}

#[test]
fn mma_of_registers_is_a_product() {
    check(By::Elements, f16::from_f32);
    check(By::Elements, bf16::from_f32);
}

#[test]
fn ldmatrix_loads_what_mma_takes() {
    check(By::LoadMatrix, f16::from_f32);
    check(By::LoadMatrix, bf16::from_f32);
}

#[test]
fn wmma_is_a_product() {
    check(By::Wmma, f16::from_f32);
    check(By::Wmma, bf16::from_f32);
}

/// Every thread copies four words; all read them after the barrier, or without it.
#[cube(launch)]
fn copies(input: &[u32], output: &mut [u32], #[comptime] wait: bool) {
    let barrier = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let mut shared = Shared::new_aligned_slice(256usize, 16usize);
    let at = UNIT_POS as usize * 4;
    copy_async(&input[at..at + 4], &mut shared[at..at + 4], 4u32);
    barrier.commit_copy_async();
    if comptime!(wait) {
        barrier.arrive_and_wait();
    }
    for i in 0..4usize {
        output[at + i] = shared[255 - at - i];
    }
}

#[test]
fn copies_are_there_for_those_who_wait() {
    let input: Vec<u32> = (0..256).collect();
    let reversed: Vec<u32> = (0..256).rev().collect();
    for order in ORDERS {
        for wait in [true, false] {
            let client = client_with_order(order);
            let from = client.create_from_slice(u32::as_bytes(&input));
            let to = client.empty(4 * 256);
            copies::launch(
                &client,
                CubeCount::new_single(),
                CubeDim::new_1d(64),
                argument(&from, 256),
                argument(&to, 256),
                wait,
            );
            let bytes = client.read_one(to).unwrap();
            let results = u32::from_bytes(&bytes);
            if wait {
                assert_eq!(results, reversed);
            } else {
                assert_eq!(results, [u32::MAX; 256]);
            }
        }
    }
}
