//! The bearer token that admits one side to one bridge.
//!
//! Owns a ticket's text and its hash. Does not know bridges or time: the bridge's reservation expires it.
//! Invariant: the hub keeps only the hash, so that neither a core file nor a debugger yields a usable ticket.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

use crate::base::Secret;

/// Bytes of randomness in a ticket: beyond guessing.
pub const TICKET_BYTES: usize = 32;
/// Longest token text that is looked at: `Bearer ` and token must fit 1,024 bytes in the C samples (wire.md, b).
const MAX_TOKEN_TEXT: usize = 1024;

/// A ticket in clear: 43 characters of base64url without padding. Handed out once, never stored.
#[derive(Debug, Clone)]
pub struct Ticket(Secret);

/// What the hub stores of a ticket: SHA-256 of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TicketHash([u8; 32]);

impl Ticket {
    /// A ticket from random bytes.
    pub fn from_random(random: [u8; TICKET_BYTES]) -> Self {
        Self(Secret::new(URL_SAFE_NO_PAD.encode(random)))
    }

    /// The token as it travels.
    pub fn token(&self) -> &Secret {
        &self.0
    }

    /// What to store and look up.
    pub fn hash(&self) -> TicketHash {
        TicketHash::of_token(self.0.expose())
    }
}

impl TicketHash {
    /// The hash of a token as presented. Looking it up in a map leaks nothing useful: an attacker who learns
    /// prefixes of a SHA-256 value cannot choose its preimage.
    pub fn of_token(token: &[u8]) -> Self {
        let shortened = &token[..token.len().min(MAX_TOKEN_TEXT)];
        Self(Sha256::digest(shortened).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_43_characters_that_need_no_escaping() {
        let ticket = Ticket::from_random([0xfb; TICKET_BYTES]);
        let text = ticket.token().expose_str().unwrap();
        assert_eq!(text.len(), 43);
        assert!(text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_'));
        assert_eq!(TicketHash::of_token(text.as_bytes()), ticket.hash());
        assert_ne!(TicketHash::of_token(b"other"), ticket.hash());
    }
}
