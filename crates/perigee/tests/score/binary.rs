//! The binary under test: commands, their output, and processes that do not outlive a test.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// The binary under test.
pub(crate) fn perigee() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_perigee"));
    command.stdin(Stdio::null());
    command
}

/// `perigee score` of a model and a file of prompts.
pub(crate) fn score(model: &str, tokens: &Path, out: &Path) -> Command {
    let mut command = perigee();
    command.args(["score", "--model", model, "--tokens"]).arg(tokens).arg("--out").arg(out);
    command
}

/// Standard output and error of a finished process, for messages of failed assertions.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A running process whose standard error goes to a file: the workers that inherit it may outlive it. Killed if a test
/// ends before it does.
pub(crate) struct Running {
    pub(crate) child: Child,
}

impl Running {
    pub(crate) fn start(mut command: Command, errors: &Path) -> Self {
        command.stdout(Stdio::null()).stderr(File::create(errors).unwrap());
        Self { child: command.spawn().unwrap() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already needs neither.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
