//! The service API and who may use it.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::support::{TestHub, key, now, policy, read_reply, send_request};
use crate::{
    auth::{Rights, sas::sign},
    hub::{resource_log, routes::ROUTES},
};

#[tokio::test]
async fn every_way_an_initiation_can_end_has_its_answer() {
    let hub = TestHub::start().await;
    hub.register("pump/flow").await;
    let unknown = hub.initiate("/twins/nobody/streams/s", "0", "1").await;
    assert_eq!((unknown.status, unknown.error_code()), (404, 404_001));
    let module = hub.initiate("/twins/pump/modules/nothing/streams/s", "0", "1").await;
    assert_eq!((module.status, module.error_code()), (404, 404_010));
    let offline = hub.initiate("/twins/pump/streams/s", "0", "1").await;
    assert_eq!((offline.status, offline.error_code()), (404, 404_103));
    assert_eq!(offline.header("iothub-errorcode"), Some("DeviceNotOnline"));
    assert!(offline.header("x-ms-request-id").is_some() && offline.body.contains("00:00:00"));
    for path in ["/twins/a%20b/streams/s", "/twins/pump/streams/a%23b", "/twins/pump/streams/a+b"] {
        assert_eq!(hub.initiate(path, "0", "0").await.error_code(), 400_004, "{path}");
    }
    assert_eq!(hub.initiate("/twins/pump/streams/s", "soon", "0").await.status, 400);

    let mut device = hub.device("pump/flow").await;
    let (silent, asked) = tokio::join!(hub.initiate("/twins/pump/modules/flow/streams/s", "5", "0.5"), device.asked());
    assert_eq!((silent.status, silent.error_code()), (504, 504_101));
    assert!(asked.topic.starts_with("$iothub/streams/POST/s/?$rid=") && !asked.topic.contains("$policy"));
    // A late answer is ignored; the next request is another one.
    device.publish(&format!("$iothub/streams/res/200/?$rid={}", asked.rid)).await;
    let reject = async {
        let asked = device.asked().await;
        device.publish(&format!("$iothub/streams/res/400/?$rid={}&$reason=no%20such%20target", asked.rid)).await;
    };
    let (rejected, ()) = tokio::join!(hub.initiate("/twins/pump/modules/flow/streams/s", "5", "5"), reject);
    assert_eq!((rejected.status, rejected.header("iothub-streaming-is-accepted")), (200, Some("False")));
    assert_eq!((rejected.body.as_str(), rejected.header("iothub-streaming-url")), ("", None));
    assert_eq!(rejected.header("culvert-reason"), None, "SDK services know no such header");
    assert_eq!(hub.handle.device_streams(), 0, "nothing stays reserved");

    let log = hub.config.resource_log.clone();
    let metrics = hub.metrics.clone();
    let folder = hub.folder.clone();
    assert_eq!(metrics.initiations.with_label_values(&["rejected"]).get(), 1);
    hub.stop();
    drop(device);
    let records = loop {
        let records = resource_log::read(&log).unwrap();
        if records.len() == 5 {
            break records;
        }
        tokio::task::yield_now().await;
    };
    let last = records.last().unwrap();
    let properties = last.properties().unwrap();
    assert_eq!((properties.result.as_str(), properties.reason.as_deref()), ("rejected", Some("no such target")));
    assert_eq!((properties.policy.as_str(), properties.sdk_version.as_str()), ("service", "2018-10-20-preview"));
    hub.stopped().await;
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_device_that_comes_late_is_waited_for() {
    let hub = TestHub::start().await;
    let device = async {
        // The request is there before the device is.
        while hub.handle.device_streams() == 0 {
            tokio::task::yield_now().await;
        }
        let mut device = hub.device("pump").await;
        let asked = device.asked().await;
        device.publish(&format!("$iothub/streams/res/200/?$rid={}", asked.rid)).await;
        device
    };
    let (reply, device) = tokio::join!(hub.initiate("/twins/pump/streams/s", "30", "5"), device);
    assert_eq!(reply.header("iothub-streaming-is-accepted"), Some("True"));
    let (url, port) = (reply.url(), hub.port);
    assert!(url.starts_with(&format!("wss://localhost:{port}/bridges/ih/localhost/d/pump/sid/")), "{url}");
    assert!(url.ends_with("/r/service") && !url.contains('?'));
    assert_eq!(reply.token().len(), 43);
    drop(device);
    hub.stopped().await;
}

#[tokio::test]
async fn no_route_answers_anything_but_401_to_strangers() {
    let hub = TestHub::start().await;
    let mut paths: Vec<String> = ROUTES.iter().map(|route| route.path.replace("{}", "pump")).collect();
    paths.retain(|path| path != "/$iothub/websocket");
    paths.extend(
        ["/", "/nothing", "/metrics", "/devices/..", "//devices", "/bridges/ih/h/d/pump/sid/0/r/device"]
            .map(String::from),
    );
    let expired = sign("localhost", &key(1), now() - 3600, Some(&"service".parse().unwrap()));
    let other_hub = sign("elsewhere", &key(1), now() + 60, Some(&"service".parse().unwrap()));
    let device_own = sign("localhost/devices/pump", &key(0x11), now() + 60, None);
    let tokens =
        [expired, other_hub, device_own].map(|token| format!("Authorization: {}", token.expose_str().unwrap()));
    let mut strangers = vec![vec![], vec!["Authorization: Bearer x".to_owned()], vec![hub.sas("service", 9)]];
    strangers.push(vec![hub.sas("nobody", 1)]);
    strangers.push(vec![hub.sas("service", 1), hub.sas("service", 1)]);
    strangers.extend(tokens.map(|token| vec![token]));
    for path in &paths {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let headers = &strangers[(path.len() + method.len()) % strangers.len()];
            let reply = hub.request(&format!("{method} {path}"), headers, "").await;
            assert_eq!(reply.status, 401, "{method} {path} {headers:?}");
            assert!(reply.header("www-authenticate").is_some(), "{method} {path}");
        }
    }
    for headers in &strangers {
        assert_eq!(hub.request("GET /devices", headers, "").await.status, 401, "{headers:?}");
    }
    let query = format!("GET /devices?access_token={}", hub.sas("registry", 2).replace(' ', "%20"));
    assert_eq!(hub.request(&query, &[], "").await.status, 401, "tokens in queries do not count");
    hub.stopped().await;
}

#[tokio::test]
async fn rights_and_patterns_bound_what_a_policy_may() {
    let hub = TestHub::with(|config| {
        let mut kiosks = policy("kiosks", Rights::SERVICE_CONNECT, 7);
        kiosks.devices = vec![crate::config::DevicePattern::Prefix("kiosk-".into())];
        config.policies.push(kiosks);
    })
    .await;
    let status =
        async |line: &str, policy: &str, byte: u8| hub.request(line, &[hub.sas(policy, byte)], "").await.status;
    assert_eq!(status("GET /devices", "service", 1).await, 401);
    assert_eq!(status("GET /devices", "registry", 2).await, 200);
    assert_eq!(status("POST /twins/pump/streams/s", "registry", 2).await, 401);
    assert_eq!(status("POST /twins/pump/streams/s", "weak", 4).await, 401);
    assert_eq!(status("POST /twins/pump/streams/s", "kiosks", 7).await, 401);
    assert_eq!(status("POST /twins/kiosk-1/streams/s", "kiosks", 7).await, 404);
    assert_eq!(status("GET /nothing", "weak", 4).await, 404);
    let patched = hub.request("PATCH /devices/pump", &[hub.sas("registry", 2)], "").await;
    assert_eq!((patched.status, patched.header("allow")), (405, Some("GET, PUT, DELETE")));
    let shown = hub.request("GET /deviceStreams", &[hub.sas("weak", 4)], "").await;
    let endpoint = format!("https://localhost:{}", hub.port);
    assert_eq!(shown.json(), serde_json::json!({ "streamingEndpoints": [endpoint] }));
    let foreign = vec![hub.sas("registry", 2), "Origin: https://evil.example".into()];
    assert_eq!(hub.request("GET /devices", &foreign, "").await.status, 403);
    hub.stopped().await;
}

#[tokio::test]
async fn a_connection_serves_several_requests_and_malformed_ones_end_it() {
    let hub = TestHub::start().await;
    let mut io = hub.connect().await;
    for _ in 0..3 {
        send_request(&mut io, "GET /devices/pump", &[hub.sas("registry", 2)], "").await;
        assert_eq!(read_reply(&mut io).await.status, 200);
    }
    send_request(&mut io, "GET /devices/pump", &["Transfer-Encoding: chunked".into()], "").await;
    assert_eq!(read_reply(&mut io).await.status, 400);
    let mut io = hub.connect().await;
    send_request(&mut io, "GET /devices/pump", &[format!("X: {}", "a".repeat(17_000))], "").await;
    assert_eq!(read_reply(&mut io).await.status, 431);
    // Behind a request that could have switched protocols the guard does not look: it is the last.
    let mut io = hub.connect().await;
    let upgrade = [hub.sas("registry", 2), "Connection: Upgrade".into(), "Upgrade: h2c".into()];
    send_request(&mut io, "GET /devices/pump", &upgrade, "").await;
    let reply = read_reply(&mut io).await;
    assert_eq!((reply.status, reply.header("connection")), (200, Some("close")));
    // Writing may still succeed: the end is what counts.
    let _ = io.write_all(b"GET /devices/pump HTTP/1.1\nHost: h\n\n").await;
    assert_eq!(io.read(&mut [0; 64]).await.unwrap_or(0), 0);
    hub.stopped().await;
}

#[tokio::test]
async fn strangers_fill_their_share_and_do_not_starve_others() {
    let hub = TestHub::with(|config| config.limits.max_unauthenticated_per_address = 3).await;
    let mut known = hub.connect().await;
    send_request(&mut known, "GET /devices", &[hub.sas("registry", 2)], "").await;
    assert_eq!(read_reply(&mut known).await.status, 200);
    let strangers = [hub.connect().await, hub.connect().await, hub.connect().await];
    let refused = tokio::net::TcpStream::connect(("127.0.0.1", hub.port)).await.unwrap();
    let mut byte = [0; 1];
    let ended = tokio::time::timeout(Duration::from_secs(5), async {
        refused.readable().await.unwrap();
        refused.try_read(&mut byte)
    });
    assert!(matches!(ended.await, Ok(Ok(0) | Err(_))));
    send_request(&mut known, "GET /devices", &[hub.sas("registry", 2)], "").await;
    assert_eq!(read_reply(&mut known).await.status, 200);
    assert_eq!(hub.metrics.limited.with_label_values(&["max_unauthenticated_per_address"]).get(), 1);
    drop(strangers);
    hub.stopped().await;
}

#[tokio::test]
async fn a_service_that_leaves_takes_its_request_back() {
    let hub = TestHub::start().await;
    let mut io = hub.connect().await;
    send_request(&mut io, "POST /twins/pump/streams/s", &[hub.sas("service", 1)], "").await;
    while hub.handle.device_streams() == 0 {
        tokio::task::yield_now().await;
    }
    drop(io);
    while hub.handle.device_streams() == 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(hub.metrics.initiations.with_label_values(&["abandoned"]).get(), 1);
    hub.stopped().await;
}

#[tokio::test]
async fn a_stopping_hub_answers_those_who_wait() {
    let hub = TestHub::start().await;
    let wait = async {
        while hub.handle.device_streams() == 0 {
            tokio::task::yield_now().await;
        }
        hub.stop();
    };
    let (reply, ()) = tokio::join!(hub.initiate("/twins/pump/streams/s", "60", "60"), wait);
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("5")));
    hub.stopped().await;
}
