//! `perigee bench`: measurements of what this program ships, and of servers like it, one file each.

mod child;
mod engine;
mod router;
mod serve;
mod stubs;

use clap::Subcommand;

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Times prefill and decode steps of the engine in this process, and holds them against the bytes that they move.
    Engine(Box<engine::EngineArgs>),
    /// Puts a scenario's load on a router, or on any OpenAI-compatible server, and reports how long answers took.
    Serve(Box<serve::ServeArgs>),
    /// Measures the router between stub replicas and a load client: its processor time, and how long tokens take.
    Router(Box<router::RouterBenchArgs>),
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.what {
        Bench::Engine(args) => engine::run(*args),
        Bench::Serve(args) => serve::run(*args),
        Bench::Router(args) => router::run(*args),
    }
}
