//! The authorities in force that vouch for devices' certificates.
//!
//! Owns the reading of `client_ca`, and which of its certificates vouched for a device. Does not know records or
//! sessions. Invariant: an [`Anchor`] names one certificate of one authority, whatever else the file holds: a file that
//! gains or loses another one changes nothing for those it vouched for.

use rustls_pki_types::CertificateDer;
use sha2::Digest as _;

use super::record::Anchor;
use crate::{config::HubConfig, transport::tls::ClientAuthorities};

/// The authorities of a configuration.
#[derive(Debug, Default)]
pub(in crate::hub) struct Authorities(Vec<(Anchor, ClientAuthorities)>);

impl Authorities {
    /// Those of `client_ca`. A file that cannot be read holds none; whoever reads a configuration has said so.
    pub(in crate::hub) fn of(config: &HubConfig) -> Self {
        let Some(file) = &config.client_ca else { return Self::default() };
        let all = ClientAuthorities::each_from_pem(&file.contents, &file.path).unwrap_or_default();
        let anchor = |certificate: CertificateDer<'_>| Anchor(sha2::Sha256::digest(&certificate).into());
        Self(all.into_iter().map(|(certificate, authority)| (anchor(certificate), authority)).collect())
    }

    /// The first that vouches for the chain, if one does now.
    pub(in crate::hub) fn vouching_for(&self, chain: &[CertificateDer<'_>]) -> Option<Anchor> {
        self.0.iter().find(|(_, authority)| authority.vouch_for(chain)).map(|(anchor, _)| *anchor)
    }

    /// True while it is in force.
    pub(in crate::hub) fn include(&self, anchor: Anchor) -> bool {
        self.0.iter().any(|(known, _)| *known == anchor)
    }
}
