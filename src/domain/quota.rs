//! How many orders somebody may have opened in a day, and which numbers are unusual.

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

use super::clock::first_instant;

/// What a policy allows in a day, in orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// One person: an actor, or a database user that names none. `None`: any number.
    pub person: Option<i64>,
    /// One database user, whatever actors it names. `None`: any number.
    pub user: Option<i64>,
    /// More than this many of one person are unusual.
    pub alarm: i64,
}

impl Limits {
    /// Where a document says nothing, half of the quota is still usual, or this many if there is none.
    const USUAL: i64 = 100;

    /// Limits as a document gives them.
    pub fn new(person: Option<i64>, user: Option<i64>, alarm: Option<i64>) -> Self {
        Self {
            person,
            user,
            alarm: alarm.or(person.map(half)).unwrap_or(Self::USUAL),
        }
    }

    fn of(&self, who: Who) -> Option<i64> {
        match who {
            Who::Person => self.person,
            Who::User => self.user,
        }
    }

    /// What is usual, if that is known.
    fn usual(&self, who: Who) -> Option<i64> {
        match who {
            Who::Person => Some(self.alarm),
            Who::User => self.user.map(half),
        }
    }
}

fn half(number: i64) -> i64 {
    (number / 2).max(1)
}

/// Whose orders are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Who {
    /// An actor, or a database user that names none.
    Person,
    /// A database user with all its actors.
    User,
}

/// What somebody has had on a day.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Orders that were asked for.
    pub orders: i64,
    /// Orders that came back by themselves, with a return or a credit.
    pub automatic: i64,
    /// Calls that were refused.
    pub refused: i64,
}

impl Count {
    fn all(&self) -> i64 {
        self.orders.saturating_add(self.automatic)
    }
}

/// A call that is over the quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub who: Who,
    pub limit: i64,
    /// Orders of this day before the call.
    pub had: i64,
    /// Orders that the call asked for.
    pub asked: i64,
}

/// A number that somebody should look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusual {
    /// So many orders, and what is usual.
    Many { who: Who, orders: i64, usual: i64 },
    /// The first refusal of a day.
    Refused(Refusal),
}

/// What becomes of a call, and of the counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub refused: Option<Refusal>,
    pub person: Count,
    pub user: Count,
    pub unusual: Vec<Unusual>,
}

/// Decides about a call for `asked` orders: all of them, or none. What comes back by itself is counted, and never refused.
pub fn decide(limits: &Limits, person: Count, user: Count, asked: i64, automatic: bool) -> Decision {
    let mut out = Decision {
        refused: None,
        person,
        user,
        unusual: Vec::new(),
    };
    let over = |(who, count): (Who, Count)| {
        let limit = limits
            .of(who)
            .filter(|limit| count.orders.saturating_add(asked) > *limit)?;
        Some(Refusal {
            who,
            limit,
            had: count.orders,
            asked,
        })
    };
    let refused = [(Who::Person, person), (Who::User, user)].into_iter().find_map(over);
    if let Some(refusal) = refused.filter(|_| !automatic) {
        let count = match refusal.who {
            Who::Person => &mut out.person,
            Who::User => &mut out.user,
        };
        count.refused = count.refused.saturating_add(1);
        if count.refused == 1 {
            out.unusual.push(Unusual::Refused(refusal));
        }
        out.refused = Some(refusal);
        return out;
    }
    for (who, count) in [(Who::Person, &mut out.person), (Who::User, &mut out.user)] {
        let before = count.all();
        let counted = if automatic {
            &mut count.automatic
        } else {
            &mut count.orders
        };
        *counted = counted.saturating_add(asked);
        let orders = count.all();
        if let Some(usual) = limits.usual(who)
            && doublings(orders, usual) > doublings(before, usual)
        {
            out.unusual.push(Unusual::Many { who, orders, usual });
        }
    }
    out
}

/// 0 for what is usual, 1 for more, one more each time that it has doubled.
fn doublings(count: i64, usual: i64) -> u32 {
    (count.saturating_sub(1) / usual.max(1))
        .checked_ilog2()
        .map_or(0, |doublings| doublings + 1)
}

/// The day that it is for a policy.
pub fn day(zone: Tz, now: DateTime<Utc>) -> NaiveDate {
    now.with_timezone(&zone).date_naive()
}

/// When the day after `day` begins.
pub fn next_day(zone: Tz, day: NaiveDate) -> DateTime<Utc> {
    let next = day.checked_add_days(Days::new(1)).unwrap_or(day);
    first_instant(zone, next.and_time(NaiveTime::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(orders: i64, automatic: i64, refused: i64) -> Count {
        Count {
            orders,
            automatic,
            refused,
        }
    }

    const FREE: Count = Count {
        orders: 0,
        automatic: 0,
        refused: 0,
    };

    #[test]
    fn usual_is_half_of_the_quota() {
        assert_eq!(Limits::new(None, None, None).alarm, 100);
        assert_eq!(Limits::new(Some(50), None, None).alarm, 25);
        assert_eq!(Limits::new(Some(1), None, None).alarm, 1);
        assert_eq!(Limits::new(Some(50), Some(90), Some(7)).alarm, 7);
    }

    #[test]
    fn the_quota_is_used_up_and_not_passed() {
        let limits = Limits::new(Some(3), None, Some(1000));
        let last = decide(&limits, count(2, 0, 0), count(20, 0, 0), 1, false);
        assert_eq!(
            (last.refused, last.person, last.user),
            (None, count(3, 0, 0), count(21, 0, 0))
        );
        let over = decide(&limits, last.person, last.user, 1, false);
        let refusal = Refusal {
            who: Who::Person,
            limit: 3,
            had: 3,
            asked: 1,
        };
        assert_eq!(over.refused, Some(refusal));
        assert_eq!((over.person, over.user), (count(3, 0, 1), count(21, 0, 0)));
        assert_eq!(over.unusual, [Unusual::Refused(refusal)]);
        let again = decide(&limits, over.person, over.user, 1, false);
        assert_eq!((again.person.refused, again.unusual), (2, vec![]));
    }

    #[test]
    fn all_orders_of_a_call_or_none() {
        let limits = Limits::new(Some(3), None, None);
        let over = decide(&limits, count(2, 0, 0), FREE, 2, false);
        assert_eq!(over.refused.map(|r| (r.had, r.asked)), Some((2, 2)));
        assert_eq!(over.person.orders, 2);
    }

    #[test]
    fn a_user_is_bounded_whatever_actors_it_names() {
        let limits = Limits::new(Some(3), Some(10), None);
        let over = decide(&limits, FREE, count(10, 0, 0), 1, false);
        assert_eq!(over.refused.map(|r| (r.who, r.limit)), Some((Who::User, 10)));
        assert_eq!((over.person, over.user), (FREE, count(10, 0, 1)));
    }

    #[test]
    fn what_comes_back_by_itself_is_counted_apart() {
        let limits = Limits::new(Some(3), Some(3), Some(5));
        let far = decide(&limits, count(3, 2, 0), count(3, 0, 0), 40, true);
        assert_eq!((far.refused, far.person), (None, count(3, 42, 0)));
        assert_eq!(
            far.unusual,
            [
                Unusual::Many {
                    who: Who::Person,
                    orders: 45,
                    usual: 5
                },
                Unusual::Many {
                    who: Who::User,
                    orders: 43,
                    usual: 1
                }
            ]
        );
        assert_eq!(decide(&limits, count(0, 42, 0), FREE, 3, false).refused, None);
    }

    #[test]
    fn an_alarm_past_the_usual_and_with_each_doubling() {
        let limits = Limits::new(None, None, Some(4));
        let mut raised = Vec::new();
        let mut person = FREE;
        for _ in 0..40 {
            let decision = decide(&limits, person, FREE, 1, false);
            person = decision.person;
            if !decision.unusual.is_empty() {
                raised.push(person.orders);
            }
        }
        assert_eq!(raised, [5, 9, 17, 33]);
        assert_eq!(decide(&limits, FREE, FREE, i64::MAX, false).unusual.len(), 1);
        assert_eq!(
            decide(&limits, count(i64::MAX, 1, 0), FREE, 1, false).person.orders,
            i64::MAX
        );
    }

    #[test]
    fn days_are_the_zones() {
        let zone = chrono_tz::Europe::Berlin;
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let date = |text: &str| text.parse::<NaiveDate>().unwrap();
        assert_eq!(day(zone, at("2026-11-27T22:59:59Z")), date("2026-11-27"));
        assert_eq!(day(zone, at("2026-11-27T23:00:00Z")), date("2026-11-28"));
        assert_eq!(next_day(zone, date("2026-11-27")), at("2026-11-27T23:00:00Z"));
        assert_eq!(next_day(zone, date("2026-07-01")), at("2026-07-01T22:00:00Z"));
        // There the clocks go from 23:59:59 to 01:00.
        let gap = chrono_tz::America::Santiago;
        assert_eq!(next_day(gap, date("2026-09-05")), at("2026-09-06T04:00:00Z"));
    }
}
