//! One table of texts that are or are not a device's ID, at every way into the hub (threats.md, row 23).

use bytes::BytesMut;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::support::{HOST, TestHub, key, now};
use crate::{
    auth::{ConnectionString, sas::sign},
    base::DeviceId,
    proto::mqtt::{self, Connect, ConnectCode, Packet},
};

const GOOD: [&str; 30] = [
    "a",
    "A",
    "0",
    "pump-17",
    "PUMP-17",
    "a.b",
    ".a",
    "a.",
    "...",
    "a-b_c",
    "-",
    "_",
    "a:b",
    "a%b",
    "a%2fb",
    "%2e%2e",
    "%00",
    "a*",
    "*",
    "a?b",
    "?",
    "a!b",
    "a(b)",
    "a,b",
    "a=b",
    "a@b",
    "a;b",
    "$a",
    "it's",
    "-:.%_*?!(),=@;$'",
];

const BAD: [&str; 34] = [
    "",
    ".",
    "..",
    "/",
    "a/",
    "/a",
    "a/b/c",
    "../a",
    "a/../b",
    "..\\a",
    "a\\b",
    "a+b",
    "+",
    "a#b",
    "#",
    "a b",
    " a",
    "a ",
    "a\tb",
    "a\nb",
    "a\r\nX: y",
    "a\0b",
    "a\u{1b}[31m",
    "a\u{7f}",
    "a\"b",
    "a&b",
    "a<b>",
    "a|b",
    "a^b",
    "a~b",
    "a`b",
    "\u{e9}",
    "e\u{301}",
    "\u{ff0e}\u{ff0e}",
];

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Registers by path and by body; tells the status.
async fn registers(hub: &TestHub, id: &str) -> u16 {
    let body = serde_json::json!({ "deviceId": id }).to_string();
    hub.request(&format!("PUT /devices/{}", encoded(id)), &[hub.sas("registry", 2)], &body).await.status
}

/// What CONNECT with this client identifier is answered, if it is.
async fn logs_in(hub: &TestHub, id: &str) -> Option<ConnectCode> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let connect = Connect {
        clean_session: true,
        keep_alive: 60,
        client_id: id.into(),
        will: None,
        username: Some(format!("{HOST}/{id}/?api-version=2020-09-30")),
        // A policy's: it may connect whatever is registered.
        password: Some(sign(HOST, &key(3), now() + 3600, Some(&"device".parse().unwrap()))),
    };
    let mut io = hub.connect_to(hub.mqtt_port).await;
    let mut bytes = BytesMut::new();
    mqtt::encode(&Packet::Connect(Box::new(connect)), &mut bytes).unwrap();
    io.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    while answer.len() < 4 && io.read_buf(&mut answer).await.unwrap_or(0) > 0 {}
    match mqtt::decode(&mut answer.as_slice().into(), 1024) {
        Ok(Some(Packet::ConnAck { code, .. })) => Some(code),
        _ => None,
    }
}

fn connection_string(id: &str) -> Result<ConnectionString, impl std::error::Error> {
    format!("HostName=h.example;DeviceId={id};x509=true").parse::<ConnectionString>()
}

#[tokio::test]
async fn an_id_is_an_id_at_every_door_or_at_none() {
    let hub = TestHub::start().await;
    let long = ["x".repeat(128), "x".repeat(129)];
    let good: Vec<&str> = GOOD.into_iter().chain([long[0].as_str()]).collect();
    for &id in &good {
        assert!(id.parse::<DeviceId>().is_ok(), "{id:?}");
        assert_eq!(registers(&hub, id).await, 200, "{id:?}");
        let asked = hub.initiate(&format!("/twins/{}/streams/s", encoded(id)), "0", "0").await;
        assert_eq!(asked.error_code(), 404_103, "{id:?}");
        assert_eq!(logs_in(&hub, id).await, Some(ConnectCode::Accepted), "{id:?}");
        // A connection string cannot hold what separates its parts.
        assert_eq!(connection_string(id).is_ok(), !id.contains(';'), "{id:?}");
    }
    for id in BAD.into_iter().chain([long[1].as_str()]) {
        assert!(id.parse::<DeviceId>().is_err(), "{id:?}");
        assert!(matches!(registers(&hub, id).await, 400 | 404 | 405), "{id:?}");
        let asked = hub.initiate(&format!("/twins/{}/streams/s", encoded(id)), "0", "0").await;
        assert!(matches!(asked.status, 400 | 404) && asked.error_code() != 404_103, "{id:?}: {}", asked.body);
        assert!(!matches!(logs_in(&hub, id).await, Some(ConnectCode::Accepted)), "{id:?}");
        // Spaces around a part of a connection string are those of the file that it came from.
        assert!(connection_string(id).is_err() || id.trim() != id, "{id:?}");
    }
    // Each is itself and no other: nothing was folded, decoded twice or trimmed.
    let listed = hub.request("GET /devices", &[hub.sas("registry", 2)], "").await.json();
    let mut listed: Vec<&str> = listed.as_array().unwrap().iter().map(|d| d["deviceId"].as_str().unwrap()).collect();
    listed.retain(|id| *id != "pump");
    listed.sort_unstable();
    let mut expected = good.clone();
    expected.sort_unstable();
    assert_eq!(listed, expected);
    hub.stopped().await;
}
