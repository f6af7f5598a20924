//! Settings in a file: TOML with a table for each command (`[up]`, `[router]`, `[worker]`), whose keys are its options.

use std::path::Path;

use anyhow::{Context, bail};
use toml::{Table, Value};

use super::Given;
use super::schema::{COMMANDS, Schema};

/// A file that is TOML and has tables of commands only.
#[derive(Debug)]
pub(crate) struct SettingsFile(Table);

impl SettingsFile {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, or has a table that no command has.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let table: Table = text.parse().with_context(|| format!("{} is not TOML", path.display()))?;
        for (name, value) in &table {
            if !COMMANDS.contains(&name.as_str()) || !value.is_table() {
                bail!("{}: {name}: expected a table [up], [router] or [worker]", path.display());
            }
        }
        Ok(Self(table))
    }

    /// The commands that it has a table for.
    pub(crate) fn commands(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// What it sets for a command; what is wrong with it goes to `faults`.
    pub(crate) fn settings(&self, command: &str, schema: &Schema, faults: &mut Vec<String>) -> Vec<Given> {
        let table = self.0.get(command).and_then(Value::as_table);
        let mut given = Vec::new();
        for (name, value) in table.into_iter().flatten() {
            let taken = match schema.find(name) {
                Err(nearest) => Err(format!("unknown key; the nearest is {nearest}")),
                Ok(setting) => text(value)
                    .and_then(|value| schema.argument(setting, &value))
                    .map(|argument| Given { name: setting.name.clone(), argument }),
            };
            match taken {
                Ok(setting) => given.push(setting),
                Err(reason) => faults.push(format!("[{command}] {name}: {reason}")),
            }
        }
        given
    }
}

fn text(value: &Value) -> Result<String, String> {
    match value {
        Value::Boolean(value) => Ok(value.to_string()),
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        other => Err(format!("expected text, a number or a boolean, found {}", other.type_str())),
    }
}
