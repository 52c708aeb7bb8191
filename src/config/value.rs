//! The types that a TOML value can be read as.
//!
//! Owns the words for a value of the wrong type. Does not know keys. Invariant: a value that cannot be read leaves at
//! least one fault.

use std::{path::PathBuf, time::Duration};

use toml::{Spanned, de::DeValue};

use crate::base::{ByteSize, Span};

/// Something wrong inside a value.
pub(super) struct Fault {
    /// The offset in the file.
    pub(super) at: usize,
    pub(super) reason: String,
}

/// A type that a TOML value can be read as.
pub(super) trait FromValue: Sized {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self>;
}

fn fault<T>(value: &Spanned<DeValue<'_>>, reason: impl Into<String>, faults: &mut Vec<Fault>) -> Option<T> {
    faults.push(Fault { at: value.span().start, reason: reason.into() });
    None
}

impl FromValue for bool {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        value.get_ref().as_bool().or_else(|| fault(value, "must be true or false", faults))
    }
}

impl FromValue for String {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        match value.get_ref().as_str() {
            Some("") => fault(value, "is empty", faults),
            Some(text) => Some(text.into()),
            None => fault(value, format!("must be text in quotes, not {}", value.get_ref().type_str()), faults),
        }
    }
}

impl FromValue for PathBuf {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        String::from_value(value, faults).map(PathBuf::from)
    }
}

impl FromValue for usize {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        let number = value.get_ref().as_integer().and_then(|n| Self::from_str_radix(n.as_str(), n.radix()).ok());
        number.or_else(|| fault(value, "must be a whole number, not negative, without quotes", faults))
    }
}

impl FromValue for u32 {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        let number = usize::from_value(value, faults)?;
        Self::try_from(number).ok().or_else(|| fault(value, format!("must be at most {}", Self::MAX), faults))
    }
}

impl FromValue for Duration {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        match value.get_ref().as_str().map(str::parse::<Span>) {
            Some(Ok(span)) => Some(span.0),
            Some(Err(error)) => fault(value, error.to_string(), faults),
            None => fault(value, "must be a time span in quotes, like \"15s\", \"500ms\" or \"1h30m\"", faults),
        }
    }
}

impl FromValue for ByteSize {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        if value.get_ref().is_integer() {
            return usize::from_value(value, faults).map(|size| Self(size as u64));
        }
        match value.get_ref().as_str().map(str::parse) {
            Some(Ok(size)) => Some(size),
            Some(Err(error)) => {
                let error: crate::base::UnitError = error;
                fault(value, error.to_string(), faults)
            }
            None => fault(value, "must be a size like \"64KiB\" or \"8MiB\"", faults),
        }
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
        let Some(array) = value.get_ref().as_array() else {
            return fault(value, "must be a list, like [\"a\", \"b\"]", faults);
        };
        let items: Vec<Option<T>> = array.iter().map(|item| T::from_value(item, faults)).collect();
        items.into_iter().collect()
    }
}

/// Reads types that parse from text, with their own words for what is wrong.
macro_rules! from_text {
    ($($name:ty),* $(,)?) => {$(
        impl FromValue for $name {
            fn from_value(value: &Spanned<DeValue<'_>>, faults: &mut Vec<Fault>) -> Option<Self> {
                let text = String::from_value(value, faults)?;
                text.parse().map_err(|error: <Self as std::str::FromStr>::Err| {
                    faults.push(Fault { at: value.span().start, reason: error.to_string() });
                }).ok()
            }
        }
    )*};
}

from_text!(
    crate::base::Name,
    crate::base::DeviceId,
    crate::base::ModuleId,
    crate::auth::Rights,
    super::parts::ListenAddress,
    super::parts::LogFormat,
    super::service::ForwardMode,
    super::service::ConnectMode,
    super::hub::PublicUrl,
    super::hub::DevicePattern,
    SocketAddress,
);

/// A socket address with words of our own for what is wrong.
pub(super) struct SocketAddress(pub(super) std::net::SocketAddr);

impl std::str::FromStr for SocketAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let reason =
            || format!("{text:?} is not an IP address with a port; write it like \"0.0.0.0:443\" or \"[::]:443\"");
        text.parse().map(Self).map_err(|_| reason())
    }
}
