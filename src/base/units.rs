//! Human units in configuration files: `"15s"`, `"1h30m"`, `"32MiB"`.
//!
//! Owns the spelling of times and sizes. Does not know what they limit.
//! Invariant: printing a value and parsing it again yields the same value.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Why a text is not a time or a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a time span.
    #[error("{0:?} is not a time span; write it like \"15s\", \"500ms\" or \"1h30m\"")]
    Span(String),
    /// Not a byte size.
    #[error("{0:?} is not a size; write it like \"64KiB\", \"8MiB\" or \"4096\"")]
    Size(String),
}

/// A span of time, written `"500ms"`, `"15s"`, `"10m"`, `"1h30m"`, `"7d"`. A bare number is refused: seconds
/// and milliseconds look alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

/// A size in bytes, written `"4096"`, `"64KiB"`, `"8MiB"`, `"1GiB"` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Milliseconds per unit, largest first, as printed.
const SPAN_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
/// Bytes per unit, largest first, as printed.
const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Span {
    /// A span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError::Span(text.into());
        let mut rest = text.trim();
        let mut total: u64 = 0;
        while !rest.is_empty() {
            let (number, unit, after) = split_number_and_unit(rest).ok_or_else(error)?;
            let (_, scale) = SPAN_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?;
            total = number.checked_mul(*scale).and_then(|ms| total.checked_add(ms)).ok_or_else(error)?;
            rest = after;
        }
        if text.trim().is_empty() {
            return Err(error());
        }
        Ok(Self(Duration::from_millis(total)))
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError::Size(text.into());
        let trimmed = text.trim();
        if let Ok(bytes) = trimmed.parse() {
            return Ok(Self(bytes));
        }
        let (number, unit, rest) = split_number_and_unit(trimmed).ok_or_else(error)?;
        let (_, scale) = SIZE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?;
        if !rest.is_empty() {
            return Err(error());
        }
        number.checked_mul(*scale).map(Self).ok_or_else(error)
    }
}

/// `"90m10s"` → `(90, "m", "10s")`.
fn split_number_and_unit(text: &str) -> Option<(u64, &str, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, rest) = text.split_at(digits);
    let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
    let (unit, after) = rest.split_at(letters);
    Some((number.parse().ok()?, unit, after))
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if left == 0 {
            return f.write_str("0s");
        }
        for (unit, scale) in SPAN_UNITS {
            if left >= scale {
                write!(f, "{}{unit}", left / scale)?;
                left %= scale;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) =
            SIZE_UNITS.iter().find(|(_, scale)| self.0 >= *scale && self.0.is_multiple_of(*scale)).unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / scale)
    }
}

macro_rules! serde_by_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(D::Error::custom)
            }
        }
    };
}

serde_by_text!(Span);
serde_by_text!(ByteSize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_survive_a_round_trip() {
        for (text, ms) in [("15s", 15_000), ("500ms", 500), ("1h30m", 5_400_000), ("7d", 604_800_000), ("0s", 0)] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.0, Duration::from_millis(ms), "{text}");
            assert_eq!(span.to_string(), text);
        }
        for bad in ["", "15", "s", "1x", "-1s", "1.5s", "99999999999999999999d", "18446744073709551615d"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_survive_a_round_trip() {
        for (text, bytes) in [("64KiB", 65_536), ("8MiB", 8 << 20), ("1GiB", 1 << 30), ("5B", 5)] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.0, bytes, "{text}");
            assert_eq!(size.to_string(), text);
        }
        assert_eq!("4096".parse::<ByteSize>().unwrap().to_string(), "4KiB");
        for bad in ["", "KiB", "1KB", "1KiB2", "99999999999GiB"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }
}
