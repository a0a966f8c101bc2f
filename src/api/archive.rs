// pgrx reads the columns of the result off the signature.
#![allow(clippy::type_complexity)]

use pgrx::prelude::*;

use crate::domain::tombstone::Tombstone;
use crate::engine::backup;
use crate::engine::check::Problem;
use crate::engine::check::archive::{self, Wanted};
use crate::engine::{reconcile, vault};
use crate::pg::error::or_raise;
use crate::pg::identity::require_role;
use crate::pg::xact::to_server;

#[pg_extern(sql = false)]
fn check_archive(
    foreign_table: &str,
) -> TableIterator<
    'static,
    (
        name!(severity, String),
        name!(object, String),
        name!(problem, String),
        name!(hint, String),
    ),
> {
    let problems = or_raise(
        require_role(&["amazon_pii_admin"], "check an archive")
            .and_then(|()| archive::problems(&archive::named(foreign_table)?)),
    );
    TableIterator::new(problems.into_iter().map(Problem::into_row))
}

#[pg_extern(sql = false)]
fn backup_check() -> TableIterator<
    'static,
    (
        name!(severity, String),
        name!(object, String),
        name!(problem, String),
        name!(hint, String),
    ),
> {
    let problems = or_raise(backup::check());
    TableIterator::new(problems.into_iter().map(Problem::into_row))
}

#[pg_extern(sql = false)]
fn reconcile(
    policy: Option<&str>,
) -> TableIterator<
    'static,
    (
        name!(policy_name, String),
        name!(order_key, String),
        name!(order_number, Option<String>),
        name!(destroyed, String),
        name!(destroyed_at, Option<TimestampWithTimeZone>),
        name!(came_back, String),
    ),
> {
    let rows = or_raise(reconcile::reconcile(policy));
    TableIterator::new(rows.into_iter().map(|b| {
        (
            b.policy,
            b.order_key,
            b.order_number,
            b.destroyed.to_owned(),
            Tombstone::micros(&b.destroyed_at).and_then(|at| to_server(at).ok()),
            b.came_back.to_owned(),
        )
    }))
}

#[pg_extern(sql = false)]
fn archive_ddl(
    foreign_table: &str,
    server: &str,
    host: &str,
    database: &str,
    role: &str,
) -> TableIterator<'static, (name!(run_on, String), name!(statement, String))> {
    let wanted = Wanted {
        table: foreign_table,
        server,
        host,
        database,
        role,
    };
    let statements = or_raise(
        require_role(&["amazon_pii_admin"], "see how an archive is made").and_then(|()| archive::ddl(&wanted)),
    );
    TableIterator::new(statements.into_iter().map(|(place, text)| (place.to_owned(), text)))
}

#[pg_extern(sql = false)]
fn archive_status() -> TableIterator<
    'static,
    (
        name!(policy, String),
        name!(foreign_table, String),
        name!(deadline, String),
        name!(unsent, i64),
        name!(unsent_since, Option<TimestampWithTimeZone>),
        name!(to_delete, i64),
        name!(up_at, Option<TimestampWithTimeZone>),
        name!(down_since, Option<TimestampWithTimeZone>),
        name!(last_error, Option<String>),
        name!(to_retrieve, i64),
        name!(to_retrieve_since, Option<TimestampWithTimeZone>),
    ),
> {
    let rows = or_raise(
        require_role(
            &["amazon_pii_admin", "amazon_pii_auditor"],
            "see the state of the archives",
        )
        .and_then(|()| vault::standing()),
    );
    TableIterator::new(rows.into_iter().map(|s| {
        (
            s.policy,
            s.foreign_table,
            s.deadline.to_owned(),
            s.unsent,
            s.unsent_since,
            s.to_delete,
            s.up_at,
            s.down_since,
            s.last_error,
            s.to_retrieve,
            s.to_retrieve_since,
        )
    }))
}
