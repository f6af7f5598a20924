//! `perigee migrate`: moves a running session to another replica, and tells what that cost.

use perigee_proto::v1::{MigrateMode, MigrateRequest};
use serde_json::json;

use super::{ClientArgs, block_on, print_json, refused};

/// What moves.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// State only; latents stay where they are.
    Split,
    /// State and latents.
    Whole,
}

/// Arguments of `migrate`.
#[derive(Debug, clap::Args)]
pub(crate) struct MigrateArgs {
    /// Session, as `perigee sessions` names it.
    session: String,
    /// Replica to move it to.
    #[arg(long)]
    to: String,
    /// What moves; by default the router chooses by cost.
    #[arg(long)]
    mode: Option<Mode>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Asks and prints.
pub(crate) fn run(args: &MigrateArgs) -> anyhow::Result<()> {
    block_on(async {
        let mode = match args.mode {
            None => MigrateMode::Unspecified,
            Some(Mode::Split) => MigrateMode::Split,
            Some(Mode::Whole) => MigrateMode::Whole,
        };
        let request = MigrateRequest { session_id: args.session.clone(), to: args.to.clone(), mode: mode.into() };
        let mut cluster = args.client.cluster().await?;
        let moved = cluster.migrate(request).await.map_err(refused)?.into_inner();
        let mode = match moved.mode() {
            MigrateMode::Whole => "whole",
            MigrateMode::Split | MigrateMode::Unspecified => "split",
        };
        let phases = moved.phases.unwrap_or_default();
        if args.client.json {
            return print_json(&json!({
                "session": args.session, "to": args.to, "mode": mode, "epoch": moved.epoch,
                "state_bytes": moved.state_bytes, "page_bytes": moved.page_bytes, "token_bytes": moved.token_bytes,
                "stall_ms": moved.stall_ms,
                "phases": {
                    "prepare_ms": phases.prepare_ms, "frozen_ms": phases.frozen_ms, "export_ms": phases.export_ms,
                    "start_ms": phases.start_ms, "release_ms": phases.release_ms,
                },
            }));
        }
        println!(
            "{} runs on {} in epoch {}: {mode}, {} bytes of state, {} of pages, {} of tokens, stalled {:.1} ms",
            args.session, args.to, moved.epoch, moved.state_bytes, moved.page_bytes, moved.token_bytes, moved.stall_ms
        );
        println!(
            "  prepared in {:.1} ms, {:.1} of them frozen ({:.1} off the device); started {:.1} ms after the commit",
            phases.prepare_ms, phases.frozen_ms, phases.export_ms, phases.start_ms
        );
        Ok(())
    })
}
