use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpListener,
};

use super::*;
use crate::transport::{
    dial::ProxyRules,
    tls::{Alpn, testing::Authority},
};

fn ask(method: Method, url: &str, body: &'static str) -> HttpRequest {
    HttpRequest {
        method,
        url: url.parse().unwrap(),
        headers: vec![(header::USER_AGENT, HeaderValue::from_static("culvert/test"))],
        body: Bytes::from_static(body.as_bytes()),
        timeout: Duration::from_secs(5),
    }
}

/// Reads a request's head (and what came with it), sends `answer`, ends.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(mut io: S, answer: &[u8]) -> String {
    let mut request = vec![0; 4096];
    let length = io.read(&mut request).await.unwrap();
    io.write_all(answer).await.unwrap();
    io.shutdown().await.unwrap();
    request.truncate(length);
    String::from_utf8(request).unwrap()
}

async fn over_pipe(request: HttpRequest, bytes: &[u8]) -> (Result<HttpResponse, HttpError>, String) {
    let (near, far): (DuplexStream, DuplexStream) = duplex(4 << 20);
    tokio::join!(exchange(near, request, "hub.test"), answer(far, bytes))
}

#[tokio::test]
async fn a_request_crosses_real_tls_and_its_answer_comes_back_whole() {
    let authority = Authority::new();
    let acceptor = authority.server(&["localhost"]).acceptor(Alpn::Http).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url =
        format!("https://localhost:{}/twins/pump/streams/ssh?api-version=x", listener.local_addr().unwrap().port());
    let dialer = Dialer::new(authority.client(), ProxyRules::none());
    let server = async {
        let io = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
        answer(io, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nIoTHub-Streaming-Is-Accepted: True\r\n\r\nbody").await
    };
    let (response, request) = tokio::join!(super::request(&dialer, ask(Method::POST, &url, "")), server);
    let response = response.unwrap();
    assert_eq!((response.status, &response.body[..]), (StatusCode::OK, &b"body"[..]));
    assert_eq!(response.header("iothub-streaming-is-accepted"), Some("True"));
    assert!(request.starts_with("POST /twins/pump/streams/ssh?api-version=x HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("Content-Length: 0\r\n") && request.contains("User-Agent: culvert/test\r\n"), "{request}");
}

#[tokio::test]
async fn refusals_are_answers_too() {
    let bytes = b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let (response, request) = over_pipe(ask(Method::PUT, "https://hub.test/devices/a", "{}"), bytes).await;
    let response = response.unwrap();
    assert_eq!(response.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.retry_after(), Some(Duration::from_secs(7)));
    assert_eq!(&response.body[..], b"abc");
    assert!(request.contains("Host: hub.test\r\n"), "no port when it is 443: {request}");
}

#[tokio::test]
async fn an_answer_that_is_cut_off_or_endless_is_an_error() {
    let get = || ask(Method::GET, "https://hub.test/devices", "");
    let cut = over_pipe(get(), b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await.0;
    assert!(matches!(cut, Err(HttpError::Body { .. })), "{cut:?}");
    let mut long = b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n".to_vec();
    long.resize(2_000_100, b'x');
    let long = over_pipe(get(), &long).await.0;
    assert!(matches!(long, Err(HttpError::Body { .. })));
    let head = over_pipe(get(), &[b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; 40_000]].concat()).await.0;
    assert!(matches!(head, Err(HttpError::Exchange { .. })), "{head:?}");
    let none = over_pipe(get(), b"").await.0;
    assert!(none.unwrap_err().is_path_failure());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_silent_is_given_up() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
    let dialer = Dialer::new(authority.client(), ProxyRules::none());
    let error = super::request(&dialer, ask(Method::GET, &url, "")).await.unwrap_err();
    assert_eq!(error.to_string(), "localhost did not answer within 5 s");
}

#[test]
fn urls_parse_strictly() {
    let url: Url = "wss://[::1]:9443/bridges/x?y=1".parse().unwrap();
    assert_eq!((url.host.as_str(), url.port, url.path.as_str()), ("::1", 9443, "/bridges/x?y=1"));
    assert_eq!(url.to_string(), "https://[::1]:9443/bridges/x?y=1");
    let url: Url = "https://hub.test".parse().unwrap();
    assert_eq!((url.port, url.path.as_str(), url.host_header().as_str()), (443, "/", "hub.test"));
    for bad in [
        "",
        "hub",
        "http://hub/",
        "ws://hub/",
        "https://u@hub/",
        "https://hub:0/",
        "https://hub:99999/",
        "https://:1/",
        "https://hub:x/",
    ] {
        assert!(bad.parse::<Url>().is_err(), "{bad}");
    }
}
