//! A command of the DBA's whose output is needed. It may hang: a cancel, SIGTERM and the time limit get through, and
//! take the command and what it started along.

use std::ffi::{c_int, c_long};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use zeroize::Zeroizing;

use super::guc;

/// Why there is no output.
#[derive(Debug)]
pub enum Failure {
    Start(ErrorKind),
    Wait(ErrorKind),
    /// It said itself that it failed.
    Status,
    /// It did not end in time.
    Time,
}

/// How often to look whether a command that has closed its output has ended.
const LOOK: Duration = Duration::from_millis(10);

/// The operating system's, which pgrx does not bind.
mod system {
    use std::ffi::c_int;

    pub(super) const SIGKILL: c_int = 9;
    unsafe extern "C" {
        pub(super) fn kill(pid: c_int, signal: c_int) -> c_int;
    }
}

/// A running command, in a process group of its own; killed with the group unless it was seen to end.
struct Running {
    child: Child,
    ended: bool,
    /// None: no limit.
    until: Option<Instant>,
}

/// Runs a shell command and returns what it prints, at most `limit` bytes of it.
///
/// # Errors
/// It failed, or took too long. A cancel unwinds, once the command is gone.
pub fn output_of(command: &str, limit: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let milliseconds = u64::from(guc::statement_timeout().unsigned_abs());
    let child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What the command complains of belongs in the server log, as with ssl_passphrase_command.
        .stderr(Stdio::inherit())
        .process_group(0)
        .spawn()
        .map_err(|e| Failure::Start(e.kind()))?;
    let mut running = Running {
        child,
        ended: false,
        until: (milliseconds > 0).then(|| Instant::now() + Duration::from_millis(milliseconds)),
    };
    let output = running.read(limit)?;
    if running.wait()?.success() {
        Ok(output)
    } else {
        Err(Failure::Status)
    }
}

impl Running {
    fn read(&mut self, limit: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let mut output = Zeroizing::new(vec![0; limit]);
        let mut length = 0;
        // Closed when this function ends: a command that prints too much is not waited for.
        let Some(mut pipe) = self.child.stdout.take() else {
            return Err(Failure::Wait(ErrorKind::BrokenPipe));
        };
        while length < limit {
            if !self.pause(Some(pipe.as_raw_fd()), None)? {
                continue;
            }
            match pipe.read(&mut output[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Wait(e.kind())),
            }
        }
        output.truncate(length);
        Ok(output)
    }

    fn wait(&mut self) -> Result<ExitStatus, Failure> {
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| Failure::Wait(e.kind()))? {
                self.ended = true;
                return Ok(status);
            }
            self.pause(None, Some(LOOK))?;
        }
    }

    /// Waits until there is something to read, for `at_most` this long, or for a signal. Whether there is something.
    fn pause(&mut self, pipe: Option<c_int>, at_most: Option<Duration>) -> Result<bool, Failure> {
        let left = self.until.map(|u| u.saturating_duration_since(Instant::now()));
        if left.is_some_and(|l| l.is_zero()) {
            return Err(Failure::Time);
        }
        let millis = match (left, at_most) {
            (Some(a), Some(b)) => a.min(b),
            (Some(a), None) | (None, Some(a)) => a,
            (None, None) => Duration::from_secs(3600),
        }
        .as_millis()
        .clamp(1, 3_600_000) as c_long;
        let mut flags = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_POSTMASTER_DEATH;
        if pipe.is_some() {
            flags |= pg_sys::WL_SOCKET_READABLE;
        }
        // SAFETY: this process's own latch, and an open file; the latch is reset before what it announces is looked at.
        let (events, stopping) = unsafe {
            let events = pg_sys::WaitLatchOrSocket(
                pg_sys::MyLatch,
                flags as c_int,
                pipe.unwrap_or(pg_sys::PGINVALID_SOCKET as c_int),
                millis,
                pg_sys::PG_WAIT_EXTENSION,
            ) as u32;
            pg_sys::ResetLatch(pg_sys::MyLatch);
            let canceled = (&raw const pg_sys::QueryCancelPending).read_volatile() != 0
                || (&raw const pg_sys::ProcDiePending).read_volatile() != 0;
            (events, canceled || events & pg_sys::WL_POSTMASTER_DEATH != 0)
        };
        if stopping {
            // SIGTERM ends this process without unwinding.
            self.kill();
        }
        pgrx::check_for_interrupts!();
        if stopping {
            return Err(Failure::Wait(ErrorKind::Interrupted));
        }
        Ok(events & pg_sys::WL_SOCKET_READABLE != 0)
    }

    /// Ends the command and everything in its group, and leaves no zombie.
    fn kill(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if let Ok(group) = c_int::try_from(self.child.id()) {
            // SAFETY: no memory is involved. The child leads the group and was not waited for: the id is still its own.
            unsafe { system::kill(-group, system::SIGKILL) };
        }
        let _gone = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}
