//! One error type. Each kind fixes its SQLSTATE, its words and its hint, so that no call site can improvise,
//! and none of them ever carries a value of a row.

use pgrx::PgSqlErrorCode as Code;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::{CaughtError, ErrorReport};

/// What went wrong, safe to store and to show.
#[derive(Debug, Clone)]
pub struct Error {
    code: Code,
    /// The SQLSTATE as the server packs it: a code of the shop's own is none of `Code`.
    state: i32,
    /// The server raised it, or code of the shop's did: of its words only the SQLSTATE was kept.
    foreign: bool,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
    /// This session was canceled, or is being terminated.
    cancel: bool,
    /// A foreign archive is at fault, as a whole.
    unreachable: bool,
    /// The extension in the database is of another version than this library.
    other_version: bool,
}

/// Why a foreign archive cannot be used that is slow.
const OUT_OF_TIME: &str = "it took longer than amazon_pii.archive_timeout";

/// Result of anything that talks to the server.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn ours(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            state: code as i32,
            foreign: false,
            message: message.into(),
            detail: None,
            hint: None,
            cancel: false,
            unreachable: false,
            other_version: false,
        }
    }

    /// Adds the hint, a sentence that says what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a detail, a sentence without values of rows.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// A bug or a damaged state of our own.
    pub fn internal(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_INTERNAL_ERROR, what)
    }

    /// An argument or document that cannot be accepted.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_INVALID_PARAMETER_VALUE, what)
    }

    /// Something the caller's role was not granted.
    pub fn privilege(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_INSUFFICIENT_PRIVILEGE, what)
    }

    /// A policy, table or column that does not exist.
    pub fn undefined(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_UNDEFINED_OBJECT, what)
    }

    /// An order number that no policy tracks.
    pub fn unknown_order(number: &str) -> Self {
        Self::ours(
            Code::ERRCODE_NO_DATA_FOUND,
            format!("no flagged order has the number \"{number}\""),
        )
        .hint("amazon_pii.find_orders() also looks among the numbers of linked records.")
    }

    /// An order number that several policies track.
    pub fn ambiguous_order(number: &str, policies: &[String]) -> Self {
        Self::ours(
            Code::ERRCODE_TOO_MANY_ROWS,
            format!("order \"{number}\" is tracked by several policies"),
        )
        .detail(format!("They are: {}.", policies.join(", ")))
        .hint("Name one with policy => '…'.")
    }

    /// An order that is in the wrong state for what was asked.
    pub fn wrong_state(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, what)
    }

    /// An order whose PII is already written back.
    pub fn already_retrieved(number: &str) -> Self {
        Self::ours(
            Code::ERRCODE_OBJECT_IN_USE,
            format!("order \"{number}\" is already retrieved"),
        )
        .hint("amazon_pii.end_retrieval() ends the retrieval early; amazon_pii.peek() reads without writing back.")
    }

    /// An order whose archive is gone for good.
    pub fn purged(number: &str) -> Self {
        Self::ours(
            Code::ERRCODE_UNDEFINED_OBJECT,
            format!("the archived personal data of order \"{number}\" no longer exists"),
        )
        .hint("It was shredded, or is past its retention; nothing can bring it back.")
    }

    /// More orders than somebody may have opened in a day; the hint says when the next day begins, and who sets the number.
    pub fn over_quota(what: &str) -> Self {
        Self::ours(Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, what)
    }

    /// A call that does not say for whom the application makes it.
    pub fn no_actor(policy: &str) -> Self {
        Self::ours(
            Code::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("policy \"{policy}\" wants to know who asks: amazon_pii.actor is not set"),
        )
        .hint("SET amazon_pii.actor = '…' to the application's own user before the call.")
    }

    /// An archive that cannot be reached or opened.
    pub fn archive(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_CONNECTION_FAILURE, what)
    }

    /// A foreign archive that does not answer, or refuses what we need; `why` is the SQLSTATE that came back, or words of ours.
    pub fn unreachable(table: &str, why: &str) -> Self {
        Self {
            unreachable: true,
            ..Self::archive(format!("the archive in {table} cannot be used: {why}")).hint(
                "Nothing was overwritten. See that its server runs, that its table is there, and that the user mapping of the \
                 extension's owner still has its rights; amazon_pii.check_archive() tries it.",
            )
        }
    }

    /// A foreign archive that did not answer in time.
    pub fn out_of_time(table: &str) -> Self {
        Self::unreachable(table, OUT_OF_TIME)
    }

    /// Whether it is [`out_of_time`](Self::out_of_time): less may be done in the same time.
    pub fn is_out_of_time(&self) -> bool {
        self.unreachable && self.message.ends_with(OUT_OF_TIME)
    }

    /// Whether it is [`unreachable`](Self::unreachable).
    pub fn is_unreachable(&self) -> bool {
        self.unreachable
    }

    /// Tables and functions that are not this library's: nothing of ours is read or written in them.
    pub fn other_version(in_database: &str, library: &str, is_older: bool) -> Self {
        let hint = if is_older {
            "Run ALTER EXTENSION amazon_pii UPDATE in this database, as a superuser."
        } else {
            "Restart the server, so that it loads the library of that version; where that is not installed, install it."
        };
        Self {
            other_version: true,
            ..Self::ours(
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("amazon_pii in this database is of version {in_database}, its library of version {library}"),
            )
            .hint(hint)
        }
    }

    /// Whether it is [`other_version`](Self::other_version).
    pub fn is_other_version(&self) -> bool {
        self.other_version
    }

    /// An archived document that is not what was sealed.
    pub fn damaged(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_DATA_CORRUPTED, what).hint(
            "Nothing was overwritten. Restore the archive's row from a backup, or let the order be archived again.",
        )
    }

    /// An audit log that is not what was written.
    pub fn damaged_log(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_DATA_CORRUPTED, what).hint("amazon_pii.verify_audit_log() says more.")
    }

    /// No master key.
    pub fn no_key(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_CONFIG_FILE_ERROR, what).hint(
            "Make one with: (umask 077; openssl rand -hex 32 > /etc/postgresql/amazon_pii.key), owned by the server's \
             user, and set amazon_pii.key_file to that path in postgresql.conf, or set amazon_pii.key_command.",
        )
    }

    /// The tombstone file cannot be used.
    pub fn tombstones(what: impl Into<String>) -> Self {
        Self::ours(
            Code::ERRCODE_CONFIG_FILE_ERROR,
            format!("the file in amazon_pii.tombstone_file {}", what.into()),
        )
        .hint(
            "Nothing was destroyed. The setting takes an absolute path outside of the data directory, in a directory that the \
             server's user can write to; nobody else may read or write the file.",
        )
    }

    /// A database that was turned back, or whose tombstone file was: what was destroyed may have come back.
    pub fn unreconciled(what: impl Into<String>) -> Self {
        Self::wrong_state(what)
            .hint("amazon_pii.reconcile() destroys again what was destroyed before, and says what came back.")
    }

    /// A resource of the server that is not to be had now.
    pub fn resources(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_INSUFFICIENT_RESOURCES, what)
    }

    /// A call that may not run inside a transaction block.
    pub fn in_transaction(what: &str) -> Self {
        Self::ours(
            Code::ERRCODE_ACTIVE_SQL_TRANSACTION,
            format!("{what} cannot run inside a transaction block"),
        )
    }

    /// Something that has to write, on a standby.
    pub fn in_recovery(what: &str) -> Self {
        Self::ours(
            Code::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            format!("{what} cannot run during recovery"),
        )
        .hint("Connect to the primary server.")
    }

    /// Something that has to write, in a transaction that may not.
    pub fn read_only_transaction(what: &str) -> Self {
        Self::ours(
            Code::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            format!("{what} cannot be done in a read-only transaction"),
        )
    }

    /// An archived value that its column cannot hold any more.
    pub fn type_changed(table: &str, column: &str, was: &str, is: &str) -> Self {
        Self::ours(
            Code::ERRCODE_DATATYPE_MISMATCH,
            format!(
                "column \"{column}\" of {table} has type {is}, which cannot hold a value that was archived as {was}"
            ),
        )
        .hint("Give the column its former type back, or read the value with amazon_pii.peek().")
    }

    /// A write of PII to a redacted order.
    pub fn reimported(table: &str) -> Self {
        Self::ours(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("personal data of redacted Amazon orders cannot be written to {table} again"),
        )
        .hint(
            "Leave these columns out, or write what they hold. amazon_pii.retrieve() gives archived personal data back; \
             \"on_reimport\" in the policy says what such a write meets.",
        )
    }

    /// A write to a retrieved order's PII.
    pub fn read_only(table: &str) -> Self {
        Self::ours(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("personal data in {table} is read-only while its Amazon order is retrieved"),
        )
        .hint("Call amazon_pii.end_retrieval() first; columns that hold no personal data can be written.")
    }

    /// An order of another channel for a customer that Amazon orders have.
    pub fn manual_order(policy: &str) -> Self {
        Self::ours(
            Code::ERRCODE_RESTRICT_VIOLATION,
            format!("policy \"{policy}\" allows no order of another channel for a customer of Amazon orders"),
        )
        .hint("Make a customer of its own for the order.")
    }

    /// Customers that must not be merged: this one's personal data is archived, redacted or retrieved.
    pub fn not_mergeable(key: &str, state: &str) -> Self {
        Self::ours(
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("customer {key} cannot be merged: its personal data is {state}"),
        )
        .hint(
            "A customer whose Amazon orders are archived, redacted or retrieved stays as it is; \
             amazon_pii.find_duplicates() leaves it out.",
        )
    }

    /// A row that does not exist.
    pub fn no_row(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_NO_DATA_FOUND, what)
    }

    /// A row that changed, or that the shop's own code wrote differently from what was asked.
    pub fn not_overwritten(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION, what)
    }

    /// A value whose text form is longer than the server and we can handle in one piece; `what` names it.
    pub fn too_large(what: &str) -> Self {
        Self::ours(
            Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("{what} is too large to be archived: its text form must stay below 512 MB"),
        )
        .hint("Make the value smaller, or leave its column out of \"redact\".")
    }

    /// Whether it is [`too_large`](Self::too_large).
    pub fn is_too_large(&self) -> bool {
        !self.foreign && self.code == Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED
    }

    /// Code of a table's owner that did not end in time.
    pub fn too_slow() -> Self {
        Self::ours(
            Code::ERRCODE_QUERY_CANCELED,
            "code of the table's owner took longer than amazon_pii.statement_timeout",
        )
    }

    /// A value of a form that cannot travel.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::ours(Code::ERRCODE_FEATURE_NOT_SUPPORTED, what)
    }

    /// The same error with the place where it happened in front.
    #[must_use]
    pub fn at(mut self, place: &str) -> Self {
        if !self.message.starts_with(place) {
            self.message = format!("{place}: {}", self.message);
        }
        self
    }

    /// Five characters, as PostgreSQL prints them.
    pub fn sqlstate(&self) -> String {
        let mut packed = self.state;
        (0..5)
            .map(|_| {
                let c = char::from((packed & 0x3f) as u8 + b'0');
                packed >>= 6;
                c
            })
            .collect()
    }

    /// What may be stored in `last_error`: SQLSTATE and words of our own.
    pub fn stored(&self) -> String {
        format!("{}: {}", self.sqlstate(), self.message)
    }

    /// What `check_policy` shows: our words, with the SQLSTATE where it says more than they do.
    pub fn shown(&self) -> String {
        if self.foreign {
            format!("{} ({})", self.message, self.sqlstate())
        } else {
            self.message.clone()
        }
    }

    /// The hint, if any.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The caller pressed cancel, or the server is stopping: never to be swallowed.
    pub fn is_cancel(&self) -> bool {
        self.cancel
    }

    /// A row is there already.
    pub fn is_duplicate(&self) -> bool {
        self.code == Code::ERRCODE_UNIQUE_VIOLATION
    }

    /// A lock that was not to be had in time, or a deadlock: the order waits for the next batch, it has not failed.
    pub fn is_lock(&self) -> bool {
        matches!(
            self.code,
            Code::ERRCODE_LOCK_NOT_AVAILABLE
                | Code::ERRCODE_T_R_DEADLOCK_DETECTED
                | Code::ERRCODE_T_R_SERIALIZATION_FAILURE
        )
    }

    /// Raises it in the server.
    pub fn raise(mut self) -> ! {
        if self.state != self.code as i32 {
            // The report knows the server's own codes only.
            let state = format!("Its SQLSTATE was {}.", self.sqlstate());
            self.detail = Some(self.detail.map_or_else(|| state.clone(), |d| format!("{d} {state}")));
        }
        let mut report = ErrorReport::new(self.code, self.message, "");
        if let Some(detail) = self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint {
            report = report.set_hint(hint);
        }
        report.report(pgrx::PgLogLevel::ERROR);
        unreachable!("an error report does not return")
    }
}

impl Error {
    /// What was caught; `raised` is the SQLSTATE of the last error that the server reported meanwhile.
    pub(super) fn caught(caught: CaughtError, raised: i32) -> Self {
        match caught {
            // Raised by our own code through `raise`: its words are ours.
            CaughtError::ErrorReport(report) => Self {
                code: report.sql_error_code(),
                state: report.sql_error_code() as i32,
                foreign: false,
                message: report.message().to_owned(),
                detail: report.detail().map(str::to_owned),
                hint: report.hint().map(str::to_owned),
                cancel: says_cancel(report.sql_error_code()),
                unreachable: false,
                other_version: false,
            },
            // The server's words may quote a row ("Key (email)=(…)"), a RAISE of the shop's code may say anything.
            CaughtError::PostgresError(report) => Self {
                code: report.sql_error_code(),
                state: state_of(report.sql_error_code(), raised),
                foreign: true,
                message: words_for(report.sql_error_code(), state_of(report.sql_error_code(), raised)),
                detail: None,
                hint: None,
                // A trigger of the shop's may raise the same SQLSTATE, or pass on a remote server's timeout: that is
                // its order's failure. A cancel of this session comes from one place, or through a trigger of ours.
                cancel: says_cancel(report.sql_error_code())
                    && (report.function_name() == Some("ProcessInterrupts") || report.file() == file!()),
                unreachable: false,
                other_version: false,
            },
            CaughtError::RustPanic { .. } => Self::internal("unexpected failure inside amazon_pii"),
        }
    }
}

impl From<CaughtError> for Error {
    fn from(caught: CaughtError) -> Self {
        Self::caught(caught, 0)
    }
}

/// The SQLSTATE of an error whose code came as `code`: what that type does not know comes as an internal error.
fn state_of(code: Code, raised: i32) -> i32 {
    let internal = Code::ERRCODE_INTERNAL_ERROR;
    if code == internal && raised != 0 && Code::from(raised) == internal {
        raised
    } else {
        code as i32
    }
}

fn says_cancel(code: Code) -> bool {
    matches!(
        code,
        Code::ERRCODE_QUERY_CANCELED | Code::ERRCODE_ADMIN_SHUTDOWN | Code::ERRCODE_CRASH_SHUTDOWN
    )
}

/// Words for an error of the server, by its class; the server's own message is dropped because it may quote a value.
fn words_for(code: Code, state: i32) -> String {
    match code {
        Code::ERRCODE_UNIQUE_VIOLATION => "a unique constraint refused the value",
        Code::ERRCODE_CHECK_VIOLATION => "a check constraint refused the value",
        Code::ERRCODE_NOT_NULL_VIOLATION => "a not-null constraint refused the value",
        Code::ERRCODE_FOREIGN_KEY_VIOLATION => "a foreign key refused the value",
        Code::ERRCODE_EXCLUSION_VIOLATION => "an exclusion constraint refused the value",
        Code::ERRCODE_STRING_DATA_RIGHT_TRUNCATION => "the value is too long for the column",
        Code::ERRCODE_INSUFFICIENT_PRIVILEGE => "the table owner lacks a privilege",
        Code::ERRCODE_UNDEFINED_TABLE => "a table does not exist",
        Code::ERRCODE_UNDEFINED_COLUMN => "a column does not exist",
        Code::ERRCODE_UNDEFINED_FUNCTION => "a function or operator does not exist",
        Code::ERRCODE_LOCK_NOT_AVAILABLE => "a lock could not be had in time",
        Code::ERRCODE_T_R_DEADLOCK_DETECTED => "a deadlock was resolved",
        Code::ERRCODE_QUERY_CANCELED => "canceled",
        Code::ERRCODE_READ_ONLY_SQL_TRANSACTION => "the transaction is read-only",
        Code::ERRCODE_SYNTAX_ERROR => "syntax error in an expression of the policy",
        Code::ERRCODE_RAISE_EXCEPTION => "an exception was raised by code of the table's owner",
        _ if state != code as i32 => "an exception was raised by code of the table's owner",
        _ => return "the server refused".to_owned(),
    }
    .to_owned()
}

/// Raises `Err`, so that exported functions read as one expression.
pub fn or_raise<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| e.raise())
}

/// The current user's name, for messages.
pub fn role_name(role: pg_sys::Oid) -> String {
    // SAFETY: `noerr` is true, so a missing role gives NULL; the result is a palloc'd C string or NULL.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role, true);
        if name.is_null() {
            format!("role with OID {role}")
        } else {
            let owned = std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned();
            // Called once an order in a cycle, whose memory context lives as long as the cycle.
            pg_sys::pfree(name.cast());
            owned
        }
    }
}
