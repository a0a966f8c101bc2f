//! Moments that a policy names: a date, a time without zone, or one with it.

use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Utc};
use chrono_tz::Tz;

use super::PolicyError;
use super::document::Node;
use crate::domain::clock::first_instant;

/// Reads a moment; a date is the start of its day, and what has no zone is read in the policy's.
pub(super) fn moment(node: &Node<'_>, zone: Tz) -> Result<DateTime<Utc>, PolicyError> {
    let text = node.text()?;
    parse(text.trim(), zone).ok_or_else(|| {
        node.error("is not a date or a timestamp")
            .with_hint("Write it as in \"2027-01-01\", \"2027-01-01 08:00\" or \"2027-01-01 08:00+01:00\".")
    })
}

fn parse(text: &str, zone: Tz) -> Option<DateTime<Utc>> {
    if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Some(first_instant(zone, date.and_time(NaiveTime::MIN)));
    }
    // One form for all: a blank between date and time, seconds that may be left out.
    let text = text.replacen('T', " ", 1);
    let zoned = match text.strip_suffix('Z') {
        Some(utc) => format!("{utc}+00:00"),
        None => text.clone(),
    };
    let zoned = ["%Y-%m-%d %H:%M%#z", "%Y-%m-%d %H:%M:%S%.f%#z"]
        .iter()
        .find_map(|form| DateTime::parse_from_str(&zoned, form).ok());
    if let Some(moment) = zoned {
        return Some(moment.to_utc());
    }
    ["%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f"]
        .iter()
        .find_map(|form| NaiveDateTime::parse_from_str(&text, form).ok())
        .map(|local| first_instant(zone, local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_zone_is_read_in_the_policys() {
        for (text, zone, expected) in [
            ("2027-01-01", Tz::UTC, "2027-01-01T00:00:00Z"),
            ("2027-01-01", Tz::Europe__Berlin, "2026-12-31T23:00:00Z"),
            ("2027-07-01 08:00", Tz::Europe__Berlin, "2027-07-01T06:00:00Z"),
            ("2027-07-01T08:00:30", Tz::Europe__Berlin, "2027-07-01T06:00:30Z"),
            ("2027-07-01T08:00:00Z", Tz::Europe__Berlin, "2027-07-01T08:00:00Z"),
            ("2027-07-01 08:00+01", Tz::Europe__Berlin, "2027-07-01T07:00:00Z"),
            ("2027-07-01 08:00:00.5-0230", Tz::UTC, "2027-07-01T10:30:00.500Z"),
            // Clocks that skip the hour show it as the next.
            ("2026-03-29 02:30", Tz::Europe__Berlin, "2026-03-29T01:00:00Z"),
        ] {
            assert_eq!(parse(text, zone), Some(expected.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "tomorrow",
            "2027-13-01",
            "2027-02-29",
            "01.01.2027",
            "2027-01-01 25:00",
            "now",
            "infinity",
        ] {
            assert_eq!(parse(text, Tz::UTC), None, "{text}");
        }
    }
}
