//! The rights that a shared access policy grants.
//!
//! Owns the names of the rights and the five policies every IoT Hub has. Does not know keys.
//! Invariant: a set of rights prints in one order only.

use std::{fmt, str::FromStr};

/// A set of rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rights(u8);

/// Every right with the name it has in IoT Hub's policies.
const NAMES: [(&str, Rights); 4] = [
    ("RegistryRead", Rights::REGISTRY_READ),
    ("RegistryWrite", Rights::REGISTRY_WRITE),
    ("ServiceConnect", Rights::SERVICE_CONNECT),
    ("DeviceConnect", Rights::DEVICE_CONNECT),
];

/// The policies that every IoT Hub is created with, and their rights. Source: IoT Hub documentation, "Access
/// control and permissions".
pub const STANDARD_POLICIES: [(&str, &[Rights]); 5] = [
    ("iothubowner", &[Rights::REGISTRY_READ, Rights::REGISTRY_WRITE, Rights::SERVICE_CONNECT, Rights::DEVICE_CONNECT]),
    ("service", &[Rights::SERVICE_CONNECT]),
    ("device", &[Rights::DEVICE_CONNECT]),
    ("registryRead", &[Rights::REGISTRY_READ]),
    ("registryReadWrite", &[Rights::REGISTRY_READ, Rights::REGISTRY_WRITE]),
];

/// Not the name of a right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a right; the rights are RegistryRead, RegistryWrite, ServiceConnect and DeviceConnect")]
pub struct RightError(String);

impl Rights {
    /// No rights.
    pub const NONE: Self = Self(0);
    /// May read device identities.
    pub const REGISTRY_READ: Self = Self(1);
    /// May create, change and remove device identities.
    pub const REGISTRY_WRITE: Self = Self(2);
    /// May open device streams.
    pub const SERVICE_CONNECT: Self = Self(4);
    /// May connect as any device.
    pub const DEVICE_CONNECT: Self = Self(8);

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// True if every right of `needed` is in this set.
    pub const fn include(self, needed: Self) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// Collects single rights.
    pub fn union(rights: &[Self]) -> Self {
        rights.iter().fold(Self::NONE, |sum, right| sum.with(*right))
    }
}

impl FromStr for Rights {
    type Err = RightError;

    /// One right by its name.
    fn from_str(text: &str) -> Result<Self, RightError> {
        NAMES.iter().find(|(name, _)| *name == text).map(|(_, right)| *right).ok_or_else(|| RightError(text.into()))
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held: Vec<&str> = NAMES.iter().filter(|(_, right)| self.include(*right)).map(|(name, _)| *name).collect();
        f.write_str(if held.is_empty() { "none" } else { "" })?;
        f.write_str(&held.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_may_do_everything_and_the_service_policy_one_thing() {
        let rights_of = |policy| Rights::union(STANDARD_POLICIES.iter().find(|(name, _)| *name == policy).unwrap().1);
        assert!(rights_of("iothubowner").include("RegistryWrite".parse().unwrap()));
        assert!(!rights_of("service").include(Rights::REGISTRY_READ));
        assert_eq!(rights_of("registryReadWrite").to_string(), "RegistryRead, RegistryWrite");
        assert!("Everything".parse::<Rights>().is_err());
    }
}
