//! `perigee drain`: moves every session off a replica, which then leaves the cluster.

use perigee_proto::v1::DrainRequest;
use serde_json::json;

use super::{ClientArgs, block_on, print_json, refused};

/// Arguments of `drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct DrainArgs {
    /// Replica to empty.
    replica: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Asks and prints.
pub(crate) fn run(args: &DrainArgs) -> anyhow::Result<()> {
    block_on(async {
        let mut cluster = args.client.cluster().await?;
        let request = DrainRequest { replica: args.replica.clone() };
        let left = cluster.drain(request).await.map_err(refused)?.into_inner();
        if args.client.json {
            return print_json(&json!({"replica": args.replica, "moved": left.moved, "ended": left.ended}));
        }
        println!("{} is empty: {} sessions moved, {} ended", args.replica, left.moved, left.ended);
        Ok(())
    })
}
