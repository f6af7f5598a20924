//! `perigee drain`: has a replica leave the cluster, every session before it, and tells meanwhile what is still there.

use std::time::Duration;

use perigee_proto::v1::{DrainRequest, DrainResponse, ListReplicasRequest, ReplicaInfo};
use serde_json::json;

use super::{ClientArgs, block_on, print_json, refused};

/// How often is told what is still there.
const LOOK: Duration = Duration::from_millis(500);

/// Arguments of `drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct DrainArgs {
    /// Replica to empty; its processes end once no session is left, or when their grace time is over.
    replica: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Asks, tells on standard error how far it is, and prints what became of the sessions.
pub(crate) fn run(args: &DrainArgs) -> anyhow::Result<()> {
    block_on(async {
        let mut cluster = args.client.cluster().await?;
        let mut watched = cluster.clone();
        let request = DrainRequest { replica: args.replica.clone() };
        let watch = async {
            let mut told = String::new();
            loop {
                tokio::time::sleep(LOOK).await;
                // Progress is a courtesy: what goes wrong is told by the call itself.
                let Ok(listed) = watched.list_replicas(ListReplicasRequest {}).await else { continue };
                let found = listed.into_inner().replicas.into_iter().find(|info| info.replica == args.replica);
                let line = found.map_or_else(|| format!("{} has left", args.replica), |info| progress(&info));
                if line != told {
                    eprintln!("{line}");
                    told = line;
                }
            }
        };
        let left: DrainResponse = tokio::select! {
            left = cluster.drain(request) => left.map_err(refused)?.into_inner(),
            never = watch => never,
        };
        if args.client.json {
            return print_json(&json!({"replica": args.replica, "moved": left.moved, "ended": left.ended}));
        }
        println!("{} has left: {} sessions moved, {} ended", args.replica, left.moved, left.ended);
        Ok(())
    })
}

fn progress(info: &ReplicaInfo) -> String {
    let ReplicaInfo { replica, status, running, waiting, homes, .. } = info;
    format!("{replica} is {status}: {running} sessions run, {waiting} wait, {homes} segments are kept for others")
}
