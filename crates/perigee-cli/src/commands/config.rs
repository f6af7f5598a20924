//! `perigee config check`: whether a file of settings is good, without starting anything.

use std::path::PathBuf;

use anyhow::bail;
use clap::Parser;

use crate::settings::Given;
use crate::settings::file::SettingsFile;
use crate::settings::schema::Schema;
use crate::{Cli, Command};

/// Arguments of `config`.
#[derive(clap::Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    action: ConfigAction,
}

#[derive(clap::Subcommand)]
enum ConfigAction {
    /// Checks a file: every table and key, and every value as the command would take it. What depends on several options, of
    /// which others may come from elsewhere, is seen at the start.
    Check {
        /// The file.
        file: PathBuf,
    },
}

pub(crate) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    let ConfigAction::Check { file: path } = &args.action;
    let file = SettingsFile::read(path)?;
    let mut faults = Vec::new();
    for command in file.commands() {
        if let Some(schema) = Schema::of(command) {
            let given = file.settings(command, &schema, &mut faults);
            faults.extend(value_faults(command, given).into_iter().map(|fault| format!("[{command}] {fault}")));
        }
    }
    if faults.is_empty() {
        println!("{}: good", path.display());
        return Ok(());
    }
    bail!("{}:\n{}", path.display(), faults.join("\n"))
}

/// What a command would find wrong with values that are numbers, or words, as they should be. Nothing can be said where an option
/// is missing that there must be: it may come from elsewhere.
fn value_faults(command: &str, given: Vec<Given>) -> Vec<String> {
    let arguments = given.into_iter().filter_map(|setting| setting.argument);
    let line = ["perigee".to_owned(), command.to_owned()].into_iter().chain(arguments);
    match Cli::try_parse_from(line).map(|cli| cli.command) {
        Ok(Command::Up(args)) => args.faults(),
        Ok(Command::Worker(config)) => {
            let mut faults = config.engine.faults();
            faults.extend(config.moves.faults(config.step_timeout()));
            faults
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_of_all_tables_are_told() {
        let check = |text: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            run(&ConfigArgs { action: ConfigAction::Check { file: file.path().into() } })
        };
        assert!(check("[up]\nreplicas = 2\n[worker]\ntp = 2\nstate-slots = 4\n[router]\ngrace = 5\n").is_ok());
        let message = format!("{:#}", check("[up]\nreplica = 2\n[worker]\ntp = -1\n").unwrap_err());
        assert!(message.contains("[up] replica: unknown key") && message.contains("[worker] tp: "), "{message}");
        let values =
            "[up]\nstate-slots = 0\nattend-misses = 0\n[worker]\nmemory-fraction = 5\n[router]\nlease-ms = 1\n";
        let message = format!("{:#}", check(values).unwrap_err());
        for fault in
            ["[up] --state-slots: ", "[up] --attend-misses: ", "[worker] --memory-fraction: ", "[router] lease-ms: "]
        {
            assert!(message.contains(fault), "{message}");
        }
    }
}
