//! `perigee replicas`: all replicas that a router knows, with their load.

use perigee_proto::v1::{ListReplicasRequest, ReplicaInfo};
use serde::Serialize;

use super::{ClientArgs, block_on, print_json, refused, table};

/// Arguments of `replicas`.
#[derive(Debug, clap::Args)]
pub(crate) struct ReplicasArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// One replica in JSON; field names are part of the interface.
#[derive(Debug, Serialize)]
struct Replica {
    replica: String,
    incarnation: String,
    endpoint: String,
    tp: u32,
    device: String,
    status: String,
    weight_bytes: Vec<u64>,
    slots_free: u32,
    slots_total: u32,
    pages_free: u32,
    pages_total: u32,
    running: u32,
    waiting: u32,
    homes: u32,
    step_ms: f64,
    pids: Vec<u32>,
}

impl From<ReplicaInfo> for Replica {
    fn from(info: ReplicaInfo) -> Self {
        Self {
            replica: info.replica,
            incarnation: info.incarnation,
            endpoint: info.endpoint,
            tp: info.tp,
            device: info.device,
            status: info.status,
            weight_bytes: info.weight_bytes,
            slots_free: info.slots_free,
            slots_total: info.slots_total,
            pages_free: info.pages_free,
            pages_total: info.pages_total,
            running: info.running,
            waiting: info.waiting,
            homes: info.homes,
            step_ms: info.step_ms,
            pids: info.pids,
        }
    }
}

impl Replica {
    fn row(&self) -> Vec<String> {
        vec![
            self.replica.clone(),
            self.status.clone(),
            self.tp.to_string(),
            self.device.clone(),
            format!("{}/{}", self.slots_free, self.slots_total),
            format!("{}/{}", self.pages_free, self.pages_total),
            self.running.to_string(),
            self.waiting.to_string(),
            self.homes.to_string(),
            format!("{:.2}", self.step_ms),
            self.endpoint.clone(),
        ]
    }
}

const HEADINGS: [&str; 11] = [
    "REPLICA",
    "STATUS",
    "TP",
    "DEVICE",
    "SLOTS FREE",
    "PAGES FREE",
    "RUNNING",
    "WAITING",
    "HOMES",
    "STEP MS",
    "ENDPOINT",
];

/// Asks and prints.
pub(crate) fn run(args: &ReplicasArgs) -> anyhow::Result<()> {
    block_on(async {
        let mut cluster = args.client.cluster().await?;
        let answer = cluster.list_replicas(ListReplicasRequest {}).await.map_err(refused)?.into_inner();
        let replicas: Vec<Replica> = answer.replicas.into_iter().map(Replica::from).collect();
        if args.client.json {
            return print_json(&replicas);
        }
        let rows: Vec<Vec<String>> = replicas.iter().map(Replica::row).collect();
        print!("{}", table::render(&HEADINGS, &rows));
        Ok(())
    })
}
