//! Attention on matrix units, in the manner of FlashAttention-2.
//!
//! A cube has planes of 32 units. Each plane owns rows, 16 or 32 of them, in registers; the cube holds tiles of the rows on the
//! other side in shared memory, two of each kind, one of which is filled while the other is worked on. A plane multiplies by
//! 16 x 8 x 16 instructions. What one product leaves in registers is what the next takes from registers: weights never go
//! through memory. See [`fragments`] for how registers are laid out.
//!
//! Planes have rows of zeros for rows that their record does not have, and tiles too: what they hold never comes from beyond a
//! tensor, and counts for nothing.
//!
//! Products take elements of the input type and add up in f32. So weights, and the gradients of scores, are rounded to the input
//! type before the second product; maxima, denominators and everything else stays f32.

pub(crate) mod attention;
pub(crate) mod fragments;
pub(crate) mod key_gradients;
pub(crate) mod query_gradients;
mod scores;
mod tiles;
pub(crate) mod work;
