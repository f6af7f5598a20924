//! What owners and homes tell each other beside the steps: an owner which sessions it still runs and which latents it
//! needs no more, a home which sessions it knows nothing of and whether it wants its pages back. So a home's entry is leased,
//! and a home that is short of pages, or about to end, waits for nobody: its owners take their latents or compute them anew.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::MoveConfig;
use super::follow::remote_home;
use crate::handle::{Command, EngineHealth};
use crate::remote::RemoteHome;
use crate::request::SessionId;
use crate::scheduler::TaskId;
use crate::step::{EngineCore, Fatal};

/// How often an owner speaks, and how often while a home calls its latents back.
const INTERVAL: Duration = Duration::from_secs(1);
const SHORT_INTERVAL: Duration = Duration::from_millis(200);
/// How long a home's call holds that does not come again.
const CALL_HOLDS: Duration = Duration::from_secs(3);
/// How long a replica calls its pages back after it had none for somebody.
const SHORT_FOR: Duration = Duration::from_secs(2);

/// A word from this replica to one of its homes, and the way back for the answer.
#[derive(Debug)]
pub struct HomeNote {
    /// Sessions (name, epoch) whose latents are needed.
    pub renewed: Vec<(String, u64)>,
    /// Sessions whose latents are needed no more.
    pub given_up: Vec<(String, u64)>,
    home: RemoteHome,
    commands: mpsc::Sender<Command>,
}

/// What a home says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HomeAnswer {
    /// Of the renewed sessions those of which it holds nothing for this owner.
    pub missing: Vec<(String, u64)>,
    /// It wants its pages back.
    pub call_back: bool,
}

impl HomeNote {
    /// The home answered. A note that is dropped was not.
    pub fn answer(self, answer: HomeAnswer) {
        if self.commands.send(Command::HomeSaid { home: self.home, answer }).is_err() {
            tracing::debug!("a home answered an engine that ended");
        }
    }
}

/// What is known of homes.
#[derive(Debug, Default)]
pub(crate) struct Homes {
    told_at: Option<Instant>,
    /// Homes that want their pages back, and until when that holds.
    calling: BTreeMap<RemoteHome, Instant>,
    given_up: Vec<(RemoteHome, (String, u64))>,
    /// Until when this replica calls its own pages back.
    short_until: Option<Instant>,
}

impl Homes {
    /// Whether it is time to tell homes what is needed of them.
    fn is_due(&self, now: Instant, config: &MoveConfig) -> bool {
        let interval = if self.calling.is_empty() { INTERVAL } else { SHORT_INTERVAL };
        let interval = interval.min(config.grace / 4);
        self.told_at.is_none_or(|at| now.saturating_duration_since(at) >= interval)
    }
}

impl EngineCore {
    /// Whether homes are to be told something now.
    pub(super) fn homes_are_due(&self, now: Instant, config: &MoveConfig) -> bool {
        !self.home_words.given_up.is_empty() || self.home_words.is_due(now, config)
    }

    /// Tells homes what is due, and decides whether this one wants its pages back.
    pub(super) fn tell_homes(&mut self, now: Instant) {
        let Some(config) = self.config.moves.clone() else { return };
        self.home_words.calling.retain(|_, until| *until > now);
        let is_leaving = *self.shared.health.borrow() != EngineHealth::Serving;
        if self.scheduler.is_short_of_pages() {
            self.home_words.short_until = Some(now + SHORT_FOR);
        }
        let is_short = self.home_words.short_until.is_some_and(|until| until > now);
        config.homes.call_back(is_leaving || is_short);

        let is_due = self.home_words.is_due(now, &config);
        if !is_due && self.home_words.given_up.is_empty() {
            return;
        }
        type Names = Vec<(String, u64)>;
        let mut notes: BTreeMap<RemoteHome, (Names, Names)> = BTreeMap::new();
        for (home, name) in std::mem::take(&mut self.home_words.given_up) {
            notes.entry(home).or_default().1.push(name);
        }
        if is_due {
            self.home_words.told_at = Some(now);
            for (id, held) in &self.sessions {
                let Some(view) = self.scheduler.session(*id) else { continue };
                for home in view.latents.segments().iter().filter_map(|segment| remote_home(&segment.home)) {
                    let name = (held.sequence.session.0.clone(), held.sequence.epoch);
                    let renewed = &mut notes.entry(home).or_default().0;
                    if renewed.last() != Some(&name) {
                        renewed.push(name);
                    }
                }
            }
        }
        for (home, (renewed, given_up)) in notes {
            let note = HomeNote { renewed, given_up, home: home.clone(), commands: self.commands.clone() };
            config.connector.tell(&home, note);
        }
    }

    /// This replica had no pages for somebody: homes' entries should go.
    pub(super) fn note_shortage(&mut self) {
        self.home_words.short_until = Some(self.config.clock.now() + SHORT_FOR);
    }

    /// A session needs what a home holds for it no more.
    pub(super) fn give_up_home(&mut self, home: RemoteHome, session: String, epoch: u64) {
        self.home_words.given_up.push((home, (session, epoch)));
    }

    /// A session that ends or is computed anew needs none of its homes.
    pub(crate) fn give_up_homes(&mut self, id: TaskId) {
        let homes = self.homes_of(id);
        self.give_up(homes);
    }

    /// The homes of a session, each with the session's name and epoch.
    pub(super) fn homes_of(&self, id: TaskId) -> Vec<(RemoteHome, (String, u64))> {
        let (Some(held), Some(view)) = (self.sessions.get(&id), self.scheduler.session(id)) else { return Vec::new() };
        let name = (held.sequence.session.0.clone(), held.sequence.epoch);
        let homes = view.latents.segments().iter().filter_map(|segment| remote_home(&segment.home));
        let mut homes: Vec<_> = homes.map(|home| (home, name.clone())).collect();
        homes.dedup();
        homes
    }

    pub(super) fn give_up(&mut self, homes: Vec<(RemoteHome, (String, u64))>) {
        self.home_words.given_up.extend(homes);
    }

    /// Whether a home wants its pages back.
    pub(super) fn is_called_back(&self, home: &RemoteHome) -> bool {
        self.home_words.calling.contains_key(home)
    }

    /// A home answered.
    pub(crate) fn home_said(&mut self, home: &RemoteHome, answer: &HomeAnswer) -> Result<(), Fatal> {
        let now = self.config.clock.now();
        for (session, epoch) in &answer.missing {
            let Some(&id) = self.names.get(&SessionId(session.clone())) else { continue };
            let is_same = self.sessions.get(&id).is_some_and(|held| held.sequence.epoch == *epoch);
            let is_there = self.scheduler.session(id).is_some_and(|view| {
                view.latents.segments().iter().any(|segment| remote_home(&segment.home).as_ref() == Some(home))
            });
            if is_same && is_there && self.scheduler.frozen(id).is_none() {
                self.rebuild(id, "a home has lost them")?;
            }
        }
        if !answer.call_back {
            self.home_words.calling.remove(home);
            return Ok(());
        }
        let was_called = self.home_words.calling.insert(home.clone(), now + CALL_HOLDS).is_some();
        // Whoever has room takes its latents; where nobody can, the session that is missed least is computed anew. Nobody
        // waits for the other's pages, so two full replicas cannot wait for each other.
        let is_following = !self.follows.is_empty();
        if was_called
            && !is_following
            && let Some(id) = self.scheduler.worst_remote(&home.replica, &home.incarnation)
        {
            self.start_over(id, "a home needs its pages and there is no room for them here")?;
        }
        Ok(())
    }

    /// An owner needs a session's latents no more.
    pub(crate) fn home_given_up(&mut self, session: &SessionId, epoch: u64) -> Result<(), Fatal> {
        // Only of a session that runs elsewhere: what runs here has no use for others' words.
        let is_home = self.seats.get(session).is_some_and(|seat| seat.party.stepping().is_none());
        if !is_home {
            return Ok(());
        }
        self.drive(session, perigee_migration::epochs::PartyEvent::Query { epoch })?;
        self.drive(session, perigee_migration::epochs::PartyEvent::Ended { epoch }).map(drop)
    }
}
