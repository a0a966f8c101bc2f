//! What SQL calls. Wrappers only; declared in `sql/40_functions.sql`.

mod access;
mod archive;
mod canary;
mod customers;
mod cycle;
mod ending;
mod files;
mod former;
mod keys;
mod policy;
mod trigger;
mod verify;
