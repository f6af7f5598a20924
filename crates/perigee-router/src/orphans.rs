//! Sessions that lost their router: where they are, and how they become this router's. A client that turns here with its
//! resume token shall get the tokens that are there already, not wait until they are computed again.

use std::sync::Arc;
use std::time::Duration;

use perigee_migration::epochs::{Command, CoordinatorEvent, Phase, Report, Side};
use perigee_proto::internal::{Session, TakeOver, router_message::Body};
use tokio::task::JoinSet;

use crate::attachment::Attachment;
use crate::choice::Choice;
use crate::driver::Seat;
use crate::error;
use crate::relay::Relay;

/// How long replicas may take to say which sessions they have: longer than most steps. What a slower one has is computed
/// anew.
const PATIENCE: Duration = Duration::from_secs(2);

/// A session that another router ran.
#[derive(Debug)]
pub(crate) struct Orphan {
    pub(crate) session: String,
    /// Its epoch there.
    epoch: u64,
    /// Who has it.
    owner: Arc<Attachment>,
}

impl Relay {
    /// Looks for sessions on all replicas, each where its epoch is the highest. Those of requests of this router are no
    /// orphans.
    pub(crate) async fn find_orphans(&self, sessions: &[String]) -> Vec<Option<Orphan>> {
        let mut asked = JoinSet::new();
        for owner in self.replicas.attachments("").unwrap_or_default() {
            asked.spawn(async move {
                let listed = tokio::time::timeout(PATIENCE, owner.list_sessions()).await;
                (owner.clone(), listed.ok().and_then(Result::ok).unwrap_or_default())
            });
        }
        let there: Vec<(Arc<Attachment>, Vec<Session>)> = asked.join_all().await;
        let find = |name: &String| {
            let all = there.iter().flat_map(|(owner, sessions)| sessions.iter().map(move |session| (owner, session)));
            let newest = all.filter(|(_, session)| session.session == *name).max_by_key(|(_, session)| session.epoch);
            let (owner, session) = newest.filter(|_| self.find(name).is_none())?;
            Some(Orphan { session: name.clone(), epoch: session.epoch, owner: owner.clone() })
        };
        sessions.iter().map(find).collect()
    }

    /// Tells an orphan's owner that it is this router's now. What becomes of that its coordinator minds: where the owner
    /// does not have it any more, it is computed anew.
    pub(crate) fn adopt(&self, seat: &mut Seat<'_>, orphan: Orphan) {
        let Some(choice) = seat.choice() else { return };
        choice.pending = None;
        choice.is_held_by(&orphan.owner);
        choice.owner = Some(orphan.owner.clone());
        self.drive(seat, CoordinatorEvent::TakeOver { known: orphan.epoch }, None);
        // Its loss was told before there was anything to lose.
        if self.replicas.live(&orphan.owner).is_none() {
            self.drive(seat, CoordinatorEvent::Lost(Side::Source), None);
        }
    }

    /// An orphan's owner answered.
    pub(crate) fn taken_over(&self, seat: &mut Seat<'_>, from: &Attachment, report: Report) {
        let replica = &from.identity.replica;
        let result = if report.phase == Phase::Started { "done" } else { "failed" };
        self.metrics.migrations.with_label_values(&["takeover", result]).inc();
        if let Some(choice) = seat.choice() {
            let (session, epoch, answer) = (&choice.session, report.epoch, report.phase);
            tracing::info!(session, replica = &**replica, epoch, ?answer, "session taken over from another router");
        }
        let why = error::replica_lost(replica, "it does not have the session any more");
        self.drive(seat, CoordinatorEvent::Report(Side::Source, report), Some(&why));
    }

    /// Says or repeats that a session is this router's.
    pub(crate) fn send_take_over(&self, seat: &mut Seat<'_>, command: Command) {
        let left = seat.flight.deadline.map(|deadline| deadline.saturating_duration_since(seat.now));
        let Some(choice) = seat.choice() else { return };
        let Some(owner) = choice.owner.as_ref().and_then(|owner| self.replicas.live(owner)) else { return };
        let order = take_over(choice, command.epoch(), left);
        // Where it is lost meanwhile, that is told soon.
        let _ = owner.send(Body::TakeOver(order));
    }
}

fn take_over(choice: &Choice, epoch: u64, left: Option<Duration>) -> TakeOver {
    TakeOver {
        session: choice.session.clone(),
        epoch,
        first: choice.due(),
        next: choice.due().max(choice.withheld),
        deadline_ms: left.map(|left| left.as_millis() as u64),
    }
}
