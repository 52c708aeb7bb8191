use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls_pki_types::CertificateDer;

use super::*;
use crate::{
    config::FileContents,
    hub::{courier::InviteError, record::Thumbprint},
};

const MINUTE: Duration = Duration::from_secs(60);
const STREAMS: [&str; 2] = ["$iothub/streams/POST/#", "$iothub/streams/res/#"];

fn invitation(rid: &str) -> Invitation {
    Invitation {
        stream: "TestStream".parse().unwrap(),
        url: "wss://hub.example.com:443/bridges/ih/hub/d/pump/sid/00ff/r/device".into(),
        ticket: Secret::new("tok"),
        policy: "service".parse().unwrap(),
        rid: rid.into(),
    }
}

/// A device that is attached and subscribed.
async fn ready(hub: &Arc<HubShared>, client: &str) -> Dialogue<TcpStream> {
    let mut device = Dialogue::tcp(hub, Vec::new()).await;
    assert_eq!(device.log_in(&connect("pump", client, Some(token("pump", &key(1))))).await, ConnectCode::Accepted);
    assert_eq!(device.subscribe(&STREAMS).await, [Some(Qos::AtMostOnce); 2]);
    device
}

async fn requested(device: &mut Dialogue<TcpStream>) -> String {
    match device.packet().await {
        Some(Packet::Publish(Publish { topic, payload, id: None, retain: false, .. })) if payload.is_empty() => topic,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_request_reaches_an_sdk_device_and_its_answer_comes_back() {
    let hub = hub().await;
    let mut device = ready(&hub, NODE).await;
    let pump = id("pump");
    let answering = async {
        let topic = requested(&mut device).await;
        assert_eq!(
            topic,
            "$iothub/streams/POST/TestStream/?$rid=r1&$url=wss%3A%2F%2Fhub.example.com%3A443%2Fbridges%2Fih%2Fhub\
             %2Fd%2Fpump%2Fsid%2F00ff%2Fr%2Fdevice&$auth=tok"
        );
        device.publish("$iothub/streams/res/200/?$rid=unknown").await;
        device.publish("$iothub/streams/res/200/?$rid=r1").await;
    };
    let (answer, ()) = tokio::join!(hub.courier.invite(&pump, invitation("r1"), MINUTE, MINUTE), answering);
    assert_eq!(answer.map(|answered| answered.answer), Ok(Answer { accepted: true, reason: None }));
    assert_eq!(hub.metrics.device_sessions.get(), 1);
    device.send(&Packet::Disconnect).await;
    assert!(matches!(device.end().await, End::Left));
    assert_eq!(hub.metrics.device_sessions.get(), 0);
    assert!(!hub.courier.is_attached(&pump));
}

#[tokio::test]
async fn a_culvert_device_learns_the_policy_and_says_why_it_rejects() {
    let hub = hub().await;
    let mut device = ready(&hub, CULVERT).await;
    let pump = id("pump");
    let answering = async {
        let topic = requested(&mut device).await;
        assert!(topic.ends_with("&$policy=service"), "{topic}");
        device.publish("$iothub/streams/res/400/?$rid=r1&$reason=no%20such%20target").await;
    };
    let (answer, ()) = tokio::join!(hub.courier.invite(&pump, invitation("r1"), MINUTE, MINUTE), answering);
    assert_eq!(
        answer.map(|answered| answered.answer),
        Ok(Answer { accepted: false, reason: Some("no such target".into()) })
    );
}

#[tokio::test]
async fn a_device_that_has_not_subscribed_or_no_longer_is_not_online() {
    let hub = hub().await;
    let mut device = ready(&hub, NODE).await;
    let filters = vec![STREAMS[0].to_owned()];
    device.send(&Packet::Unsubscribe { id: PacketId::new(9).unwrap(), filters }).await;
    assert_eq!(device.packet().await, Some(Packet::UnsubAck(PacketId::new(9).unwrap())));
    let absent = hub.courier.invite(&id("pump"), invitation("r1"), Duration::ZERO, MINUTE).await;
    assert_eq!(absent.unwrap_err(), InviteError::NotOnline);
}

#[tokio::test]
async fn what_sdks_do_besides_streams_is_tolerated() {
    let hub = hub().await;
    let mut device = ready(&hub, NODE).await;
    let others = ["$iothub/twin/res/#", "$iothub/methods/POST/#", "devices/pump/messages/devicebound/#"];
    assert_eq!(device.subscribe(&others).await, [Some(Qos::AtMostOnce); 3]);
    assert_eq!(device.subscribe(&["#", "devices/kiosk/messages/devicebound/#"]).await, [None; 2]);

    let telemetry = |topic: &str| {
        let message = Publish::at_most_once(topic, Bytes::from(vec![7; 200 * 1024]));
        Packet::Publish(Publish { id: PacketId::new(77), dup: true, ..message })
    };
    for topic in ["devices/pump/messages/events/a=b", "devices/kiosk/messages/events/", "anything/else"] {
        device.send(&telemetry(topic)).await;
        assert_eq!(device.packet().await, Some(Packet::PubAck(PacketId::new(77).unwrap())), "{topic}");
    }
    assert_eq!(hub.metrics.telemetry.get(), 1);

    device.publish("$iothub/methods/res/200/?$rid=1").await;
    device.publish("$iothub/twin/PATCH/properties/reported/?$rid=8").await;
    let Some(Packet::Publish(patched)) = device.packet().await else { panic!() };
    assert_eq!((patched.topic.as_str(), patched.payload.len()), ("$iothub/twin/res/204/?$rid=8&$version=2", 0));
    device.publish("$iothub/twin/GET/?$rid=9").await;
    let Some(Packet::Publish(twin)) = device.packet().await else { panic!() };
    assert_eq!(twin.topic, "$iothub/twin/res/200/?$rid=9");
    assert_eq!(twin.payload, r#"{"desired":{"$version":1},"reported":{"$version":2}}"#);
    device.send(&Packet::PingReq).await;
    assert_eq!(device.packet().await, Some(Packet::PingResp));
}

#[tokio::test]
async fn every_kind_of_token_that_may_connect_does() {
    let hub = hub().await;
    let policy = |name: &str, byte| sign(HOST, &key(byte), in_an_hour(), Some(&name.parse().unwrap()));
    for (identity, password) in [
        ("pump", token("pump", &key(1))),
        ("pump", token("pump", &key(2))),
        ("pump/flow", token("pump/flow", &key(4))),
        ("pump/flow", token("pump", &key(3))),
        ("pump", policy("device", 0xd0)),
        ("pump/flow", policy("device", 0xd0)),
    ] {
        let mut device = Dialogue::tcp(&hub, Vec::new()).await;
        let code = device.log_in(&connect(identity, NODE, Some(password))).await;
        assert_eq!(code, ConnectCode::Accepted, "{identity}");
    }
}

#[tokio::test]
async fn every_refusal_looks_the_same_from_outside() {
    let hub = hub().await;
    put(&hub.registry, "off", Authentication::Keys { primary: key(1), secondary: key(2) }, false).await;
    put(&hub.registry, "x509", Authentication::Authority, true).await;
    let policy = |name: &str, byte| sign(HOST, &key(byte), in_an_hour(), Some(&name.parse().unwrap()));
    let late = sign("hub.example.com/devices/pump", &key(1), in_an_hour() - 3600 - 301, None);
    for (what, identity, password) in [
        ("an unknown device", "nobody", Some(token("nobody", &key(1)))),
        ("a wrong key", "pump", Some(token("pump", &key(9)))),
        ("a disabled device", "off", Some(token("off", &key(1)))),
        ("an expired token", "pump", Some(late)),
        ("another's token", "pump", Some(token("kiosk", &key(5)))),
        ("a module's token for its device", "pump", Some(token("pump/flow", &key(1)))),
        ("a policy that may not connect", "pump", Some(policy("service", 0x50))),
        ("a policy that does not exist", "pump", Some(policy("nobody", 0xd0))),
        ("a policy's token for no device", "nobody", Some(policy("device", 0xd0))),
        ("a token where a certificate is registered", "x509", Some(token("x509", &key(1)))),
        ("no token", "pump", None),
        ("an empty token", "pump", Some(Secret::new([]))),
        ("not a token", "pump", Some(Secret::new([0xff, 0xfe]))),
    ] {
        let mut device = Dialogue::tcp(&hub, Vec::new()).await;
        device.send(&connect(identity, NODE, password)).await;
        let mut answer = Vec::new();
        device.io.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"\x20\x02\x00\x05", "{what}");
        assert!(matches!(device.end().await, End::Refused(_)), "{what}");
    }
    assert_eq!(hub.metrics.control_sessions.with_label_values(&["unauthorized"]).get(), 13);
    assert_eq!(hub.courier.sessions(), 0);
}

#[tokio::test]
async fn a_module_of_a_disabled_device_stays_out() {
    let hub = hub().await;
    put(&hub.registry, "pump", Authentication::Keys { primary: key(1), secondary: key(2) }, false).await;
    let mut device = Dialogue::tcp(&hub, Vec::new()).await;
    let code = device.log_in(&connect("pump/flow", NODE, Some(token("pump/flow", &key(3))))).await;
    assert_eq!(code, ConnectCode::NotAuthorized);
}

#[tokio::test]
async fn malformed_names_have_their_own_codes() {
    let hub = hub().await;
    let named = |client_id: &str, username: &str| {
        let Packet::Connect(connect) = connect("pump", NODE, Some(token("pump", &key(1)))) else { panic!() };
        Packet::Connect(Box::new(Connect { client_id: client_id.into(), username: Some(username.into()), ..*connect }))
    };
    for (client_id, username, code) in [
        ("", "hub.example.com//?api-version=1", ConnectCode::IdentifierRejected),
        ("a b", "hub.example.com/a b/?api-version=1", ConnectCode::IdentifierRejected),
        ("pump/flow/x", "hub.example.com/pump/flow/x/?api-version=1", ConnectCode::IdentifierRejected),
        ("../pump", "hub.example.com/../pump/?api-version=1", ConnectCode::IdentifierRejected),
        ("pump", "hub.example.com/kiosk/?api-version=1", ConnectCode::BadCredentials),
        ("pump", "other.example.com/pump/?api-version=1", ConnectCode::BadCredentials),
        ("pump", "HUB.example.com/pump/api-version=2016-11-14", ConnectCode::Accepted),
    ] {
        let mut device = Dialogue::tcp(&hub, Vec::new()).await;
        assert_eq!(device.log_in(&named(client_id, username)).await, code, "{client_id} {username}");
    }
}

#[tokio::test]
async fn the_newest_session_wins_and_the_same_request_goes_to_it() {
    let hub = hub().await;
    let mut old = ready(&hub, NODE).await;
    let pump = id("pump");
    let renewing = async {
        assert!(requested(&mut old).await.contains("$rid=r1"));
        // Token renewal: make before break. The old session ends by itself.
        let mut new = ready(&hub, NODE).await;
        assert_eq!(old.packet().await, None);
        let end = old.end().await;
        assert_eq!(end.close(), (4001, "taken over"));
        assert!(requested(&mut new).await.contains("$rid=r1"));
        new.publish("$iothub/streams/res/200/?$rid=r1").await;
        new
    };
    let (answer, new) = tokio::join!(hub.courier.invite(&pump, invitation("r1"), MINUTE, MINUTE), renewing);
    assert!(answer.unwrap().answer.accepted);
    assert_eq!(hub.courier.sessions(), 1);
    drop(new);
    until(|| hub.metrics.device_sessions.get() == 0).await;
}

#[tokio::test]
async fn revocation_ends_what_it_admitted_and_nothing_else() {
    let hub = hub().await;
    let keys = |first, second| Authentication::Keys { primary: key(first), secondary: key(second) };
    let mut device = ready(&hub, NODE).await;
    // The other key is exchanged, another device changes: nothing happens to this session.
    put(&hub.registry, "pump", keys(1, 0x77), true).await;
    put(&hub.registry, "kiosk", keys(8, 9), false).await;
    device.send(&Packet::PingReq).await;
    assert_eq!(device.packet().await, Some(Packet::PingResp));
    put(&hub.registry, "pump", keys(0x78, 0x77), true).await;
    assert!(matches!(device.end().await, End::Revoked));

    put(&hub.registry, "pump", keys(1, 2), true).await;
    let device = ready(&hub, NODE).await;
    put(&hub.registry, "pump", keys(1, 2), false).await;
    assert!(matches!(device.end().await, End::Revoked));

    put(&hub.registry, "pump", keys(1, 2), true).await;
    let device = ready(&hub, NODE).await;
    hub.registry.delete(&id("pump"), Precondition::Any).await.unwrap();
    assert!(matches!(device.end().await, End::Revoked));
}

#[tokio::test]
async fn a_policys_new_key_ends_sessions_of_the_old_one() {
    let hub = hub().await;
    let mut device = Dialogue::tcp(&hub, Vec::new()).await;
    let password = sign(HOST, &key(0xd0), in_an_hour(), Some(&"device".parse().unwrap()));
    assert_eq!(device.log_in(&connect("pump", NODE, Some(password))).await, ConnectCode::Accepted);
    let mut changed = config();
    changed.policies[0].primary_key = key(0xd1);
    hub.reconfigure(changed);
    assert!(matches!(device.end().await, End::Revoked));
}

#[tokio::test]
async fn max_token_lifetime_refuses_what_lives_longer() {
    let hub = hub().await;
    for (longest, code) in [
        (None, ConnectCode::Accepted),
        (Some(Duration::from_secs(3600)), ConnectCode::Accepted),
        (Some(Duration::from_secs(1800)), ConnectCode::NotAuthorized),
    ] {
        let mut limited = config();
        limited.limits.max_token_lifetime = longest;
        hub.reconfigure(limited);
        let mut device = Dialogue::tcp(&hub, Vec::new()).await;
        let answer = device.log_in(&connect("pump", NODE, Some(token("pump", &key(1))))).await;
        assert_eq!(answer, code, "{longest:?}");
    }
}

#[tokio::test]
async fn shutdown_and_a_full_hub_are_told() {
    let hub = hub().await;
    let device = ready(&hub, NODE).await;
    let mut full = config();
    full.limits.max_sessions = 1;
    hub.reconfigure(full);
    let mut second = Dialogue::tcp(&hub, Vec::new()).await;
    let code = second.log_in(&connect("kiosk", NODE, Some(token("kiosk", &key(5))))).await;
    assert_eq!(code, ConnectCode::ServerUnavailable);
    assert!(matches!(second.end().await, End::Full));
    // Its own session is a device's to replace.
    let successor = ready(&hub, NODE).await;
    assert!(matches!(device.end().await, End::TakenOver));
    let device = successor;
    let stranger = Dialogue::tcp(&hub, Vec::new()).await;
    hub.shutdown.cancel();
    assert!(matches!(device.end().await, End::Shutdown));
    assert!(matches!(stranger.end().await, End::Shutdown));
}

fn self_signed(name: &str) -> CertificateDer<'static> {
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
}

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, common_name: &str) -> CertificateDer<'static> {
        self.issue_until(common_name, std::time::SystemTime::now() + Duration::from_secs(3600))
    }

    fn issue_until(&self, common_name: &str, end: std::time::SystemTime) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.not_after = end.into();
        params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().der().clone()
    }
}

#[tokio::test]
async fn a_registered_thumbprint_opens_and_another_does_not() {
    use sha2::Digest as _;
    let hub = hub().await;
    let (primary, secondary, stranger) = (self_signed("a"), self_signed("b"), self_signed("c"));
    let sha256: Thumbprint = Thumbprint::from_digest(&sha2::Sha256::digest(&primary));
    let sha1: Thumbprint = Thumbprint::from_digest(&sha1::Sha1::digest(&secondary));
    assert_eq!((sha256.as_str().len(), sha1.as_str().len()), (64, 40));
    let both = Authentication::SelfSigned { primary: Some(sha256.clone()), secondary: Some(sha1) };
    put(&hub.registry, "cam", both, true).await;
    let mut sessions = Vec::new();
    for (certificates, code) in [
        (vec![stranger], ConnectCode::NotAuthorized),
        (Vec::new(), ConnectCode::NotAuthorized),
        (vec![primary], ConnectCode::Accepted),
        (vec![secondary], ConnectCode::Accepted),
    ] {
        let mut device = Dialogue::tcp(&hub, certificates).await;
        assert_eq!(device.log_in(&connect("cam", NODE, None)).await, code);
        sessions.push(device);
    }
    // The secondary's session lives until its thumbprint is taken out.
    let first = Authentication::SelfSigned { primary: Some(sha256), secondary: None };
    put(&hub.registry, "cam", first, true).await;
    assert!(matches!(sessions.pop().unwrap().end().await, End::Revoked));
}

#[tokio::test]
async fn the_device_ca_vouches_for_the_common_name_only() {
    let mut with_ca = config();
    let (ours, other) = (Ca::new(), Ca::new());
    with_ca.client_ca = Some(FileContents { path: "devices.pem".into(), contents: ours.pem.clone().into_bytes() });
    let hub = hub().await;
    hub.reconfigure(with_ca);
    for name in ["cam", "cam/lens", "cam2"] {
        put(&hub.registry, name, Authentication::Authority, true).await;
    }
    for (identity, certificate, code) in [
        ("cam", ours.issue("cam"), ConnectCode::Accepted),
        ("cam/lens", ours.issue("cam/lens"), ConnectCode::Accepted),
        ("cam", ours.issue("cam2"), ConnectCode::NotAuthorized),
        ("cam/lens", ours.issue("cam"), ConnectCode::NotAuthorized),
        ("cam", other.issue("cam"), ConnectCode::NotAuthorized),
        ("cam", self_signed("cam"), ConnectCode::NotAuthorized),
        ("pump", ours.issue("pump"), ConnectCode::NotAuthorized),
        ("nobody", ours.issue("nobody"), ConnectCode::NotAuthorized),
        ("cam", CertificateDer::from(vec![0x30, 0x82]), ConnectCode::NotAuthorized),
    ] {
        let mut device = Dialogue::tcp(&hub, vec![certificate]).await;
        assert_eq!(device.log_in(&connect(identity, NODE, None)).await, code, "{identity}");
    }
}

#[tokio::test]
async fn a_device_ca_that_is_withdrawn_ends_what_it_vouched_for() {
    let (one, two) = (Ca::new(), Ca::new());
    let with = |pem: String| {
        let mut config = config();
        config.client_ca = Some(FileContents { path: "devices.pem".into(), contents: pem.into_bytes() });
        config
    };
    let hub = hub().await;
    hub.reconfigure(with(one.pem.clone()));
    for name in ["cam", "cam2"] {
        put(&hub.registry, name, Authentication::Authority, true).await;
    }
    let mut first = Dialogue::tcp(&hub, vec![one.issue("cam")]).await;
    assert_eq!(first.log_in(&connect("cam", NODE, None)).await, ConnectCode::Accepted);
    // A second one ends nothing.
    hub.reconfigure(with(format!("{}{}", two.pem, one.pem)));
    let mut second = Dialogue::tcp(&hub, vec![two.issue("cam2")]).await;
    assert_eq!(second.log_in(&connect("cam2", NODE, None)).await, ConnectCode::Accepted);
    first.send(&Packet::PingReq).await;
    assert_eq!(first.packet().await, Some(Packet::PingResp));
    hub.reconfigure(with(two.pem.clone()));
    assert!(matches!(first.end().await, End::Revoked));
    second.send(&Packet::PingReq).await;
    assert_eq!(second.packet().await, Some(Packet::PingResp));
}

#[tokio::test]
async fn a_session_ends_with_the_certificate_that_a_device_ca_vouched_for() {
    let ca = Ca::new();
    let mut with_ca = config();
    with_ca.client_ca = Some(FileContents { path: "devices.pem".into(), contents: ca.pem.clone().into_bytes() });
    let hub = hub().await;
    hub.reconfigure(with_ca);
    put(&hub.registry, "cam", Authentication::Authority, true).await;
    // Certificates count in whole seconds.
    let end = std::time::SystemTime::now() + Duration::from_secs(3);
    let mut device = Dialogue::tcp(&hub, vec![ca.issue_until("cam", end)]).await;
    assert_eq!(device.log_in(&connect("cam", NODE, None)).await, ConnectCode::Accepted);
    assert!(matches!(device.end().await, End::Expired));
}

#[tokio::test(start_paused = true)]
async fn a_bulk_import_is_looked_at_once_a_second_and_a_revocation_in_it_takes_effect() {
    let hub = hub().await;
    let (identity, admission) = (id("pump"), crate::hub::record::Admission::Key(key(1)));
    let began = Instant::now();
    let importing = async {
        for n in 0..40u8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let keys = Authentication::Keys { primary: key(1), secondary: key(2) };
            put(&hub.registry, &format!("new-{n}"), keys, true).await;
        }
        put(&hub.registry, "pump", Authentication::Authority, true).await;
        began.elapsed()
    };
    let revoked = async {
        hub.revoked(&identity, &admission).await;
        began.elapsed()
    };
    let (written, noticed) = tokio::join!(importing, revoked);
    assert!(noticed >= written && noticed <= written + Duration::from_secs(1), "{written:?} {noticed:?}");
}

#[tokio::test]
async fn a_session_that_is_not_clean_finds_its_subscriptions_again() {
    let hub = hub().await;
    let mut present = Vec::new();
    for clean in [false, false, true, false] {
        let Packet::Connect(mut login) = connect("pump", NODE, Some(token("pump", &key(1)))) else { unreachable!() };
        login.clean_session = clean;
        let mut device = Dialogue::tcp(&hub, Vec::new()).await;
        device.send(&Packet::Connect(login)).await;
        let Some(Packet::ConnAck { session_present, .. }) = device.packet().await else { panic!("no CONNACK") };
        present.push(session_present);
        if session_present {
            let pump = id("pump");
            let answering = async {
                requested(&mut device).await;
                device.publish("$iothub/streams/res/200/?$rid=r1").await;
            };
            let (answer, ()) = tokio::join!(hub.courier.invite(&pump, invitation("r1"), MINUTE, MINUTE), answering);
            assert!(answer.is_ok_and(|answered| answered.answer.accepted), "it is subscribed without having asked");
        } else {
            device.subscribe(&STREAMS).await;
        }
        device.send(&Packet::Disconnect).await;
        assert!(matches!(device.end().await, End::Left));
    }
    assert_eq!(present, [false, true, false, false], "a clean session forgets what was, and is not kept");
}
