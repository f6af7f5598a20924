//! The one binary of Perigee: reads the command line and hands over. Exit codes: 0 done, 1 failed, 2 usage.

mod client;
mod commands;
mod launch;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Port of the router's gRPC service where `up` is not told another, and where client commands look for it.
const DEFAULT_PORT: u16 = 7411;
/// Port of the router's HTTP service where `up` is not told another.
const DEFAULT_HTTP_PORT: u16 = 7412;

/// Serves Kimi Linear models on clusters: sessions move, latents stay. `up`, `router` and `worker` also take
/// `--config FILE`: TOML with a table for each command, its keys the long options.
#[derive(Parser)]
#[command(name = "perigee", version)]
struct Cli {
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

/// Logs go to standard error. PERIGEE_LOG filters them, such as `info,perigee_router=debug`; PERIGEE_LOG_FORMAT is text or
/// json. By default only warnings, and the balancer's moves: a person at a terminal came for the answer.
fn logs() -> anyhow::Result<()> {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let format = setting("PERIGEE_LOG_FORMAT", "text").parse()?;
    perigee_telemetry::LogOptions { format, filter: setting("PERIGEE_LOG", "warn,perigee_router::balance=info") }
        .install()?;
    Ok(())
}

fn run(command: Command) -> anyhow::Result<()> {
    logs()?;
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

fn main() -> ExitCode {
    let line = match commands::config::expand(std::env::args_os().collect()) {
        Ok(line) => line,
        Err(error) => {
            eprintln!("perigee: --config: {error:#}");
            return ExitCode::from(2);
        }
    };
    match run(Cli::parse_from(line).command) {
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
