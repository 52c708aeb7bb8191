//! Certificates for tests: a fresh authority per test, and servers that it vouches for. And what TLS does when the
//! kernel takes nothing.

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{ClientCertificate, ClientTls, ServerTls, Trust};

/// A certification authority, and a folder for the files that it issues.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("culvert test CA")
    }

    pub(crate) fn named(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-tls-{}", getrandom::u64().unwrap()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = common_name(name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, folder }
    }

    /// A client's TLS that trusts this authority only.
    pub(crate) fn client(&self) -> ClientTls {
        ClientTls::new(&Trust::Pem(self.pem().into()), None).unwrap()
    }

    pub(crate) fn pem(&self) -> String {
        AsRef::<rcgen::Certificate>::as_ref(&self.issuer).pem()
    }

    /// Writes the authority's certificate to a file.
    pub(crate) fn file(&self) -> PathBuf {
        let path = self.folder.join("ca.pem");
        std::fs::write(&path, self.pem()).unwrap();
        path
    }

    /// A server certificate for these names.
    pub(crate) fn server(&self, names: &[&str]) -> ServerTls {
        let files = self.issue(names, |_| {});
        ServerTls::load(&files.certificate_file, &files.private_key_file).unwrap()
    }

    /// A certificate and its key, in files that the next call overwrites.
    pub(crate) fn issue(&self, names: &[&str], adjust: impl FnOnce(&mut CertificateParams)) -> ClientCertificate {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = common_name("test leaf");
        adjust(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        self.write(&certificate.pem(), &key.serialize_pem())
    }

    /// A certificate that vouches for itself.
    pub(crate) fn self_signed(&self, names: &[&str]) -> ClientCertificate {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        self.write(&made.cert.pem(), &made.signing_key.serialize_pem())
    }

    fn write(&self, certificate: &str, key: &str) -> ClientCertificate {
        let certificate_file = self.folder.join("leaf.pem");
        let private_key_file = self.folder.join("leaf.key");
        std::fs::write(&certificate_file, certificate).unwrap();
        std::fs::write(&private_key_file, key).unwrap();
        ClientCertificate { certificate_file, private_key_file }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// TLS above a kernel that takes nothing: whatever is written is held, a flush waits for ever, nothing comes.
#[derive(Debug, Default)]
pub(crate) struct Hoard {
    /// Bytes taken so far, which all wait.
    pub held: usize,
}

impl AsyncRead for Hoard {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Hoard {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.held += bytes.len();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}
