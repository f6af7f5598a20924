//! What owners and homes tell each other over the wire: the owner's side, a short call for each note, and the home's, which
//! renews leases and gives up what nobody needs. Neither waits for a step.

use std::time::Duration;

use perigee_engine::EngineHandle;
use perigee_engine::homes::{HomeDirectory, Owner};
use perigee_engine::moves::{HomeAnswer, HomeNote};
use perigee_engine::remote::RemoteHome;
use perigee_engine::request::SessionId;
use perigee_migration::AnswerStatus;
use perigee_proto::internal::{KeepHomesAnswer, KeepHomesRequest, KeptSession, ReplicaRun};
use perigee_proto::status::{ErrorKind, WireError};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::identity::ReplicaIdentity;
use crate::peers::Peers;

/// How long a home may take to hear what an owner says.
const PATIENCE: Duration = Duration::from_secs(2);
/// Reason of a call that was meant for another run.
const OTHER_REPLICA: &str = "OTHER_REPLICA";

/// Refuses what is meant for another replica, or for an earlier run of this one.
///
/// # Errors
/// FAILED_PRECONDITION: whatever that run held is gone.
pub(crate) fn check_run(identity: &ReplicaIdentity, meant: Option<&ReplicaRun>) -> Result<(), Status> {
    let mine = (identity.replica.as_str(), identity.incarnation.as_str());
    if meant.is_some_and(|meant| (meant.replica.as_str(), meant.incarnation.as_str()) == mine) {
        return Ok(());
    }
    let meant =
        meant.map_or_else(|| "nobody".to_owned(), |meant| format!("{} in run {}", meant.replica, meant.incarnation));
    let message = format!("this is for {meant}, here is replica {} in run {}", mine.0, mine.1);
    Err(WireError { reason: Some(OTHER_REPLICA), ..WireError::new(ErrorKind::FailedPrecondition, message) }.into())
}

/// Who speaks.
pub(crate) fn owner(run: ReplicaRun) -> Owner {
    Owner { replica: run.replica, incarnation: run.incarnation }
}

/// The home's side.
pub(crate) fn keep(engine: &EngineHandle, homes: &HomeDirectory, request: KeepHomesRequest) -> KeepHomesAnswer {
    for session in request.given_up {
        engine.home_given_up(SessionId(session.session), session.epoch);
    }
    let owner = request.owner.map(owner).unwrap_or_default();
    // One that a later owner has is found out by the step that asks.
    let is_missing = |kept: &KeptSession| homes.renew(&kept.session, kept.epoch, &owner) == Err(AnswerStatus::Unknown);
    let missing = request.renewed.into_iter().filter(is_missing).collect();
    KeepHomesAnswer { missing, call_back: homes.calls_back() }
}

/// The owner's side. A home that cannot be reached says nothing: the steps that ask it find out what that means.
pub(crate) async fn tell(peers: &Peers, owner: ReplicaRun, home: &RemoteHome, note: HomeNote) {
    match tokio::time::timeout(PATIENCE, call(peers, owner, home, &note)).await {
        Ok(Ok(answer)) => note.answer(answer),
        Ok(Err(why)) => tracing::debug!(home = home.replica, why, "a home was not told which sessions need it"),
        Err(_) => tracing::debug!(home = home.replica, "a home does not listen"),
    }
}

async fn call(peers: &Peers, owner: ReplicaRun, home: &RemoteHome, note: &HomeNote) -> Result<HomeAnswer, String> {
    let kept = |names: &[(String, u64)]| {
        names.iter().map(|(session, epoch)| KeptSession { session: session.clone(), epoch: *epoch }).collect()
    };
    let request = KeepHomesRequest {
        home: Some(ReplicaRun { replica: home.replica.clone(), incarnation: home.incarnation.clone() }),
        owner: Some(owner),
        renewed: kept(&note.renewed),
        given_up: kept(&note.given_up),
    };
    let mut client = peers.connect(&home.endpoint).await?;
    let asked = Instant::now();
    match client.keep_homes(request).await {
        Ok(answer) => {
            peers.links().answered(&home.replica, asked.elapsed());
            let KeepHomesAnswer { missing, call_back } = answer.into_inner();
            let missing = missing.into_iter().map(|kept| (kept.session, kept.epoch)).collect();
            Ok(HomeAnswer { missing, call_back })
        }
        // Another run is at its address: what the one that is meant held is gone with it.
        Err(status) if status.code() == Code::FailedPrecondition => {
            Ok(HomeAnswer { missing: note.renewed.clone(), call_back: false })
        }
        Err(status) => Err(status.message().to_owned()),
    }
}
