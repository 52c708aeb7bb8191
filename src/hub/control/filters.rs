//! Which topics a control session has subscribed to.
//!
//! Owns the list of filters that exist for a device. Does not know packets.
//! Invariant: a filter that names another identity is refused.

use percent_encoding::percent_decode_str;

use crate::{
    base::Identity,
    proto::{
        control::{REQUEST_FILTER, RESPONSE_FILTER},
        mqtt::Qos,
    },
};

const TWIN_ANSWERS: &str = "$iothub/twin/res/#";
const TWIN_CHANGES: &str = "$iothub/twin/PATCH/properties/desired/#";
const METHODS: &str = "$iothub/methods/POST/#";

/// A session's subscriptions: those that the hub ever publishes on.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Filters {
    stream_requests: bool,
    twin_answers: bool,
}

impl Filters {
    /// Adds a filter and returns the granted QoS: at most what was asked for and never 2; `None` refuses.
    pub(super) fn add(&mut self, filter: &str, asked: Qos, identity: &Identity) -> Option<Qos> {
        match filter {
            REQUEST_FILTER => self.stream_requests = true,
            TWIN_ANSWERS => self.twin_answers = true,
            RESPONSE_FILTER | TWIN_CHANGES | METHODS => {}
            other if is_own(other, identity) => {}
            _ => return None,
        }
        Some(asked.min(Qos::AtLeastOnce))
    }

    /// Removes a filter.
    pub(super) fn remove(&mut self, filter: &str) {
        match filter {
            REQUEST_FILTER => self.stream_requests = false,
            TWIN_ANSWERS => self.twin_answers = false,
            _ => {}
        }
    }

    /// The device is ready for stream requests.
    pub(super) fn stream_requests(&self) -> bool {
        self.stream_requests
    }

    /// The device listens for answers about its twin.
    pub(super) fn twin_answers(&self) -> bool {
        self.twin_answers
    }
}

/// `devices/{id}/messages/devicebound/#`, or for a module anything below `devices/{id}/modules/{mid}/`. The IDs may
/// be percent-encoded.
fn is_own(filter: &str, identity: &Identity) -> bool {
    let same = |level: &str, id: &str| level == id || percent_decode_str(level).eq(id.bytes());
    let levels: Vec<&str> = filter.split('/').collect();
    match (levels.as_slice(), &identity.module) {
        (["devices", device, "messages", "devicebound", "#"], None) => same(device, identity.device.as_str()),
        (["devices", device, "modules", module, .., "#"], Some(own)) => {
            same(device, identity.device.as_str()) && same(module, own.as_str())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_sdks_ask_for_is_granted_and_nothing_else() {
        let (device, module): (Identity, Identity) = ("pump-17".parse().unwrap(), "pump-17/flow".parse().unwrap());
        let mut filters = Filters::default();
        let mut add = |filter: &str, who: &Identity| filters.add(filter, Qos::ExactlyOnce, who);
        for (filter, who) in [
            ("$iothub/streams/POST/#", &device),
            ("$iothub/streams/res/#", &device),
            ("$iothub/methods/POST/#", &device),
            ("$iothub/twin/res/#", &module),
            ("$iothub/twin/PATCH/properties/desired/#", &module),
            ("devices/pump-17/messages/devicebound/#", &device),
            ("devices/pump%2d17/messages/devicebound/#", &device),
            ("devices/pump-17/modules/flow/#", &module),
            ("devices/pump-17/modules/flow/inputs/#", &module),
        ] {
            assert_eq!(add(filter, who), Some(Qos::AtLeastOnce), "{filter}");
        }
        for (filter, who) in [
            ("#", &device),
            ("$iothub/#", &device),
            ("devices/#", &device),
            ("devices/+/messages/devicebound/#", &device),
            ("devices/pump-18/messages/devicebound/#", &device),
            ("devices/pump-17/modules/other/#", &module),
            ("devices/pump-17/modules/flow/#", &device),
            ("$SYS/#", &device),
        ] {
            assert_eq!(add(filter, who), None, "{filter}");
        }
        assert!(filters.stream_requests() && filters.twin_answers());
        filters.remove("$iothub/streams/POST/#");
        assert!(!filters.stream_requests());
        assert_eq!(filters.add("$iothub/streams/POST/#", Qos::AtMostOnce, &device), Some(Qos::AtMostOnce));
    }
}
