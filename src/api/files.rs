// pgrx reads the columns of the result off the signature.
#![allow(clippy::type_complexity)]

use pgrx::prelude::*;

use crate::engine::files;
use crate::pg::error::or_raise;

type FileRow = (
    i64,
    String,
    String,
    String,
    String,
    Option<String>,
    TimestampWithTimeZone,
);

#[pg_extern(sql = false)]
fn files_due(
    policy: Option<&str>,
    max: Option<i64>,
) -> TableIterator<
    'static,
    (
        name!(file_id, i64),
        name!(policy_name, String),
        name!(order_key, String),
        name!(table_name, String),
        name!(record_key, String),
        name!(path, Option<String>),
        name!(due_since, TimestampWithTimeZone),
    ),
> {
    let rows = or_raise(files::due(policy, max));
    let rows = rows
        .into_iter()
        .map(|f| -> FileRow { (f.id, f.policy, f.order_key, f.table, f.record_key, f.path, f.due_since) });
    TableIterator::new(rows)
}

#[pg_extern(sql = false)]
fn ack_file(file_id: i64) -> bool {
    or_raise(files::acknowledge(file_id))
}
