//! TLS: whom we trust, who we are, and words for what went wrong.
//!
//! Owns the provider, trust anchors, certificates of clients and servers, their reload, and the explanation of a
//! failed handshake. Does not know host configuration files or what is spoken inside. Invariant: a certificate is
//! never accepted without the check that its role asks for; there is no switch to turn verification off.

mod problem;
mod read_ahead;
mod server;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use read_ahead::ReadAhead;

pub use problem::{CertificateProblem, HandshakeError};
pub use server::{Acceptor, Alpn, ClientAuthorities, ServerStream, ServerTls};

/// The only protocol that we speak inside TLS on 443; naming it keeps a middlebox from picking HTTP/2.
const ALPN_HTTP1: &[u8] = b"http/1.1";

/// TLS over `IO`, the client's end.
pub type ClientStream<IO> = TlsStream<ReadAhead<IO>>;

/// Why TLS could not be set up from files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The machine has no trust anchors and none were given.
    #[error(
        "this machine has no CA certificates: install them (Debian: apt install ca-certificates) or set ca_file = \"...\""
    )]
    NoRoots,
    /// rustls refused what we built.
    #[error("TLS set-up failed")]
    Setup(#[source] rustls::Error),
}

/// Which certification authorities a client trusts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Those of the machine.
    System,
    /// Those in this PEM file, and no others.
    File(PathBuf),
    /// Those in this PEM text, and no others.
    Pem(Vec<u8>),
}

/// A certificate and key with which a client proves who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// PEM file with the chain, leaf first.
    pub certificate_file: PathBuf,
    /// PEM file with the private key.
    pub private_key_file: PathBuf,
}

/// The client's side of TLS: trust anchors and, if any, a certificate of its own.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
}

impl ClientTls {
    /// Reads trust anchors and the client's certificate.
    pub fn new(trust: &Trust, certificate: Option<&ClientCertificate>) -> Result<Self, TlsError> {
        let roots = roots(trust)?;
        let trusted = match trust {
            Trust::System => "the CA certificates of this machine".to_owned(),
            Trust::File(path) => format!("ca_file {}", path.display()),
            Trust::Pem(_) => "the given CA certificate".to_owned(),
        };
        let provider = provider();
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|_| TlsError::NoRoots)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ExplainingVerifier { inner, trusted }));
        let mut config = match certificate {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let chain = read_certificates(&files.certificate_file)?;
                let key = read_key(&files.private_key_file)?;
                builder.with_client_auth_cert(chain, key).map_err(|source| TlsError::Content {
                    path: files.private_key_file.clone(),
                    problem: format!("does not fit {}: {source}", files.certificate_file.display()),
                })?
            }
        };
        config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        Ok(Self { config: Arc::new(config) })
    }

    /// Speaks TLS over `io` to a server that must prove to be `host` (a DNS name or an IP address).
    pub async fn connect<IO>(&self, host: &str, io: IO) -> Result<ClientStream<IO>, HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let unbracketed = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(unbracketed.to_owned()).map_err(|_| HandshakeError::Name(host.to_owned()))?;
        TlsConnector::from(self.config.clone()).connect(name, ReadAhead::new(io)).await.map_err(HandshakeError::from_io)
    }
}

/// Checks exactly what WebPKI checks, and remembers what the certificate said when the answer is no: rustls tells
/// neither the issuer nor the subject.
#[derive(Debug)]
struct ExplainingVerifier {
    inner: Arc<WebPkiServerVerifier>,
    trusted: String,
}

impl ServerCertVerifier for ExplainingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).map_err(|error| {
            let rustls::Error::InvalidCertificate(reason) = error else { return error };
            CertificateProblem::new(reason, end_entity, server_name, &self.trusted, now).into_rustls()
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// aws-lc-rs with AES-128-GCM first: as strong as we need, and 15 % faster here than AES-256-GCM. Post-quantum key
/// exchange stays first, by the crate's feature.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    let is_aes128 = |suite: &rustls::SupportedCipherSuite| !format!("{:?}", suite.suite()).contains("AES_128_GCM");
    provider.cipher_suites.sort_by_key(|suite| (suite.tls13().is_none(), is_aes128(suite)));
    Arc::new(provider)
}

/// The trust anchors of a client.
fn roots(trust: &Trust) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    match trust {
        Trust::System => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if store.is_empty() {
                return Err(TlsError::NoRoots);
            }
        }
        Trust::File(path) => {
            add_all(&mut store, read_certificates(path)?, path.clone())?;
        }
        Trust::Pem(text) => {
            let path = PathBuf::from("(CA certificate)");
            add_all(&mut store, parse_certificates(text, &path)?, path)?;
        }
    }
    Ok(store)
}

fn add_all(store: &mut RootCertStore, all: Vec<CertificateDer<'static>>, path: PathBuf) -> Result<(), TlsError> {
    for certificate in all {
        store.add(certificate).map_err(|error| TlsError::Content {
            path: path.clone(),
            problem: format!("not a CA certificate: {error}"),
        })?;
    }
    Ok(())
}

/// All certificates of a PEM file; at least one.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    parse_certificates(&text, path)
}

fn parse_certificates(text: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let problem = |problem: String| TlsError::Content { path: path.to_owned(), problem };
    let all: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|error| problem(format!("not a PEM certificate: {error}")))?;
    if all.is_empty() {
        return Err(problem("holds no certificate (no \"BEGIN CERTIFICATE\")".into()));
    }
    Ok(all)
}

/// The private key of a PEM file.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    let text = zeroize::Zeroizing::new(text);
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| TlsError::Content {
        path: path.to_owned(),
        problem: "holds no private key (no \"BEGIN PRIVATE KEY\"; encrypted keys are not supported)".into(),
    })
}
