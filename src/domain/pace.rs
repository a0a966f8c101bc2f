//! How many orders the next batch of a cycle has. Knows no clock; times come in.

use std::time::Duration;

/// A batch of which nothing is known yet may hold scanned invoices.
const FIRST: i64 = 16;

/// Text in one batch above which the next one is smaller; a batch needs several times as much memory.
const MUCH_TEXT: usize = 16 * 1024 * 1024;

/// By how much the next batch is larger, or smaller, at most.
const STEP: i64 = 4;

/// What a batch was like.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    pub orders: i64,
    /// The longer of its transactions: for so long others may have waited for its locks.
    pub took: Duration,
    /// Bytes of text in it.
    pub text: usize,
    /// Somebody did wait for it.
    pub waited_for: bool,
}

/// Orders in the next batch: few at first, then as many as take the time that a batch may take.
#[derive(Debug)]
pub struct Size {
    next: i64,
    /// Seconds that a batch takes whatever its size is, as far as two sizes have shown.
    fixed: f64,
    last: Option<(f64, f64)>,
    /// Somebody waited: from now on batches grow slowly.
    careful: bool,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            next: FIRST,
            fixed: 0.0,
            last: None,
            careful: false,
        }
    }
}

impl Size {
    /// Of the next batch.
    pub fn next(&self, most: i64) -> i64 {
        self.next.min(most).max(1)
    }

    /// Learns from a batch that has [`Size::next`] orders, or all that were left.
    pub fn learn(&mut self, batch: &Batch, goal: Duration, most: i64) {
        let size = self.next(most);
        let wanted = self.fitting(batch, goal.as_secs_f64());
        let largest = match (batch.orders < size, self.careful) {
            // It says nothing of larger ones.
            (true, _) => size,
            (_, true) => size + size / 4 + 1,
            _ => size * STEP,
        };
        self.next = wanted.clamp(size / STEP, largest);
        if batch.text > MUCH_TEXT {
            self.next = self.next.min(size / STEP);
        }
        if batch.waited_for {
            self.careful = true;
            self.next = self.next.min(size / 2);
        }
        self.next = self.next.clamp(1, most.max(1));
    }

    /// How many orders would take the time. A part of it is the same for every size: where that is nearly all, or more
    /// than all, of the time that a batch may take, smaller batches would spare others little and cost much.
    fn fitting(&mut self, batch: &Batch, goal: f64) -> i64 {
        let (orders, took) = (batch.orders.max(1) as f64, batch.took.as_secs_f64());
        if let Some((before, time)) = self.last
            && (orders / before > 1.5 || before / orders > 1.5)
        {
            self.fixed = took - orders * (took - time) / (orders - before);
            self.fixed = self.fixed.min(time);
        }
        self.last = Some((orders, took));
        self.fixed = self.fixed.clamp(0.0, took);
        let room = (goal - self.fixed).max(self.fixed / 2.0);
        let each = (took - self.fixed) / orders;
        // Infinite where an order takes no time; the conversion saturates.
        (room / each) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Duration = Duration::from_millis(200);
    const MOST: i64 = 2000;

    /// A server on which a batch takes `fixed` seconds, and `each` for every order; sizes and times of batches, one after the other.
    fn run(size: &mut Size, batches: usize, fixed: f64, each: f64) -> Vec<(i64, f64)> {
        let mut seen = Vec::new();
        for _ in 0..batches {
            let orders = size.next(MOST);
            let took = fixed + each * orders as f64;
            seen.push((orders, took));
            size.learn(&batch(orders, took), GOAL, MOST);
        }
        seen
    }

    fn batch(orders: i64, took: f64) -> Batch {
        Batch {
            orders,
            took: Duration::from_secs_f64(took),
            text: 0,
            waited_for: false,
        }
    }

    #[test]
    fn a_fast_server_comes_to_the_largest_batches_soon() {
        let seen = run(&mut Size::default(), 6, 0.01, 0.00001);
        assert_eq!(
            seen.iter().map(|b| b.0).collect::<Vec<_>>(),
            [16, 64, 256, 1024, 2000, 2000]
        );
    }

    #[test]
    fn batches_take_the_time_that_they_may() {
        for (fixed, each) in [(0.0, 0.001), (0.02, 0.003), (0.05, 0.01), (0.1, 0.0005), (0.0, 0.15)] {
            let seen = run(&mut Size::default(), 12, fixed, each);
            let (orders, took) = seen[11];
            assert!(
                (0.1..=0.21).contains(&took),
                "{fixed} {each}: {orders} orders take {took} s"
            );
        }
    }

    #[test]
    fn one_order_is_the_least() {
        let seen = run(&mut Size::default(), 8, 0.0, 3.0);
        assert_eq!(seen[7].0, 1);
    }

    #[test]
    fn batches_grow_again() {
        let mut size = Size::default();
        assert!(run(&mut size, 8, 0.01, 0.05)[7].0 < 8);
        assert!(run(&mut size, 8, 0.01, 0.0001)[7].0 > 1000);
    }

    #[test]
    fn one_slow_batch_is_soon_forgotten() {
        let mut size = Size::default();
        let usual = run(&mut size, 12, 0.01, 0.001)[11].0;
        size.learn(&batch(size.next(MOST), 3.0), GOAL, MOST);
        assert!(size.next(MOST) <= usual / 3);
        let after = run(&mut size, 8, 0.01, 0.001)[7].0;
        assert!(
            (usual * 9 / 10..=usual * 11 / 10).contains(&after),
            "{usual}, then {after}"
        );
    }

    #[test]
    fn what_every_batch_costs_does_not_make_batches_tiny() {
        let seen = run(&mut Size::default(), 16, 0.5, 0.001);
        let (orders, took) = seen[15];
        assert!(orders >= 100 && took < 0.8, "{orders} orders take {took} s");
    }

    #[test]
    fn somebody_who_waits_halves_batches_and_they_grow_slowly_from_then_on() {
        let mut size = Size::default();
        run(&mut size, 4, 0.0, 0.00001);
        let before = size.next(MOST);
        size.learn(
            &Batch {
                waited_for: true,
                ..batch(before, 0.01)
            },
            GOAL,
            MOST,
        );
        let half = size.next(MOST);
        assert_eq!(half, before / 2);
        assert_eq!(run(&mut size, 2, 0.0, 0.00001)[1].0, half + half / 4 + 1);
    }

    #[test]
    fn much_text_makes_batches_smaller_however_fast_they_are() {
        let mut size = Size::default();
        run(&mut size, 3, 0.0, 0.00001);
        size.learn(
            &Batch {
                text: MUCH_TEXT + 1,
                ..batch(size.next(MOST), 0.001)
            },
            GOAL,
            MOST,
        );
        assert_eq!(size.next(MOST), 256);
    }

    #[test]
    fn the_rest_says_nothing_of_larger_batches() {
        let mut size = Size::default();
        size.learn(&batch(3, 0.001), GOAL, MOST);
        assert_eq!(size.next(MOST), FIRST);
    }
}
