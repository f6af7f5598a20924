//! One process of the binary under test: its standard output line by line, its standard error in a file that is shown
//! where a test fails, and its end with the value that stands for it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use tempfile::TempDir;

use crate::error::{Result, TestkitError};
use crate::processes::wait_for;

/// A folder for what processes write.
pub(crate) fn folder() -> Result<TempDir> {
    TempDir::with_prefix("perigee-sandbox-").map_err(TestkitError::file(std::env::temp_dir()))
}

/// A running process; killed when dropped, and it ends where the test is killed.
pub struct Started {
    what: String,
    child: Child,
    /// Its standard input, with which it ends: a test that is killed drops nothing. Kept apart, because waiting for a child
    /// closes the one that it has.
    _lifeline: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: PathBuf,
}

impl Started {
    /// Starts a command of the program; its standard error goes to a file in `folder`, because children that inherit it may outlive it.
    ///
    /// # Errors
    /// The program or the file cannot be opened.
    pub fn spawn(what: &str, mut command: Command, folder: &Path) -> Result<Self> {
        let errors = folder.join(format!("{}.errors", what.replace(' ', "-")));
        let file = File::create(&errors).map_err(TestkitError::file(&errors))?;
        command.arg("--end-with-input").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let program = command.get_program().to_owned();
        let mut child = command.spawn().map_err(TestkitError::file(PathBuf::from(program)))?;
        let lifeline = child.stdin.take();
        let (sender, lines) = channel();
        if let Some(output) = child.stdout.take() {
            // Read to its end, so that the process never waits for a reader.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                    // A test that has what it wanted reads no more.
                    let _ = sender.send(line);
                }
            });
        }
        Ok(Self { what: what.to_owned(), child, _lifeline: lifeline, lines, errors })
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line on standard output.
    ///
    /// # Errors
    /// It ended, or wrote nothing within `limit`.
    pub fn first_line(&mut self, limit: Duration) -> Result<String> {
        self.lines.recv_timeout(limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => self.fault(&format!("nothing on standard output within {limit:?}")),
            RecvTimeoutError::Disconnected => self.fault("its standard output ended"),
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It runs on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        let waited = wait_for("the end of a process", limit, || child.try_wait().transpose());
        match waited {
            Ok((Ok(status), _)) => Ok(status),
            Ok((Err(error), _)) => Err(self.fault(&error.to_string())),
            Err(error) => Err(self.fault(&error.to_string())),
        }
    }

    /// What it and its children wrote to standard error.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.errors).unwrap_or_default()).into_owned()
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        // One that has ended already needs neither.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn fault(&self, message: &str) -> TestkitError {
        TestkitError::Process { what: self.what.clone(), message: format!("{message}; it wrote:\n{}", self.errors()) }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} wrote:\n{}---", self.what, self.errors());
        }
    }
}
