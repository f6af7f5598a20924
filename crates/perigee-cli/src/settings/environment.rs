//! Settings in the environment: PERIGEE_ROUTER_GRACE is `--grace` of `perigee router`. PERIGEE_LOG and PERIGEE_LOG_FORMAT are
//! those of every command.

use super::Given;
use super::schema::Schema;

/// Options that every command has, and may be named without it.
const COMMON: [&str; 2] = ["log", "log-format"];
/// Endings of what Kubernetes puts into containers for a Service whose name happens to begin like a command.
const SERVICE_LINKS: [&str; 3] = ["SERVICE_HOST", "SERVICE_PORT", "PORT"];

/// The variable of a command's option, or what all variables of a command begin with.
pub(crate) fn variable(command: &str, option: &str) -> String {
    format!("PERIGEE_{command}_{option}").to_uppercase().replace('-', "_")
}

/// What variables set for a command; what is wrong with them goes to `faults`.
pub(crate) fn settings(
    variables: &[(String, String)],
    command: &str,
    schema: &Schema,
    faults: &mut Vec<String>,
) -> Vec<Given> {
    let prefix = variable(command, "");
    let own = variables.iter().filter_map(|(name, value)| {
        let option = name.strip_prefix(&prefix).filter(|option| !is_service_link(option, value))?;
        Some((name, option.to_lowercase().replace('_', "-"), value))
    });
    let common = variables.iter().filter_map(|(name, value)| {
        let option = name.strip_prefix("PERIGEE_")?.to_lowercase().replace('_', "-");
        COMMON.contains(&option.as_str()).then_some((name, option, value))
    });
    let mut given: Vec<Given> = Vec::new();
    for (variable_name, option, value) in own.chain(common) {
        // A command's own variable comes first.
        if given.iter().any(|setting| setting.name == option) {
            continue;
        }
        let taken = match schema.find(&option) {
            Err(nearest) => Err(format!("unknown variable; the nearest is {}", variable(command, nearest))),
            Ok(setting) => schema.argument(setting, switch_word(setting.is_switch, value)),
        };
        match taken {
            Ok(argument) => given.push(Given { name: option, argument }),
            Err(reason) => faults.push(format!("{variable_name}: {reason}")),
        }
    }
    given
}

/// 1 and 0 are common in environments.
fn switch_word(is_switch: bool, value: &str) -> &str {
    match value {
        "1" if is_switch => "true",
        "0" if is_switch => "false",
        _ => value,
    }
}

/// Such as PERIGEE_ROUTER_SERVICE_HOST, PERIGEE_ROUTER_SERVICE_PORT_GRPC, PERIGEE_ROUTER_PORT_7411_TCP_ADDR and PERIGEE_ROUTER_PORT,
/// which an option of `up` is named like: a link's is a URL.
fn is_service_link(option: &str, value: &str) -> bool {
    let begins =
        |ending: &str| option.strip_prefix(ending).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    SERVICE_LINKS.into_iter().any(begins) && (option != "PORT" || value.contains("://"))
}
