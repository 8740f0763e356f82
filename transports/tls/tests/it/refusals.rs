//! What is refused: on which side, and in which words.

use std::sync::Arc;

use memferry_transports::{Connection, Transport};
use memferry_transports_tls::{ClientCertificates, TlsSettings};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, NamedGroup, RootCertStore, ServerConfig, ServerConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::authority::{Authority, DESTINATION, Ends, HANG, Made, SOURCE};

/// What the source reads: the reason of a destination that refuses it comes after the source's own handshake.
async fn read_error(source: Result<Connection, String>) -> String {
    match source {
        Err(error) => error,
        Ok(mut connection) => {
            let read = connection.reader.as_mut().unwrap().read_u8();
            tokio::time::timeout(HANG, read).await.expect("it hangs").expect_err("refused").to_string()
        }
    }
}

/// The errors of source and destination.
async fn refused(source: TlsSettings, destination: TlsSettings) -> [String; 2] {
    let (source, destination) = Ends::new(source, destination).meet().await;
    let destination = destination.expect_err("refused");
    [read_error(source).await, destination]
}

fn holds(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert!(!text.contains("PRIVATE KEY"), "{text}");
}

#[tokio::test]
async fn a_destinations_certificate_is_refused_by_name_and_date() {
    let (ours, other) = (Authority::new("ours"), Authority::new("another"));
    let good = Made::of_destination();
    let source = ours.settings(&Made::of_source());
    let cases = [
        (
            ours.settings(&Made { days: 1, ..good.clone() }),
            vec!["\"CN=dest-1.example\"", "which the destination shows", "it expired on 20", "here it is 20"],
            vec!["the source refuses", "it has expired", "valid from 20"],
        ),
        (ours.settings(&Made { from: 5, ..good.clone() }), vec!["it is valid from 20"], vec!["the source refuses"]),
        (
            ours.settings(&Made { name: Some("elsewhere.example"), ..good.clone() }),
            vec!["its names are elsewhere.example", "wanted is dest-1.example", "set peer_name"],
            vec!["the source refuses", "the name"],
        ),
        (
            ours.settings(&Made { name: None, ..good.clone() }),
            vec!["no subject alternative name", "memferry certs DIR --host dest-1.example", "dns_name"],
            vec!["the source refuses"],
        ),
        (ours.self_signed(&good), vec!["it is signed by itself", "ca.pem"], vec!["the source refuses"]),
        (
            TlsSettings { ca: source.ca.clone(), ..other.settings(&good) },
            vec!["no authority in ", "its issuer is \"CN=another\""],
            vec!["the source refuses", "no authority there issued it"],
        ),
        (
            ours.settings(&Made { purpose: ExtendedKeyUsagePurpose::ClientAuth, ..good.clone() }),
            vec!["not that of TLS servers"],
            vec!["the source refuses"],
        ),
    ];
    for (destination, here, there) in cases {
        let [at_source, at_destination] = refused(source.clone(), destination).await;
        holds(&at_source, &here);
        holds(&at_source, &["tls over memory", "refused here"]);
        holds(&at_destination, &there);
    }
}

#[tokio::test]
async fn a_sources_certificate_is_refused_by_name_and_date() {
    let (ours, other) = (Authority::new("ours"), Authority::new("another"));
    let good = Made::of_source();
    let destination = ours.settings(&Made::of_destination());
    let allowing = TlsSettings { allow: vec!["dest-*.example".into()], ..destination.clone() };
    let cases = [
        (
            ours.settings(&Made { days: 1, ..good.clone() }),
            &destination,
            vec!["src-1.example", "which the source shows", "it expired on 20"],
            vec!["the destination refuses", "it has expired", "valid from 20"],
        ),
        (
            TlsSettings { ca: destination.ca.clone(), ..other.settings(&good) },
            &destination,
            vec!["no authority in ", "its issuer is \"CN=another\""],
            vec!["the destination refuses", "its issuer is \"CN=another\""],
        ),
        (ours.self_signed(&good), &destination, vec!["it is signed by itself"], vec!["the destination refuses"]),
        (
            ours.settings(&Made { purpose: ExtendedKeyUsagePurpose::ServerAuth, ..good.clone() }),
            &destination,
            vec!["not that of TLS clients"],
            vec!["the destination refuses"],
        ),
        (
            TlsSettings { client_certificates: ClientCertificates::None, ..ours.settings(&good) },
            &destination,
            vec!["the source shows no certificate", "client_certificates = \"none\" at both ends"],
            vec!["the destination requires a certificate", "this end shows none"],
        ),
        (
            ours.settings(&good),
            &allowing,
            vec!["its names are src-1.example", "`allow` here has dest-*.example"],
            vec!["the destination refuses"],
        ),
        (
            ours.settings(&Made { name: None, ..good.clone() }),
            &allowing,
            vec!["no subject alternative name", "memferry certs DIR --host NAME"],
            vec!["the destination refuses"],
        ),
    ];
    for (source, destination, here, there) in cases {
        let [at_source, at_destination] = refused(source, destination.clone()).await;
        holds(&at_destination, &here);
        holds(&at_source, &there);
    }
}

#[tokio::test]
async fn a_source_allows_destinations_by_name_too() {
    let ours = Authority::new("ours");
    let destination = ours.settings(&Made::of_destination());
    let source = TlsSettings { allow: vec!["dest-*.example".into()], ..ours.settings(&Made::of_source()) };
    Ends::new(source.clone(), destination.clone()).connected().await;
    let source = TlsSettings { allow: vec!["dest-2.example".into(), "src-*.example".into()], ..source };
    let [at_source, _] = refused(source, destination).await;
    holds(&at_source, &["its names are dest-1.example", "dest-2.example, src-*.example"]);
}

#[tokio::test]
async fn the_identity_is_the_digest_of_the_peers_certificate() {
    let ours = Authority::new("ours");
    let (source, destination) = (ours.settings(&Made::of_source()), ours.settings(&Made::of_destination()));
    let ends = Ends::new(source.clone(), destination.clone());
    let mut listener = ends.destination.listen().await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let (at_source, at_destination) = ends.meet_at(&mut *listener).await;
        let (at_source, at_destination) = (at_source.unwrap(), at_destination.unwrap());
        assert_eq!(at_destination.peer, format!("the source in memory ({SOURCE})"));
        assert_eq!(at_source.peer, format!("the destination in memory ({DESTINATION})"));
        seen.push([at_source.identity.unwrap(), at_destination.identity.unwrap()]);
    }
    assert_eq!(seen[0], seen[1]);
    let digest = |settings: &TlsSettings| {
        let certificate = CertificateDer::from_pem_file(settings.certificate.as_ref().unwrap()).unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &certificate);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    assert_eq!(seen[0].map(|identity| identity.to_string()), [digest(&destination), digest(&source)]);

    // Another certificate of the same name is another peer.
    let again = ours.settings(&Made::of_source());
    let (_, at_destination) = Ends::new(again, destination).connected().await;
    assert_ne!(at_destination.identity.unwrap(), seen[0][1]);
}

#[tokio::test]
async fn server_only_authentication_is_asked_for_by_name() {
    let ours = Authority::new("ours");
    let none = |settings| TlsSettings { client_certificates: ClientCertificates::None, ..settings };
    let source = TlsSettings { certificate: None, key: None, ..none(ours.settings(&Made::of_source())) };
    let destination = ours.settings(&Made::of_destination());
    let (at_source, at_destination) = Ends::new(source.clone(), none(destination)).connected().await;
    assert!(at_source.identity.is_some() && at_destination.identity.is_none());

    let required = TlsSettings { client_certificates: ClientCertificates::Required, ..source };
    let error = Ends::new(required.clone(), required).source.connect().await.unwrap_err().to_string();
    holds(&error, &["[transport.tls] certificate: TLS needs `certificate`", "client_certificates = \"none\""]);
}

fn raw_client(settings: &TlsSettings, version: &'static rustls::SupportedProtocolVersion) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(settings.ca.as_ref().unwrap()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[tokio::test]
async fn the_key_exchange_is_hybrid_and_post_quantum() {
    let ours = Authority::new("ours");
    let settings = ours.settings(&Made::of_destination());
    let settings = TlsSettings { client_certificates: ClientCertificates::None, ..settings };
    let ends = Ends::new(settings.clone(), settings.clone());
    let mut listener = ends.destination.listen().await.unwrap();
    let config = Arc::new(raw_client(&settings, &rustls::version::TLS13));
    let name = ServerName::try_from(DESTINATION).unwrap();
    let Connection { reader, writer, .. } = ends.memory.connect().await.unwrap();
    let stream = tokio::io::join(reader.unwrap(), writer.unwrap());
    let client = tokio_rustls::TlsConnector::from(config).connect(name, stream);
    let (client, server) = tokio::join!(client, listener.accept_ready());
    server.unwrap();
    let client = client.unwrap();
    let group = client.get_ref().1.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
}

#[tokio::test]
async fn tls_1_2_is_refused_by_either_end() {
    let ours = Authority::new("ours");
    let settings = ours.settings(&Made::of_destination());
    let ends = Ends::new(ours.settings(&Made::of_source()), settings.clone());

    let mut listener = ends.destination.listen().await.unwrap();
    let config = Arc::new(raw_client(&settings, &rustls::version::TLS12));
    let mut old = ClientConnection::new(config, ServerName::try_from(DESTINATION).unwrap()).unwrap();
    let mut hello = Vec::new();
    old.write_tls(&mut hello).unwrap();
    let mut connection = ends.memory.connect().await.unwrap();
    connection.writer.as_mut().unwrap().write_all(&hello).await.unwrap();
    let error = listener.accept_ready().await.unwrap_err().to_string();
    holds(&error, &["the source and this end have no TLS in common", "memferry speaks TLS 1.3 and no older version"]);
    let mut alert = Vec::new();
    connection.reader.as_mut().unwrap().read_to_end(&mut alert).await.unwrap();
    assert!(alert.starts_with(&[0x15, 3, 3, 0, 2, 2, 70]), "protocol_version: {alert:?}");
    drop(listener);

    // A destination of TLS 1.2 alone.
    let mut listener = ends.memory.listen().await.unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = vec![CertificateDer::from_pem_file(settings.certificate.as_ref().unwrap()).unwrap()];
    let key = PrivateKeyDer::from_pem_file(settings.key.as_ref().unwrap()).unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let old = async {
        let mut connection = listener.accept_ready().await.unwrap();
        let mut session = ServerConnection::new(Arc::new(config)).unwrap();
        let mut hello = vec![0; 4096];
        let read = connection.reader.as_mut().unwrap().read(&mut hello).await.unwrap();
        session.read_tls(&mut &hello[..read]).unwrap();
        session.process_new_packets().unwrap_err();
        let mut alert = Vec::new();
        session.write_tls(&mut alert).unwrap();
        connection.writer.as_mut().unwrap().write_all(&alert).await.unwrap();
    };
    let (error, ()) = tokio::join!(ends.source.connect(), old);
    holds(&error.unwrap_err().to_string(), &["the destination speaks no TLS 1.3"]);
}

#[tokio::test]
async fn plaintext_is_known_as_such_at_either_end() {
    let ours = Authority::new("ours");
    let ends = Ends::new(ours.settings(&Made::of_source()), ours.settings(&Made::of_destination()));
    let mut listener = ends.destination.listen().await.unwrap();
    let mut plain = ends.memory.connect().await.unwrap();
    plain.writer.as_mut().unwrap().write_all(&[7; 100]).await.unwrap();
    let error = listener.accept_ready().await.unwrap_err().to_string();
    holds(&error, &["the source does not speak TLS", "write tls: in its address, or tcp: in that of this destination"]);
    let mut answer = Vec::new();
    plain.reader.as_mut().unwrap().read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 10], "unexpected_message");
    drop(listener);

    let mut listener = ends.memory.listen().await.unwrap();
    let refusing = async {
        let mut connection = listener.accept_ready().await.unwrap();
        connection.writer.as_mut().unwrap().write_all(b"no frame of TLS").await.unwrap();
        connection
    };
    let (error, _connection) = tokio::join!(ends.source.connect(), refusing);
    holds(&error.unwrap_err().to_string(), &["the destination does not speak TLS", "or tcp: here"]);
}
