//! A small certification authority for hubs that have no certificate of their own.
//!
//! Owns the shape and lifetime of the certificates that culvert makes. Does not know where they are kept.
//! Invariant: a certificate made here is for servers only, and its authority signs nothing below another authority.

use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::base::{Secret, Utc};

/// The authority lives this many years: every device must be given its successor by hand.
const CA_YEARS: u64 = 20;
/// A hub's certificate lives this many days: the most that Apple's systems accept from a private authority.
const HUB_DAYS: u64 = 825;
/// Certificates are valid from so many days ago, for devices whose clocks are behind.
const BACKDATED_DAYS: u64 = 2;
/// Longest common name, from X.509's upper bounds.
const MAX_COMMON_NAME: usize = 64;

const DAY_MS: u64 = 86_400_000;

/// A certificate and its private key, both PEM.
pub(super) struct Pair {
    pub(super) certificate: String,
    pub(super) key: Secret,
}

/// Makes an authority whose name nobody else has.
pub(super) fn authority() -> anyhow::Result<Pair> {
    let mut random = [0; 4];
    getrandom::fill(&mut random)?;
    let name = format!("culvert CA {:08x}", u32::from_be_bytes(random));
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = authority_params(&name, CA_YEARS * 365).self_signed(&key)?;
    Ok(Pair { certificate: certificate.pem(), key: Secret::new(key.serialize_pem()) })
}

/// Makes a certificate for a server of these names (or addresses), the first of which it is called by.
pub(super) fn server(authority: &Pair, names: &[String]) -> anyhow::Result<Pair> {
    let ca_key = KeyPair::from_pem(authority.key.expose_str().unwrap_or_default())?;
    let ca_name = Described::read(&authority.certificate)?.common_name;
    let issuer = Issuer::new(authority_params(&ca_name, CA_YEARS * 365), ca_key);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(names)?;
    let name = names.first().filter(|name| name.len() <= MAX_COMMON_NAME).map_or("culvert hub", String::as_str);
    set_name_and_lifetime(&mut params, name, HUB_DAYS);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer)?;
    Ok(Pair { certificate: certificate.pem(), key: Secret::new(key.serialize_pem()) })
}

/// The names that a server's certificate is for, in their order.
pub(super) fn names_of(certificate: &str) -> anyhow::Result<Vec<String>> {
    Ok(Described::read(certificate)?.names)
}

fn authority_params(name: &str, days: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    set_name_and_lifetime(&mut params, name, days);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn set_name_and_lifetime(params: &mut CertificateParams, name: &str, days: u64) {
    let now = Utc::from(SystemTime::now());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let day = |at: u64| {
        let (year, month, day) = calendar(Utc(at));
        rcgen::date_time_ymd(year, month, day)
    };
    params.not_before = day(now.0.saturating_sub(BACKDATED_DAYS * DAY_MS));
    params.not_after = day(now.0.saturating_add(days * DAY_MS));
}

/// Year, month and day, as `rcgen` wants them.
fn calendar(at: Utc) -> (i32, u8, u8) {
    let text = at.to_string();
    let mut fields = text.split(['-', 'T']).map_while(|field| field.parse::<u16>().ok());
    let mut next = || fields.next().unwrap_or(1);
    let (year, month, day) = (next(), next(), next());
    (i32::from(year), u8::try_from(month).unwrap_or(1), u8::try_from(day).unwrap_or(1))
}

/// What a certificate says about itself.
struct Described {
    common_name: String,
    names: Vec<String>,
}

impl Described {
    fn read(pem: &str) -> anyhow::Result<Self> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes())?;
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&der)?;
        let common_name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let names = certificate.subject_alternative_name()?.map_or(&[][..], |extension| &extension.value.general_names);
        Ok(Self {
            common_name: common_name.unwrap_or_default().to_owned(),
            names: names.iter().filter_map(name_text).collect(),
        })
    }
}

fn name_text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => Some(std::net::IpAddr::from(<[u8; 4]>::try_from(*bytes).ok()?).to_string()),
            _ => Some(std::net::IpAddr::from(<[u8; 16]>::try_from(*bytes).ok()?).to_string()),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_certificate_is_for_its_names_and_is_signed_by_its_authority() {
        let authority = authority().unwrap();
        let names = ["hub.example.com".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let hub = server(&authority, &names).unwrap();
        assert_eq!(names_of(&hub.certificate).unwrap(), names);

        let der = CertificateDer::from_pem_slice(hub.certificate.as_bytes()).unwrap();
        let ca_der = CertificateDer::from_pem_slice(authority.certificate.as_bytes()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca_der).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
        for name in &names {
            use rustls::client::danger::ServerCertVerifier as _;
            let name = rustls_pki_types::ServerName::try_from(name.as_str()).unwrap();
            verifier.verify_server_cert(&der, &[], &name, &[], rustls_pki_types::UnixTime::now()).unwrap();
        }
    }
}
