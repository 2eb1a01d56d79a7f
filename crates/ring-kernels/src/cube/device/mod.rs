//! Code that runs on the device, compiled by CubeCL for each when it is launched for the first time there.
//!
//! What a cube works on it reads from a [table](super::table): the record of its y position, for the batch entry (counted from the
//! record's own) and the query head within a group of its z position. Its x position is a tile of the record's rows.
//!
//! Everything is f32 but the inputs and the rounded results. No constant here is infinite, since WGSL has no such constants:
//! minus infinity is an argument, and the maximum of a row that has seen nothing is the least finite number.

// The attribute `cube` makes items of its own.
#![allow(missing_docs)]
// Conditions on constants, which choose what is compiled, are no conditions of the device: they stay apart.
#![allow(clippy::collapsible_if)]

pub(super) mod attention;
pub(super) mod dropout;
pub(super) mod elements;
pub(super) mod gradients;
pub(super) mod index;
pub(super) mod matrix;
pub(super) mod messages;
pub(super) mod quads;
pub(super) mod scores;
pub(super) mod tile;
