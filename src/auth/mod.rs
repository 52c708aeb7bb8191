//! Floor 1, pure: who may do what.
//!
//! Owns keys, SAS tokens, connection strings, tickets and the rights of policies. Knows no clock, randomness,
//! sockets or files: `now` and random bytes are handed in. Invariant: secrets are compared in constant time and
//! never print.

pub mod connstr;
pub mod key;
pub mod policy;
pub mod sas;
pub mod ticket;

pub use connstr::{ConnectionString, Credential, Owner};
pub use policy::Rights;
pub use sas::Sas;
pub use ticket::{Ticket, TicketHash};
