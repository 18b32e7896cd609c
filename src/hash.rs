//! A content hash that stays the same across builds and machines.
//!
//! FNV-1a with 64 bits: it answers "is this still the same file or corpus?" on resume, where the other
//! side is a mistake, not an attacker. The standard library's hasher may change between Rust releases.

use std::fmt;

/// FNV-1a state and result; prints as 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hash(u64);

impl Hash {
    pub fn new() -> Self {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    pub fn of(bytes: &[u8]) -> Self {
        Self::new().with(bytes)
    }

    /// Whether a text is what a hash prints.
    pub fn is_name(text: &str) -> bool {
        text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// What a hash printed.
    pub fn parse(text: &str) -> Option<Self> {
        let bits = u64::from_str_radix(text, 16).ok()?;
        Self::is_name(text).then_some(Hash(bits))
    }

    /// As a number.
    pub fn bits(self) -> u64 {
        self.0
    }

    pub fn with(self, bytes: &[u8]) -> Self {
        Hash(bytes.iter().fold(self.0, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        }))
    }
}

impl Default for Hash {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors() {
        assert_eq!(Hash::of(b"").to_string(), "cbf29ce484222325");
        assert_eq!(Hash::of(b"a").to_string(), "af63dc4c8601ec8c");
        assert_eq!(Hash::of(b"foobar").to_string(), "85944171f73967e8");
        assert!(Hash::is_name("85944171f73967e8") && !Hash::is_name("85944171f73967E8"));
        assert_eq!(Hash::parse("85944171f73967e8"), Some(Hash::of(b"foobar")));
        assert_eq!(Hash::parse("5944171f73967e8"), None);
        assert_eq!(Hash::new().with(b"foo").with(b"bar"), Hash::of(b"foobar"));
    }
}
