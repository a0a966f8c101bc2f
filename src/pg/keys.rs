//! Where master keys come from: a command's output or a file that only its owner can read. Never kept between calls.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

use zeroize::Zeroizing;

use super::child;
use super::error::{Error, Result};
use super::guc;
use crate::domain::vault::MasterKeys;

/// A key text is a few lines; more is somebody's mistake.
const LONGEST: usize = 64 * 1024;

/// Reads the master keys.
///
/// # Errors
/// None is configured, or what is configured cannot be read or is no key; the hint says how to make one.
pub fn master_keys() -> Result<MasterKeys> {
    let text = match (guc::key_command(), guc::key_file()) {
        (Some(command), _) => from_command(&command)?,
        (None, Some(path)) => from_file(&path)?,
        (None, None) => return Err(Error::no_key("no master key is configured")),
    };
    MasterKeys::parse(&text).map_err(|e| Error::no_key(format!("the master key is unusable: {e}")))
}

fn from_file(path: &str) -> Result<Zeroizing<String>> {
    let refused = |why: &str| Error::no_key(format!("the file in amazon_pii.key_file {why}"));
    let file = std::fs::File::open(path).map_err(|e| refused(&format!("cannot be opened ({})", e.kind())))?;
    let meta = file
        .metadata()
        .map_err(|e| refused(&format!("cannot be examined ({})", e.kind())))?;
    if !meta.is_file() {
        return Err(refused("is no ordinary file"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(refused("can be read by others than its owner"));
    }
    read_limited(file).map_err(|_| refused("cannot be read as text"))
}

fn from_command(command: &str) -> Result<Zeroizing<String>> {
    let refused = |why: &str| Error::no_key(format!("amazon_pii.key_command {why}"));
    let bytes = match child::output_of(command, LONGEST) {
        Ok(bytes) => bytes,
        Err(child::Failure::Start(kind)) => return Err(refused(&format!("could not be started ({kind})"))),
        Err(child::Failure::Wait(kind)) => return Err(refused(&format!("could not be waited for ({kind})"))),
        Err(child::Failure::Status) => return Err(refused("failed")),
        Err(child::Failure::Time) => return Err(refused("took longer than amazon_pii.statement_timeout")),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| refused("printed something that is no text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn read_limited(source: impl Read) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    source.take(LONGEST as u64).read_to_string(&mut text)?;
    Ok(text)
}
