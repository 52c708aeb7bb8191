//! Shared access signatures, in every spelling that the SDKs produce (wire.md, section e).
//!
//! Owns parsing, signing and verifying of tokens, and the comparison of a token's resource with what it must
//! admit to. Does not know where keys come from. Invariant: [`Sas::verify`] is the one place that decides whether
//! a token is good, and it compares signatures in constant time.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sha2::Sha256;

use crate::base::{Identity, Name, Secret};

/// Longest token that is parsed, in bytes. IDs of 128 + 128 bytes, percent-encoded, with a host name of 255 fit twice.
pub const MAX_SAS: usize = 4096;
/// How far a peer's clock may be off, in seconds, before its token counts as expired: threats.md, row 21.
pub const CLOCK_SKEW: u64 = 300;

const PREFIX: &str = "SharedAccessSignature ";
/// `encodeURIComponent`'s unreserved set: what Node, C# and Python leave as it is.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why a text is not a SAS token. Never quotes the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SasError {
    /// Does not begin with `SharedAccessSignature `.
    #[error("the token does not begin with \"SharedAccessSignature \"")]
    Prefix,
    /// Longer than [`MAX_SAS`].
    #[error("the token is longer than {MAX_SAS} bytes")]
    TooLong,
    /// A field is missing.
    #[error("the token has no field \"{0}\"")]
    Missing(&'static str),
    /// A field appears twice.
    #[error("the token has the field \"{0}\" twice")]
    Twice(&'static str),
    /// A field has a value that cannot be read.
    #[error("the token's field \"{0}\" cannot be read")]
    Field(&'static str),
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Its time is over, by more than the tolerated clock skew.
    #[error("the token expired {seconds_ago} s ago")]
    Expired {
        /// Seconds since its expiry.
        seconds_ago: u64,
    },
    /// No key that was tried made this signature.
    #[error("the token's signature is not by a key of this identity")]
    Signature,
}

/// A parsed token, not yet verified.
#[derive(Debug, Clone)]
pub struct Sas {
    resource_text: String,
    /// Percent-decoded; as it stands if that is no text.
    resource: String,
    signature: Vec<u8>,
    expiry_text: String,
    expiry: u64,
    policy: Option<Name>,
}

impl Sas {
    /// Parses a token. Fields may stand in any order; unknown fields are ignored.
    pub fn parse(token: &str) -> Result<Self, SasError> {
        if token.len() > MAX_SAS {
            return Err(SasError::TooLong);
        }
        let fields = Fields::split(token.strip_prefix(PREFIX).ok_or(SasError::Prefix)?)?;
        let resource_text = fields.resource.ok_or(SasError::Missing("sr"))?;
        let signature_text = fields.signature.ok_or(SasError::Missing("sig"))?;
        let expiry_text = fields.expiry.ok_or(SasError::Missing("se"))?;
        // Rust's own parser takes a plus sign.
        let digits = expiry_text.bytes().all(|byte| byte.is_ascii_digit());
        let expiry = expiry_text.parse().ok().filter(|_| digits);
        let policy = fields.policy.map(|skn| skn.parse().map_err(|_| SasError::Field("skn"))).transpose()?;
        Ok(Self {
            resource: decode(resource_text).unwrap_or_else(|| resource_text.into()),
            resource_text: resource_text.into(),
            signature: decode(signature_text)
                .and_then(|text| STANDARD.decode(text).ok())
                .ok_or(SasError::Field("sig"))?,
            expiry: expiry.ok_or(SasError::Field("se"))?,
            expiry_text: expiry_text.into(),
            policy,
        })
    }

    /// The resource, percent-decoded: `host`, `host/devices/ID` or `host/devices/ID/modules/ID`.
    pub fn resource(&self) -> &str {
        &self.resource
    }

    /// The policy that signed (`skn`), if it was not a device's or module's own key.
    pub fn policy(&self) -> Option<&Name> {
        self.policy.as_ref()
    }

    /// When the token ends, in Unix seconds.
    pub fn expiry(&self) -> u64 {
        self.expiry
    }

    /// Accepts the token if one of `keys` signed it and it has not expired. All keys are tried in every case, so
    /// that the time taken tells nothing.
    pub fn verify(&self, keys: &[&Secret], now: u64) -> Result<(), VerifyError> {
        let mut good = subtle::Choice::from(0);
        for key in keys {
            let made = mac(&self.resource_text, &self.expiry_text, key);
            good |= subtle::ConstantTimeEq::ct_eq(made.as_slice(), self.signature.as_slice());
        }
        if !bool::from(good) {
            return Err(VerifyError::Signature);
        }
        if now > self.expiry.saturating_add(CLOCK_SKEW) {
            return Err(VerifyError::Expired { seconds_ago: now - self.expiry });
        }
        Ok(())
    }

    /// True if the resource covers the device or module at `host`: its own path or a prefix of it by whole
    /// segments (`/devices/a` does not cover `/devices/ab`). The host is compared without regard to case. The text
    /// counts as it stands, too: C and Node do not encode it, and the ID may hold `%41`.
    pub fn covers(&self, host: &str, identity: &Identity) -> bool {
        [&self.resource, &self.resource_text].into_iter().any(|resource| covers(resource, host, identity))
    }

    /// True if the resource is the whole hub.
    pub fn covers_hub(&self, host: &str) -> bool {
        below(&self.resource, host).is_some_and(|rest| rest.trim_matches('/').is_empty())
    }
}

fn covers(resource: &str, host: &str, identity: &Identity) -> bool {
    let Some(rest) = below(resource, host) else { return false };
    let mut given = rest.split('/').filter(|segment| !segment.is_empty());
    let module = identity.module.as_ref().map(|module| module.as_str());
    let device = identity.device.as_str();
    let wanted = ["devices", device].into_iter().chain(module.into_iter().flat_map(|id| ["modules", id]));
    let mut wanted = wanted;
    given.all(|segment| wanted.next() == Some(segment))
}

/// What follows the host name in a resource, if the host is this one.
fn below<'a>(resource: &'a str, host: &str) -> Option<&'a str> {
    let (given, rest) = resource.split_at(resource.find('/').unwrap_or(resource.len()));
    given.eq_ignore_ascii_case(host).then_some(rest)
}

/// Signs a token for `resource` (unencoded) that ends at `expiry` (Unix seconds). `policy` is named in `skn`
/// unless the key is a device's or module's own. The text is spelled as Python's and C#'s SDKs spell it.
pub fn sign(resource: &str, key: &Secret, expiry: u64, policy: Option<&Name>) -> Secret {
    let resource = utf8_percent_encode(resource, COMPONENT).to_string();
    let expiry = expiry.to_string();
    let signature = STANDARD.encode(mac(&resource, &expiry, key));
    let signature = utf8_percent_encode(&signature, COMPONENT);
    let skn = policy.map(|name| format!("&skn={name}")).unwrap_or_default();
    Secret::new(format!("{PREFIX}sr={resource}&sig={signature}&se={expiry}{skn}"))
}

/// The resource of a device or module at `host`.
pub fn device_resource(host: &str, identity: &Identity) -> String {
    match &identity.module {
        None => format!("{host}/devices/{}", identity.device),
        Some(module) => format!("{host}/devices/{}/modules/{module}", identity.device),
    }
}

fn mac(resource: &str, expiry: &str, key: &Secret) -> [u8; 32] {
    #[cfg(test)]
    tests::MACS.set(tests::MACS.get() + 1);
    // HMAC takes a key of any length (RFC 2104), so this cannot fail.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key.expose()) else { return [0; 32] };
    mac.update(resource.as_bytes());
    mac.update(b"\n");
    mac.update(expiry.as_bytes());
    mac.finalize().into_bytes().into()
}

fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

#[derive(Default)]
struct Fields<'a> {
    resource: Option<&'a str>,
    signature: Option<&'a str>,
    expiry: Option<&'a str>,
    policy: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn split(text: &'a str) -> Result<Self, SasError> {
        let mut fields = Self::default();
        for pair in text.split('&') {
            let Some((name, value)) = pair.split_once('=') else { continue };
            let (slot, name) = match name {
                "sr" => (&mut fields.resource, "sr"),
                "sig" => (&mut fields.signature, "sig"),
                "se" => (&mut fields.expiry, "se"),
                "skn" => (&mut fields.policy, "skn"),
                _ => continue,
            };
            if slot.is_some() {
                return Err(SasError::Twice(name));
            }
            // Device SDKs may write an empty "skn=".
            *slot = (name != "skn" || !value.is_empty()).then_some(value);
        }
        Ok(fields)
    }
}

/// Any bytes as a token: it is refused, or its parts can be used. For fuzzers.
///
/// # Panics
/// If a token that was never signed verifies.
pub fn fuzz_sas(data: &[u8]) {
    let Ok(sas) = Sas::parse(&String::from_utf8_lossy(data)) else { return };
    let keys = [&Secret::new([1; 32]), &Secret::new([2; 32])];
    assert!(sas.verify(&keys, sas.expiry()).is_err(), "nobody signed this");
    sas.covers_hub("hub.example.com");
}

/// How many signatures this thread has made so far: what a refusal costs can be counted, while its time cannot be
/// asserted.
#[cfg(test)]
pub(crate) fn macs_made() -> usize {
    tests::MACS.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local!(pub(super) static MACS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });

    const HOST: &str = "hub.example.com";

    fn key() -> Secret {
        Secret::new([0x17; 32])
    }

    fn device(text: &str) -> Identity {
        text.parse().unwrap()
    }

    /// The C device SDK: order `sr,sig,se`, resource literal, lower-case hex in the signature.
    fn as_c_writes(resource: &str, expiry: u64) -> String {
        let sig = STANDARD.encode(mac(resource, &expiry.to_string(), &key()));
        let sig = sig.replace('+', "%2b").replace('/', "%2f").replace('=', "%3d");
        format!("SharedAccessSignature sr={resource}&sig={sig}&se={expiry}")
    }

    #[test]
    fn every_spelling_of_the_sdks_is_verified() {
        let resource = format!("{HOST}/devices/pump-17");
        let python = sign(&resource, &key(), 2000, None);
        let csharp = sign(HOST, &key(), 2000, Some(&"service".parse().unwrap()));
        for token in [as_c_writes(&resource, 2000).as_str(), python.expose_str().unwrap(), csharp.expose_str().unwrap()]
        {
            let sas = Sas::parse(token).unwrap();
            assert_eq!(sas.verify(&[&Secret::new([1; 32]), &key()], 1000), Ok(()), "{token}");
            assert_eq!(sas.verify(&[&Secret::new([1; 32])], 1000), Err(VerifyError::Signature));
        }
        let reordered = "SharedAccessSignature skn=service&se=2000&sr=hub.example.com&sig=";
        let sig = csharp.expose_str().unwrap().split("sig=").nth(1).unwrap().split('&').next().unwrap();
        let sas = Sas::parse(&format!("{reordered}{sig}")).unwrap();
        assert_eq!(sas.verify(&[&key()], 1000), Ok(()));
        assert_eq!(sas.policy().unwrap().as_str(), "service");
    }

    #[test]
    fn expiry_tolerates_five_minutes_of_skew_and_no_more() {
        let token = sign(HOST, &key(), 1000, None);
        let sas = Sas::parse(token.expose_str().unwrap()).unwrap();
        assert_eq!(sas.verify(&[&key()], 1000 + CLOCK_SKEW), Ok(()));
        assert_eq!(sas.verify(&[&key()], 1001 + CLOCK_SKEW), Err(VerifyError::Expired { seconds_ago: 301 }));
    }

    #[test]
    fn scope_is_compared_by_whole_segments() {
        let sas = |resource: &str| {
            let token = sign(resource, &key(), 1, None);
            Sas::parse(token.expose_str().unwrap()).unwrap()
        };
        let a = sas("HUB.example.com/devices/a");
        assert!(a.covers(HOST, &device("a")) && a.covers(HOST, &device("a/m")));
        assert!(!a.covers(HOST, &device("ab")) && !a.covers(HOST, &device("A")) && !a.covers_hub(HOST));
        let module = sas("hub.example.com/devices/a/modules/m");
        assert!(module.covers(HOST, &device("a/m")) && !module.covers(HOST, &device("a")));
        let whole = sas("hub.example.com");
        assert!(whole.covers_hub(HOST) && whole.covers(HOST, &device("a")));
        assert!(!sas("hub.example.com.evil").covers_hub(HOST));
        assert!(!sas("hub.example.com/devicesX/a").covers(HOST, &device("a")));
    }

    #[test]
    fn an_id_that_looks_encoded_is_covered_in_either_spelling() {
        for id in ["p%41", "p%ff", "100%", "a%2Fb", "a%2525"] {
            let literal = Sas::parse(&as_c_writes(&format!("{HOST}/devices/{id}"), 2000)).unwrap();
            let encoded = sign(&format!("{HOST}/devices/{id}"), &key(), 2000, None);
            let encoded = Sas::parse(encoded.expose_str().unwrap()).unwrap();
            for sas in [literal, encoded] {
                assert!(sas.covers(HOST, &device(id)) && !sas.covers(HOST, &device("p")), "{id}");
                assert_eq!(sas.verify(&[&key()], 1000), Ok(()));
            }
        }
    }

    #[test]
    fn nonsense_is_named_without_being_quoted() {
        for (token, error) in [
            ("", SasError::Prefix),
            ("SharedAccessSignature ", SasError::Missing("sr")),
            ("SharedAccessSignature sr=a&sig=QQ%3D%3D", SasError::Missing("se")),
            ("SharedAccessSignature sr=a&sr=b&sig=&se=1", SasError::Twice("sr")),
            ("SharedAccessSignature sr=a&sig=%%%&se=1", SasError::Field("sig")),
            ("SharedAccessSignature sr=a&sig=QQ==&se=-1", SasError::Field("se")),
            ("SharedAccessSignature sr=a&sig=QQ==&se=+1", SasError::Field("se")),
            ("SharedAccessSignature sr=a&sig=QQ==&se=1&skn=a/b", SasError::Field("skn")),
        ] {
            assert_eq!(Sas::parse(token).unwrap_err(), error, "{token}");
        }
        assert_eq!(Sas::parse(&"x".repeat(MAX_SAS + 1)).unwrap_err(), SasError::TooLong);
    }
}
