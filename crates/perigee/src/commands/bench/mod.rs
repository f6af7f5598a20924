//! `perigee bench`: measurements of what this program ships, one file each.

mod engine;

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
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.what {
        Bench::Engine(args) => engine::run(*args),
    }
}
