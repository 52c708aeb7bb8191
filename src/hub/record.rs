//! A registered identity: what the registry stores, and what admitted a session.
//!
//! Owns the record of a device or module and the proofs it may use. Does not know JSON, SQL or MQTT.
//! Invariant: a record's proofs are of one kind; an [`Admission`] can be checked again at any later time.

use std::{fmt, str::FromStr, time::SystemTime};

use crate::base::{Identity, Name, Secret};

/// What the registry knows of a device or module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Whose record.
    pub identity: Identity,
    /// Tells this identity from an earlier one of the same name: a decimal number as text.
    pub generation: String,
    /// Changes with every write.
    pub etag: String,
    /// A disabled identity may not connect.
    pub enabled: bool,
    /// Why it is disabled, for people.
    pub status_reason: Option<String>,
    /// When it was last enabled or disabled.
    pub status_updated: Option<SystemTime>,
    /// How it proves itself.
    pub authentication: Authentication,
}

/// What a writer asks for; the registry adds generation, etag and times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Whose record.
    pub identity: Identity,
    /// May it connect?
    pub enabled: bool,
    /// Why not.
    pub status_reason: Option<String>,
    /// How it proves itself.
    pub authentication: Authentication,
}

/// How a device or module proves itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication {
    /// By a SAS token that one of two keys signs.
    Keys {
        /// The first key.
        primary: Secret,
        /// The second, for rotation.
        secondary: Secret,
    },
    /// By a client certificate with one of two thumbprints, whoever signed it.
    SelfSigned {
        /// The first certificate.
        primary: Option<Thumbprint>,
        /// The second, for rotation.
        secondary: Option<Thumbprint>,
    },
    /// By a client certificate that the hub's device CA signed, with the ID as common name.
    Authority,
}

/// A certificate's SHA-1 or SHA-256 in upper-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Thumbprint(Box<str>);

/// Not a thumbprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a thumbprint has 40 (SHA-1) or 64 (SHA-256) hexadecimal digits")]
pub struct ThumbprintError;

impl Thumbprint {
    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The thumbprint that a certificate's digest makes.
    pub fn from_digest(digest: &[u8]) -> Self {
        Self(digest.iter().map(|byte| format!("{byte:02X}")).collect::<String>().into())
    }
}

impl FromStr for Thumbprint {
    type Err = ThumbprintError;

    fn from_str(text: &str) -> Result<Self, ThumbprintError> {
        let plain = text.bytes().all(|b| b.is_ascii_hexdigit()) && matches!(text.len(), 40 | 64);
        plain.then(|| Self(text.to_ascii_uppercase().into())).ok_or(ThumbprintError)
    }
}

impl fmt::Display for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device CA's certificate, by its SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor(pub(in crate::hub) [u8; 32]);

/// What admitted a control session, a request or a side of a bridge: kept for as long as what it admitted lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// A key of the identity's own.
    Key(Secret),
    /// A certificate known by its thumbprint.
    Thumbprint(Thumbprint),
    /// A certificate that this one of the device CAs vouched for.
    Authority(Anchor),
    /// A key of a policy.
    Policy(Name, Secret),
}

impl Authentication {
    /// True if the record still asks for such a proof as `admission` is. Whether a device CA is in force is not the
    /// record's to judge; a policy's admission is not at all: false.
    pub fn accepts(&self, admission: &Admission) -> bool {
        match (self, admission) {
            (Self::Keys { primary, secondary }, Admission::Key(key)) => key == primary || key == secondary,
            (Self::SelfSigned { primary, secondary }, Admission::Thumbprint(given)) => {
                primary.as_ref() == Some(given) || secondary.as_ref() == Some(given)
            }
            (Self::Authority, Admission::Authority(_)) => true,
            (_, Admission::Key(_) | Admission::Thumbprint(_) | Admission::Authority(_) | Admission::Policy(..)) => {
                false
            }
        }
    }
}
