//! Where master keys come from: a command's output or a file that only its owner can read. Never kept between calls.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use zeroize::Zeroizing;

use super::error::{Error, Result};
use super::guc;
use crate::domain::vault::MasterKeys;

/// A key text is a few lines; more is somebody's mistake.
const LONGEST: u64 = 64 * 1024;

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
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What the command complains of belongs in the server log, as with ssl_passphrase_command.
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| refused(&format!("could not be started ({})", e.kind())))?;
    let output = child.stdout.take().map(read_limited);
    let status = child
        .wait()
        .map_err(|e| refused(&format!("could not be waited for ({})", e.kind())))?;
    if !status.success() {
        return Err(refused("failed"));
    }
    output
        .ok_or_else(|| refused("has no output"))?
        .map_err(|_| refused("printed something that is no text"))
}

fn read_limited(source: impl Read) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    source.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}
