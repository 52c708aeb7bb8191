//! The service API's headers and errors (wire.md, section a).
//!
//! Owns header names, the meaning of the two timeouts, error codes and the JSON of an error body. Does not know
//! HTTP libraries, routes or the registry. Invariant: every error has a status, a six-digit code whose first three
//! digits are that status, a name and a message for a person.

use std::time::Duration;

use crate::base::Utc;

/// How long to wait for an offline device, in seconds (decimal, may have a fraction).
pub const CONNECT_TIMEOUT_HEADER: &str = "iothub-streaming-connect-timeout-in-seconds";
/// How long a connected device may take to answer, in seconds (decimal, may have a fraction).
pub const RESPONSE_TIMEOUT_HEADER: &str = "iothub-streaming-response-timeout-in-seconds";
/// `True` or `False`, spelled with a capital first letter.
pub const ACCEPTED_HEADER: &str = "iothub-streaming-is-accepted";
/// Where the service's leg connects.
pub const URL_HEADER: &str = "iothub-streaming-url";
/// The ticket that admits the service's leg.
pub const TOKEN_HEADER: &str = "iothub-streaming-auth-token";
/// The name of an error.
pub const ERROR_HEADER: &str = "iothub-errorcode";
/// Why a device rejected, percent-encoded. Sent to culvert services only (wire.md, j).
pub const REASON_HEADER: &str = "culvert-reason";

/// The whole handshake must finish within this time (wire.md, g); also the value of an absent timeout header.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(60);
/// The longest wait that a client can ask for, per header: keeps a forgotten client from holding a request for ever.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(300);

/// The stream name that carries a mux; any other name is a plain stream (design.md, section 2).
pub const MUX_STREAM: &str = "culvert-mux-1";
/// Targets and plain streams may not begin with this.
pub const RESERVED_PREFIX: &str = "culvert-";

/// An error of the hub's HTTPS API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The device did not answer the stream request in time.
    #[error("Timed out waiting for the response from device.")]
    GatewayTimeout {
        /// How long was waited.
        timeout: Duration,
    },
    /// The device is not connected or has not subscribed for stream requests.
    #[error(
        "The operation failed because the requested device isn't online or hasn't registered the device stream callback."
    )]
    DeviceNotOnline {
        /// How long was waited.
        timeout: Duration,
    },
    /// No such device.
    #[error("No device is registered with this ID.")]
    DeviceNotFound,
    /// No such module.
    #[error("No module is registered with this ID.")]
    ModuleNotFound,
    /// No such path.
    #[error("There is nothing at this address.")]
    NotFound,
    /// A bad or missing token, or a policy without the right. The text must not tell which devices exist.
    #[error("Unauthorized: {0}")]
    Unauthorized(String),
    /// Something in the request cannot be understood.
    #[error("{0}")]
    ArgumentInvalid(String),
    /// The device exists already.
    #[error("A device with this ID is already registered.")]
    DeviceAlreadyExists,
    /// The module exists already.
    #[error("A module with this ID is already registered.")]
    ModuleAlreadyExists,
    /// If-Match did not match.
    #[error("The entity tag does not match; read the device again and repeat the change.")]
    PreconditionFailed,
    /// Too many requests.
    #[error("Too many requests; try again in {retry_after} s.")]
    Throttled {
        /// Seconds to wait.
        retry_after: u64,
    },
    /// A limit of the hub is reached.
    #[error("{0}")]
    QuotaExceeded(String),
    /// The method is not allowed at this path.
    #[error("This method is not allowed here.")]
    MethodNotAllowed,
    /// The body is too large.
    #[error("The request body is too large.")]
    BodyTooLarge,
    /// The hub itself failed.
    #[error("The hub failed to process the request; its log has the reason under this tracking ID.")]
    Internal,
    /// The hub is stopping or overloaded.
    #[error("The hub is busy or stopping; try again in {retry_after} s.")]
    Unavailable {
        /// Seconds to wait.
        retry_after: u64,
    },
}

impl ApiError {
    /// The six-digit code; its first three digits are the HTTP status.
    pub fn code(&self) -> u32 {
        self.code_and_name().0
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        (self.code() / 1000) as u16
    }

    /// The name in `iothub-errorcode`.
    pub fn name(&self) -> &'static str {
        self.code_and_name().1
    }

    fn code_and_name(&self) -> (u32, &'static str) {
        match self {
            Self::ArgumentInvalid(_) => (400_004, "ArgumentInvalid"),
            Self::Unauthorized(_) => (401_002, "IotHubUnauthorizedAccess"),
            Self::QuotaExceeded(_) => (403_002, "IotHubQuotaExceeded"),
            Self::NotFound => (404_000, "NotFound"),
            Self::DeviceNotFound => (404_001, "DeviceNotFound"),
            Self::ModuleNotFound => (404_010, "ModuleNotFound"),
            Self::DeviceNotOnline { .. } => (404_103, "DeviceNotOnline"),
            Self::MethodNotAllowed => (405_000, "MethodNotAllowed"),
            Self::DeviceAlreadyExists => (409_001, "DeviceAlreadyExists"),
            Self::ModuleAlreadyExists => (409_301, "ModuleAlreadyExistsOnDevice"),
            Self::PreconditionFailed => (412_001, "PreconditionFailed"),
            Self::BodyTooLarge => (413_001, "RequestEntityTooLarge"),
            Self::Throttled { .. } => (429_001, "ThrottlingException"),
            Self::Internal => (500_001, "ServerError"),
            Self::Unavailable { .. } => (503_001, "ServiceUnavailable"),
            Self::GatewayTimeout { .. } => (504_101, "GatewayTimeout"),
        }
    }

    /// Seconds for a `Retry-After` header, if the error has one.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::Throttled { retry_after } | Self::Unavailable { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// The JSON body: an object whose `Message` is itself JSON in a string. `tracking` is 32 hexadecimal digits.
    /// Where the Node SDK looks for the older form (`ErrorCode:DeviceNotFound;text`) that form is not used: C#
    /// reads the JSON.
    pub fn body(&self, tracking: &str, now: Utc) -> String {
        let info = match self {
            Self::GatewayTimeout { timeout } | Self::DeviceNotOnline { timeout } => {
                serde_json::json!({ "timeout": hours_minutes_seconds(*timeout) })
            }
            _ => serde_json::json!({}),
        };
        let message = serde_json::json!({
            "errorCode": self.code(),
            "trackingId": format!("{tracking}-TimeStamp:{}", now.tracking_format()),
            "message": self.to_string(),
            "info": info,
            "timestampUtc": now.to_string(),
        });
        serde_json::json!({ "Message": message.to_string(), "ExceptionMessage": "" }).to_string()
    }
}

/// Reads a timeout header: decimal seconds, perhaps with a fraction. Absent means [`HANDSHAKE_LIMIT`]; more than
/// [`MAX_TIMEOUT`] means that. `None` if it is not a number or negative.
pub fn parse_timeout(value: Option<&str>) -> Option<Duration> {
    let Some(text) = value else { return Some(HANDSHAKE_LIMIT) };
    let seconds: f64 = text.trim().parse().ok()?;
    let valid = seconds.is_finite() && seconds >= 0.0;
    valid.then(|| Duration::from_secs_f64(seconds.min(MAX_TIMEOUT.as_secs_f64())))
}

fn hours_minutes_seconds(span: Duration) -> String {
    let seconds = span.as_secs();
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_reads_as_the_cloud_wrote_it() {
        let error = ApiError::GatewayTimeout { timeout: Duration::from_secs(60) };
        let body = error.body("0123456789abcdef0123456789abcdef", Utc(1_581_384_999_456));
        let outer: serde_json::Value = serde_json::from_str(&body).unwrap();
        let inner: serde_json::Value = serde_json::from_str(outer["Message"].as_str().unwrap()).unwrap();
        assert_eq!(error.status(), 504);
        assert_eq!(inner["errorCode"], 504_101);
        assert_eq!(inner["info"]["timeout"], "00:01:00");
        assert_eq!(inner["message"], "Timed out waiting for the response from device.");
        assert_eq!(inner["trackingId"], "0123456789abcdef0123456789abcdef-TimeStamp:02/11/2020 01:36:39");
        assert_eq!(outer["ExceptionMessage"], "");
    }

    #[test]
    fn timeouts_are_decimal_seconds() {
        assert_eq!(parse_timeout(None), Some(HANDSHAKE_LIMIT));
        assert_eq!(parse_timeout(Some("1.5")), Some(Duration::from_millis(1500)));
        assert_eq!(parse_timeout(Some("0")), Some(Duration::ZERO));
        assert_eq!(parse_timeout(Some("1e9")), Some(MAX_TIMEOUT));
        for bad in ["", "-1", "NaN", "inf", "soon"] {
            assert_eq!(parse_timeout(Some(bad)), None, "{bad}");
        }
    }
}
