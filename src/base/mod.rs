//! Floor 0: words that every other floor uses.
//!
//! Owns the identifiers that parse strictly, secrets that never print, human units of time and size, gates
//! and the backoff schedule. Knows nothing of sockets, clocks, randomness or files.
//! Invariant: a value of one of these types is valid by construction.

mod backoff;
mod gate;
mod id;
mod secret;
mod text;
mod units;
mod utc;

pub use backoff::Backoff;
pub use gate::{Gate, Pass};
pub use id::{DeviceId, IdError, Identity, ModuleId, Name, StreamName};
pub use secret::Secret;
pub use text::printable;
pub use units::{ByteSize, Span, UnitError};
pub use utc::Utc;
