//! The launcher: decides which database is served when, and starts a worker for it. It holds no connection to any
//! database, so that it is in nobody's way.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pgrx::prelude::*;

use super::database;
use crate::pg::guc;
use crate::pg::worker::board::{self, Outcome, Wanted};
use crate::pg::worker::{self, Connection, Errand, Handle, Kind};

const LAUNCHER: Kind = Kind {
    name: "amazon_pii launcher",
    function: "amazon_pii_launcher_main",
};
const RESTART_AFTER: Duration = Duration::from_secs(5);
/// Databases without the extension are looked at this many naptimes apart, ...
const REST: u32 = 5;
/// ... but no longer than this.
const LONGEST_REST: Duration = Duration::from_secs(300);
/// After the server had no slot for a worker.
const NO_SLOT: Duration = Duration::from_secs(1);

/// Registers the launcher, when the library is being preloaded; does nothing otherwise.
pub fn register() {
    if worker::preloading() {
        board::request();
        worker::register(LAUNCHER, RESTART_AFTER);
    }
}

/// Where the launcher's process starts.
#[allow(unsafe_code)]
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn amazon_pii_launcher_main(_argument: pg_sys::Datum) {
    worker::enter(Connection::SharedCatalogs);
    board::launcher_is_here();
    let mut launcher = Launcher::new(Instant::now());
    loop {
        worker::report_running("amazon_pii: starting workers");
        let nap = launcher.tick();
        worker::report_idle();
        worker::sleep(nap);
    }
}

/// A worker that was started.
struct Run {
    handle: Handle,
    database: pg_sys::Oid,
    started: Instant,
    /// Asked for again meanwhile: what committed after the worker looked must not wait.
    again: bool,
}

struct Launcher {
    /// When each database is due.
    due: HashMap<pg_sys::Oid, Instant>,
    /// The index is the worker's place on the board.
    runs: Vec<Option<Run>>,
    /// When to look for new databases.
    look_at: Instant,
    /// Told once, until it works again or the configuration changes.
    complained: bool,
    unknown_complained: bool,
}

impl Launcher {
    fn new(now: Instant) -> Self {
        Self {
            due: HashMap::new(),
            runs: (0..board::SLOTS).map(|_| None).collect(),
            look_at: now,
            complained: false,
            unknown_complained: false,
        }
    }

    /// One round; how long to sleep after it.
    fn tick(&mut self) -> Duration {
        let now = Instant::now();
        if worker::reload_if_asked() {
            // Everything may have changed, and the DBA wants to see it, also where a worker is about to end.
            self.due.clear();
            self.runs.iter_mut().flatten().for_each(|run| run.again = true);
            self.look_at = now;
            self.complained = false;
            self.unknown_complained = false;
        }
        match board::take_wanted() {
            Wanted::Nothing => {}
            Wanted::One(database) => self.want(database, now),
            Wanted::Several => {
                let all: Vec<_> = self.due.keys().copied().collect();
                all.into_iter().for_each(|database| self.want(database, now));
            }
        }
        self.reap(now);
        let mut next = now + naptime();
        if self.look_at <= now || self.due.values().any(|at| *at <= now) {
            self.look(now);
            self.look_at = next;
        }
        if !self.start_due(now) {
            next = now + NO_SLOT;
        } else if self.running() < guc::workers() {
            // Otherwise the end of a worker wakes us before anything can be done.
            next = self
                .due
                .iter()
                .filter(|d| !self.is_running(*d.0))
                .map(|d| *d.1)
                .fold(next, Instant::min);
        }
        next.saturating_duration_since(now)
    }

    fn want(&mut self, database: pg_sys::Oid, now: Instant) {
        self.due.insert(database, now);
        if let Some(run) = self.runs.iter_mut().flatten().find(|r| r.database == database) {
            run.again = true;
        }
    }

    fn running(&self) -> usize {
        self.runs.iter().flatten().count()
    }

    fn is_running(&self, database: pg_sys::Oid) -> bool {
        self.runs.iter().flatten().any(|r| r.database == database)
    }

    /// Takes note of workers that ended, however they ended.
    fn reap(&mut self, now: Instant) {
        for (slot, place) in self.runs.iter_mut().enumerate() {
            let Some(run) = place.take_if(|r| r.handle.stopped()) else {
                continue;
            };
            let pause = match board::outcome(slot) {
                Outcome::Served => board::wants_back_in(slot).map_or(naptime(), |soon| soon.min(naptime())),
                // A database that cannot be reached is looked at as seldom as one that has nothing for us.
                Outcome::Absent | Outcome::Silent => (naptime() * REST).min(LONGEST_REST).max(naptime()),
            };
            let at = if run.again { now } else { (run.started + pause).max(now) };
            self.due.insert(run.database, at);
        }
    }

    /// Finds out which databases there are; new ones are due at once, dropped ones are forgotten.
    fn look(&mut self, now: Instant) {
        let found = match worker::databases() {
            Ok(found) => found,
            Err(e) => {
                worker::log(&e, "the list of databases could not be read");
                return;
            }
        };
        let wanted = guc::databases();
        if !self.unknown_complained {
            for name in wanted.iter().filter(|w| !found.iter().any(|d| d.name == **w)) {
                self.unknown_complained = true;
                pgrx::log!("amazon_pii.databases: database \"{name}\" does not exist or takes no connections");
            }
        }
        let served: Vec<pg_sys::Oid> = found
            .iter()
            .filter(|d| {
                if wanted.is_empty() {
                    !d.template
                } else {
                    wanted.contains(&d.name)
                }
            })
            .map(|d| d.oid)
            .collect();
        self.due.retain(|database, _| served.contains(database));
        for database in served {
            self.due.entry(database).or_insert(now);
        }
    }

    /// Starts workers for what is due, longest waiting first; whether the server had a slot for each.
    fn start_due(&mut self, now: Instant) -> bool {
        let mut due: Vec<(Instant, pg_sys::Oid)> = self
            .due
            .iter()
            .filter(|d| *d.1 <= now && !self.is_running(*d.0))
            .map(|d| (*d.1, *d.0))
            .collect();
        due.sort_by_key(|d| d.0);
        for (_, database) in due {
            if self.running() >= guc::workers() {
                break;
            }
            let Some(slot) = self.runs.iter().position(Option::is_none) else {
                break;
            };
            board::clear_outcome(slot);
            let Some(handle) = Handle::start(
                database::WORKER,
                Errand {
                    database,
                    number: slot as u32,
                },
            ) else {
                if !self.complained {
                    self.complained = true;
                    pgrx::log!("amazon_pii: no slot is free for a background worker; raise max_worker_processes");
                }
                return false;
            };
            self.complained = false;
            self.runs[slot] = Some(Run {
                handle,
                database,
                started: now,
                again: false,
            });
        }
        true
    }
}

fn naptime() -> Duration {
    Duration::from_secs(guc::naptime())
}
