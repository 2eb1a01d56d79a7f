//! A checksum that is the same in every process, by which ranks see that they hold the same: [`Fnv1a`].

use std::hash::Hasher;

/// The 64-bit FNV-1a hash: the same on every machine and in every build, unlike the standard library's. It guards against
/// mistakes, not against malice. Of the methods of [`Hasher`] only [`write`](Hasher::write) is that on every machine: the
/// others follow its byte order.
///
/// ```
/// use std::hash::Hasher;
///
/// use ring_comm::checksum::Fnv1a;
///
/// let mut hasher = Fnv1a::default();
/// hasher.write(b"foo");
/// hasher.write(b"bar");
/// assert_eq!(hasher.finish(), Fnv1a::of(b"foobar"));
/// ```
#[derive(Clone, Debug)]
pub struct Fnv1a(u64);

impl Fnv1a {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut hasher = Self::default();
        hasher.write(bytes);
        hasher.finish()
    }
}

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv1a {
    fn write(&mut self, bytes: &[u8]) {
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        self.0 = bytes.iter().fold(self.0, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(PRIME)
        });
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_the_published_values() {
        assert_eq!(Fnv1a::of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Fnv1a::of(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(Fnv1a::of(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
