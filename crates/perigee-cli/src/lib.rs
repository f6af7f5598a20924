//! The commands of the one binary: reads the command line and hands over.

mod client;
mod commands;
mod launch;
mod settings;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use perigee_telemetry::{Service, Telemetry, TelemetryOptions};

/// Port of the router's gRPC service where `up` is not told another, and where client commands look for it.
const DEFAULT_PORT: u16 = 7411;
/// Port of the router's HTTP service where `up` is not told another.
const DEFAULT_HTTP_PORT: u16 = 7412;

/// Serves Kimi Linear models on clusters: sessions move, latents stay. Every option of `up`, `router` and `worker` may also
/// be set in the environment (PERIGEE_ROUTER_GRACE is `--grace` of `router`) and in a file named by `--config FILE` or
/// PERIGEE_CONFIG: TOML with a table for each command, its keys the long options. Flags win over the environment, that over
/// the file.
#[derive(Parser)]
#[command(name = "perigee", version)]
struct Cli {
    /// End when standard input does: for a process that starts this one and may be killed.
    #[arg(long, global = true, hide = true)]
    end_with_input: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts a router and replicas on this machine.
    Up(Box<commands::up::UpArgs>),
    /// Works on configuration files.
    Config(commands::config::ConfigArgs),
    /// Runs a router.
    Router(Box<commands::router::RouterArgs>),
    /// Runs one rank of a replica.
    Worker(Box<perigee_worker::WorkerConfig>),
    /// Sends a prompt to a router and prints the answer.
    Generate(Box<client::generate::GenerateArgs>),
    /// Talks with a model: a line a turn.
    Chat(client::chat::ChatArgs),
    /// Lists replicas.
    Replicas(client::replicas::ReplicasArgs),
    /// Lists sessions: where they run, and where their latents are.
    Sessions(client::sessions::SessionsArgs),
    /// Moves a running session to another replica.
    Migrate(client::migrate::MigrateArgs),
    /// Moves every session off a replica.
    Drain(client::drain::DrainArgs),
    /// Scores token sequences: logits, states and traces of every position.
    Score(Box<commands::score::ScoreArgs>),
    /// Measures.
    Bench(Box<commands::bench::BenchArgs>),
    /// Writes a random model as a checkpoint directory.
    InitModel(commands::init_model::InitModelArgs),
}

/// Sets up logs and traces. Commands without options of their own for that take PERIGEE_LOG and PERIGEE_LOG_FORMAT.
fn telemetry(command: &Command) -> anyhow::Result<Telemetry> {
    let router = || Service { name: "perigee-router", facts: Vec::new() };
    let (options, service) = match command {
        Command::Up(args) => (args.telemetry.clone(), router()),
        Command::Router(args) => (args.telemetry.clone(), router()),
        Command::Worker(config) => (config.telemetry.clone(), config.service()),
        _ => {
            let mut options = TelemetryOptions::default();
            if let Ok(filter) = std::env::var("PERIGEE_LOG") {
                options.log = filter;
            }
            if let Ok(format) = std::env::var("PERIGEE_LOG_FORMAT") {
                options.log_format = format.parse()?;
            }
            (options, Service { name: "perigee", facts: Vec::new() })
        }
    };
    commands::without_faults(&options.faults())?;
    Ok(options.install(service)?)
}

fn run(command: Command) -> anyhow::Result<()> {
    // To the end of the command.
    let _telemetry = telemetry(&command)?;
    match command {
        Command::Config(args) => commands::config::run(&args),
        Command::Up(args) => commands::up::run(*args),
        Command::Router(args) => commands::router::run(*args),
        Command::Worker(config) => {
            commands::without_faults(&config.faults())?;
            perigee_worker::run(&config).map_err(anyhow::Error::from)
        }
        Command::Generate(args) => client::generate::run(&args),
        Command::Chat(args) => client::chat::run(&args),
        Command::Replicas(args) => client::replicas::run(&args),
        Command::Sessions(args) => client::sessions::run(&args),
        Command::Migrate(args) => client::migrate::run(&args),
        Command::Drain(args) => client::drain::run(&args),
        Command::Score(args) => commands::score::run(*args),
        Command::Bench(args) => commands::bench::run(*args),
        Command::InitModel(args) => commands::init_model::run(&args),
    }
}

/// Does what this process was started for. Exit codes: 0 done, 1 failed, 2 usage.
pub fn main() -> ExitCode {
    let line = match settings::expand(std::env::args_os().collect(), &settings::variables()) {
        Ok(line) => line,
        Err(error) => {
            eprintln!("perigee: {error:#}");
            return ExitCode::from(2);
        }
    };
    let cli = Cli::parse_from(line);
    if cli.end_with_input {
        perigee_worker::events::end_with_parent();
    }
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one write: the processes of a replica share one standard error. Nobody reads it where it is closed.
            let _ = std::io::stderr().write_all(format!("perigee: {}\n", told(&error)).as_bytes());
            if error.is::<commands::UsageError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// An error and its causes, each told once: some errors repeat their cause in their own text.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
