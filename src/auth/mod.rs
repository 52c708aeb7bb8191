//! Floor 1, pure: who may do what.
//!
//! Owns SAS tokens, connection strings, tickets and the rights of policies. Knows no clock, randomness, sockets
//! or files: `now` and random bytes are handed in. Invariant: secrets are compared in constant time and never print.

