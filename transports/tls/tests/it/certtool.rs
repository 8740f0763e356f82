//! Directories as GnuTLS's certtool makes them, with the names of QEMU and of Cloud Hypervisor.

use std::path::Path;
use std::process::Command;

use memferry_transports_tls::{TlsSettings, trial};

use crate::authority::{Ends, write};
use crate::skip::skipped;

/// Runs certtool, and returns what it prints.
fn certtool(directory: &Path, arguments: &[&str]) {
    let ran = Command::new("certtool").current_dir(directory).args(arguments).output().unwrap();
    assert!(ran.status.success(), "certtool {arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// As the documentation of QEMU has it, with keys of the type that is asked for.
fn make(directory: &Path, key_type: &[&str]) {
    let template = |name: &str, text: &str| drop(write(&directory.join(name), text));
    let key = |name: &str| {
        let arguments = [&["--generate-privkey", "--no-text", "--outfile", name], key_type].concat();
        certtool(directory, &arguments);
    };
    key("ca-key.pem");
    template("ca.info", "cn = Trial\nca\ncert_signing_key\ncrl_signing_key\nserial = 1\n");
    certtool(
        directory,
        &[
            "--generate-self-signed",
            "--load-privkey",
            "ca-key.pem",
            "--template",
            "ca.info",
            "--outfile",
            "ca-cert.pem",
        ],
    );
    for (end, purpose, serial) in [("server", "tls_www_server", 2), ("client", "tls_www_client", 3)] {
        let files = ["key.pem", "cert.pem", "info"]
            .map(|kind| if kind == "info" { format!("{end}.info") } else { format!("{end}-{kind}") });
        key(&files[0]);
        template(
            &files[2],
            &format!(
                "organization = Trial\ncn = {end}.example\ndns_name = {end}.example\ndns_name = localhost\nserial = {serial}\n\
                 {purpose}\nencryption_key\nsigning_key\n"
            ),
        );
        certtool(
            directory,
            &[
                "--generate-certificate",
                "--load-ca-certificate",
                "ca-cert.pem",
                "--load-ca-privkey",
                "ca-key.pem",
                "--load-privkey",
                &files[0],
                "--template",
                &files[2],
                "--outfile",
                &files[1],
            ],
        );
    }
}

fn is_there() -> bool {
    Command::new("certtool").arg("--version").output().is_ok()
}

fn settings(directory: &Path) -> TlsSettings {
    let directory = Some(directory.to_owned());
    TlsSettings {
        directory,
        peer_name: Some("server.example".into()),
        allow: vec!["*.example".into()],
        ..TlsSettings::default()
    }
}

#[tokio::test]
async fn directories_of_certtool_load_as_they_are() {
    if !is_there() {
        return skipped("certtool is not here (gnutls-bin)");
    }
    for key_type in
        [&["--key-type", "ecdsa", "--curve", "secp256r1"][..], &["--key-type", "ed25519"], &["--bits", "2048"]]
    {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), key_type);
        let settings = settings(folder.path());
        let (at_source, at_destination) = Ends::new(settings.clone(), settings).connected().await;
        assert!(at_source.peer.ends_with("(server.example)"), "{}", at_source.peer);
        assert!(at_destination.peer.ends_with("(client.example)"), "{}", at_destination.peer);
    }
}

#[tokio::test]
async fn a_list_of_certtool_is_honoured() {
    if !is_there() {
        return skipped("certtool is not here (gnutls-bin)");
    }
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), &["--key-type", "ecdsa", "--curve", "secp256r1"]);
    let settings = settings(folder.path());
    write(&folder.path().join("crl.info"), "crl_next_update = 30\ncrl_number = 1\n");
    let list = |revoked: &[&str]| {
        let mut arguments = vec![
            "--generate-crl",
            "--load-ca-privkey",
            "ca-key.pem",
            "--load-ca-certificate",
            "ca-cert.pem",
            "--template",
            "crl.info",
            "--outfile",
            "ca-crl.pem",
        ];
        arguments.extend(revoked);
        certtool(folder.path(), &arguments);
    };
    list(&[]);
    Ends::new(settings.clone(), settings.clone()).connected().await;
    list(&["--load-certificate", "client-cert.pem"]);
    let (_, at_destination) = Ends::new(settings.clone(), settings).meet().await;
    let why = at_destination.expect_err("revoked");
    assert!(why.contains("it is revoked, by ") && why.contains("ca-crl.pem"), "{why}");
}

/// The names of `memferry certs` are those of QEMU and of Cloud Hypervisor.
#[test]
fn the_names_are_those_of_qemu_and_cloud_hypervisor() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("pki");
    trial::write(&directory, &["localhost".into()]).unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["ca-cert.pem", "client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"]);
}
