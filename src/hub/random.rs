//! Randomness from the operating system.
//!
//! Owns the one call to it in the hub. Does not know what the bytes are for. Invariant: bytes are never repeated or
//! made up: without the system's source the hub cannot be safe and stops.

/// Random bytes.
pub(in crate::hub) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // getrandom(2) fails only on kernels older than 3.17 or before the pool is seeded at boot, which it waits for.
    getrandom::fill(&mut bytes).expect("the operating system has randomness");
    bytes
}

/// A random UUID (version 4), lower-case with hyphens.
pub(in crate::hub) fn uuid() -> String {
    let mut bytes: [u8; 16] = bytes();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
