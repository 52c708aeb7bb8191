use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

const UPGRADE: Upgrade<'_> =
    Upgrade { host: "hub.test:9443", path: "/x?y=1", subprotocol: None, bearer: None, user_agent: "culvert/test" };

async fn read_request(io: &mut DuplexStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn accept_of(request: &str) -> String {
    let key = request.lines().find_map(|line| line.strip_prefix("Sec-Websocket-Key: ")).unwrap();
    derive_accept_key(key.as_bytes())
}

/// Upgrades against a server that answers with what `answer` makes of the request.
async fn upgrade_with(
    upgrade: &Upgrade<'_>,
    answer: impl Fn(&str) -> Vec<u8>,
) -> (Result<Carrier<DuplexStream>, UpgradeError>, String, DuplexStream) {
    let (near, mut far) = duplex(64 * 1024);
    let server = async {
        let request = read_request(&mut far).await;
        far.write_all(&answer(&request)).await.unwrap();
        request
    };
    let (carrier, request) = tokio::join!(Carrier::client(near, upgrade, CarrierOptions::CONTROL), server);
    (carrier, request, far)
}

fn switching(request: &str, more: &str) -> Vec<u8> {
    let accept = accept_of(request);
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: keep-alive, upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{more}\r\n"
    )
    .into_bytes()
}

#[tokio::test]
async fn an_upgrade_loses_no_byte_behind_the_answer() {
    let token = Secret::new("tick-et_7");
    let upgrade = Upgrade { subprotocol: Some("mqtt"), bearer: Some(&token), ..UPGRADE };
    let (carrier, request, _far) = upgrade_with(&upgrade, |request| {
        let mut answer = switching(request, "Sec-WebSocket-Protocol: mqtt\r\n");
        answer.extend_from_slice(b"\x82\x05early");
        answer
    })
    .await;
    let mut got = [0; 5];
    carrier.unwrap().read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"early");
    assert!(request.starts_with("GET /x?y=1 HTTP/1.1\r\n"), "{request}");
    for line in
        ["Host: hub.test:9443", "Authorization: Bearer tick-et_7", "Sec-Websocket-Protocol: mqtt", "Upgrade: websocket"]
    {
        assert!(request.contains(&format!("{line}\r\n")), "{line} in {request}");
    }
}

#[tokio::test]
async fn a_refusal_yields_status_body_and_delay() {
    let (carrier, ..) = upgrade_with(&UPGRADE, |_| {
        b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\nContent-Length: 8\r\n\r\nlater\r\n!".to_vec()
    })
    .await;
    let error = carrier.unwrap_err();
    assert_eq!(error.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3)));
    let text = error.to_string();
    assert_eq!(text, "the server answered 503 Service Unavailable to the WebSocket upgrade: later!");
    assert!(!error.is_path_failure());
}

#[tokio::test]
async fn a_refusal_of_credentials_hints_at_a_wrong_clock() {
    let (carrier, ..) = upgrade_with(&UPGRADE, |_| {
        b"HTTP/1.1 401 No\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 0\r\n\r\n".to_vec()
    })
    .await;
    let text = carrier.unwrap_err().to_string();
    assert!(text.contains("401 Unauthorized to the WebSocket upgrade; this machine's clock is "), "{text}");
}

#[tokio::test]
async fn answers_that_break_the_rules_are_refused() {
    type Answer = fn(&str) -> Vec<u8>;
    let table: [(Answer, &str); 4] = [
        (|request| switching(request, "Sec-WebSocket-Extensions: permessage-deflate\r\n"), "an extension"),
        (|request| switching(request, "Sec-WebSocket-Protocol: mqtt\r\n"), "another sub-protocol"),
        (|_| switching("Sec-Websocket-Key: other", ""), "another key"),
        (|_| b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n".to_vec(), "no Upgrade header"),
    ];
    for (answer, expected) in table {
        let error = upgrade_with(&UPGRADE, answer).await.0.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn an_upgraded_pair_over_real_tls_carries_and_ends_cleanly() {
    use crate::transport::tls::{Alpn, testing::Authority};
    let authority = Authority::new();
    let acceptor = authority.server(&["hub.test"]).acceptor(Alpn::Http).unwrap();
    let (near, far) = duplex(64 * 1024);
    let tls = authority.client();
    let (near, far) = tokio::join!(tls.connect("hub.test", near), acceptor.accept(far));
    let (near, mut far) = (near.unwrap(), far.unwrap());
    let server = async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(far.read_u8().await.unwrap());
        }
        far.write_all(&switching(std::str::from_utf8(&head).unwrap(), "")).await.unwrap();
        far.flush().await.unwrap();
        Carrier::server(far, Bytes::new(), CarrierOptions::HUB_CONTROL)
    };
    let (client, mut server) = tokio::join!(Carrier::client(near, &UPGRADE, CarrierOptions::DATA), server);
    let mut client = client.unwrap();
    let sent = vec![42; 300_000];
    let mut got = Vec::new();
    let near = async {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
    };
    let far = async {
        server.read_to_end(&mut got).await.unwrap();
        server.shutdown().await.unwrap();
    };
    tokio::join!(near, far);
    assert!(got == sent);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    let (near, _far) = duplex(64 * 1024);
    let error = Carrier::client(near, &UPGRADE, CarrierOptions::CONTROL).await.unwrap_err();
    assert!(matches!(error, UpgradeError::Timeout) && error.is_path_failure());
}
