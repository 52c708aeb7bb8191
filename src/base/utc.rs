//! Wall-clock times as text.
//!
//! Owns the civil calendar (proleptic Gregorian, UTC, no leap seconds, as Unix time has it). Does not read a
//! clock. Invariant: formatting never fails and never allocates more than the text.

use std::{fmt, time::SystemTime};

/// A moment in UTC: milliseconds since 1970-01-01T00:00:00Z. Displays as `2026-11-23T04:05:06.007Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Utc(pub u64);

/// A moment split into calendar fields.
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    milli: u64,
}

impl Utc {
    /// Whole seconds since the epoch, as SAS tokens count them.
    pub fn seconds(self) -> u64 {
        self.0 / 1000
    }

    /// `02/11/2020 01:36:39`: how the cloud writes the time inside a tracking ID (month first).
    pub fn tracking_format(self) -> String {
        let c = self.civil();
        format!("{:02}/{:02}/{:04} {:02}:{:02}:{:02}", c.month, c.day, c.year, c.hour, c.minute, c.second)
    }

    /// Days to date by the algorithm of Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    fn civil(self) -> Civil {
        let (days, millis) = (self.0 / 86_400_000, self.0 % 86_400_000);
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_index = (5 * day_of_year + 2) / 153;
        let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
        Civil {
            year: year_of_era + era * 400 + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_index + 2) / 5 + 1,
            hour: millis / 3_600_000,
            minute: millis / 60_000 % 60,
            second: millis / 1000 % 60,
            milli: millis % 1000,
        }
    }
}

impl From<SystemTime> for Utc {
    /// Times before 1970 become 1970: a device whose clock is that wrong has no other time to show.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = self.civil();
        write!(f, "{:04}-{:02}-{:02}", c.year, c.month, c.day)?;
        write!(f, "T{:02}:{:02}:{:02}.{:03}Z", c.hour, c.minute, c.second, c.milli)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_print_as_the_calendar_has_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_581_384_999, "2020-02-11T01:36:39.000Z"),
            (4_102_444_799, "2099-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(Utc(seconds * 1000).to_string(), text);
        }
        assert_eq!(Utc(1_581_384_999_456).tracking_format(), "02/11/2020 01:36:39");
    }
}
