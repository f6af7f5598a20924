//! `perigee config check`: whether a file of settings is good, without starting anything.

use std::path::PathBuf;

use anyhow::bail;

use crate::settings::file::SettingsFile;
use crate::settings::schema::Schema;

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
    let ConfigAction::Check { file: path } = &args.action;
    let file = SettingsFile::read(path)?;
    let mut faults = Vec::new();
    for command in file.commands() {
        if let Some(schema) = Schema::of(command) {
            file.settings(command, &schema, &mut faults);
        }
    }
    if faults.is_empty() {
        println!("{}: good", path.display());
        return Ok(());
    }
    bail!("{}:\n{}", path.display(), faults.join("\n"))
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
    }
}
