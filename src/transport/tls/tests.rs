use rcgen::date_time_ymd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{testing::Authority, *};

/// One handshake over a pipe.
async fn handshake(
    client: &ClientTls,
    host: &str,
    server: &ServerTls,
) -> (Result<ClientStream<DuplexStream>, HandshakeError>, io::Result<ServerStream<DuplexStream>>) {
    let (near, far) = duplex(64 * 1024);
    let acceptor = server.acceptor(Alpn::Http).unwrap();
    tokio::join!(client.connect(host, near), acceptor.accept(far))
}

async fn refusal(client: &ClientTls, host: &str, files: ClientCertificate) -> String {
    let server = ServerTls::load(&files.certificate_file, &files.private_key_file).unwrap();
    let error = handshake(client, host, &server).await.0.unwrap_err();
    assert!(!error.is_path_failure(), "{error}");
    error.to_string()
}

#[tokio::test]
async fn a_trusted_server_is_spoken_to_with_tls_1_3_and_post_quantum_keys() {
    let authority = Authority::new();
    let (client, server) = handshake(&authority.client(), "hub.test", &authority.server(&["hub.test"])).await;
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    {
        let (_, session) = client.get_ref();
        assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let suite = session.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        let group = session.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
        assert_eq!(session.alpn_protocol(), Some(ALPN_HTTP1));
    }
    client.write_all(b"hi").await.unwrap();
    client.flush().await.unwrap();
    let mut got = [0; 2];
    server.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hi");
    assert!(server.get_ref().1.peer_certificates().is_none());
}

#[tokio::test]
async fn a_client_has_nothing_to_read_until_it_is_answered() {
    let authority = Authority::new();
    let (client, server) = handshake(&authority.client(), "hub.test", &authority.server(&["hub.test"])).await;
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    server.write_all(b"!").await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
    assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
}

#[tokio::test]
async fn http_2_is_never_spoken() {
    let authority = Authority::new();
    let acceptor = authority.server(&["hub.test"]).acceptor(Alpn::Http).unwrap();
    let mut roots = RootCertStore::empty();
    add_all(&mut roots, parse_certificates(authority.pem().as_bytes(), "ca.pem".as_ref()).unwrap(), "ca".into())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let spoken = async |offered: &[&str]| {
        let mut config = config.clone();
        config.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        let (near, far) = duplex(64 * 1024);
        let connect = TlsConnector::from(Arc::new(config)).connect("hub.test".try_into().unwrap(), near);
        let (client, server) = tokio::join!(connect, acceptor.accept(far));
        // The server's refusal may reach a TLS 1.3 client after its own part of the handshake.
        server.ok()?;
        client.unwrap().get_ref().1.alpn_protocol().map(<[u8]>::to_vec)
    };
    assert_eq!(spoken(&["h2", "http/1.1"]).await.as_deref(), Some(ALPN_HTTP1));
    assert_eq!(spoken(&["h2"]).await, None);
    assert_eq!(spoken(&["h2c", "h3"]).await, None);
}

#[tokio::test]
async fn addresses_are_names_too() {
    let authority = Authority::new();
    let server = authority.server(&["127.0.0.1", "::1"]);
    for host in ["127.0.0.1", "::1", "[::1]"] {
        handshake(&authority.client(), host, &server).await.0.unwrap();
    }
}

#[tokio::test]
async fn an_expired_certificate_is_named_with_both_dates_and_the_clock() {
    let authority = Authority::new();
    let files = authority.issue(&["hub.test"], |params| {
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(2020, 2, 29);
    });
    let text = refusal(&authority.client(), "hub.test", files).await;
    assert!(text.starts_with("the certificate of hub.test (CN=test leaf) expired on Feb 29"), "{text}");
    assert!(text.contains("2020") && text.contains("this machine's clock says"), "{text}");
}

#[test]
fn a_server_knows_what_its_clients_will_say() {
    let authority = Authority::new();
    let complaint = |names: &[&str], to: i32, host: &str| {
        let files = authority.issue(names, |params| params.not_after = date_time_ymd(to, 2, 28));
        let server = ServerTls::load(&files.certificate_file, &files.private_key_file).unwrap();
        server.complaint(host)
    };
    assert_eq!(complaint(&["hub.test"], 2090, "hub.test"), None);
    assert_eq!(complaint(&["192.0.2.7"], 2090, "192.0.2.7"), None);
    let expired = complaint(&["hub.test"], 2020, "hub.test").unwrap();
    assert!(expired.contains(": the certificate of hub.test (CN=test leaf) expired on Feb 28"), "{expired}");
    let soon = {
        let files = authority.issue(&["hub.test"], |params| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            params.not_after = date_time_ymd(1970, 1, 1) + now + std::time::Duration::from_hours(7 * 24 + 12);
        });
        ServerTls::load(&files.certificate_file, &files.private_key_file).unwrap().complaint("hub.test").unwrap()
    };
    assert!(soon.ends_with(", in 7 days: renew it"), "{soon}");
    let other = complaint(&["other.test"], 2090, "hub.test").unwrap();
    assert!(other.contains("is not for hub.test but for other.test"), "{other}");
}

#[tokio::test]
async fn a_certificate_from_the_future_hints_at_the_clock() {
    let authority = Authority::new();
    let files = authority.issue(&["hub.test"], |params| {
        params.not_before = date_time_ymd(2090, 1, 1);
        params.not_after = date_time_ymd(2099, 1, 1);
    });
    let server = ServerTls::load(&files.certificate_file, &files.private_key_file).unwrap();
    let error = handshake(&authority.client(), "hub.test", &server).await.0.unwrap_err();
    let HandshakeError::Certificate(problem) = &error else { panic!("{error}") };
    assert!(problem.is_about_time());
    assert!(error.to_string().contains("is valid from") && error.to_string().contains("set the clock"), "{error}");
}

#[tokio::test]
async fn a_wrong_name_lists_the_right_ones() {
    let authority = Authority::new();
    let files = authority.issue(&["other.test", "192.0.2.7"], |_| {});
    let text = refusal(&authority.client(), "hub.test", files).await;
    assert!(text.contains("is not for hub.test but for other.test, 192.0.2.7"), "{text}");
}

#[tokio::test]
async fn an_unknown_issuer_is_named_and_ca_file_suggested() {
    let (authority, stranger) = (Authority::new(), Authority::named("Stranger CA"));
    let files = stranger.issue(&["hub.test"], |_| {});
    let trust = Trust::File(authority.file());
    let client = ClientTls::new(&trust, None).unwrap();
    let text = refusal(&client, "hub.test", files).await;
    assert!(text.contains("was issued by CN=Stranger CA, which is not among ca_file "), "{text}");
    assert!(text.contains("set ca_file"), "{text}");
}

#[tokio::test]
async fn a_self_signed_certificate_is_told_from_an_unknown_issuer() {
    let authority = Authority::new();
    let files = authority.self_signed(&["hub.test"]);
    let text = refusal(&authority.client(), "hub.test", files).await;
    assert!(text.contains("is self-signed and not among"), "{text}");
}

#[tokio::test]
async fn a_ca_of_the_same_name_but_another_key_is_told_apart() {
    let (old, new) = (Authority::named("Same"), Authority::named("Same"));
    let files = new.issue(&["hub.test"], |_| {});
    let text = refusal(&old.client(), "hub.test", files).await;
    assert!(text.contains("an earlier set-up"), "{text}");
}

#[tokio::test]
async fn a_server_without_tls_is_said_to_be_one() {
    let authority = Authority::new();
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let error = authority.client().connect("hub.test", near).await.unwrap_err();
    assert!(error.to_string().contains("does not speak TLS"), "{error}");
    drop(far);
    let (near, far) = duplex(64 * 1024);
    drop(far);
    let error = authority.client().connect("hub.test", near).await.unwrap_err();
    assert!(error.is_path_failure(), "{error}");
}

#[tokio::test]
async fn a_client_certificate_reaches_the_server_whoever_issued_it() {
    let (authority, devices) = (Authority::new(), Authority::named("Devices"));
    let server = authority.server(&["hub.test"]);
    let vouching = ClientAuthorities::load(devices.file()).unwrap();
    let issued = devices.issue(&[], |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    for (files, vouched) in [(issued, true), (authority.self_signed(&["dev"]), false)] {
        let client = ClientTls::new(&Trust::Pem(authority.pem().into()), Some(&files)).unwrap();
        let (client, accepted) = handshake(&client, "hub.test", &server).await;
        client.unwrap();
        let accepted = accepted.unwrap();
        let chain = accepted.get_ref().1.peer_certificates().unwrap();
        assert_eq!(chain, read_certificates(&files.certificate_file).unwrap());
        assert_eq!(vouching.vouch_for(chain), vouched);
    }
}

#[tokio::test]
async fn a_renewed_certificate_serves_new_connections_and_a_broken_one_changes_nothing() {
    let authority = Authority::new();
    let server = authority.server(&["hub.test"]);
    let before = server.leaf();
    let files = authority.issue(&["hub.test"], |_| {});
    let reload = || server.reload(&files.certificate_file, &files.private_key_file);
    assert!(reload().unwrap());
    assert!(!reload().unwrap(), "the same files");
    assert_ne!(server.leaf(), before);
    handshake(&authority.client(), "hub.test", &server).await.0.unwrap();
    let after = server.leaf();

    std::fs::write(&files.private_key_file, "nonsense").unwrap();
    let error = reload().unwrap_err().to_string();
    assert!(error.contains("leaf.key: holds no private key"), "{error}");
    std::fs::write(&files.private_key_file, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let error = reload().unwrap_err().to_string();
    assert!(error.contains("does not fit"), "{error}");
    assert_eq!(server.leaf(), after);
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let authority = Authority::new();
    let path = authority.file();
    let missing = ClientTls::new(&Trust::File("/nonexistent/ca.pem".into()), None).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read /nonexistent/ca.pem");
    std::fs::write(&path, "hello").unwrap();
    let empty = ClientTls::new(&Trust::File(path.clone()), None).unwrap_err();
    assert!(empty.to_string().ends_with("ca.pem: holds no certificate (no \"BEGIN CERTIFICATE\")"), "{empty}");
}
