//! What is wrong with the files for TLS is said when they are loaded, with the file's name.

mod authority;

use std::fs;

use authority::{Authority, Wish};
use tempfile::TempDir;
use transport::{ClientIdentity, Error, ServerIdentity, Side, TlsFiles};

struct Directory {
    directory: TempDir,
    authority: Authority,
}

impl Directory {
    fn new() -> Self {
        let (directory, authority) = (TempDir::new().unwrap(), Authority::new());
        authority.fill(directory.path());
        Self {
            directory,
            authority,
        }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.directory.path().join(name), content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).unwrap()
    }

    fn issue(&self, side: Side, wish: &Wish) {
        self.authority.put(self.directory.path(), side, wish);
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.path().join(name)).unwrap();
    }

    fn files(&self, side: Side) -> TlsFiles {
        TlsFiles::in_directory(self.directory.path(), side)
    }

    fn server(&self) -> Refusal {
        Refusal::of(ServerIdentity::load(&self.files(Side::Server)).unwrap_err())
    }

    fn client(&self) -> Refusal {
        Refusal::of(ClientIdentity::load(&self.files(Side::Client)).unwrap_err())
    }
}

#[derive(Debug)]
struct Refusal {
    file: String,
    why: String,
}

impl Refusal {
    fn of(error: Error) -> Self {
        let Error::Identity { file, why } = error else {
            panic!("another error: {error}");
        };
        let file = file.file_name().unwrap().to_string_lossy().into_owned();
        Self { file, why }
    }

    #[track_caller]
    fn says(&self, file: &str, why: &str) {
        assert_eq!(self.file, file, "{self:?}");
        assert!(self.why.contains(why), "{self:?}");
    }
}

#[test]
fn right_files_are_taken() {
    let it = Directory::new();

    ServerIdentity::load(&it.files(Side::Server)).unwrap();
    ClientIdentity::load(&it.files(Side::Client)).unwrap();
}

#[test]
fn a_list_of_revoked_certificates_is_found() {
    let it = Directory::new();
    it.write("ca-crl.pem", it.authority.revoke_all());

    ServerIdentity::load(&it.files(Side::Server)).unwrap();
    it.client().says("client-cert.pem", "it was revoked");
}

#[test]
fn missing_files_are_named() {
    let it = Directory::new();
    it.remove("server-cert.pem");
    it.remove("client-key.pem");

    it.server().says("server-cert.pem", "No such file");
    it.client().says("client-key.pem", "No such file");
}

#[test]
fn a_missing_authority_is_named() {
    let it = Directory::new();
    it.remove("ca-cert.pem");

    it.server().says("ca-cert.pem", "No such file");
}

#[test]
fn a_file_without_a_certificate_is_refused() {
    let it = Directory::new();
    it.write("server-cert.pem", "nothing\n");
    it.write("ca-crl.pem", "nothing\n");

    it.server()
        .says("server-cert.pem", "there is no certificate in it");
    it.client()
        .says("ca-crl.pem", "no list of revoked certificates in it");
}

#[test]
fn a_file_without_a_key_is_refused() {
    let it = Directory::new();
    it.write("server-key.pem", it.read("server-cert.pem"));

    it.server()
        .says("server-key.pem", "there is no private key in it");
}

#[test]
fn an_encrypted_key_is_refused() {
    let it = Directory::new();
    let key = it.read("server-key.pem");
    it.write(
        "server-key.pem",
        key.replace("PRIVATE", "ENCRYPTED PRIVATE"),
    );

    it.server().says("server-key.pem", "the key is encrypted");
}

#[test]
fn damaged_files_are_refused() {
    let it = Directory::new();
    let key = it.read("server-key.pem");
    it.write("server-key.pem", &key[..key.len() / 2]);
    let certificate = it.read("client-cert.pem");
    it.write("client-cert.pem", certificate.replace("MII", "!!!"));

    it.server().says("server-key.pem", "not proper PEM");
    it.client().says("client-cert.pem", "not proper PEM");
}

#[test]
fn a_certificate_that_is_none_is_refused() {
    let it = Directory::new();
    let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    it.write("server-cert.pem", junk);

    it.server().says("server-cert.pem", "damaged");

    it.write("ca-cert.pem", junk);
    it.server().says("ca-cert.pem", "damaged");
}

#[test]
fn a_file_that_is_too_long_is_refused() {
    let it = Directory::new();
    it.write("ca-cert.pem", vec![b'#'; (1 << 20) + 1]);

    it.server().says("ca-cert.pem", "longer than 1 MiB");
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let it = Directory::new();
    it.write("server-key.pem", it.read("client-key.pem"));

    it.server().says("server-key.pem", "not that of");
}

#[test]
fn an_expired_certificate_is_refused() {
    let it = Directory::new();
    it.issue(Side::Server, &Wish::of(Side::Server).expired());
    it.issue(Side::Client, &Wish::of(Side::Client).expired());

    it.server().says("server-cert.pem", "it expired 5 days ago");
    it.client().says("client-cert.pem", "it expired 5 days ago");
}

#[test]
fn a_certificate_that_is_not_valid_yet_is_refused() {
    let it = Directory::new();
    it.issue(Side::Server, &Wish::of(Side::Server).not_yet_valid());

    it.server().says("server-cert.pem", "it will be valid in");
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    let it = Directory::new();
    it.write("ca-cert.pem", Authority::new().pem());

    it.server()
        .says("server-cert.pem", "none of the authorities issued it");
    it.client()
        .says("client-cert.pem", "none of the authorities issued it");
}

#[test]
fn a_certificate_of_an_authority_with_the_same_name_is_refused() {
    let it = Directory::new();
    let own = Authority::named("twin");
    own.fill(it.directory.path());
    it.write("ca-cert.pem", Authority::named("twin").pem());

    it.server().says("server-cert.pem", "has another key");
    it.client().says("client-cert.pem", "has another key");
}

#[test]
fn a_certificate_for_the_other_side_is_refused() {
    let it = Directory::new();
    it.issue(Side::Server, &Wish::of(Side::Client));
    it.issue(Side::Client, &Wish::of(Side::Server));

    it.server().says("server-cert.pem", "extendedKeyUsage");
    it.client().says("client-cert.pem", "extendedKeyUsage");
}

#[test]
fn a_name_that_is_none_is_refused() {
    let it = Directory::new();
    let client = ClientIdentity::load(&it.files(Side::Client)).unwrap();

    let error = client.expecting("no name").unwrap_err();

    assert!(error.to_string().contains("\"no name\""), "{error}");
}
