//! The registry's REST API.

use super::support::{Reply, TestHub, policy};
use crate::auth::Rights;

#[tokio::test]
async fn identities_are_created_read_changed_and_removed() {
    let hub = TestHub::start().await;
    let sas = || vec![hub.sas("registry", 2)];
    let get = async |path: &str| hub.request(&format!("GET {path}?api-version=2021-04-12"), &sas(), "").await;
    let put = async |path: &str, more: &[&str], body: &str| -> Reply {
        let headers = [sas(), more.iter().map(ToString::to_string).collect()].concat();
        hub.request(&format!("PUT {path}"), &headers, body).await
    };
    let made = put("/devices/kiosk", &[], r#"{"deviceId":"kiosk"}"#).await;
    assert_eq!(made.status, 200, "{}", made.body);
    let device = made.json();
    assert_eq!((device["status"].as_str(), device["authentication"]["type"].as_str()), (Some("enabled"), Some("sas")));
    assert_eq!(device["connectionState"], "Disconnected");
    let key = device["authentication"]["symmetricKey"]["primaryKey"].as_str().unwrap();
    assert_eq!(crate::auth::key::decode_key(key).unwrap().expose().len(), 32, "keys are made up");
    assert_eq!(get("/devices/kiosk").await.json(), device);
    assert_eq!(put("/devices/kiosk", &[], r#"{"deviceId":"kiosk"}"#).await.error_code(), 409_001);

    // What was read can be written back, with the etag or with "*", quoted or not.
    let etag = format!("If-Match: \"{}\"", device["etag"].as_str().unwrap());
    let mut changed = device.clone();
    changed["status"] = "disabled".into();
    changed["statusReason"] = "stolen".into();
    let updated = put("/devices/kiosk", &[&etag], &changed.to_string()).await;
    assert_eq!(updated.status, 200, "{}", updated.body);
    assert_eq!(updated.json()["statusReason"], "stolen");
    assert_eq!(updated.json()["authentication"], device["authentication"]);
    assert_eq!(put("/devices/kiosk", &[&etag], &changed.to_string()).await.error_code(), 412_001);
    assert_eq!(put("/devices/kiosk", &["If-Match: \"*\""], r#"{"deviceId":"kiosk"}"#).await.status, 200);
    assert_eq!(get("/devices/kiosk").await.json()["authentication"], device["authentication"], "keys are kept");

    let list = get("/devices").await.json();
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|device| device["deviceId"].as_str().unwrap()).collect();
    assert_eq!(ids, ["kiosk", "pump"]);
    assert_eq!(put("/devices/kiosk/modules/flow", &[], r#"{"deviceId":"kiosk","moduleId":"flow"}"#).await.status, 200);
    let modules = get("/devices/kiosk/modules").await.json();
    assert_eq!((modules[0]["moduleId"].as_str(), modules[1].is_null()), (Some("flow"), true));
    assert_eq!(put("/devices/none/modules/flow", &[], r#"{"moduleId":"flow"}"#).await.error_code(), 404_001);

    let removed = hub.request("DELETE /devices/kiosk", &[sas(), vec!["If-Match: *".into()]].concat(), "").await;
    assert_eq!(removed.status, 204);
    assert_eq!(get("/devices/kiosk").await.error_code(), 404_001);
    assert_eq!(get("/devices/kiosk/modules/flow").await.error_code(), 404_010);
    hub.stopped().await;
}

#[tokio::test]
async fn certificates_are_registered_by_thumbprint_or_authority() {
    let hub = TestHub::start().await;
    let put =
        async |body: &str| hub.request("PUT /devices/x", &[hub.sas("registry", 2), "If-Match: *".into()], body).await;
    let create = r#"{"deviceId":"x","authentication":{"type":"certificateAuthority"}}"#;
    let made = hub.request("PUT /devices/x", &[hub.sas("registry", 2)], create).await;
    assert_eq!(made.json()["authentication"]["type"], "certificateAuthority");
    let print = "ab".repeat(32);
    let own = format!(
        r#"{{"deviceId":"x","authentication":{{"type":"selfSigned","x509Thumbprint":{{"primaryThumbprint":"{print}"}}}}}}"#
    );
    let made = put(&own).await.json();
    assert_eq!(made["authentication"]["x509Thumbprint"]["primaryThumbprint"], print.to_uppercase());
    assert_eq!(
        put(r#"{"authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"xy"}}}"#).await.status,
        400
    );
    hub.stopped().await;
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    let hub = TestHub::start().await;
    let put = async |path: &str, body: &str| hub.request(&format!("PUT {path}"), &[hub.sas("registry", 2)], body).await;
    for body in
        ["", "{", "[]", "null", r#"{"deviceId":"b"}"#, r#"{"deviceId":"a","moduleId":"m"}"#, r#"{"status":"maybe"}"#]
    {
        assert_eq!(put("/devices/a", body).await.error_code(), 400_004, "{body}");
    }
    let short = r#"{"authentication":{"type":"sas","symmetricKey":{"primaryKey":"YQ=="}}}"#;
    assert_eq!(put("/devices/a", short).await.status, 400);
    assert_eq!(put("/devices/a", &" ".repeat(70_000)).await.status, 413);
    for path in
        ["/devices/..", "/devices/%2e%2e", "/devices/a%2Fb", "/devices/a%00b", "/devices/a%20b", "/devices/%C3%A4"]
    {
        assert_eq!(put(path, "{}").await.status, 400, "{path}");
    }
    assert_eq!(put(&format!("/devices/{}", "x".repeat(129)), "{}").await.status, 400);
    assert_eq!(hub.request("GET /devices?top=0", &[hub.sas("registry", 2)], "").await.status, 400);
    hub.stopped().await;
}

#[tokio::test]
async fn a_policy_for_some_devices_is_for_no_other_in_the_registry_either() {
    let hub = TestHub::with(|config| {
        let mut kiosks = policy("kiosks", Rights::REGISTRY_READ.with(Rights::REGISTRY_WRITE), 7);
        kiosks.devices = vec![crate::config::DevicePattern::Prefix("kiosk-".into())];
        config.policies.push(kiosks);
    })
    .await;
    for identity in ["kiosk-1", "kiosk-1/flow", "pump/flow"] {
        hub.register(identity).await;
    }
    let status = async |line: &str| hub.request(line, &[hub.sas("kiosks", 7), "If-Match: *".into()], "{}").await.status;
    for path in ["/devices/pump", "/devices/pump/modules/flow", "/devices/none"] {
        for method in ["GET", "PUT", "DELETE"] {
            assert_eq!(status(&format!("{method} {path}")).await, 401, "{method} {path}");
        }
    }
    assert_eq!(status("GET /devices/pump/modules").await, 401);
    for line in ["GET /devices/kiosk-1", "GET /devices/kiosk-1/modules", "PUT /devices/kiosk-1/modules/flow"] {
        assert_eq!(status(line).await, 200, "{line}");
    }
    assert_eq!(status("GET /devices/kiosk-2").await, 404);
    for line in ["GET /devices", "GET /devices?top=1"] {
        let list = hub.request(line, &[hub.sas("kiosks", 7)], "").await.json();
        let ids: Vec<_> = list.as_array().unwrap().iter().map(|device| device["deviceId"].as_str().unwrap()).collect();
        assert_eq!(ids, ["kiosk-1"], "{line}");
    }
    hub.stopped().await;
}

#[tokio::test]
async fn what_is_disabled_stays_so_until_someone_says_otherwise() {
    let hub = TestHub::start().await;
    hub.register("pump/flow").await;
    for (identity, path) in [("pump", "/devices/pump"), ("pump/flow", "/devices/pump/modules/flow")] {
        let off = hub.put(identity, r#","status":"disabled","statusReason":"stolen""#, Some("*")).await.json();
        assert_eq!((&off["status"], &off["statusReason"]), (&"disabled".into(), &"stolen".into()));
        let put = async |body: &str| {
            let headers = [hub.sas("registry", 2), "If-Match: *".into()];
            hub.request(&format!("PUT {path}"), &headers, body).await.json()
        };
        let read = hub.request(&format!("GET {path}"), &[hub.sas("registry", 2)], "").await;
        for body in [read.body.as_str(), "{}"] {
            let written = put(body).await;
            assert_eq!(
                (&written["status"], &written["statusReason"]),
                (&off["status"], &off["statusReason"]),
                "{body}"
            );
        }
        let on = put(r#"{"status":"enabled"}"#).await;
        assert_eq!((&on["status"], on["statusReason"].is_null()), (&"enabled".into(), true));
    }
    hub.stopped().await;
}

#[tokio::test]
async fn who_is_registered_anew_finds_no_session() {
    let hub = TestHub::start().await;
    hub.register("pump/flow").await;
    for identity in ["pump", "pump/flow"] {
        assert!(!hub.device(identity).await.known && hub.device(identity).await.known);
    }
    while hub.metrics.device_sessions.get() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(hub.request("DELETE /devices/pump", &[hub.sas("registry", 2)], "").await.status, 204);
    for identity in ["pump", "pump/flow"] {
        hub.register(identity).await;
        assert!(!hub.device(identity).await.known, "{identity}");
    }
    hub.stopped().await;
}

#[tokio::test]
async fn a_write_that_names_no_key_undoes_no_rotation() {
    let hub = TestHub::start().await;
    let put = async |body: String| {
        let headers = [hub.sas("registry", 2), "If-Match: *".into()];
        hub.request("PUT /devices/pump", &headers, &body).await
    };
    for round in 0..20 {
        let key = crate::auth::key::encode_key(&super::support::key(round));
        let rotate = put(format!(r#"{{"authentication":{{"symmetricKey":{{"primaryKey":"{key}"}}}}}}"#));
        let enable = || put(r#"{"status":"enabled"}"#.into());
        let (rotated, ..) = tokio::join!(rotate, enable(), enable(), enable(), enable());
        assert_eq!(rotated.status, 200);
        let shown = hub.request("GET /devices/pump", &[hub.sas("registry", 2)], "").await.json();
        assert_eq!(shown["authentication"]["symmetricKey"]["primaryKey"], key, "round {round}");
    }
    hub.stopped().await;
}
