//! What ranks compare before they decode.

use std::hash::Hasher;

use ring_comm::checksum::Fnv1a;

use crate::spec::AttentionSpec;

/// What must be the same on all ranks from the prompt on.
pub(super) fn fields(spec: &AttentionSpec, chunk: usize) -> Vec<(String, String)> {
    let mut fields = spec.fields();
    fields.push(("chunk of new tokens".to_string(), chunk.to_string()));
    fields
}

/// All of it as one number.
pub(super) fn checksum(fields: &[(String, String)]) -> u64 {
    let mut hasher = Fnv1a::default();
    for (name, value) in fields {
        hasher.write(name.as_bytes());
        hasher.write(value.as_bytes());
    }
    hasher.finish()
}
