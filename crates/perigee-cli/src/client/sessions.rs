//! `perigee sessions`: where every session runs, and where its latents are.

use perigee_proto::v1::{ListSessionsRequest, SegmentInfo, SessionInfo};
use serde::Serialize;

use super::{ClientArgs, block_on, print_json, refused, table};

/// Arguments of `sessions`.
#[derive(Debug, clap::Args)]
pub(crate) struct SessionsArgs {
    /// Only those of this replica.
    #[arg(long, default_value = "")]
    replica: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// One session in JSON; field names are part of the interface.
#[derive(Debug, Serialize)]
struct Session {
    session: String,
    owner: String,
    epoch: u64,
    status: String,
    context: u64,
    segments: Vec<Segment>,
    request_id: String,
}

/// A run of positions.
#[derive(Debug, Serialize)]
struct Segment {
    home: String,
    first: u64,
    tokens: u64,
}

impl From<SegmentInfo> for Segment {
    fn from(info: SegmentInfo) -> Self {
        Self { home: info.home, first: info.first, tokens: info.tokens }
    }
}

impl From<SessionInfo> for Session {
    fn from(info: SessionInfo) -> Self {
        Self {
            session: info.session,
            owner: info.owner,
            epoch: info.epoch,
            status: info.status,
            context: info.context,
            segments: info.segments.into_iter().map(Segment::from).collect(),
            request_id: info.request_id,
        }
    }
}

impl Session {
    fn row(&self) -> Vec<String> {
        let segment =
            |segment: &Segment| format!("{}:{}..{}", segment.home, segment.first, segment.first + segment.tokens);
        let segments: Vec<String> = self.segments.iter().map(segment).collect();
        vec![
            self.session.clone(),
            self.owner.clone(),
            self.epoch.to_string(),
            self.status.clone(),
            self.context.to_string(),
            segments.join(" "),
        ]
    }
}

const HEADINGS: [&str; 6] = ["SESSION", "OWNER", "EPOCH", "STATUS", "CONTEXT", "SEGMENTS"];

/// Asks and prints.
pub(crate) fn run(args: &SessionsArgs) -> anyhow::Result<()> {
    block_on(async {
        let mut cluster = args.client.cluster().await?;
        let request = ListSessionsRequest { replica: args.replica.clone() };
        let answer = cluster.list_sessions(request).await.map_err(refused)?.into_inner();
        let sessions: Vec<Session> = answer.sessions.into_iter().map(Session::from).collect();
        if args.client.json {
            return print_json(&sessions);
        }
        let rows: Vec<Vec<String>> = sessions.iter().map(Session::row).collect();
        print!("{}", table::render(&HEADINGS, &rows));
        Ok(())
    })
}
