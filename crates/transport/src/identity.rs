//! What a host proves itself with, and whom it believes: a certificate with its key, and the authorities whose certificates it takes
//! from the other side. TLS 1.3 only, no resumption: each connection is proved anew.
//!
//! Everything is checked when it is loaded, our own certificate as the peer will check it: a mistake is found when a
//! receiver starts, not when a guest should move.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::client::{danger as client_danger, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};

use crate::greeting;
use crate::{Error, Result};

/// No file of certificates is longer, a bundle of all public authorities included.
const MAX_FILE: u64 = 1 << 20;

/// Which end of a connection, as certificates have it: a receiver is a server, a sender is a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It listens.
    Server,
    /// It connects.
    Client,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// Where a side's certificates are, all in PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The side's own certificate, then those between it and the authority.
    pub chain: PathBuf,
    /// The private key of the first of them, not encrypted.
    pub key: PathBuf,
    /// The authorities one of which must have issued the peer's certificate (and ours).
    pub authorities: PathBuf,
    /// Lists of certificates that the authorities took back.
    pub revoked: Option<PathBuf>,
}

impl TlsFiles {
    /// By the convention of QEMU and libvirt: `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, or `client-cert.pem` and
    /// `client-key.pem`, and `ca-crl.pem` if there is one.
    #[must_use]
    pub fn in_directory(directory: &Path, side: Side) -> Self {
        let name = side.name();
        let revoked = directory.join("ca-crl.pem");
        Self {
            chain: directory.join(format!("{name}-cert.pem")),
            key: directory.join(format!("{name}-key.pem")),
            authorities: directory.join("ca-cert.pem"),
            revoked: revoked.symlink_metadata().is_ok().then_some(revoked),
        }
    }
}

/// What a receiver proves itself with, and whom it lets in: everybody who has a certificate of its authorities that may be
/// used by clients, or those alone whose certificate has the name given to [`ServerIdentity::expecting`].
#[derive(Debug, Clone)]
pub struct ServerIdentity {
    loaded: Arc<Loaded>,
    config: Arc<ServerConfig>,
}

impl ServerIdentity {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// [`Error::Identity`] with the file and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Self> {
        let loaded = Arc::new(Loaded::load(files, Side::Server)?);
        let config = loaded.server_config(None)?;
        Ok(Self { loaded, config })
    }

    /// Lets in only who has `name`, a host's name or an IP address, in its certificate.
    ///
    /// # Errors
    /// [`Error::PeerName`] if that is no name.
    pub fn expecting(self, name: &str) -> Result<Self> {
        let config = self.loaded.server_config(Some(peer_name(name)?))?;
        Ok(Self { config, ..self })
    }

    pub(crate) fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }
}

/// What a sender proves itself with, and whom it sends to: who has a certificate of its authorities that may be used by
/// servers, with the host's name or address that was connected to, or with the name given to [`ClientIdentity::expecting`].
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    config: Arc<ClientConfig>,
    expected: Option<ServerName<'static>>,
}

impl ClientIdentity {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// [`Error::Identity`] with the file and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Self> {
        let loaded = Loaded::load(files, Side::Client)?;
        Ok(Self {
            config: loaded.client_config()?,
            expected: None,
        })
    }

    /// Wants `name`, a host's name or an IP address, in the receiver's certificate, whatever address is connected to.
    ///
    /// # Errors
    /// [`Error::PeerName`] if that is no name.
    pub fn expecting(self, name: &str) -> Result<Self> {
        let expected = Some(peer_name(name)?);
        Ok(Self { expected, ..self })
    }

    pub(crate) fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    pub(crate) fn expected(&self) -> Option<&ServerName<'static>> {
        self.expected.as_ref()
    }
}

/// A name as it may stand in a certificate.
pub(crate) fn peer_name(name: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(name.to_owned()).map_err(|_| Error::PeerName { name: name.into() })
}

#[derive(Debug)]
struct Loaded {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authorities: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
}

impl Loaded {
    fn load(files: &TlsFiles, side: Side) -> Result<Self> {
        let chain = certificates(&files.chain)?;
        let key = key(&files.key)?;
        let mut authorities = RootCertStore::empty();
        for certificate in certificates(&files.authorities)? {
            authorities
                .add(certificate)
                .map_err(|e| wrong(&files.authorities, greeting::words(&e)))?;
        }
        let loaded = Self {
            files: files.clone(),
            provider: Arc::new(ring::default_provider()),
            chain,
            key,
            authorities: Arc::new(authorities),
            revoked: files.revoked.as_deref().map_or(Ok(Vec::new()), revoked)?,
        };
        loaded.check_own(side)?;
        Ok(loaded)
    }

    /// Our own certificate, as the peer will look at it.
    fn check_own(&self, side: Side) -> Result<()> {
        let [own, between @ ..] = &self.chain[..] else {
            return Err(wrong(&self.files.chain, "there is no certificate in it"));
        };
        let now = UnixTime::now();
        let checked = match side {
            Side::Client => self
                .client_verifier()?
                .verify_client_cert(own, between, now)
                .map(drop),
            Side::Server => ParsedCertificate::try_from(own).and_then(|own| {
                let algorithms = self.provider.signature_verification_algorithms.all;
                verify_server_cert_signed_by_trust_anchor(
                    &own,
                    &self.authorities,
                    between,
                    now,
                    algorithms,
                )
            }),
        };
        checked.map_err(|e| {
            let (why, authorities) = (greeting::words(&e), self.files.authorities.display());
            wrong(
                &self.files.chain,
                format!(
                    "a peer would refuse it as a {}'s: {why} (authorities: {authorities})",
                    side.name()
                ),
            )
        })
    }

    fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>> {
        WebPkiClientVerifier::builder_with_provider(self.authorities.clone(), self.provider.clone())
            .with_crls(self.revoked.iter().cloned())
            // An authority without a list took nothing back.
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| self.unusable(&e))
    }

    fn server_verifier(&self) -> Result<Arc<dyn client_danger::ServerCertVerifier>> {
        let verifier = WebPkiServerVerifier::builder_with_provider(
            self.authorities.clone(),
            self.provider.clone(),
        )
        .with_crls(self.revoked.iter().cloned())
        .allow_unknown_revocation_status()
        .build()
        .map_err(|e| self.unusable(&e))?;
        Ok(verifier)
    }

    fn unusable(&self, error: &VerifierBuilderError) -> Error {
        let file = match (error, &self.files.revoked) {
            (VerifierBuilderError::InvalidCrl(_), Some(revoked)) => revoked,
            _ => &self.files.authorities,
        };
        wrong(file, error.to_string())
    }

    fn server_config(&self, expected: Option<ServerName<'static>>) -> Result<Arc<ServerConfig>> {
        let verifier = self.client_verifier()?;
        let verifier = match expected {
            None => verifier,
            Some(name) => Arc::new(Named { name, verifier }),
        };
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.misfit(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| self.misfit(&e))?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn client_config(&self) -> Result<Arc<ClientConfig>> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.misfit(&e))?
            .dangerous()
            .with_custom_certificate_verifier(self.server_verifier()?)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|e| self.misfit(&e))?;
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn misfit(&self, error: &rustls::Error) -> Error {
        let why = match error {
            rustls::Error::InconsistentKeys(_) => {
                format!("the key is not that of {}", self.files.chain.display())
            }
            other => greeting::words(other),
        };
        wrong(&self.files.key, why)
    }
}

/// Takes what `verifier` takes, if it has `name`.
#[derive(Debug)]
struct Named {
    name: ServerName<'static>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .verifier
            .verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<client_danger::HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<client_danger::HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

fn wrong(file: &Path, why: impl Into<String>) -> Error {
    Error::Identity {
        file: file.into(),
        why: why.into(),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(file)
        .and_then(|opened| opened.take(MAX_FILE + 1).read_to_end(&mut content))
        .map_err(|e| wrong(file, format!("cannot be read: {e}")))?;
    if content.len() as u64 > MAX_FILE {
        return Err(wrong(file, "it is longer than 1 MiB"));
    }
    Ok(content)
}

fn all<T: PemObject>(file: &Path, what: &str) -> Result<Vec<T>> {
    let found = T::pem_slice_iter(&read(file)?)
        .collect::<std::result::Result<Vec<T>, pem::Error>>()
        .map_err(|e| wrong(file, format!("it is not proper PEM: {e}")))?;
    if found.is_empty() {
        return Err(wrong(file, format!("there is no {what} in it")));
    }
    Ok(found)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    all(file, "certificate")
}

fn revoked(file: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    all(file, "list of revoked certificates")
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let content = read(file)?;
    warn_of_readers(file);
    PrivateKeyDer::from_pem_slice(&content).map_err(|e| match e {
        pem::Error::NoItemsFound if is_encrypted(&content) => {
            wrong(file, "the key is encrypted; decrypt it (openssl pkey)")
        }
        pem::Error::NoItemsFound => wrong(file, "there is no private key in it"),
        e => wrong(file, format!("it is not proper PEM: {e}")),
    })
}

fn is_encrypted(pem: &[u8]) -> bool {
    const LABEL: &[u8] = b"BEGIN ENCRYPTED PRIVATE KEY";
    pem.windows(LABEL.len()).any(|window| window == LABEL)
}

fn warn_of_readers(key: &Path) {
    let mode = std::fs::metadata(key).map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o007 != 0 {
        tracing::warn!(
            "{}: all users of this host can reach the private key",
            key.display()
        );
    }
}
