//! How far this machine's clock is from a server's.
//!
//! Owns the Date header's form (RFC 9110, IMF-fixdate) and a hint for people. Does not read the clock. Invariant: a
//! header that cannot be understood yields no opinion.

use http::{HeaderMap, header};

/// Credentials are accepted with this much skew, so less is not worth a word.
const WORTH_A_WORD: i64 = 300;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// What to tell a person who was refused while the clocks differ; `now` in seconds since 1970.
pub(in crate::transport) fn skew_hint(headers: &HeaderMap, now: u64) -> Option<String> {
    let server = parse_date(headers.get(header::DATE)?.to_str().ok()?)?;
    let ahead = i64::try_from(now).ok()? - server;
    (ahead.abs() > WORTH_A_WORD).then(|| {
        let direction = if ahead > 0 { "ahead of" } else { "behind" };
        format!("this machine's clock is {} s {direction} the server's: set the clock (is NTP running?)", ahead.abs())
    })
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` in seconds since 1970.
fn parse_date(text: &str) -> Option<i64> {
    let mut words = text.split_once(", ")?.1.strip_suffix(" GMT")?.split(' ');
    let day: i64 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = i64::try_from(MONTHS.iter().position(|month| *month == name)?).ok()? + 1;
    let year: i64 = words.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    Some(days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms"; years begin in March.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_parse_and_only_a_real_difference_is_mentioned() {
        assert_eq!(parse_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(parse_date("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
        for bad in ["", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Nov 1994 08:49 GMT", "Sun, x Nov 1994 08:49:37 GMT"]
        {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
        let mut headers = HeaderMap::new();
        assert_eq!(skew_hint(&headers, 0), None);
        headers.insert(header::DATE, "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
        assert_eq!(skew_hint(&headers, 784_111_777 + 300), None);
        let hint = skew_hint(&headers, 784_111_777 - 3600).unwrap();
        assert!(hint.starts_with("this machine's clock is 3600 s behind the server's"), "{hint}");
    }
}
