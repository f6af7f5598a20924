//! Where a process's settings come from: flags, then the environment, then a file (`--config FILE` or PERIGEE_CONFIG), then
//! defaults. Those of environment and file become arguments in front of the flags, so that one parser knows all names and
//! values, and a name that no option has is an error.

pub(crate) mod environment;
pub(crate) mod file;
pub(crate) mod schema;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::bail;

use self::file::SettingsFile;
use self::schema::Schema;

/// Names the file, where no flag does.
pub(crate) const CONFIG_VARIABLE: &str = "PERIGEE_CONFIG";

/// An option that a source sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Given {
    /// Its long name.
    pub(crate) name: String,
    /// It as an argument; none for a switch that is off.
    pub(crate) argument: Option<String>,
}

/// The variables of this process's environment that are text and ours.
pub(crate) fn variables() -> Vec<(String, String)> {
    let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text).filter(|(name, _)| name.starts_with("PERIGEE_")).collect()
}

/// The command line with what environment and file set, right after the command's name.
///
/// # Errors
/// Everything that is wrong with either.
pub(crate) fn expand(mut line: Vec<OsString>, variables: &[(String, String)]) -> anyhow::Result<Vec<OsString>> {
    let Some(command) = line.get(1).and_then(|name| name.to_str()).map(str::to_owned) else { return Ok(line) };
    let Some(schema) = Schema::of(&command) else { return Ok(line) };
    let named = |variable: &str| variables.iter().find(|(name, _)| name == variable).map(|(_, value)| value.into());
    let mut faults = Vec::new();
    let mut given = environment::settings(variables, &command, &schema, &mut faults);
    if let Some(path) = take_config(&mut line).or_else(|| named(CONFIG_VARIABLE)) {
        let file = SettingsFile::read(&path)?.settings(&command, &schema, &mut faults);
        given.extend(
            file.into_iter()
                .filter(|setting| !given.iter().any(|other| other.name == setting.name))
                .collect::<Vec<_>>(),
        );
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    let flags: Vec<String> = line.iter().skip(2).map(|flag| flag.to_string_lossy().into_owned()).collect();
    let is_flag = |name: &str| flags.iter().any(|flag| flag.split('=').next() == Some(&format!("--{name}")));
    let arguments = given.into_iter().filter(|setting| !is_flag(&setting.name)).filter_map(|setting| setting.argument);
    line.splice(2..2, arguments.map(OsString::from));
    Ok(line)
}

/// Takes `--config FILE` out of a command line.
fn take_config(line: &mut Vec<OsString>) -> Option<PathBuf> {
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
    file
}

#[cfg(test)]
mod tests;
