//! A certificate authority for tests, and the directories that it fills.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};
use time::{Duration, OffsetDateTime};
use transport::{ClientIdentity, ServerIdentity, Side, TlsFiles};

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What is special about a certificate.
pub struct Wish {
    pub purpose: ExtendedKeyUsagePurpose,
    pub names: Vec<String>,
    pub valid_from: OffsetDateTime,
    pub valid_until: OffsetDateTime,
}

impl Wish {
    /// A server's for this host, or a client's.
    pub fn of(side: Side) -> Self {
        let now = OffsetDateTime::now_utc();
        let (purpose, names) = match side {
            Side::Server => (
                ExtendedKeyUsagePurpose::ServerAuth,
                ["receiver.test", "localhost", "127.0.0.1", "::1"],
            ),
            Side::Client => (
                ExtendedKeyUsagePurpose::ClientAuth,
                ["sender.test", "127.0.0.1", "::1", "localhost"],
            ),
        };
        Self {
            purpose,
            names: names.map(String::from).to_vec(),
            valid_from: now - Duration::days(10),
            valid_until: now + Duration::days(10),
        }
    }

    pub fn named(mut self, name: &str) -> Self {
        self.names = vec![name.into()];
        self
    }

    pub fn expired(mut self) -> Self {
        self.valid_until = OffsetDateTime::now_utc() - Duration::days(5);
        self
    }

    pub fn not_yet_valid(mut self) -> Self {
        self.valid_from = OffsetDateTime::now_utc() + Duration::days(5);
        self
    }
}

impl Authority {
    pub fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        Self::named(&format!(
            "authority {}",
            MADE.fetch_add(1, Ordering::Relaxed)
        ))
    }

    pub fn named(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// A certificate and its key, in PEM.
    pub fn issue(&self, wish: &Wish) -> (String, String) {
        let mut params = CertificateParams::new(wish.names.clone()).unwrap();
        params.extended_key_usages = vec![wish.purpose.clone()];
        params.serial_number = Some(SerialNumber::from(7));
        params.not_before = wish.valid_from;
        params.not_after = wish.valid_until;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A list that takes back every certificate of this authority.
    pub fn revoke_all(&self) -> String {
        let now = OffsetDateTime::now_utc();
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::days(1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(7),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }

    /// Fills `directory` with all that both sides need, by the convention.
    pub fn fill(&self, directory: &Path) {
        fs::write(directory.join("ca-cert.pem"), self.pem()).unwrap();
        self.put(directory, Side::Server, &Wish::of(Side::Server));
        self.put(directory, Side::Client, &Wish::of(Side::Client));
    }

    pub fn put(&self, directory: &Path, side: Side, wish: &Wish) {
        let files = TlsFiles::in_directory(directory, side);
        let (certificate, key) = self.issue(wish);
        fs::write(files.chain, certificate).unwrap();
        fs::write(files.key, key).unwrap();
    }
}

pub fn server(directory: &Path) -> ServerIdentity {
    ServerIdentity::load(&TlsFiles::in_directory(directory, Side::Server)).unwrap()
}

pub fn client(directory: &Path) -> ClientIdentity {
    ClientIdentity::load(&TlsFiles::in_directory(directory, Side::Client)).unwrap()
}
