//! When a cycle waits for the server's replicas, and for how long. Knows no clock; times come in.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// How often a cycle waits for as long as it would wait at once, in all.
const WAITS: u32 = 12;

/// Somebody who reads the server's WAL: a standby or a subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replica {
    /// Of the process that sends to it.
    pub pid: i32,
    /// Bytes that it has not replayed.
    pub behind: u64,
}

/// What to do before the next batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    GoOn,
    /// This one falls behind.
    WaitFor(Replica),
    /// It was waited for long enough: deadlines are stronger. It counts again once it has caught up.
    GiveUp(Replica),
}

/// Looks after replicas in the course of a cycle.
#[derive(Debug, Default)]
pub struct Watch {
    /// How far each was behind at the last look.
    seen: HashMap<i32, u64>,
    /// Since when the cycle waits, if it does.
    since: Option<Duration>,
    given_up: HashSet<i32>,
    /// How long it has waited before.
    waited: Duration,
}

impl Watch {
    /// A look at `now`, counted from the cycle's begin. A cycle begins to wait for one that is further behind than `limit`,
    /// and falls back further; then it waits until that is over, but no longer than `patience`, and `WAITS` times as long in
    /// all.
    pub fn look(&mut self, now: Duration, replicas: &[Replica], limit: u64, patience: Duration) -> Advice {
        let late: Vec<Replica> = replicas.iter().filter(|r| r.behind > limit).copied().collect();
        self.given_up.retain(|pid| late.iter().any(|r| r.pid == *pid));
        let falls_back = |r: &Replica| self.seen.get(&r.pid).is_some_and(|before| r.behind > *before);
        let worst = late
            .iter()
            .filter(|r| !self.given_up.contains(&r.pid) && (self.since.is_some() || falls_back(r)))
            .max_by_key(|r| r.behind)
            .copied();
        self.seen = replicas.iter().map(|r| (r.pid, r.behind)).collect();
        let Some(worst) = worst else {
            self.waited += self
                .since
                .take()
                .map_or(Duration::ZERO, |since| now.saturating_sub(since));
            return Advice::GoOn;
        };
        let since = *self.since.get_or_insert(now);
        let wait = now.saturating_sub(since);
        if wait >= patience || self.waited + wait >= patience * WAITS {
            self.waited += wait;
            self.since = None;
            self.given_up.extend(late.iter().map(|r| r.pid));
            return Advice::GiveUp(worst);
        }
        Advice::WaitFor(worst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 100;
    const PATIENCE: Duration = Duration::from_secs(60);

    /// What a cycle is told of one replica, look by look, ten seconds apart.
    fn told(watch: &mut Watch, from: u64, behind: &[u64]) -> Vec<&'static str> {
        let mut told = Vec::new();
        for (i, behind) in behind.iter().enumerate() {
            let now = Duration::from_secs(from + 10 * i as u64);
            told.push(
                match watch.look(
                    now,
                    &[Replica {
                        pid: 1,
                        behind: *behind,
                    }],
                    LIMIT,
                    PATIENCE,
                ) {
                    Advice::GoOn => "go on",
                    Advice::WaitFor(_) => "wait",
                    Advice::GiveUp(_) => "give up",
                },
            );
        }
        told
    }

    #[test]
    fn a_replica_that_keeps_up_is_not_waited_for() {
        assert!(
            told(&mut Watch::default(), 0, &[0, 50, 100, 20])
                .iter()
                .all(|t| *t == "go on")
        );
    }

    #[test]
    fn a_replica_that_falls_back_is_waited_for_until_it_has_caught_up() {
        let found = told(&mut Watch::default(), 0, &[50, 150, 200, 180, 101, 100, 120, 90]);
        assert_eq!(
            found,
            ["go on", "wait", "wait", "wait", "wait", "go on", "wait", "go on"]
        );
    }

    #[test]
    fn a_replica_that_catches_up_by_itself_is_not_waited_for() {
        assert!(
            told(&mut Watch::default(), 0, &[900, 800, 700, 700, 200])
                .iter()
                .all(|t| *t == "go on")
        );
    }

    #[test]
    fn patience_ends_until_the_replica_has_caught_up() {
        let mut watch = Watch::default();
        assert_eq!(
            told(&mut watch, 0, &[50, 200, 200, 200, 200, 200, 200]),
            ["go on", "wait", "wait", "wait", "wait", "wait", "wait"]
        );
        assert_eq!(
            told(&mut watch, 70, &[200, 250, 300, 90, 110]),
            ["give up", "go on", "go on", "go on", "wait"]
        );
    }

    #[test]
    fn patience_in_all_ends_too() {
        let mut watch = Watch::default();
        let mut waits = 0;
        for round in 0..100 {
            waits += told(&mut watch, round * 1000, &[50, 200, 210, 220, 90])
                .iter()
                .filter(|t| **t == "wait")
                .count();
        }
        assert!(
            (waits * 10) as u64 <= PATIENCE.as_secs() * u64::from(WAITS) * 2,
            "{waits}"
        );
        assert!(waits > 20);
    }

    #[test]
    fn the_one_that_is_furthest_behind_counts_and_one_given_up_hides_no_other() {
        let mut watch = Watch::default();
        let pair = |a, b| [Replica { pid: 1, behind: a }, Replica { pid: 2, behind: b }];
        let at = Duration::from_secs;
        watch.look(at(0), &pair(10, 10), LIMIT, PATIENCE);
        assert_eq!(
            watch.look(at(1), &pair(150, 20), LIMIT, PATIENCE),
            Advice::WaitFor(pair(150, 20)[0])
        );
        assert_eq!(
            watch.look(at(61), &pair(150, 20), LIMIT, PATIENCE),
            Advice::GiveUp(pair(150, 20)[0])
        );
        assert_eq!(
            watch.look(at(62), &pair(190, 120), LIMIT, PATIENCE),
            Advice::WaitFor(pair(190, 120)[1])
        );
    }
}
