//! Reads beyond the inputs, of every ragged size: queries, keys, values and output gradients end, or begin, at pages that may
//! not be touched. A read of one byte too many ends the test process.

use std::ptr;

use half::bf16;
use ring_comm::buffer::{HostBuffer, HostView};

use super::tests::attention_of;
use super::{CpuKernels, InstructionSet};
use crate::judge::{on_all_heads, rows};
use crate::*;

/// Which end of the elements touches a page that may not be touched.
#[derive(Clone, Copy, Debug)]
enum Edge {
    Begin,
    End,
}

/// Elements between two pages that may not be touched.
struct Guarded<T> {
    mapping: *mut libc::c_void,
    bytes: usize,
    elements: *const T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    fn new(values: &[T], edge: Edge) -> Self {
        // SAFETY: no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        let room = size_of_val(values).next_multiple_of(page);
        let bytes = room + 2 * page;
        // SAFETY: a new mapping at an address of the system's choice; its inner pages are made writable and filled before
        // anything else knows of them, and `values` fits into them.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let mapping = libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(mapping, libc::MAP_FAILED);
            let inner = mapping.byte_add(page);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(inner, room.max(1), access), 0);
            let elements = match edge {
                Edge::Begin => inner,
                Edge::End => inner.byte_add(room - size_of_val(values)),
            };
            let elements = elements.cast::<T>();
            ptr::copy_nonoverlapping(values.as_ptr(), elements, values.len());
            Self {
                mapping,
                bytes,
                elements,
                len: values.len(),
            }
        }
    }

    fn values(&self) -> &[T] {
        // SAFETY: `new` wrote these elements, and they live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.elements, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; `values` borrows from `self`, so nothing refers to it any more.
        unsafe { libc::munmap(self.mapping, self.bytes) };
    }
}

fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 37 + seed * 101) % 256) as f32 / 128.0 - 1.0)
        .collect()
}

/// The attention of all rows to all rows.
fn attention(
    kernels: &CpuKernels,
    problem: &Problem,
    inputs: [HostView<'_>; 4],
) -> [HostBuffer; 5] {
    let block = (rows(0, 1, problem.queries), rows(0, 1, problem.keys));
    let blocks = on_all_heads(problem, &[block]);
    attention_of(kernels, problem, &blocks, inputs)
}

#[test]
fn no_read_leaves_the_inputs() {
    for set in InstructionSet::available() {
        let kernels = CpuKernels::with_instruction_set(1, set).unwrap();
        for head_dim in [1, 2, 7, 16, 33, 64, 80] {
            for (queries, keys) in [(1, 1), (3, 130), (63, 15), (65, 129), (100, 33)] {
                let window = Mask {
                    left: Some(20),
                    right: Some(3),
                };
                for mask in [Mask::NONE, Mask::CAUSAL, window] {
                    let problem = Problem {
                        batch: 1,
                        query_heads: 1,
                        kv_heads: 1,
                        head_dim,
                        queries,
                        keys,
                        scale: 0.3,
                        mask,
                        scores: Scores::default(),
                    };
                    check(&kernels, &problem);
                }
            }
        }
    }
}

fn check(kernels: &CpuKernels, problem: &Problem) {
    let (queries, keys) = (problem.queries, problem.keys);
    let mut seed = 0;
    let inputs = [queries, keys, keys, queries].map(|rows| {
        seed += 1;
        numbers(rows * problem.head_dim, seed)
    });
    let halves = inputs.each_ref().map(|values| {
        values
            .iter()
            .map(|&x| bf16::from_f32(x))
            .collect::<Vec<_>>()
    });
    let single = inputs.each_ref().map(|values| HostView::F32(values));
    let half = halves.each_ref().map(|values| HostView::BF16(values));
    let expected = [single, half].map(|inputs| attention(kernels, problem, inputs));
    for edge in [Edge::Begin, Edge::End] {
        let guarded = inputs.each_ref().map(|values| Guarded::new(values, edge));
        let single = guarded
            .each_ref()
            .map(|values| HostView::F32(values.values()));
        let guarded = halves.each_ref().map(|values| Guarded::new(values, edge));
        let half = guarded
            .each_ref()
            .map(|values| HostView::BF16(values.values()));
        let got = [single, half].map(|inputs| attention(kernels, problem, inputs));
        assert_eq!(got, expected, "{problem:?} {edge:?}");
    }
}
