//! The server's side of TLS: its certificate, which can be exchanged while it runs, and certificates of clients.
//!
//! Owns the live certificate and the check of client certificates. Does not know which device a client certificate
//! stands for: the caller asks the registry. Invariant: a certificate that does not fit its key is never installed.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    server::{
        ClientHello, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

use super::{
    ALPN_HTTP1, CertificateProblem, ReadAhead, TlsError, add_all, parse_certificates, problem::not_after, provider,
    read_certificates, read_key,
};

/// What a listener says about the protocol inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/1.1 (a client that names no protocol is served too).
    Http,
    /// Nothing: MQTT clients name no protocol, or one that nobody standardised.
    Unspoken,
}

/// TLS over `IO`, the server's end.
pub type ServerStream<IO> = TlsStream<ReadAhead<IO>>;

/// Makes TLS of accepted connections.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// The handshake over `io`.
    pub fn accept<IO: AsyncRead + AsyncWrite + Unpin>(&self, io: IO) -> Accept<ReadAhead<IO>> {
        self.0.accept(ReadAhead::new(io))
    }
}

/// A server certificate from files, exchangeable while connections run. Clones share it.
#[derive(Clone, Debug)]
pub struct ServerTls {
    live: Arc<LiveCertificate>,
}

impl ServerTls {
    /// Reads a certificate chain (leaf first) and its key from PEM files.
    pub fn load(certificate_file: &Path, private_key_file: &Path) -> Result<Self, TlsError> {
        let key = read_certified_key(certificate_file, private_key_file)?;
        Ok(Self { live: Arc::new(LiveCertificate(RwLock::new(Arc::new(key)))) })
    }

    /// Reads these files, the same as before or others. New connections get the new certificate; on an error nothing
    /// changes. True if the certificate is another one than before.
    pub fn reload(&self, certificate_file: &Path, private_key_file: &Path) -> Result<bool, TlsError> {
        let key = Arc::new(read_certified_key(certificate_file, private_key_file)?);
        let mut live = self.live.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let changed = live.cert != key.cert;
        *live = key;
        Ok(changed)
    }

    /// The live certificate's leaf.
    pub fn leaf(&self) -> CertificateDer<'static> {
        let live = self.live.current();
        // `read_certified_key` refuses an empty chain.
        live.cert.first().cloned().unwrap_or_else(|| CertificateDer::from(Vec::new()))
    }

    /// When the live certificate ends, in seconds since 1970.
    pub fn not_after(&self) -> Option<i64> {
        not_after(&self.leaf())
    }

    /// What clients that come to `host` will find wrong with the live certificate, now or before long, by this machine's
    /// clock, if anything, in words for who runs the server.
    pub fn complaint(&self, host: &str) -> Option<String> {
        let (leaf, now) = (self.leaf(), UnixTime::now());
        let host = ServerName::try_from(host.to_owned()).ok()?;
        match CertificateProblem::of_own(&leaf, &host, now) {
            Some(problem) => {
                Some(format!("devices and services that connect directly will refuse this hub: {problem}"))
            }
            None => CertificateProblem::ahead_of_expiry(&leaf, &host, now),
        }
    }

    /// An acceptor that asks clients for a certificate, takes any, and none. The handshake proves that the client
    /// holds the certificate's key; whom it stands for is the caller's question
    /// (`tokio_rustls::server::TlsStream::get_ref().1.peer_certificates()`).
    pub fn acceptor(&self, alpn: Alpn) -> Result<Acceptor, TlsError> {
        let provider = provider();
        let any = Arc::new(AnyClient(provider.signature_verification_algorithms));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(any)
            .with_cert_resolver(self.live.clone());
        // A ticket would be the first thing that an accepted client has to read, and it comes while the client writes its
        // request: programs that read and write one OpenSSL connection from two threads (Python's `websockets.sync`
        // does) lose the request then, and one that closes without reading resets what it wrote last. A session that
        // is resumed saves no round trip in TLS 1.3, only the certificate.
        config.send_tls13_tickets = 0;
        if alpn == Alpn::Http {
            config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        }
        Ok(Acceptor(TlsAcceptor::from(Arc::new(config))))
    }
}

fn read_certified_key(certificate_file: &Path, private_key_file: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = read_certificates(certificate_file)?;
    let key = read_key(private_key_file)?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|source| TlsError::Content {
        path: private_key_file.to_owned(),
        problem: format!("does not fit {}: {source}", certificate_file.display()),
    })
}

/// The certificate that new connections get.
#[derive(Debug)]
struct LiveCertificate(RwLock<Arc<CertifiedKey>>);

impl LiveCertificate {
    fn current(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

/// Takes every client certificate whose key the client holds, and clients without one. Thumbprints of self-signed
/// certificates and authorities both are the registry's business, after the handshake.
#[derive(Debug)]
struct AnyClient(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// The authorities whose client certificates are accepted for devices registered as CA-signed.
#[derive(Clone, Debug)]
pub struct ClientAuthorities(Arc<dyn ClientCertVerifier>);

impl ClientAuthorities {
    /// Reads the authorities from a PEM file.
    pub fn load(ca_file: PathBuf) -> Result<Self, TlsError> {
        Self::new(read_certificates(&ca_file)?, ca_file)
    }

    /// The authorities in PEM text; `path` says in messages where it came from.
    pub fn from_pem(text: &[u8], path: &Path) -> Result<Self, TlsError> {
        Self::new(parse_certificates(text, path)?, path.to_owned())
    }

    /// Each authority in PEM text by itself, beside its certificate.
    pub fn each_from_pem(text: &[u8], path: &Path) -> Result<Vec<(CertificateDer<'static>, Self)>, TlsError> {
        let certificates = parse_certificates(text, path)?.into_iter();
        let each = certificates.map(|one| Self::new(vec![one.clone()], path.to_owned()).map(|this| (one, this)));
        each.collect()
    }

    fn new(certificates: Vec<CertificateDer<'static>>, path: PathBuf) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        add_all(&mut roots, certificates, path)?;
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map(Self)
            .map_err(|_| TlsError::NoRoots)
    }

    /// True if the chain (leaf first, as the handshake yielded it) leads to one of the authorities and is valid now.
    pub fn vouch_for(&self, chain: &[CertificateDer<'_>]) -> bool {
        let Some((leaf, intermediates)) = chain.split_first() else { return false };
        self.0.verify_client_cert(leaf, intermediates, UnixTime::now()).is_ok()
    }
}
