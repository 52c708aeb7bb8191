//! The route table of the public listener.
//!
//! Owns which paths exist, their methods, and what each asks of its caller. Does not know handlers' work.
//! Invariant: a path leads to its route only as written here, segment by segment, percent-decoded once.

use http::Method;
use percent_encoding::percent_decode_str;

use crate::auth::Rights;

/// What a route is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hub) enum Endpoint {
    Stream,
    Devices,
    Device,
    Modules,
    Module,
    DeviceStreams,
    Bridge,
    Mqtt,
}

/// What a route asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hub) enum Access {
    /// A policy's token; reading needs the first right, writing the second.
    Policy { read: Rights, write: Rights },
    /// A ticket.
    Ticket,
    /// Nothing yet: the device logs in over MQTT.
    Login,
}

/// A row of the table.
#[derive(Debug)]
pub(in crate::hub) struct Route {
    pub(in crate::hub) endpoint: Endpoint,
    /// The metric's label.
    pub(in crate::hub) label: &'static str,
    pub(in crate::hub) methods: &'static [Method],
    /// `{}` stands for any one segment.
    pub(in crate::hub) path: &'static str,
    pub(in crate::hub) access: Access,
}

const SERVICE: Access = Access::Policy { read: Rights::SERVICE_CONNECT, write: Rights::SERVICE_CONNECT };
const REGISTRY: Access = Access::Policy { read: Rights::REGISTRY_READ, write: Rights::REGISTRY_WRITE };
/// Whoever may do anything here may know where the streams are.
const ANY_POLICY: Access = Access::Policy { read: Rights::NONE, write: Rights::NONE };
const READ_WRITE: &[Method] = &[Method::GET, Method::PUT, Method::DELETE];

/// Every path of the public listener.
pub(in crate::hub) const ROUTES: [Route; 11] = [
    route(Endpoint::Stream, "streams", &[Method::POST], "/twins/{}/streams/{}", SERVICE),
    route(Endpoint::Stream, "streams", &[Method::POST], "/twins/{}/modules/{}/streams/{}", SERVICE),
    route(Endpoint::Devices, "devices", &[Method::GET], "/devices", REGISTRY),
    // As azure-iothub for Node asks for the list.
    route(Endpoint::Devices, "devices", &[Method::GET], "/devices/", REGISTRY),
    route(Endpoint::Device, "devices", READ_WRITE, "/devices/{}", REGISTRY),
    route(Endpoint::Modules, "modules", &[Method::GET], "/devices/{}/modules", REGISTRY),
    route(Endpoint::Module, "modules", READ_WRITE, "/devices/{}/modules/{}", REGISTRY),
    route(Endpoint::DeviceStreams, "device_streams", &[Method::GET], "/deviceStreams", ANY_POLICY),
    route(Endpoint::Bridge, "bridges", &[Method::GET], "/bridges/ih/{}/d/{}/sid/{}/r/{}", Access::Ticket),
    route(Endpoint::Bridge, "bridges", &[Method::GET], "/bridges/ih/{}/d/{}/m/{}/sid/{}/r/{}", Access::Ticket),
    route(Endpoint::Mqtt, "mqtt", &[Method::GET], "/$iothub/websocket", Access::Login),
];

const fn route(
    endpoint: Endpoint,
    label: &'static str,
    methods: &'static [Method],
    path: &'static str,
    access: Access,
) -> Route {
    Route { endpoint, label, methods, path, access }
}

/// The route of a path, and what stands in its gaps.
pub(in crate::hub) fn find(path: &str) -> Option<(&'static Route, Vec<String>)> {
    ROUTES.iter().find_map(|route| Some((route, match_path(route.path, path)?)))
}

fn match_path(pattern: &str, path: &str) -> Option<Vec<String>> {
    let mut gaps = Vec::new();
    let mut given = path.split('/');
    for wanted in pattern.split('/') {
        let segment = percent_decode_str(given.next()?).decode_utf8().ok()?;
        match wanted {
            "{}" if !segment.is_empty() => gaps.push(segment.into_owned()),
            _ if wanted == segment => {}
            _ => return None,
        }
    }
    given.next().is_none().then_some(gaps)
}

/// Any bytes as a path: a route whose gaps are filled, or nothing. For fuzzers.
///
/// # Panics
/// If a gap is empty.
pub fn fuzz_path(data: &[u8]) {
    if let Some((_, gaps)) = find(&String::from_utf8_lossy(data)) {
        assert!(gaps.iter().all(|gap| !gap.is_empty()), "a gap holds something");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_whole_and_decode_once() {
        let gaps = |path| find(path).map(|(route, gaps)| (route.endpoint, gaps));
        assert_eq!(gaps("/twins/a%2Fb/streams/s"), Some((Endpoint::Stream, vec!["a/b".into(), "s".into()])));
        assert_eq!(gaps("/devices/a%252e"), Some((Endpoint::Device, vec!["a%2e".into()])));
        assert_eq!(gaps("/%24iothub/websocket"), Some((Endpoint::Mqtt, vec![])));
        assert_eq!(gaps("/devices/"), Some((Endpoint::Devices, vec![])));
        for path in ["/", "/devices//", "/devices//x", "/Devices", "/devices/a/", "//devices", "/devices/../x/y", ""] {
            assert_eq!(gaps(path), None, "{path}");
        }
    }
}
