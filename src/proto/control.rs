//! What a device and the hub say to each other in MQTT topics (wire.md, sections b and j).
//!
//! Owns the topics: stream requests, answers, the loss notice, twins, telemetry. Does not know MQTT packets or
//! sessions. Invariant: a topic written here has exactly one non-empty key and one non-empty value in every pair,
//! because an empty value makes the C SDK abort.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::base::{IdError, Identity, Name, Secret, StreamName};

/// The filter that makes a device ready for streams.
pub const REQUEST_FILTER: &str = "$iothub/streams/POST/#";
/// The filter for answers, which the SDKs subscribe to and the hub never publishes on.
pub const RESPONSE_FILTER: &str = "$iothub/streams/res/#";
/// Longest reason that an answer carries, in bytes before encoding (wire.md, j).
pub const MAX_REASON: usize = 256;

/// What a status that is no number counts as.
const REJECTED: u16 = 400;
const REQUEST_PREFIX: &str = "$iothub/streams/POST/";
const ANSWER_PREFIX: &str = "$iothub/streams/res/";
const LOST_PREFIX: &str = "$culvert/streams/lost/?sid=";
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why a topic is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// Not of the form that its prefix promises.
    #[error("the topic is not of the form {0}")]
    Form(&'static str),
    /// A key is missing or empty.
    #[error("the topic has no {0}")]
    Missing(&'static str),
    /// A name in it is not a name.
    #[error("in the topic: {0}")]
    Id(#[from] IdError),
}

/// A request for a device stream, from the hub to the device.
#[derive(Debug, Clone)]
pub struct StreamRequest {
    /// The device stream's name.
    pub stream: StreamName,
    /// Ties the answer to the request: a lower-case UUID.
    pub rid: String,
    /// Where the device's leg connects: `wss://host:port/path`, always with a port.
    pub url: String,
    /// The ticket that admits the device's leg.
    pub ticket: Secret,
    /// The policy that asks. Sent to culvert devices only.
    pub policy: Option<Name>,
}

/// A device's answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamAnswer {
    /// The request it answers.
    pub rid: String,
    /// 200 accepts, 400 rejects; any other 2xx counts as accepting.
    pub status: u16,
    /// Why it was rejected, for a person. Sent by culvert devices only.
    pub reason: Option<String>,
}

/// The meaning of a topic that a device published on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceTopic<'a> {
    /// An answer to a stream request.
    Answer(StreamAnswer),
    /// The device's leg of the bridge with this stream ID is gone.
    Lost(&'a str),
    /// Telemetry of this identity.
    Telemetry(Identity),
    /// A wish for the twin.
    TwinGet {
        /// The request ID to answer with.
        rid: &'a str,
    },
    /// A change of the twin's reported properties.
    TwinPatch {
        /// The request ID to answer with.
        rid: &'a str,
    },
    /// The result of a direct method, which this hub never calls.
    MethodResponse,
    /// Anything else: tolerated and dropped.
    Other,
}

impl StreamRequest {
    /// The topic that carries the request. Keys of ours are added only `for_culvert`.
    pub fn to_topic(&self, for_culvert: bool) -> String {
        let url = utf8_percent_encode(&self.url, COMPONENT);
        let ticket = self.ticket.expose_str().unwrap_or_default();
        let Self { stream, rid, .. } = self;
        let mut topic = format!("{REQUEST_PREFIX}{stream}/?$rid={rid}&$url={url}&$auth={ticket}");
        if let Some(policy) = self.policy.as_ref().filter(|_| for_culvert) {
            topic.push_str(&format!("&$policy={policy}"));
        }
        topic
    }

    /// Reads the topic of a request, as a device.
    pub fn parse(topic: &str) -> Result<Self, TopicError> {
        const FORM: TopicError = TopicError::Form("$iothub/streams/POST/NAME/?KEY=VALUE&...");
        let rest = topic.strip_prefix(REQUEST_PREFIX).ok_or(FORM)?;
        let (stream, query) = rest.split_once('/').ok_or(FORM)?;
        if query.contains('/') {
            return Err(FORM);
        }
        let value = |key| value_of(query, key);
        let url = value("$url").ok_or(TopicError::Missing("$url"))?;
        Ok(Self {
            stream: stream.parse()?,
            rid: value("$rid").ok_or(TopicError::Missing("$rid"))?.into(),
            url: percent_decode_str(url).decode_utf8().map_err(|_| FORM)?.into(),
            ticket: Secret::new(value("$auth").ok_or(TopicError::Missing("$auth"))?),
            policy: value("$policy").map(str::parse).transpose()?,
        })
    }
}

impl StreamAnswer {
    /// True if the device takes the stream.
    pub fn is_accepted(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The topic that carries the answer.
    pub fn to_topic(&self) -> String {
        let Self { rid, status, reason } = self;
        let topic = format!("{ANSWER_PREFIX}{status}/?$rid={rid}");
        match reason.as_deref().map(|text| shorten(text, MAX_REASON)).filter(|text| !text.is_empty()) {
            None => topic,
            Some(reason) => format!("{topic}&$reason={}", utf8_percent_encode(reason, COMPONENT)),
        }
    }

    fn parse(rest: &str) -> Option<Self> {
        let (status, query) = rest.split_once('/')?;
        let reason = value_of(query, "$reason").and_then(|text| percent_decode_str(text).decode_utf8().ok());
        Some(Self {
            rid: value_of(query, "$rid")?.into(),
            // What is no number does not accept, and whoever said it expects no other answer to be awaited.
            status: status.parse().unwrap_or(REJECTED),
            reason: reason.map(|text| shorten(&text, MAX_REASON).to_owned()),
        })
    }
}

/// The topic on which a culvert device says that its leg of bridge `sid` is gone.
pub fn lost_topic(sid: &str) -> String {
    format!("{LOST_PREFIX}{sid}")
}

/// The stream ID in a streaming URL handed out by a culvert hub (`.../sid/SID/r/device`), if it has one.
pub fn sid_of_url(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("/sid/")?;
    let sid = rest.split('/').next()?;
    (!sid.is_empty()).then_some(sid)
}

impl<'a> DeviceTopic<'a> {
    /// Reads a topic that a device published on. Never fails: what is not understood is [`DeviceTopic::Other`].
    pub fn parse(topic: &'a str) -> Self {
        if let Some(rest) = topic.strip_prefix(ANSWER_PREFIX) {
            return StreamAnswer::parse(rest).map_or(Self::Other, Self::Answer);
        }
        if let Some(sid) = topic.strip_prefix(LOST_PREFIX).filter(|sid| !sid.is_empty()) {
            return Self::Lost(sid);
        }
        if let Some(query) = topic.strip_prefix("$iothub/twin/GET/") {
            return value_of(query, "$rid").map_or(Self::Other, |rid| Self::TwinGet { rid });
        }
        if let Some(query) = topic.strip_prefix("$iothub/twin/PATCH/properties/reported/") {
            return value_of(query, "$rid").map_or(Self::Other, |rid| Self::TwinPatch { rid });
        }
        if topic.starts_with("$iothub/methods/res/") {
            return Self::MethodResponse;
        }
        telemetry_identity(topic).map_or(Self::Other, Self::Telemetry)
    }
}

/// `devices/{id}/messages/events/...` or `devices/{id}/modules/{mid}/messages/events/...`.
fn telemetry_identity(topic: &str) -> Option<Identity> {
    let mut levels = topic.strip_prefix("devices/")?.split('/');
    let decoded = |level: &str| percent_decode_str(level).decode_utf8().ok().map(String::from);
    let device = levels.next().and_then(decoded)?.parse().ok()?;
    let (module, messages) = match levels.next()? {
        "modules" => (Some(levels.next().and_then(decoded)?.parse().ok()?), levels.next()?),
        other => (None, other),
    };
    let events = (messages == "messages") && levels.next()? == "events";
    events.then_some(Identity { device, module })
}

/// The non-empty value of `key` in `?k=v&k=v`. A missing `?` is tolerated, as the SDKs do; trailing `=` belongs
/// to the value.
fn value_of<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    let pairs = query.strip_prefix('?').unwrap_or(query);
    let mut pairs = pairs.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| *name == key).map(|(_, value)| value).filter(|value| !value.is_empty())
}

/// At most `max` bytes of `text`, cut between characters.
fn shorten(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// Any bytes as the topic of either side: what is understood can be said again. For fuzzers.
///
/// # Panics
/// If a request or an answer changes its meaning on the way through its own topic.
pub fn fuzz_topics(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(request) = StreamRequest::parse(&text) {
        let again = StreamRequest::parse(&request.to_topic(true)).ok();
        let meaning = |request: &StreamRequest| (request.stream.clone(), request.url.clone(), request.policy.clone());
        assert_eq!(again.as_ref().map(meaning), Some(meaning(&request)), "a request");
        sid_of_url(&request.url);
    }
    if let DeviceTopic::Answer(answer) = DeviceTopic::parse(&text) {
        let topic = answer.to_topic();
        let DeviceTopic::Answer(again) = DeviceTopic::parse(&topic) else { unreachable!("{topic:?} is an answer") };
        assert_eq!((again.rid, again.status), (answer.rid, answer.status), "an answer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> StreamRequest {
        StreamRequest {
            stream: "TestStream".parse().unwrap(),
            rid: "0f0e0d0c-0b0a-4908-8706-050403020100".into(),
            url: "wss://hub.example.com:443/bridges/ih/hub/d/pump-17/sid/00ff/r/device".into(),
            ticket: Secret::new("tok-en_"),
            policy: Some("service".parse().unwrap()),
        }
    }

    #[test]
    fn a_request_is_five_levels_of_pairs_with_a_port_in_the_url() {
        let topic = request().to_topic(false);
        assert_eq!(topic.split('/').count(), 5, "{topic}");
        assert_eq!(
            topic,
            "$iothub/streams/POST/TestStream/?$rid=0f0e0d0c-0b0a-4908-8706-050403020100&$url=wss%3A%2F%2F\
             hub.example.com%3A443%2Fbridges%2Fih%2Fhub%2Fd%2Fpump-17%2Fsid%2F00ff%2Fr%2Fdevice&$auth=tok-en_"
        );
        let parsed = StreamRequest::parse(&request().to_topic(true)).unwrap();
        assert_eq!((&parsed.url, parsed.policy, parsed.ticket), (&request().url, request().policy, request().ticket));
        assert_eq!(sid_of_url(&parsed.url), Some("00ff"));
        let spaced = StreamRequest { stream: "my %20 stream".parse().unwrap(), ..request() };
        assert_eq!(StreamRequest::parse(&spaced.to_topic(false)).unwrap().stream, spaced.stream);
    }

    #[test]
    fn bad_requests_are_refused() {
        for topic in [
            "$iothub/streams/POST/",
            "$iothub/streams/POST/s",
            "$iothub/streams/POST/s/?$rid=1&$url=wss://raw/x&$auth=t",
            "$iothub/streams/POST/s/?$rid=&$url=u&$auth=t",
            "$iothub/streams/POST/s/?$rid=1&$auth=t",
            "$iothub/streams/POST/s/?$rid=1&$url=%ff&$auth=t",
            "other",
        ] {
            assert!(StreamRequest::parse(topic).is_err(), "{topic}");
        }
    }

    #[test]
    fn answers_survive_a_round_trip_with_and_without_a_reason() {
        let plain = StreamAnswer { rid: "r1".into(), status: 200, reason: None };
        assert_eq!(plain.to_topic(), "$iothub/streams/res/200/?$rid=r1");
        let reasoned = StreamAnswer { rid: "r1".into(), status: 400, reason: Some("no target \"x/y\" & ü".into()) };
        for answer in [plain, reasoned] {
            assert_eq!(DeviceTopic::parse(&answer.to_topic()), DeviceTopic::Answer(answer.clone()));
        }
        for status in ["abc", "", "-1", "99999999", "201.5"] {
            let rejected = StreamAnswer { rid: "r1".into(), status: 400, reason: None };
            let topic = format!("$iothub/streams/res/{status}/?$rid=r1");
            assert_eq!(DeviceTopic::parse(&topic), DeviceTopic::Answer(rejected), "{topic}");
        }
        let long = StreamAnswer { rid: "r".into(), status: 400, reason: Some("ü".repeat(400)) };
        let DeviceTopic::Answer(back) = DeviceTopic::parse(&long.to_topic()).clone() else { panic!() };
        assert_eq!(back.reason.unwrap().len(), MAX_REASON);
    }

    #[test]
    fn the_sdks_other_topics_are_recognised() {
        use DeviceTopic as T;
        assert_eq!(T::parse("$culvert/streams/lost/?sid=abc"), T::Lost("abc"));
        assert_eq!(T::parse("devices/a/messages/events/x=1"), T::Telemetry("a".parse().unwrap()));
        assert_eq!(T::parse("devices/a%24/modules/m/messages/events/"), T::Telemetry("a$/m".parse().unwrap()));
        assert_eq!(T::parse("$iothub/twin/GET/?$rid=7"), T::TwinGet { rid: "7" });
        assert_eq!(T::parse("$iothub/twin/PATCH/properties/reported/?$rid=8"), T::TwinPatch { rid: "8" });
        for other in ["devices/a/messages", "devices//messages/events/", "$iothub/streams/res/200/?$rid=", ""] {
            assert_eq!(T::parse(other), T::Other, "{other}");
        }
    }
}
