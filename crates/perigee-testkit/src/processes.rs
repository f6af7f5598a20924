//! Watches processes from outside: which children one has, whether they still run, signals to them, and a wait for a
//! condition with a deadline. Linux only, by /proc; nothing here starts or serves anything.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::error::{Result, TestkitError};

/// Time between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Process ids of the running children of a process, in ascending order; none where the process is gone.
pub fn children(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return found };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some((state, of)) = status(pid)
            && of == parent
            && state != 'Z'
        {
            found.push(pid);
        }
    }
    found.sort_unstable();
    found
}

/// Whether a process exists and has not ended; one that has ended and was not yet waited for does not run.
pub fn runs(pid: u32) -> bool {
    status(pid).is_some_and(|(state, _)| state != 'Z')
}

/// The arguments of a process, program first; none where it is gone.
pub fn arguments(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|&byte| byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

/// Processor time that a process has used, in clock ticks; none where it is gone.
pub fn ticks(pid: u32) -> Option<u64> {
    let fields = fields(pid)?;
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Sends a signal, named as `kill` names it: KILL, STOP, CONT, TERM.
///
/// # Errors
/// There is no such process, or it is not ours.
pub fn signal(name: &str, pid: u32) -> Result<()> {
    kill(name, &pid.to_string())
}

/// The same for a whole process group, which has the id of the process that leads it.
///
/// # Errors
/// As for [`signal`].
pub fn signal_group(name: &str, leader: u32) -> Result<()> {
    kill(name, &format!("-{leader}"))
}

fn kill(name: &str, whom: &str) -> Result<()> {
    let fault = |message: String| TestkitError::Process { what: format!("kill -{name} -- {whom}"), message };
    let output = Command::new("kill").args([&format!("-{name}"), "--", whom]).output();
    let output = output.map_err(|error| fault(error.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(fault(String::from_utf8_lossy(&output.stderr).into_owned())) }
}

/// Looks until there is something to see, and tells how long that took.
///
/// # Errors
/// There was nothing within the time allowed.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Result<(T, Duration)> {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok((found, began.elapsed()));
        }
        if began.elapsed() > limit {
            return Err(TestkitError::Deadline { what: what.into(), seconds: limit.as_secs() });
        }
        std::thread::sleep(POLL);
    }
}

/// State letter and parent of a process.
fn status(pid: u32) -> Option<(char, u32)> {
    let fields = fields(pid)?;
    Some((fields.first()?.chars().next()?, fields.get(1)?.parse().ok()?))
}

/// The fields of /proc/PID/stat after the program's name, which may itself hold spaces and brackets.
fn fields(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).ok()?;
    let (_, after) = text.rsplit_once(") ")?;
    Some(after.split_whitespace().map(str::to_owned).collect())
}
