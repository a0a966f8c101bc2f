//! Rows that several orders share: who still needs them. Decided on the source tables, by every policy that names the
//! table; what is not tracked keeps a row alive.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::due::{Clock, redact_due};
use super::orphan::{self, Imported, Rows};
use super::plan::{Entry, Plan, Table};
use super::turn;
use super::walk::{self, FIRST, Values, by_key, key_parts, key_text, up_some};
use crate::pg::error::Result;
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg};

/// Users of each row that are looked at first; most rows have fewer.
const FIRST_LOOK: u32 = 50;

/// Users of all rows together that a batch reads after that. A row with more of them is looked at as a whole only for an
/// order that came back for it.
const SECOND_LOOK: usize = 5000;

/// Orders of the batch that asks.
#[derive(Default)]
pub struct Ours<'a> {
    /// Redacted in the same transaction: they need the row no longer.
    pub leaving: Vec<String>,
    /// Left out of it: they still do, due or not.
    pub staying: Vec<String>,
    /// The rows go before their orders: those that were only imported with them let go together.
    pub apart: Option<&'a Rows>,
}

/// What keeps a shared row alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// An order of the policy that asks, tracked or not.
    Own(String),
    /// An order of another policy.
    Other { policy: String, order: String },
    /// That it has too many users to look at here.
    Unsure,
}

/// A row that somebody may need.
pub struct Asked {
    pub key: Values,
    /// An order was taken once more: all users of the row are looked at, however many there are.
    pub whole: bool,
}

/// For each row what keeps it alive, if anything does.
///
/// # Errors
/// Errors of the server; a row whose users cannot be found out must not be overwritten.
pub fn keepers(
    plan: &Plan,
    others: &[Rc<Plan>],
    table: usize,
    rows: &[Asked],
    ours: &Ours<'_>,
    clock: &Clock,
) -> Result<Vec<Option<Keeper>>> {
    let relation = plan.tables[table].relation.oid;
    let mut out: Vec<Option<Keeper>> = vec![None; rows.len()];
    let none = Ours::default();
    for user in std::iter::once(plan).chain(others.iter().map(Rc::as_ref)) {
        let own = std::ptr::eq(user, plan);
        let Some(theirs) = user.tables.iter().position(|t| t.relation.oid == relation) else {
            continue;
        };
        let mut look = Look {
            plan: user,
            table: theirs,
            own,
            ours: if own { ours } else { &none },
            clock,
            amazon_only: plan.tables[table].amazon_only,
            rows,
            out: &mut out,
        };
        let open = (0..rows.len()).filter(|i| look.out[*i].is_none()).collect();
        let mut large = look.at(open, Some(FIRST_LOOK))?.1;
        if own && !large.is_empty() {
            large = look.at_last_seen(large)?;
        }
        let each = u32::try_from(SECOND_LOOK / large.len().max(1)).unwrap_or(u32::MAX);
        if each > FIRST_LOOK && !large.is_empty() {
            large = look.at(large, Some(each))?.1;
        }
        let mut read = 0;
        for row in large {
            if rows[row].whole && read < SECOND_LOOK {
                read += look.at(vec![row], None)?.0;
            } else {
                look.out[row] = Some(Keeper::Unsure);
            }
        }
    }
    Ok(out)
}

/// A user of a row: which row, the order's key, whether it is an Amazon order.
pub type User = (usize, String, bool);

/// A search among the orders of one policy.
struct Look<'a> {
    plan: &'a Plan,
    table: usize,
    /// It is the policy that asks.
    own: bool,
    ours: &'a Ours<'a>,
    clock: &'a Clock,
    amazon_only: bool,
    rows: &'a [Asked],
    out: &'a mut [Option<Keeper>],
}

impl Look<'_> {
    /// Looks at some users of each of these rows. Returns how many it read, and the rows that have more of them and of
    /// which nobody was found.
    fn at(&mut self, open: Vec<usize>, limit: Option<u32>) -> Result<(usize, Vec<usize>)> {
        let keys: Vec<Values> = open.iter().map(|i| self.rows[*i].key.clone()).collect();
        let imported = self.ours.apart.map_or(Imported::Needing, Imported::Others);
        let (users, cut) = users_of(self.plan, self.table, &keys, limit, imported)?;
        let read = users.len();
        self.note(&open, users)?;
        let more = |n: &usize| cut.contains(n) && self.out[open[*n]].is_none();
        Ok((read, (0..open.len()).filter(more).map(|n| open[n]).collect()))
    }

    /// Asks the order that was last seen keeping a row alive. Returns the rows of which it is no user any more, or lets go.
    fn at_last_seen(&mut self, open: Vec<usize>) -> Result<Vec<usize>> {
        let keys = open
            .iter()
            .map(|i| key_text(&self.rows[*i].key))
            .collect::<Result<Vec<_>>>()?;
        let seen = last_seen(self.plan, self.table, &keys)?;
        let users = still_users(self.plan, self.table, &keys, &seen)?;
        self.note(&open, users)?;
        Ok(open.into_iter().filter(|i| self.out[*i].is_none()).collect())
    }

    /// Notes for each row the one of its living users that will probably go last: it is asked first the next time.
    fn note(&mut self, open: &[usize], users: Vec<User>) -> Result<()> {
        let mut best: HashMap<usize, (i64, String)> = HashMap::new();
        for (row, order, goes) in alive(self.plan, users, self.ours, self.own, self.clock, self.amazon_only)? {
            match best.get(&row) {
                Some((known, _)) if *known >= goes => {}
                _ => _ = best.insert(row, (goes, order)),
            }
        }
        for (row, (_, order)) in best {
            let keeper = if self.own {
                Keeper::Own(order)
            } else {
                Keeper::Other {
                    policy: self.plan.policy.clone(),
                    order,
                }
            };
            self.out[open[row]].get_or_insert(keeper);
        }
        Ok(())
    }
}

/// The orders of a policy that use rows of one of its tables, that many at most for each link; and the rows that may have
/// more.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn users(plan: &Plan, table: usize, rows: &[Values], limit: Option<u32>) -> Result<(Vec<User>, HashSet<usize>)> {
    users_of(plan, table, rows, limit, Imported::All)
}

/// [`users`], of those that no link leads from any more only these.
fn users_of(
    plan: &Plan,
    table: usize,
    rows: &[Values],
    limit: Option<u32>,
    imported: Imported<'_>,
) -> Result<(Vec<User>, HashSet<usize>)> {
    let orders = plan.orders();
    let mut select = orders.key_list();
    select.push(plan.amazon.to_string());
    let mut out = Vec::new();
    let mut cut = HashSet::new();
    for (index, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.table == table) {
        let found = if entry.parent.is_none() {
            by_key(plan, orders, rows, &select)?
        } else if let Some(starts) = own_keys(&plan.tables[table], entry, rows) {
            up_some(plan, index, starts, &select, limit, &mut cut)?
        } else {
            let mut links = walk::select_all(&entry.on_child);
            links.extend(entry.filter.as_ref().map(ToString::to_string));
            let starts = by_key(plan, &plan.tables[table], rows, &links)?
                .into_iter()
                .filter(|f| entry.filter.is_none() || f.row.bool(FIRST + entry.on_child.len()).unwrap_or(false))
                .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + entry.on_child.len())?)))
                .collect::<Result<Vec<_>>>()?;
            up_some(plan, index, starts, &select, limit, &mut cut)?
        };
        for f in found {
            let key = key_text(&f.row.texts(FIRST..FIRST + orders.key.len())?)?;
            out.push((f.input, key, f.row.bool(FIRST + orders.key.len())?));
        }
    }
    out.extend(orphan::users(plan, table, rows, limit, imported, &mut cut)?);
    Ok((out, cut))
}

/// The index has the newest entry of a record last.
const NEWEST: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_sort", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// For each row the order that was last seen keeping it alive: (position, order).
fn last_seen(plan: &Plan, table: usize, rows: &[String]) -> Result<Vec<(usize, String)>> {
    let found = act_as(Identity::Extension, OWN_PATH, NEWEST, || {
        sql::read(
            "SELECT n.i - 1, w.witness FROM pg_catalog.unnest($1) WITH ORDINALITY AS n (k, i) CROSS JOIN LATERAL ( \
                SELECT r.witness FROM amazon_pii.record_state r WHERE r.status = 'waiting' AND r.record_key = n.k \
                   AND r.table_name = $2 AND r.policy = $3 AND r.witness IS NOT NULL ORDER BY r.changed_at DESC LIMIT 1) AS w",
            &[
                Arg::texts(rows),
                Arg::Text(Some(&plan.tables[table].archived_as)),
                Arg::Text(Some(&plan.policy)),
            ],
        )
    })?;
    found
        .iter()
        .map(|r| Ok((usize::try_from(r.int(0)?).unwrap_or(usize::MAX), r.string(1)?)))
        .collect()
}

/// Those of the orders that use their row today.
fn still_users(plan: &Plan, table: usize, rows: &[String], seen: &[(usize, String)]) -> Result<Vec<User>> {
    let orders = seen.iter().map(|s| key_parts(&s.1)).collect::<Result<Vec<_>>>()?;
    let amazon = by_key(plan, plan.orders(), &orders, &[plan.amazon.to_string()])?
        .into_iter()
        .map(|f| Ok((f.input, f.row.bool(FIRST)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    let select = plan.tables[table].key_list();
    let mut out = Vec::new();
    for (index, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.table == table) {
        let reached = if entry.parent.is_none() {
            by_key(plan, plan.orders(), &orders, &select)?
        } else {
            walk::down(plan, &orders, index, &select, None)?
        };
        for f in reached {
            let (row, order) = &seen[f.input];
            if key_text(&f.row.texts(FIRST..FIRST + select.len())?)? == rows[*row] {
                out.push((*row, order.clone(), amazon.get(&f.input).copied().unwrap_or(false)));
            }
        }
    }
    Ok(out)
}

/// The link values of rows whose link is their own key: there is nothing to read.
fn own_keys(table: &Table, entry: &Entry, rows: &[Values]) -> Option<Vec<(usize, Values)>> {
    if entry.filter.is_some() {
        return None;
    }
    let positions = walk::own_key(table, entry)?;
    let link = |row: &Values| positions.iter().map(|p| row.get(*p).cloned().flatten()).collect();
    Some(rows.iter().enumerate().map(|(i, row)| (i, link(row))).collect())
}

/// The condition that an order lets go of shared rows, over `o` with the parameters of [`redact_due`]. One of the policy that asks does
/// once it is redacted and has nothing new to archive: a copy that was made earlier may be out of date by now.
///
/// Orders of other policies let go when they are due: their cycles take no turns with this one, and two that waited for
/// each other would leave the row behind.
fn let_go(user: &Plan, own: bool) -> String {
    if own {
        "(o.status = 'redacted' AND (o.next_due_at IS NULL OR o.next_due_at > pg_catalog.clock_timestamp()))".to_owned()
    } else {
        format!(
            "COALESCE(o.status = 'redacted' OR (o.status = 'archived' AND {}), false)",
            redact_due(user)
        )
    }
}

/// Those users that still need the row, with the second in which they will let go at the earliest.
fn alive(
    plan: &Plan,
    users: Vec<User>,
    ours: &Ours,
    own: bool,
    clock: &Clock,
    amazon_only: bool,
) -> Result<Vec<(usize, String, i64)>> {
    let leaving: HashSet<&str> = ours.leaving.iter().map(String::as_str).collect();
    let users: Vec<User> = users
        .into_iter()
        .filter(|(_, key, amazon)| (*amazon || !amazon_only) && !leaving.contains(key.as_str()))
        .collect();
    if users.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<&str> = users.iter().map(|u| u.1.as_str()).collect();
    let rows = on_keys(|| {
        sql::read(
            // ident-ok: made of constants.
            &format!(
                "SELECT o.order_key, {}, \
                    pg_catalog.date_part('epoch', LEAST(GREATEST(o.redact_due_at, o.retrieved_until, o.held_until), '9999-01-01'::timestamptz))::bigint \
                 FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($3)",
                let_go(plan, own)
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::texts(&keys),
                Arg::Text(Some(&clock.redact)),
            ],
        )
    })?;
    // What is not tracked needs its rows for good, and what is not dispatched for long.
    let mut known = HashMap::new();
    for row in &rows {
        let goes = row.text(2)?.and_then(|t| t.parse().ok()).unwrap_or(i64::MAX);
        known.insert(row.str(0)?, (row.bool(1)?, goes));
    }
    let mut out = Vec::new();
    for (row, key, _) in users {
        let (done, goes) = known.get(key.as_str()).copied().unwrap_or((false, i64::MAX));
        if !done || ours.staying.contains(&key) {
            out.push((row, key, goes));
        }
    }
    Ok(out)
}

/// A shared row that was left alone, with the first order of the batch that waits for it.
#[derive(Debug)]
pub struct Waiting {
    pub order_key: String,
    pub keeper: Keeper,
}

/// Last look of a batch at the rows that it left alone, when everything is written. Two transactions that redact two orders
/// of one customer at the same time each see the other as not redacted yet: the one that commits later sees it here, and
/// its order comes back for the row. Returns the orders that come back at the end of the cycle, for rows with many users.
///
/// # Errors
/// Errors of the server.
pub fn settle(
    plan: &Plan,
    others: &[Rc<Plan>],
    clock: &Clock,
    waiting: &[Waiting],
    together: bool,
) -> Result<Vec<String>> {
    let mut by_keeper: HashMap<(&str, &str), Vec<&str>> = HashMap::new();
    let mut unsure = Vec::new();
    for row in waiting {
        let keeper: (&str, &str) = match &row.keeper {
            Keeper::Own(order) if together => (&plan.policy, order),
            // Who works alone saw everything that there is.
            Keeper::Own(_) => continue,
            Keeper::Other { policy, order } => (policy, order),
            Keeper::Unsure => {
                unsure.push(row.order_key.clone());
                continue;
            }
        };
        by_keeper.entry(keeper).or_default().push(&row.order_key);
    }
    if !unsure.is_empty() {
        on_keys(|| {
            sql::execute(
                // Later than what this cycle takes, or it would take nothing else; a cycle that never ends leaves it to the next.
                "UPDATE amazon_pii.order_state o SET next_due_at = GREATEST($3::timestamptz, $4::timestamptz) + '1 millisecond'::interval \
                 WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) AND o.status = 'redacted'",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::texts(&unsure),
                    Arg::Text(Some(&clock.now)),
                    Arg::Text(Some(&clock.redact)),
                ],
            )
        })?;
    }
    // Cycles of two policies take no turns: their lock comes last, so that no two wait for each other.
    if by_keeper.keys().any(|(policy, _)| *policy == plan.policy) {
        turn::before_commit(&plan.policy)?;
    }
    if by_keeper.keys().any(|(policy, _)| *policy != plan.policy) {
        turn::before_commit_of_any()?;
    }
    let mut back: Vec<&str> = Vec::new();
    for user in std::iter::once(plan).chain(others.iter().map(Rc::as_ref)) {
        let theirs = || by_keeper.iter().filter(|((policy, _), _)| *policy == user.policy);
        let keepers: Vec<&str> = theirs().map(|((_, order), _)| *order).collect();
        let gone = gone(user, std::ptr::eq(user, plan), clock, &keepers)?;
        back.extend(
            theirs()
                .filter(|((_, order), _)| gone.contains(*order))
                .flat_map(|(_, waiting)| waiting),
        );
    }
    come_back(plan, clock, &back)?;
    Ok(unsure)
}

/// Those of some orders that have let go of shared rows.
fn gone(user: &Plan, own: bool, clock: &Clock, orders: &[&str]) -> Result<HashSet<String>> {
    if orders.is_empty() {
        return Ok(HashSet::new());
    }
    let rows = on_keys(|| {
        sql::read(
            // ident-ok: made of constants.
            &format!(
                "SELECT o.order_key FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($3) AND {}",
                let_go(user, own)
            ),
            &[
                Arg::Text(Some(&user.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::texts(orders),
                Arg::Text(Some(&clock.redact)),
            ],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// Redacted orders that this cycle takes once more.
///
/// # Errors
/// Errors of the server.
pub fn come_back(plan: &Plan, clock: &Clock, orders: &[impl AsRef<str>]) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET next_due_at = $3::timestamptz \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) AND o.status = 'redacted'",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(orders),
                Arg::Text(Some(&clock.now)),
            ],
        )
    })?;
    Ok(())
}

/// The other policies that name a table of this one, ready.
///
/// # Errors
/// One of them cannot be made ready: whether its orders need a shared row is unknown.
pub fn other_policies(plan: &Plan) -> Result<Vec<Rc<Plan>>> {
    let oids: Vec<i64> = plan
        .tables
        .iter()
        .map(|t| i64::from(u32::from(t.relation.oid)))
        .collect();
    let names = as_extension(|| {
        sql::read(
            "SELECT DISTINCT t.policy FROM amazon_pii.policy_table t WHERE t.policy <> $1 AND t.relation::oid::bigint = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::Ints(oids)],
        )
    })?;
    names.iter().map(|r| Plan::current(r.str(0)?)).collect()
}
