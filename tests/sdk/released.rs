//! The clients that can be had today, unmodified: azure-iothub, azure-iot-device, paho-mqtt, mosquitto, ws, websockets.

use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use sha2::Digest as _;

use crate::world::{HUB, World, echo_server, stories};

/// A device's certificate, signed by `issuer` or by itself; NAME.pem and NAME.key. Its SHA-256 and SHA-1.
fn certificate(world: &World, name: &str, issuer: Option<&CertifiedIssuer<'_, KeyPair>>) -> [String; 2] {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let made = match issuer {
        Some(issuer) => params.signed_by(&key, issuer).unwrap(),
        None => params.self_signed(&key).unwrap(),
    };
    world.write(&format!("{name}.pem"), &made.pem());
    world.write(&format!("{name}.key"), &key.serialize_pem());
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02X}")).collect();
    [hex(&sha2::Sha256::digest(made.der())), hex(&sha1::Sha1::digest(made.der()))]
}

/// Devices that prove themselves by certificates, and the CA that the hub knows.
fn certificates(world: &mut World) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "devices' CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    world.write("devices-ca.pem", &authority.pem());
    let hub = std::fs::read_to_string(world.path("hub.toml")).unwrap();
    world.write("hub.toml", &hub.replacen("[tls]", "client_ca_file = \"devices-ca.pem\"\n\n[tls]", 1));
    world.until("hub", "reloaded");
    let [sha256, sha1] = certificate(world, "self-signed", None);
    world.register_with("self-signed", &["--thumbprint", &sha256]);
    let [other, _] = certificate(world, "stranger", None);
    world.register_with("by-sha1", &["--thumbprint", &other, "--secondary-thumbprint", &sha1]);
    certificate(world, "ca-signed", Some(&authority));
    world.register_with("ca-signed", &["--ca-signed"]);
}

stories! {
    fn azure_iothub_keeps_the_registry(world) {
        let stories = [
            "devices_are_created_read_listed_updated_and_deleted",
            "errors_come_as_the_packages_types",
            "modules_are_created_read_listed_updated_and_deleted",
            "certificates_are_registered",
        ];
        world.node("registry.js", &stories);
    }

    fn azure_iot_device_is_at_home(world) {
        world.register("device-sdk");
        world.register("module-sdk");
        world.register("module-sdk/m");
        let stories = ["over_mqtt", "over_websocket", "as_a_module", "refused", "unknown_subscriptions_are_refused"];
        world.node("device.js", &stories);
        // Five messages by each of two transports for the device and the module, and five at the end.
        assert_eq!(world.metric("culvert_hub_telemetry_messages_total"), 25.0);
    }

    fn azure_iot_device_renews_its_token(world) {
        world.register("device-sdk");
        world.node("device.js", &["tokens_are_renewed"]);
    }

    fn certificates_admit_devices_on_both_ports(world) {
        certificates(world);
        world.node("device.js", &["with_a_certificate"]);
        world.python("x509.py", &["certificates_admit_and_strangers_stay_out"]);
    }

    fn a_culvert_device_comes_by_certificate(world) {
        certificates(world);
        echo_server("127.0.0.1:7000");
        let keys = "certificate_file = \"self-signed.pem\"\nprivate_key_file = \"self-signed.key\"";
        world.device_with("self-signed", keys, &["name = \"echo\"\naddress = \"127.0.0.1:7000\""]);
        world.python("mixed.py", &["a_device_by_certificate_serves_targets"]);
    }

    fn paho_and_websockets_are_a_device_and_a_service(world) {
        world.register("device-sdk");
        world.python("released.py", &["paho_answers_stream_requests", "paho_does_what_a_device_does"]);
    }

    fn the_previews_own_websocket_library_is_a_service(world) {
        world.register("device-sdk");
        world.background("echo_device.py", &["device-sdk.connection"]);
        world.node("service.js", &["websocket_stream_5_as_the_preview_used_it", "ws_8_as_it_is_today"]);
    }

    fn mosquitto_is_a_device(world) {
        world.register("device-sdk");
        let token = world.python("sas_token.py", &["device-sdk.connection"]);
        let client = |program: &str| {
            let mut command = Command::new(program);
            command.args(["-V", "mqttv311", "-h", HUB, "-p", "8883", "-i", "device-sdk", "-P", token.trim()]);
            command.args(["-u", &format!("{HUB}/device-sdk/?api-version=2020-09-30")]);
            command.arg("--cafile").arg(world.path("ca.pem"));
            command
        };
        let mut telemetry = client("mosquitto_pub");
        telemetry.args(["-q", "1", "-m", "21.5", "-t", "devices/device-sdk/messages/events/a=b"]);
        assert!(telemetry.status().unwrap().success());
        // A token of a week ago, another device's: the CONNACK's code is the program's.
        let mut refused = client("mosquitto_pub");
        refused.args(["-P", &token.replace("&se=1", "&se=2"), "-q", "1", "-m", "x", "-t", "devices/device-sdk/messages/events/"]);
        assert_eq!(refused.status().unwrap().code(), Some(5));
        let mut subscriber = client("mosquitto_sub");
        subscriber.args(["-C", "1", "-W", "30", "-q", "1", "-F", "%q %r %l %t", "-t", "$iothub/streams/POST/#"]);
        let heard = std::thread::spawn(move || subscriber.output().unwrap());
        world.python("errors.py", &["a_device_that_only_listens"]);
        let heard = String::from_utf8(heard.join().unwrap().stdout).unwrap();
        assert!(heard.starts_with("0 0 0 $iothub/streams/POST/TestStream/?$rid="), "{heard}");
    }
}
