//! When due work is done: the window of a policy, and the wait after a failure.

use chrono::{DateTime, Days, Duration, NaiveDateTime, Offset, TimeZone, Utc};
use chrono_tz::Tz;

use super::policy::Window;

/// What a cycle does at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Horizons {
    /// Orders whose archive is due at or before this are archived now (None: not now).
    pub archive: Option<DateTime<Utc>>,
    /// Orders whose redaction deadline is at or before this are archived and redacted now.
    pub redact: DateTime<Utc>,
    /// When the next window opens, for the worker's sleep (None without a window).
    pub next_open: Option<DateTime<Utc>>,
}

/// How far a cycle at `now` reaches.
///
/// A deadline is the latest moment, so inside a window all is done that cannot wait until the next window has ended.
/// Outside, only what is past its deadline is done: it should not have come to that, and must not wait longer.
pub fn horizons(window: Option<&Window>, now: DateTime<Utc>) -> Horizons {
    let Some(window) = window else {
        return Horizons {
            archive: Some(now),
            redact: now,
            next_open: None,
        };
    };
    let spans = spans(window, now);
    let inside = spans.iter().any(|(start, end)| *start <= now && now < *end);
    let next = spans.iter().find(|(start, _)| *start > now);
    Horizons {
        archive: inside.then_some(now),
        redact: next.filter(|_| inside).map_or(now, |(_, end)| *end),
        next_open: next.map(|(start, _)| *start),
    }
}

/// How long an order waits after this many failures in a row: a minute, doubled each time, a day at most.
pub fn backoff(attempts: u32) -> Duration {
    let minutes = 1_i64
        .checked_shl(attempts.saturating_sub(1).min(11))
        .unwrap_or(i64::MAX);
    Duration::minutes(minutes).min(Duration::days(1))
}

/// The openings of a window around `now` in order of time, none empty, none touching another.
///
/// Daylight saving may swallow an opening or make two of them overlap; a zone may skip a
/// whole day. Four days ahead are enough to find the next one all the same.
fn spans(window: &Window, now: DateTime<Utc>) -> Vec<(DateTime<Utc>, DateTime<Utc>)> {
    let zone = window.timezone;
    let today = now.with_timezone(&zone).date_naive();
    let overnight = u64::from(window.to < window.from);
    let first = today.checked_sub_days(Days::new(2)).unwrap_or(today);
    let mut spans: Vec<(DateTime<Utc>, DateTime<Utc>)> = Vec::new();
    for day in first.iter_days().take(7) {
        let Some(last) = day.checked_add_days(Days::new(overnight)) else {
            break;
        };
        let start = first_instant(zone, day.and_time(window.from));
        let end = last_instant(zone, last.and_time(window.to));
        match spans.last_mut() {
            _ if start >= end => {}
            Some((_, open)) if start <= *open => *open = end.max(*open),
            _ => spans.push((start, end)),
        }
    }
    spans
}

/// The first instant at which the zone's clocks show this time.
pub fn first_instant(zone: Tz, local: NaiveDateTime) -> DateTime<Utc> {
    zone.from_local_datetime(&local)
        .earliest()
        .map_or_else(|| after_gap(zone, local), |time| time.to_utc())
}

/// The last instant at which the zone's clocks show this time.
fn last_instant(zone: Tz, local: NaiveDateTime) -> DateTime<Utc> {
    zone.from_local_datetime(&local)
        .latest()
        .map_or_else(|| after_gap(zone, local), |time| time.to_utc())
}

/// The first instant after the gap that swallows a local time.
fn after_gap(zone: Tz, local: NaiveDateTime) -> DateTime<Utc> {
    let shown = |instant: DateTime<Utc>| {
        let offset = zone.offset_from_utc_datetime(&instant.naive_utc()).fix();
        instant.naive_utc() + offset
    };
    // No zone was ever more than 16 hours from UTC, so the clocks show less at one end and more at the other.
    let (mut before, mut after) = (
        local.and_utc() - Duration::hours(16),
        local.and_utc() + Duration::hours(16),
    );
    while after - before > Duration::seconds(1) {
        let middle = before + Duration::seconds((after - before).num_seconds() / 2);
        if shown(middle) < local {
            before = middle;
        } else {
            after = middle;
        }
    }
    after
}

#[cfg(test)]
mod tests {
    use chrono::NaiveTime;

    use super::*;

    fn time(text: &str) -> NaiveTime {
        text.parse().unwrap()
    }

    fn window(from: &str, to: &str, timezone: Tz) -> Window {
        Window {
            from: time(from),
            to: time(to),
            timezone,
        }
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn without_window_all_that_is_due_is_done() {
        let now = at("2026-11-22T12:00:00Z");
        assert_eq!(
            horizons(None, now),
            Horizons {
                archive: Some(now),
                redact: now,
                next_open: None
            }
        );
    }

    #[test]
    fn inside_reaches_to_the_end_of_the_next_window() {
        let window = window("01:00:00", "05:00:00", Tz::UTC);
        for now in ["2026-11-22T01:00:00Z", "2026-11-22T04:59:59Z"] {
            let now = at(now);
            let expected = Horizons {
                archive: Some(now),
                redact: at("2026-11-23T05:00:00Z"),
                next_open: Some(at("2026-11-23T01:00:00Z")),
            };
            assert_eq!(horizons(Some(&window), now), expected);
        }
    }

    #[test]
    fn outside_only_what_is_overdue_is_done() {
        let window = window("01:00:00", "05:00:00", Tz::UTC);
        for (now, open) in [
            ("2026-11-22T00:59:59Z", "2026-11-22T01:00:00Z"),
            ("2026-11-22T05:00:00Z", "2026-11-23T01:00:00Z"),
            ("2026-11-22T23:59:59Z", "2026-11-23T01:00:00Z"),
        ] {
            let expected = Horizons {
                archive: None,
                redact: at(now),
                next_open: Some(at(open)),
            };
            assert_eq!(horizons(Some(&window), at(now)), expected);
        }
    }

    #[test]
    fn window_may_span_midnight() {
        let window = window("22:00:00", "04:00:00", Tz::Europe__Berlin);
        for now in ["2026-11-22T21:00:00Z", "2026-11-23T00:30:00Z", "2026-11-23T02:59:59Z"] {
            assert_eq!(
                horizons(Some(&window), at(now)).redact,
                at("2026-11-24T03:00:00Z"),
                "{now}"
            );
        }
        assert_eq!(horizons(Some(&window), at("2026-11-23T03:00:00Z")).archive, None);
    }

    #[test]
    fn time_that_does_not_exist_is_the_first_instant_after_the_gap() {
        let spring = window("02:30:00", "05:00:00", Tz::Europe__Berlin);
        assert_eq!(
            horizons(Some(&spring), at("2026-03-29T00:00:00Z")).next_open,
            Some(at("2026-03-29T01:00:00Z"))
        );
        let whole_day = first_instant(Tz::Pacific__Apia, "2011-12-30T12:00:00".parse().unwrap());
        assert_eq!(whole_day, at("2011-12-30T10:00:00Z"));
    }

    #[test]
    fn window_swallowed_by_a_gap_is_passed_over() {
        let swallowed = window("02:10:00", "02:50:00", Tz::Europe__Berlin);
        let before = horizons(Some(&swallowed), at("2026-03-28T01:30:00Z"));
        assert_eq!(before.redact, at("2026-03-30T00:50:00Z"));
        assert_eq!(before.next_open, Some(at("2026-03-30T00:10:00Z")));
    }

    #[test]
    fn time_that_comes_twice_opens_early_and_closes_late() {
        let autumn = window("02:15:00", "02:45:00", Tz::Europe__Berlin);
        let before = horizons(Some(&autumn), at("2026-10-24T00:20:00Z"));
        assert_eq!(before.next_open, Some(at("2026-10-25T00:15:00Z")));
        assert_eq!(before.redact, at("2026-10-25T01:45:00Z"));
    }

    #[test]
    fn windows_that_the_clock_change_joins_are_one() {
        let nearly_always = window("02:30:00", "02:20:00", Tz::Europe__Berlin);
        let inside = horizons(Some(&nearly_always), at("2026-10-25T00:40:00Z"));
        assert!(inside.archive.is_some());
        assert_eq!(inside.next_open, Some(at("2026-10-26T01:30:00Z")));
    }

    /// Orders fall due at every minute of 60 days; a worker looks each minute. Were the horizon shorter, orders would
    /// miss their deadline; were it not bound to the window, work would be done outside.
    #[test]
    fn nothing_is_late_and_nothing_outside_the_window() {
        let cases = [
            ("01:00:00", "05:00:00", Tz::Europe__Berlin),
            ("22:00:00", "04:00:00", Tz::Europe__Berlin),
            ("02:00:00", "03:00:00", Tz::Europe__Berlin),
            ("02:15:00", "02:45:00", Tz::Europe__Berlin),
            ("02:30:00", "02:20:00", Tz::Europe__Berlin),
            ("03:00:00", "03:01:00", Tz::Europe__Berlin),
            ("23:30:00", "00:30:00", Tz::America__New_York),
            ("01:45:00", "02:15:00", Tz::Australia__Lord_Howe),
        ];
        for start in ["2026-02-20T00:00:00Z", "2026-10-01T00:00:00Z"] {
            for (from, to, zone) in cases {
                simulate(&window(from, to, zone), at(start));
            }
        }
    }

    fn simulate(window: &Window, start: DateTime<Utc>) {
        let minute = Duration::minutes(1);
        let end = start + Duration::days(60);
        let settled = start + Duration::days(1);
        let mut now = start;
        let mut deadline = start;
        while now < end {
            let horizons = horizons(Some(window), now);
            while deadline <= horizons.redact && deadline < end {
                assert!(now <= deadline, "{window:?}: due {deadline}, done {now}");
                let shown = now.with_timezone(&window.timezone).time();
                let open = if window.from < window.to {
                    window.from <= shown && shown < window.to
                } else {
                    window.from <= shown || shown < window.to
                };
                // A clock change opens a window early or closes it late, by an hour at most.
                let change = [-61, 61].iter().any(|m| {
                    let offset = |t: DateTime<Utc>| window.timezone.offset_from_utc_datetime(&t.naive_utc()).fix();
                    offset(now) != offset(now + Duration::minutes(*m))
                });
                assert!(
                    open || change || now < settled,
                    "{window:?}: due {deadline}, done outside at {now}"
                );
                assert!(
                    horizons.archive.is_some() || now < settled,
                    "{window:?}: redacted but not archived at {now}"
                );
                deadline += minute;
            }
            now += minute;
        }
        assert_eq!(deadline, end, "{window:?}: orders were left");
    }

    #[test]
    fn backoff_doubles_up_to_a_day() {
        let minutes = |attempts| backoff(attempts).num_minutes();
        assert_eq!([0, 1, 2, 3, 4, 11].map(minutes), [1, 1, 2, 4, 8, 1024]);
        assert_eq!([12, 13, 64, u32::MAX].map(minutes), [1440; 4]);
    }
}
