//! Whether a cluster was put together from a backup of another one, told by the files that the server leaves. Its identifier does not
//! tell: it is the original's, as a standby's is, which is to take its primary's place without being asked.

/// What the history of a timeline says of the end of a recovery that nobody had bounded: of a promotion, above all.
const UNBOUNDED: &str = "no recovery target specified";

/// What tells such a cluster from its original; `None` where nothing does.
///
/// `timeline` is the current one, `history` what is known of those before it, `label` what is left of the backup label that the
/// cluster was started with.
pub fn marker(timeline: u32, history: Option<&str>, label: Option<&str>) -> Option<String> {
    let recovered = history.and_then(recovered_to);
    recovered.or_else(|| label.and_then(|label| started_from(timeline, label)))
}

/// The last point in time to which somebody had a backup recovered.
fn recovered_to(history: &str) -> Option<String> {
    let mut ends = history.lines().filter_map(|line| {
        let mut words = line.trim().splitn(3, '\t');
        let (timeline, position) = (words.next()?.trim().parse::<u32>().ok()?, words.next()?.trim());
        let reason = words.next()?.trim();
        (reason != UNBOUNDED).then(|| format!("{timeline}@{position}"))
    });
    ends.next_back()
}

/// Where the backup begins that was started as it is, without any recovery. What was started as a standby, or recovered, is on
/// another timeline since it ended that.
fn started_from(timeline: u32, label: &str) -> Option<String> {
    let value = |name: &str| {
        label
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    // Until version 14 a backup in which the server crashed left one behind in the original.
    let streamed = value("BACKUP METHOD")? == "streamed";
    let same = value("START TIMELINE")?.parse() == Ok(timeline);
    let position = value("START WAL LOCATION")?.split_whitespace().next()?;
    (streamed && same).then(|| format!("{timeline}@{position}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-01 12:00:00 UTC\nLABEL: nightly\nSTART TIMELINE: 1\n";
    const PROMOTED: &str = "1\t0/3000110\tno recovery target specified\n";
    const RECOVERED: &str = "1\t0/3000110\tbefore 2026-11-01 13:00:00.5+00\n";

    #[test]
    fn an_original_has_no_marker() {
        assert_eq!(marker(1, None, None), None);
    }

    #[test]
    fn a_promoted_standby_is_its_original() {
        assert_eq!(marker(2, Some(PROMOTED), Some(LABEL)), None);
    }

    #[test]
    fn a_backup_that_was_started_as_it_is_is_a_copy() {
        assert_eq!(marker(1, None, Some(LABEL)).as_deref(), Some("1@0/2000028"));
    }

    #[test]
    fn a_backup_that_was_recovered_to_a_point_in_time_is_a_copy_for_good() {
        assert_eq!(marker(2, Some(RECOVERED), Some(LABEL)).as_deref(), Some("1@0/3000110"));
        let later = format!("{RECOVERED}\n2\t0/5000000\tno recovery target specified\n");
        assert_eq!(marker(3, Some(&later), Some(LABEL)).as_deref(), Some("1@0/3000110"));
        let again = format!("{later}\n3\t0/6000000\tat restore point \"monday\"\n");
        assert_eq!(marker(4, Some(&again), None).as_deref(), Some("3@0/6000000"));
    }

    #[test]
    fn a_label_that_a_crash_left_behind_tells_nothing() {
        let label = LABEL.replace("streamed", "pg_start_backup");
        assert_eq!(marker(1, None, Some(&label)), None);
    }

    #[test]
    fn what_cannot_be_read_tells_nothing() {
        assert_eq!(marker(1, Some("# a comment\n\nnonsense\n"), Some("LABEL: x\n")), None);
    }
}
