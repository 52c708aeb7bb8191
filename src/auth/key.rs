//! Shared access keys: base64 text outside, bytes inside.
//!
//! Owns the encoding and the length limits of keys. Does not know whose key it is.
//! Invariant: a decoded key is between [`MIN_KEY`] and [`MAX_KEY`] bytes long.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::base::Secret;

/// Shortest key in bytes: IoT Hub's documented minimum.
pub const MIN_KEY: usize = 16;
/// Longest key in bytes: IoT Hub's documented maximum.
pub const MAX_KEY: usize = 64;

/// Why a text is not a key. Never quotes the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64.
    #[error("the key is not valid base64; copy it whole, including any trailing \"=\"")]
    Base64,
    /// Too short or too long.
    #[error("the key is {0} bytes long; between {MIN_KEY} and {MAX_KEY} are allowed")]
    Length(usize),
}

/// Decodes a base64 key.
pub fn decode_key(text: &str) -> Result<Secret, KeyError> {
    let bytes = STANDARD.decode(text.trim()).map_err(|_| KeyError::Base64)?;
    if !(MIN_KEY..=MAX_KEY).contains(&bytes.len()) {
        return Err(KeyError::Length(bytes.len()));
    }
    Ok(Secret::new(bytes))
}

/// Encodes key bytes as base64, for a connection string.
pub fn encode_key(key: &Secret) -> String {
    STANDARD.encode(key.expose())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_a_round_trip_and_nonsense_is_refused() {
        let key = Secret::new([7u8; 32]);
        assert_eq!(decode_key(&encode_key(&key)).unwrap(), key);
        assert_eq!(decode_key("not base64!").unwrap_err(), KeyError::Base64);
        assert_eq!(decode_key("QUJD").unwrap_err(), KeyError::Length(3));
    }
}
