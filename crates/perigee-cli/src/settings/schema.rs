//! The options of each command that serves, as the command line's parser knows them: the one schema of flags, environment and
//! files.

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, Parser};

use crate::Cli;

/// Commands that serve, and so have a table in files and a prefix in the environment.
pub(crate) const COMMANDS: [&str; 3] = ["up", "router", "worker"];

/// Options of one command.
#[derive(Debug)]
pub(crate) struct Schema {
    command: String,
    options: Vec<Setting>,
}

/// One option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Its long name, without dashes.
    pub(crate) name: String,
    /// Whether it is given without a value.
    pub(crate) is_switch: bool,
}

impl Schema {
    /// The options of a command; none for one that does not serve. Options between a process and its children are left out.
    pub(crate) fn of(command: &str) -> Option<Self> {
        if !COMMANDS.contains(&command) {
            return None;
        }
        let cli = Cli::command();
        let known = cli.find_subcommand(command)?.get_arguments().filter(|option| !option.is_hide_set());
        let setting = |option: &clap::Arg| {
            let name = option.get_long()?.to_owned();
            Some(Setting { name, is_switch: matches!(option.get_action(), ArgAction::SetTrue) })
        };
        Some(Self { command: command.to_owned(), options: known.filter_map(setting).collect() })
    }

    #[cfg(test)]
    pub(crate) fn options(&self) -> &[Setting] {
        &self.options
    }

    /// An option by its long name.
    ///
    /// # Errors
    /// The name of the nearest one.
    pub(crate) fn find(&self, name: &str) -> Result<&Setting, &str> {
        if let Some(setting) = self.options.iter().find(|setting| setting.name == name) {
            return Ok(setting);
        }
        let likeness = |setting: &&Setting| strsim::jaro_winkler(&setting.name, name);
        let nearest = self.options.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        Err(nearest.map_or("", |setting| setting.name.as_str()))
    }

    /// An option's value as an argument; none for a switch that is off.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub(crate) fn argument(&self, setting: &Setting, value: &str) -> Result<Option<String>, String> {
        let name = &setting.name;
        if setting.is_switch {
            return match value {
                "true" => Ok(Some(format!("--{name}"))),
                "false" => Ok(None),
                _ => Err(format!("expected true or false, found {value:?}")),
            };
        }
        let argument = format!("--{name}={value}");
        match Cli::try_parse_from(["perigee", &self.command, &argument]) {
            // Another source may have what is missing.
            Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
                let reason = error.to_string();
                let reason = reason.lines().next().unwrap_or_default();
                Err(reason.trim_start_matches("error: ").to_owned())
            }
            _ => Ok(Some(argument)),
        }
    }
}
