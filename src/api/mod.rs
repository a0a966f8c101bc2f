//! What SQL calls. Wrappers only; declared in `sql/40_functions.sql`.

mod access;
mod customers;
mod cycle;
mod files;
mod policy;
mod trigger;
mod verify;
