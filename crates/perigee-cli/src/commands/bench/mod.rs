//! `perigee bench`: measurements of what this program ships, and of servers like it, one file each.

mod child;
mod engine;
mod grid;
mod migrate;
mod router;
mod serve;
mod stubs;

use clap::Subcommand;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
    /// Times a served replica by batch and context, from a gRPC client of its router.
    Grid(Box<grid::GridArgs>),
    /// Moves a session between two replicas of this machine, by context, and tells what it cost its stream.
    Migrate(Box<migrate::MigrateArgs>),
    /// Puts a scenario's load on a router, or on any OpenAI-compatible server, and reports how long answers took.
    Serve(Box<serve::ServeArgs>),
    /// Measures the router between stub replicas and a load client: its processor time, and how long tokens take.
    Router(Box<router::RouterBenchArgs>),
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.what {
        Bench::Engine(args) => engine::run(*args),
        Bench::Grid(args) => grid::run(*args),
        Bench::Migrate(args) => migrate::run(*args),
        Bench::Serve(args) => serve::run(*args),
        Bench::Router(args) => router::run(*args),
    }
}

/// Lets this process and its children open as many files as they may: every connection is one.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, connections beyond it fail by messages of their own.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
