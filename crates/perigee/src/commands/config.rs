//! Configuration files: TOML with a table for each command (`[up]`, `[router]`, `[worker]`) whose keys are the long options of
//! that command. A file becomes arguments before the command line's own, which win; so one parser knows all names, and an
//! unknown key is the same error as an unknown option.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use toml::{Table, Value};

use crate::Cli;

/// Commands that a file may have a table for.
const COMMANDS: [&str; 3] = ["up", "router", "worker"];

/// Arguments of `config`.
#[derive(clap::Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    action: ConfigAction,
}

#[derive(clap::Subcommand)]
enum ConfigAction {
    /// Checks a file: every table and key, and every value as the command would take it.
    Check {
        /// The file.
        file: PathBuf,
    },
}

pub(crate) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    let ConfigAction::Check { file } = &args.action;
    let table = read(file)?;
    let mut faults = Vec::new();
    for command in table.keys() {
        let parsed = arguments(&table, command)
            .and_then(|keys| Ok(Cli::try_parse_from(["perigee".into(), command.into()].into_iter().chain(keys))?));
        if let Err(error) = parsed {
            let reason = error.to_string();
            faults.push(format!("[{command}] {}", reason.lines().next().unwrap_or_default()));
        }
    }
    if faults.is_empty() {
        println!("{}: good", file.display());
        return Ok(());
    }
    bail!("{}:\n{}", file.display(), faults.join("\n"))
}

/// The command line with the options of `--config FILE` put in place, right after the command's name.
///
/// # Errors
/// The file cannot be read, is not TOML, or has a table or value that no command has.
pub(crate) fn expand(mut line: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let Some(command) = line.get(1).and_then(|name| name.to_str()).map(str::to_owned) else { return Ok(line) };
    if !COMMANDS.contains(&command.as_str()) {
        return Ok(line);
    }
    let mut file = None;
    let mut index = 2;
    while index < line.len() {
        let argument = line[index].to_string_lossy().into_owned();
        if argument == "--config" && index + 1 < line.len() {
            file = Some(PathBuf::from(line.remove(index + 1)));
            line.remove(index);
        } else if let Some(path) = argument.strip_prefix("--config=") {
            file = Some(PathBuf::from(path));
            line.remove(index);
        } else {
            index += 1;
        }
    }
    if let Some(file) = file {
        let given = |option: &OsString| {
            let option = option.to_string_lossy();
            let name = option.split('=').next().unwrap_or_default().to_owned();
            line.iter().skip(2).any(|argument| argument.to_string_lossy().split('=').next() == Some(&name))
        };
        let keys: Vec<OsString> = arguments(&read(&file)?, &command)?.into_iter().filter(|key| !given(key)).collect();
        line.splice(2..2, keys);
    }
    Ok(line)
}

fn read(file: &Path) -> anyhow::Result<Table> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let table: Table = text.parse().with_context(|| format!("{} is not TOML", file.display()))?;
    for (name, value) in &table {
        if !COMMANDS.contains(&name.as_str()) || !value.is_table() {
            bail!("{}: {name}: expected a table [up], [router] or [worker]", file.display());
        }
    }
    Ok(table)
}

/// A command's table as options; a command without a table has none.
fn arguments(table: &Table, command: &str) -> anyhow::Result<Vec<OsString>> {
    let Some(options) = table.get(command).and_then(Value::as_table) else { return Ok(Vec::new()) };
    let mut arguments = Vec::new();
    for (name, value) in options {
        match value {
            Value::Boolean(true) => arguments.push(format!("--{name}").into()),
            Value::Boolean(false) => {}
            Value::String(text) => arguments.push(format!("--{name}={text}").into()),
            Value::Integer(number) => arguments.push(format!("--{name}={number}").into()),
            Value::Float(number) => arguments.push(format!("--{name}={number}").into()),
            other => bail!("[{command}] {name}: expected text, a number or a boolean, found {}", other.type_str()),
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn expanded(text: &str, line: &[&str]) -> anyhow::Result<Vec<String>> {
        let file = file(text);
        let mut line: Vec<OsString> = line.iter().map(Into::into).collect();
        line.push("--config".into());
        line.push(file.path().into());
        Ok(expand(line)?.iter().map(|argument| argument.to_string_lossy().into_owned()).collect())
    }

    #[test]
    fn keys_are_options_and_the_command_line_wins() {
        let text = "[up]\nreplicas = 3\nmodel = \"random:wide\"\njson = true\n[router]\ngrace = 5\n";
        let line = expanded(text, &["perigee", "up", "--model=random:tiny"]).unwrap();
        assert_eq!(line, ["perigee", "up", "--json", "--replicas=3", "--model=random:tiny"]);
        assert!(Cli::try_parse_from(line).is_ok());
    }

    #[test]
    fn unknown_tables_keys_and_kinds_of_value_are_errors() {
        let check = |text: &str| run(&ConfigArgs { action: ConfigAction::Check { file: file(text).path().into() } });
        assert!(check("[up]\nreplicas = 2\n[worker]\ntp = 2\nstate-slots = 4\n").is_ok());
        for (text, reason) in [
            ("[up]\nreplica = 2\n", "--replica"),
            ("[server]\nport = 1\n", "server"),
            ("[up]\nreplicas = \"many\"\n", "many"),
            ("[up]\nreplicas = [1]\n", "array"),
            ("up = 1\n", "table"),
            ("[up\n", "TOML"),
        ] {
            let message = format!("{:#}", check(text).unwrap_err());
            assert!(message.contains(reason), "{text:?}: {message}");
        }
    }
}
