use std::{io, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::TcpListener,
    task::JoinSet,
};

use super::*;
use crate::{
    base::Secret,
    transport::tls::{Alpn, ClientStream, ServerTls, testing::Authority},
};

/// A TLS server that echoes once.
async fn echo_server(tls: ServerTls, tasks: &mut JoinSet<io::Result<()>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tls.acceptor(Alpn::Http).unwrap();
    tasks.spawn(async move {
        let mut stream = acceptor.accept(listener.accept().await?.0).await?;
        let mut got = [0; 4];
        stream.read_exact(&mut got).await?;
        stream.write_all(&got).await?;
        stream.shutdown().await
    });
    address
}

/// A CONNECT proxy that wants this Authorization line and sends everything to `target`; yields the request.
async fn proxy_to(
    target: SocketAddr,
    tasks: &mut JoinSet<io::Result<()>>,
) -> (SocketAddr, Arc<std::sync::Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(std::sync::Mutex::new(String::new()));
    let log = seen.clone();
    tasks.spawn(async move {
        let mut client = listener.accept().await?.0;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let authorised = head.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n");
        *log.lock().unwrap() = head;
        if !authorised {
            client
                .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n")
                .await?;
            return client.shutdown().await;
        }
        let mut server = TcpStream::connect(target).await?;
        client.write_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n").await?;
        copy_bidirectional(&mut client, &mut server).await.map(drop)
    });
    (address, seen)
}

/// A server that sends `answer` to whoever connects and closes.
async fn blunt_server(answer: &'static [u8], tasks: &mut JoinSet<io::Result<()>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut client = listener.accept().await?.0;
        let mut first = [0; 256];
        let _ = client.read(&mut first).await?;
        client.write_all(answer).await?;
        client.shutdown().await
    });
    address
}

async fn echoes(mut stream: ClientStream<CarrierSocket>) {
    stream.write_all(b"ping").await.unwrap();
    stream.flush().await.unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"ping");
}

fn through(proxy: SocketAddr, user: &str) -> ProxyRules {
    ProxyRules::new(format!("http://{user}{proxy}").parse().unwrap(), NoProxy::default())
}

async fn failure(dialer: &Dialer, host: &str, port: u16) -> DialError {
    dialer.connect(host, port, None).await.map(drop).unwrap_err()
}

#[tokio::test]
async fn a_hub_is_reached_directly_by_name_and_by_a_given_address() {
    let (authority, mut tasks) = (Authority::new(), JoinSet::new());
    let dialer = Dialer::new(authority.client(), ProxyRules::none());
    let hub = echo_server(authority.server(&["localhost"]), &mut tasks).await;
    echoes(dialer.connect("localhost", hub.port(), None).await.unwrap()).await;
    let hub = echo_server(authority.server(&["hub.test"]), &mut tasks).await;
    echoes(dialer.connect("hub.test", 443, Some(hub)).await.unwrap()).await;
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_hub_is_reached_through_a_proxy_that_wants_credentials() {
    let (authority, mut tasks) = (Authority::new(), JoinSet::new());
    let hub = echo_server(authority.server(&["hub.test"]), &mut tasks).await;
    let (proxy, request) = proxy_to(hub, &mut tasks).await;
    let proxy: Proxy = format!("http://user@{proxy}").parse().unwrap();
    let rules = ProxyRules::new(proxy.with_password(Secret::new("secret")), NoProxy::default());
    let dialer = Dialer::new(authority.client(), rules);
    echoes(dialer.connect("hub.test", 443, None).await.unwrap()).await;
    let request = request.lock().unwrap().clone();
    assert!(request.starts_with("CONNECT hub.test:443 HTTP/1.1\r\nHost: hub.test:443\r\n"), "{request}");
}

#[tokio::test]
async fn a_proxy_that_wants_credentials_says_what_to_configure() {
    let (authority, mut tasks) = (Authority::new(), JoinSet::new());
    for (user, expected) in [("", "wants credentials: set proxy ="), ("user:wrong@", "user name or password is wrong")]
    {
        let (proxy, _) = proxy_to(SocketAddr::from(([127, 0, 0, 1], 1)), &mut tasks).await;
        let error = failure(&Dialer::new(authority.client(), through(proxy, user)), "hub.test", 443).await;
        let text = error.to_string();
        assert!(text.starts_with(&format!("the proxy http://{proxy} ")) && text.contains(expected), "{text}");
        assert!(text.contains("it takes Basic") && !text.contains("wrong@"), "{text}");
        assert!(!error.is_path_failure());
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_is_quoted() {
    let (authority, mut tasks) = (Authority::new(), JoinSet::new());
    let table: [(&'static [u8], &str, bool); 4] = [
        (
            b"HTTP/1.1 403 Forbidden\r\n\r\n",
            "refused to connect to hub.test:443: 403 Forbidden (its rules forbid it",
            false,
        ),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", "502 Bad Gateway (it cannot reach or resolve that host)", true),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "does not answer as an HTTP proxy does: SSH-2.0-OpenSSH_9.2", false),
        (b"HTTP/1.1 200 OK\r\n", "ended the connection", true),
    ];
    for (answer, expected, path) in table {
        let proxy = blunt_server(answer, &mut tasks).await;
        let error = failure(&Dialer::new(authority.client(), through(proxy, "")), "hub.test", 443).await;
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.is_path_failure(), path, "{error}");
    }
    let error =
        failure(&Dialer::new(authority.client(), through(([127, 0, 0, 1], 1).into(), "")), "hub.test", 443).await;
    assert!(error.to_string().starts_with("the proxy http://127.0.0.1:1 cannot be reached: "), "{error}");
}

#[tokio::test]
async fn failures_of_the_path_and_of_the_server_are_told_apart() {
    let (authority, mut tasks) = (Authority::new(), JoinSet::new());
    let dialer = Dialer::new(authority.client(), ProxyRules::none());
    let error = failure(&dialer, "no-such-hub.invalid", 443).await;
    assert!(error.is_path_failure() && error.to_string().starts_with("cannot resolve no-such-hub.invalid"), "{error}");
    let error = failure(&dialer, "127.0.0.1", 1).await;
    assert!(!error.is_path_failure(), "somebody answered: {error}");
    let plain = blunt_server(b"HTTP/1.1 400 Bad Request\r\n\r\n", &mut tasks).await;
    let error = failure(&dialer, "127.0.0.1", plain.port()).await;
    assert!(error.to_string().contains("does not speak TLS"), "{error}");
    let hub = echo_server(authority.server(&["other.test"]), &mut tasks).await;
    let error = dialer.connect("hub.test", 443, Some(hub)).await.map(drop).unwrap_err();
    assert!(!error.is_path_failure() && error.to_string().contains("is not for hub.test"), "{error}");
}

#[test]
fn proxies_parse_and_never_print_their_password() {
    let proxy: Proxy = "http://me:p%40ss@[::1]:3128/".parse().unwrap();
    let (user, password) = proxy.credentials.clone().unwrap();
    assert_eq!((user.as_str(), password.expose_str()), ("me", Some("p@ss")));
    assert_eq!(proxy.to_string(), "http://[::1]:3128");
    assert!(!format!("{proxy:?}").contains("p@ss"));
    assert_eq!("proxy.local".parse::<Proxy>().unwrap().to_string(), "http://proxy.local:1080");
    assert_eq!("socks5://x:1".parse::<Proxy>(), Err(ProxySyntaxError::Kind("socks5".into())));
    for bad in ["http://", "http://:1", "http://a b:1", "http://x:port"] {
        assert!(bad.parse::<Proxy>().is_err(), "{bad}");
    }
}

#[test]
fn exceptions_cover_names_below_networks_and_ports() {
    let list = NoProxy::parse("localhost, .example.com,*.test,10.0.0.0/8,192.0.2.1,[2001:db8::]/32,host:8443");
    for (host, port, covered) in [
        ("example.com", 443, true),
        ("a.EXAMPLE.com.", 443, true),
        ("badexample.com", 443, false),
        ("hub.test", 443, true),
        ("10.1.2.3", 443, true),
        ("11.1.2.3", 443, false),
        ("192.0.2.1", 443, true),
        ("192.0.2.2", 443, false),
        ("host", 8443, true),
        ("host", 443, false),
        ("127.0.0.1", 443, false),
    ] {
        assert_eq!(list.covers(host, port), covered, "{host}:{port}");
    }
    assert!(NoProxy::parse("*").covers("anything", 1));
    assert!(!NoProxy::parse("").covers("anything", 1));
}

#[test]
fn the_environment_names_a_proxy_in_either_spelling_and_spares_this_machine() {
    let rules = |pairs: &'static [(&str, &str)]| {
        ProxyRules::from_environment(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    };
    assert!(rules(&[]).unwrap().proxy_for("hub.test", 443).is_none());
    let both = rules(&[("https_proxy", "http://low:1"), ("HTTPS_PROXY", "http://high:1"), ("NO_PROXY", "direct.test")]);
    let both = both.unwrap();
    assert_eq!(both.proxy_for("hub.test", 443).unwrap().host, "low");
    for direct in ["direct.test", "localhost", "127.0.0.1", "::1"] {
        assert!(both.proxy_for(direct, 443).is_none(), "{direct}");
    }
    assert_eq!(rules(&[("ALL_PROXY", "http://all:1")]).unwrap().proxy_for("x", 1).unwrap().host, "all");
    assert!(rules(&[("HTTPS_PROXY", "socks5://x:1")]).is_err());
}
