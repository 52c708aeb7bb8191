//! Identifiers, validated once, at the boundary where they enter.
//!
//! Owns the alphabets and lengths of every name in culvert. Does not know where a name is used.
//! Invariant: an identifier holds no byte that needs escaping in a log line, and is never `.` or `..`.

use std::{borrow::Borrow, fmt, str::FromStr};

/// Longest device or module ID in bytes: IoT Hub's documented limit.
const MAX_IOT_ID: usize = 128;
/// Longest name of our own (forward, target, policy) in bytes: long enough for `iothubclient_e2etest_<guid>`
/// (57), the longest stream name that an SDK's own tests use, so that a target can carry it.
const MAX_NAME: usize = 64;
/// Longest stream name in bytes. It travels in a URL and in an MQTT topic beside a URL of up to 1 KiB.
const MAX_STREAM_NAME: usize = 128;

/// Why a text is not an identifier. Display names the rule that was broken, never the whole text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text has no characters.
    #[error("{what} is empty")]
    Empty {
        /// Which kind of identifier.
        what: &'static str,
    },
    /// The text is longer than allowed.
    #[error("{what} is {len} bytes long; at most {max} are allowed")]
    TooLong {
        /// Which kind of identifier.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// A character outside the alphabet.
    #[error("{what} contains {found:?}; allowed are {allowed}")]
    Character {
        /// Which kind of identifier.
        what: &'static str,
        /// The first offending character.
        found: char,
        /// The alphabet, in words.
        allowed: &'static str,
    },
    /// `.` or `..`, which are paths, not names.
    #[error("{what} may not be \".\" or \"..\"")]
    Dots {
        /// Which kind of identifier.
        what: &'static str,
    },
}

struct Alphabet {
    what: &'static str,
    max: usize,
    allowed: &'static str,
    contains: fn(char) -> bool,
}

impl Alphabet {
    fn check(&self, text: &str) -> Result<(), IdError> {
        let what = self.what;
        if text.is_empty() {
            return Err(IdError::Empty { what });
        }
        if text.len() > self.max {
            return Err(IdError::TooLong { what, len: text.len(), max: self.max });
        }
        if let Some(found) = text.chars().find(|c| !(self.contains)(*c)) {
            return Err(IdError::Character { what, found, allowed: self.allowed });
        }
        if text == "." || text == ".." {
            return Err(IdError::Dots { what });
        }
        Ok(())
    }
}

fn in_iot_set(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-:.%_*?!(),=@;$'".contains(c)
}

fn in_name_set(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

/// `/ ? #` would end the URL's path segment, `+ #` are MQTT wildcards; controls and what breaks lines break log lines. The
/// plain space is no worse than a letter (wire.md, section a).
fn in_stream_set(c: char) -> bool {
    !c.is_control() && (c == ' ' || !c.is_whitespace()) && !"/?#+".contains(c)
}

const IOT_CHARACTERS: &str = "letters, digits and - : . % _ * ? ! ( ) , = @ ; $ '";

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $allowed:expr, $contains:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Alphabet { what: $what, max: $max, allowed: $allowed, contains: $contains }.check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

identifier!(
    /// A device's ID: IoT Hub's character set, case-sensitive, at most 128 bytes.
    DeviceId,
    "device ID",
    MAX_IOT_ID,
    IOT_CHARACTERS,
    in_iot_set
);
identifier!(
    /// A module's ID within its device: the same rules as [`DeviceId`].
    ModuleId,
    "module ID",
    MAX_IOT_ID,
    IOT_CHARACTERS,
    in_iot_set
);
identifier!(
    /// A name of our own: a forward, a target or a policy. `[A-Za-z0-9._-]{1,64}`.
    Name,
    "name",
    MAX_NAME,
    "letters, digits and . _ -",
    in_name_set
);
identifier!(
    /// A device stream's name as it stands in the service API's path and in the device's MQTT topic.
    StreamName,
    "stream name",
    MAX_STREAM_NAME,
    "printable characters except / ? # +",
    in_stream_set
);

impl From<&Name> for StreamName {
    /// Every name of ours is a valid stream name: its alphabet and length are smaller.
    fn from(name: &Name) -> Self {
        Self(name.0.clone())
    }
}

/// Who is at the far end of a control session: a device, or one of its modules.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The device.
    pub device: DeviceId,
    /// The module, if the identity is a module's.
    pub module: Option<ModuleId>,
}

impl Identity {
    /// The identity of a device itself.
    pub fn device(device: DeviceId) -> Self {
        Self { device, module: None }
    }
}

impl From<DeviceId> for Identity {
    fn from(device: DeviceId) -> Self {
        Self::device(device)
    }
}

impl fmt::Display for Identity {
    /// `device` or `device/module`, which is also the MQTT client ID.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.module {
            None => write!(f, "{}", self.device),
            Some(module) => write!(f, "{}/{module}", self.device),
        }
    }
}

impl FromStr for Identity {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.split_once('/') {
            None => Ok(Self::device(text.parse()?)),
            Some((device, module)) => Ok(Self { device: device.parse()?, module: Some(module.parse()?) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_ids_follow_the_iot_hub_alphabet() {
        for good in ["pump-17", "A:b.c%d_e*f?g!h(i)j,k=l@m;n$o'p", "...", &"x".repeat(128)] {
            assert_eq!(good.parse::<DeviceId>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "a+b", "a#b", "ä", "a\0", "a\n", "a>b", &"x".repeat(129)] {
            assert!(bad.parse::<DeviceId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_hold_an_sdk_test_stream_name() {
        let sdk = "iothubclient_e2etest_3f2504e0-4f89-11d3-9a0c-0305e82c3301";
        let name: Name = sdk.parse().unwrap();
        assert_eq!(StreamName::from(&name).as_str(), sdk);
        assert!("a:b".parse::<Name>().is_err());
    }

    #[test]
    fn stream_names_refuse_topic_and_url_syntax() {
        assert!("TestStream".parse::<StreamName>().is_ok() && "my stream".parse::<StreamName>().is_ok());
        for bad in ["a/b", "a?b", "a#b", "a+b", "a\u{a0}b", "a\u{2028}b", "a\u{7f}", "a\r\n", ".", ""] {
            assert!(bad.parse::<StreamName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_identity_is_written_as_an_mqtt_client_id() {
        let module: Identity = "pump-17/flow".parse().unwrap();
        assert_eq!(module.to_string(), "pump-17/flow");
        assert!("a/b/c".parse::<Identity>().is_err());
        assert!("a/".parse::<Identity>().is_err());
    }
}
