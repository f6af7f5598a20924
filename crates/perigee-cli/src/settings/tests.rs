//! Settings from all sources, against the parser of the command line.

use clap::{CommandFactory, Parser};

use super::schema::COMMANDS;
use super::*;
use crate::Cli;

/// A value for every option that is no switch, not its default.
fn sample(option: &str) -> &'static str {
    match option {
        "listen" | "internal" | "http" => "127.0.0.1:9",
        "leader" => "host:9",
        "registry" => "file:/replicas.json",
        "model" => "random:wide@3",
        "device" => "cuda:1,2",
        "dtype" => "bf16",
        "replica" | "advertise" | "prompt" | "etcd-user" => "name",
        "log" => "perigee_router=debug",
        "log-format" => "json",
        "otlp-endpoint" => "http://collector:4317",
        "otlp-sample" | "memory-fraction" => "0.25",
        "lease-ms" | "prepare-ms" => "700",
        "pages-follow" => "never",
        "handoff" => "pair",
        "balance" => "dry-run",
        "tls-cert" | "tls-key" | "tls-ca" | "etcd-ca" | "etcd-cert" | "etcd-key" | "etcd-password-file"
        | "resume-key-file" => "/file",
        _ => "7",
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn expanded(flags: &[&str], variables: &[(&str, &str)], text: &str) -> Result<Vec<String>, String> {
    let file = file(text);
    let mut line: Vec<OsString> = ["perigee"].iter().chain(flags).map(Into::into).collect();
    line.extend(["--config".into(), file.path().into()]);
    let variables: Vec<_> = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let line = expand(line, &variables).map_err(|error| format!("{error:#}"))?;
    Ok(line.iter().map(|argument| argument.to_string_lossy().into_owned()).collect())
}

#[test]
fn every_option_of_every_command_can_be_set_three_ways() {
    for command in COMMANDS {
        let schema = Schema::of(command).unwrap();
        assert!(schema.options().len() > 10, "{command}");
        for setting in schema.options() {
            let name = setting.name.as_str();
            let (value, flag) = match setting.is_switch {
                true => ("true", format!("--{name}")),
                false => (sample(name), format!("--{name}={}", sample(name))),
            };
            let ways = [
                expanded(&[command, &flag], &[], ""),
                expanded(&[command], &[(&environment::variable(command, name), value)], ""),
                expanded(&[command], &[], &format!("[{command}]\n{name} = \"{value}\"\n")),
            ];
            for way in ways {
                let line = way.unwrap_or_else(|error| panic!("{command} {name}: {error}"));
                let matches = Cli::command().ignore_errors(true).try_get_matches_from(&line).unwrap();
                let own = matches.subcommand_matches(command).unwrap();
                let id = name.replace('-', "_");
                let raw: Vec<_> = own.get_raw(&id).into_iter().flatten().collect();
                assert_eq!(raw, [value], "{command} {name}");
            }
        }
    }
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let text = "[up]\nreplicas = 3\ntp = 4\nmodel = \"random:wide\"\njson = true\n[router]\ngrace = 5\n";
    let variables = [("PERIGEE_UP_TP", "1"), ("PERIGEE_UP_MODEL", "random:48b"), ("PERIGEE_UP_JSON", "0")];
    let line = expanded(&["up", "--model=random:tiny"], &variables, text).unwrap();
    assert_eq!(line, ["perigee", "up", "--tp=1", "--replicas=3", "--model=random:tiny"]);
    assert!(Cli::try_parse_from(line).is_ok());
    let switched = expanded(&["up"], &[("PERIGEE_UP_INSECURE", "1")], text).unwrap();
    assert!(switched.contains(&"--insecure".to_owned()) && switched.contains(&"--json".to_owned()), "{switched:?}");
}

#[test]
fn a_file_may_be_named_in_the_environment_and_logs_without_a_command() {
    let file = file("[worker]\ntp = 3\nlog = \"error\"\n");
    let line = vec!["perigee".into(), "worker".into()];
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let variables = [variable(CONFIG_VARIABLE, &file.path().to_string_lossy()), variable("PERIGEE_LOG", "info")];
    assert_eq!(expand(line.clone(), &variables).unwrap(), ["perigee", "worker", "--log=info", "--tp=3"]);
    // A command's own variable is nearer.
    let variables =
        [variables, [variable("PERIGEE_WORKER_LOG", "debug"), variable("PERIGEE_ROUTER_LOG", "warn")]].concat();
    assert_eq!(expand(line, &variables).unwrap(), ["perigee", "worker", "--log=debug", "--tp=3"]);
}

#[test]
fn what_no_option_is_called_is_an_error_that_names_the_nearest() {
    for (variables, text, reason) in [
        (vec![], "[up]\nreplica = 2\n", "[up] replica: unknown key; the nearest is replicas"),
        (vec![], "[up]\nreplicas = \"many\"\n", "[up] replicas: invalid value 'many'"),
        (vec![], "[up]\nreplicas = [1]\n", "[up] replicas: expected text, a number or a boolean, found array"),
        (vec![], "[up]\njson = \"yes\"\n", "[up] json: expected true or false"),
        (vec![], "[server]\nport = 1\n", "server: expected a table"),
        (vec![], "up = 1\n", "up: expected a table"),
        (vec![], "[up\n", "TOML"),
        (
            vec![("PERIGEE_UP_REPLICSA", "2")],
            "",
            "PERIGEE_UP_REPLICSA: unknown variable; the nearest is PERIGEE_UP_REPLICAS",
        ),
        (vec![("PERIGEE_UP_TP", "two")], "", "PERIGEE_UP_TP: invalid value 'two'"),
        (vec![("PERIGEE_LOG_FORMAT", "xml")], "", "PERIGEE_LOG_FORMAT: invalid value 'xml'"),
        (vec![("PERIGEE_UP_SUPERVISED", "1")], "", "PERIGEE_UP_SUPERVISED: unknown"),
    ] {
        let message = expanded(&["up"], &variables, text).unwrap_err();
        assert!(message.contains(reason), "{message:?} does not say {reason:?}");
    }
    let both = expanded(&["up"], &[("PERIGEE_UP_X", "1")], "[up]\ny = 1\n").unwrap_err();
    assert_eq!(both.lines().count(), 2, "all faults at once: {both}");
}

#[test]
fn variables_of_other_commands_and_of_kubernetes_are_let_be() {
    let variables = [
        ("PERIGEE_WORKER_NONSENSE", "1"),
        ("PERIGEE_BINARY", "/perigee"),
        ("PERIGEE_ROUTER_SERVICE_HOST", "10.0.0.1"),
        ("PERIGEE_ROUTER_SERVICE_PORT_GRPC", "7411"),
        ("PERIGEE_ROUTER_PORT_7411_TCP_ADDR", "10.0.0.1"),
        ("PERIGEE_ROUTER_PORT", "tcp://10.0.0.1:7411"),
    ];
    assert_eq!(expanded(&["router"], &variables, "").unwrap(), ["perigee", "router"]);
}
