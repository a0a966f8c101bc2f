//! What can be decided without a server: the policy document, treatments, the clock, sealing. Imports nothing of it.

pub mod array_text;
pub mod clock;
pub mod document;
pub mod filter;
pub mod json_merge;
pub mod json_text;
pub mod lag;
pub mod message;
pub mod number;
pub mod origin;
pub mod pace;
pub mod policy;
pub mod preset;
pub mod quota;
pub mod reason;
pub mod sample;
pub mod scrub;
pub mod sought;
pub mod tombstone;
pub mod treatment;
pub mod vault;
pub mod words;
