//! What is read from files, and which files are refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use memferry_transports_tls::{ClientCertificates, Credentials, End, TlsKey, TlsSettings, Validity, trial};
use tokio::io::AsyncReadExt;

use crate::authority::{Authority, Ends, Made, write};

fn error(settings: &TlsSettings, end: End) -> (TlsKey, String) {
    let error = Credentials::load(settings, end).expect_err("refused");
    (error.key, error.to_string())
}

#[test]
fn a_key_that_others_can_access_is_refused() {
    let ours = Authority::new("ours");
    let settings = ours.settings(&Made::of_destination());
    let key = settings.key.clone().unwrap();
    for mode in [0o640, 0o604, 0o620, 0o666, 0o601] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let (named, why) = error(&settings, End::Destination);
        assert_eq!(named, TlsKey::Key);
        assert!(why.contains(&format!("(mode {mode:03o}); chmod 600 {}", key.display())), "{why}");
    }
    for mode in [0o600, 0o400] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        Credentials::load(&settings, End::Destination).unwrap();
    }
}

#[test]
fn files_that_do_not_fit_are_named() {
    let ours = Authority::new("ours");
    let (one, two) = (ours.settings(&Made::of_destination()), ours.settings(&Made::of_destination()));
    let with = |change: fn(&mut TlsSettings, &TlsSettings)| {
        let mut settings = one.clone();
        change(&mut settings, &two);
        error(&settings, End::Destination)
    };
    let cases = [
        (with(|settings, two| settings.key = two.key.clone()), TlsKey::Key, "is not the key of "),
        (with(|settings, _| settings.key = None), TlsKey::Key, "nothing names it"),
        (with(|settings, _| settings.ca = None), TlsKey::Ca, "memferry certs DIR --host NAME"),
        (with(|settings, _| settings.certificate = None), TlsKey::Certificate, "nothing names it"),
        (with(|settings, _| settings.ca = settings.key.clone()), TlsKey::Ca, "holds no certificate"),
        (with(|settings, _| settings.key = settings.certificate.clone()), TlsKey::Key, "holds no private key"),
        (with(|settings, _| settings.ca = Some("/absent".into())), TlsKey::Ca, "/absent cannot be read"),
        (with(|settings, _| settings.directory = Some("/d".into())), TlsKey::Ca, "`directory` has all files"),
        (with(|settings, _| settings.crl = settings.ca.clone()), TlsKey::Crl, "no list of revoked certificates"),
        (with(|settings, _| settings.peer_name = Some("a b".into())), TlsKey::PeerName, "is no name of a host"),
        (with(|settings, _| settings.allow = vec![String::new()]), TlsKey::Allow, "a pattern is empty"),
    ];
    for ((key, why), right, words) in cases {
        assert_eq!(key, right, "{why}");
        assert!(why.contains(words) && !why.contains("BEGIN"), "{words:?} is not in: {why}");
    }
}

#[tokio::test]
async fn one_directory_serves_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("pki");
    trial::write(&directory, &["dest-1.example".into(), "10.0.0.7".into()]).unwrap();
    for (file, mode) in [("ca-cert.pem", 0o644), ("server-key.pem", 0o600), ("client-key.pem", 0o600)] {
        assert_eq!(fs::metadata(directory.join(file)).unwrap().permissions().mode() & 0o777, mode, "{file}");
    }
    for name in ["dest-1.example", "10.0.0.7", "localhost", "127.0.0.1", "::1"] {
        let settings =
            TlsSettings { directory: Some(directory.clone()), peer_name: Some(name.into()), ..TlsSettings::default() };
        Ends::new(settings.clone(), settings).connected().await;
    }
    let settings = TlsSettings { directory: Some(directory.clone()), ..TlsSettings::default() };
    let credentials = Credentials::load(&settings, End::Source).unwrap();
    let now = std::time::SystemTime::now();
    assert!(credentials.certificates().all(|own| own.facts.validity(now) == Validity::Holds));
    assert_eq!(credentials.certificates().count(), 2);
    // Nothing is replaced.
    let before = fs::read(directory.join("ca-cert.pem")).unwrap();
    let again = trial::write(&directory, &["localhost".into()]).unwrap_err().to_string();
    assert!(again.contains("ca-cert.pem is there already"), "{again}");
    assert_eq!(fs::read(directory.join("ca-cert.pem")).unwrap(), before);

    // Without a certificate of the source.
    fs::remove_file(directory.join("client-key.pem")).unwrap();
    let (key, why) = error(&settings, End::Source);
    assert!(key == TlsKey::Directory && why.contains("client-key.pem cannot be read"), "{why}");
    let none = TlsSettings { client_certificates: ClientCertificates::None, ..settings };
    Credentials::load(&none, End::Source).unwrap();
}

#[tokio::test]
async fn revoked_certificates_are_refused_and_a_list_is_never_ignored() {
    let (ours, other) = (Authority::new("ours"), Authority::new("another"));
    let (source, destination) = (ours.settings(&Made::of_source()), ours.settings(&Made::of_destination()));
    let with = |settings: &TlsSettings, crl| TlsSettings { crl: Some(crl), ..settings.clone() };

    Ends::new(with(&source, ours.revokes(&[99], 9)), with(&destination, ours.revokes(&[99], 9))).connected().await;
    for (crl, words) in [
        (ours.revokes(&[1, 7], 9), "it is revoked, by "),
        (other.revokes(&[], 9), "no list of its issuer \"CN=ours\""),
        (ours.revokes(&[], -1), "should have been renewed by 20"),
    ] {
        let (at_source, _) = Ends::new(with(&source, crl.clone()), destination.clone()).meet().await;
        let why = at_source.expect_err("refused");
        assert!(why.contains(words) && why.contains(&crl.display().to_string()), "{why}");
    }
    let (at_source, at_destination) = Ends::new(source, with(&destination, ours.revokes(&[8], 9))).meet().await;
    let why = at_destination.expect_err("refused");
    assert!(
        why.contains("src-1.example") && why.contains("which the source shows, is refused here: it is revoked, by "),
        "{why}"
    );
    let there = at_source.unwrap().reader.unwrap().read_u8().await.unwrap_err().to_string();
    assert!(there.contains("it is revoked there"), "{there}");
}

#[test]
fn a_list_in_a_directory_that_cannot_be_honoured_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("pki");
    trial::write(&directory, &["localhost".into()]).unwrap();
    write(&directory.join("ca-crl.pem"), "no list");
    let settings = TlsSettings { directory: Some(directory.clone()), ..TlsSettings::default() };
    for end in [End::Source, End::Destination] {
        let (key, why) = error(&settings, end);
        assert!(key == TlsKey::Directory && why.contains("ca-crl.pem holds no list"), "{why}");
    }
    fs::remove_file(directory.join("ca-crl.pem")).unwrap();
    std::os::unix::fs::symlink("absent", directory.join("ca-crl.pem")).unwrap();
    let (_, why) = error(&settings, End::Source);
    assert!(why.contains("ca-crl.pem cannot be read"), "{why}");
}
