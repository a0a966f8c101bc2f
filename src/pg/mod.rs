//! The only layer that talks to the server, and the only one that may hold `unsafe`.
//! Everything above it sees safe types: names that are quoted, rows of text, typed errors.
#![allow(unsafe_code)]

pub mod activity;
pub mod call;
pub mod catalog;
mod child;
pub mod columns;
pub mod cursor;
pub mod deadline;
pub mod error;
pub mod guc;
pub mod ident;
pub mod identity;
pub mod invalidation;
pub mod keys;
pub mod origin;
mod params;
pub mod prepared;
pub mod replicas;
mod rows;
mod size;
pub mod sql;
pub mod subxact;
pub mod tombstones;
pub mod transition;
pub mod trigger;
pub mod unique;
pub mod version;
pub mod worker;
pub mod xact;
