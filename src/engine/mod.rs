//! Statements and batches: what happens to orders, in which order, as whom.

pub mod access;
pub mod alive;
pub mod apply;
pub mod archive;
pub mod audit;
pub mod check;
pub mod cycle;
pub mod due;
pub mod find;
pub mod flag;
pub mod former;
pub mod gather;
pub mod guard;
pub mod inspect;
pub mod overwrite;
pub mod plan;
pub mod records;
pub mod redact;
pub mod rekey;
pub mod state;
pub mod sweep;
pub mod touched;
pub mod trigger_ddl;
pub mod triggers;
pub mod vault;
pub mod walk;
