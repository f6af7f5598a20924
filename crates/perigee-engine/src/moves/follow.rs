//! Pages that follow their session: which segments of other replicas are worth bringing here, and what the step loop does
//! with them when they come. A segment turns local between two steps, once all of it is in pages here; until then, and
//! where it is not worth it or does not fit, its home is asked. How pages travel is `fetching`'s affair.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use perigee_migration::attend::break_even_tokens;
use perigee_migration::{Digest, PAGE_POSITIONS, PageSlice};

use super::fetching::{FetchError, Fetching};
use super::source::non_fatal;
use super::{FetchReply, FollowPolicy, MoveConfig};
use crate::cache::{Home, LatentSegment};
use crate::executor::PageSpan;
use crate::remote::RemoteHome;
use crate::scheduler::{Status, TaskId};
use crate::sequence::Sequence;
use crate::step::{EngineCore, Fatal, Session};

/// Segments on their way at once: each brings at most one chunk between two steps.
const AT_ONCE: usize = 2;
/// Pause of a session after a fetch that failed.
const PAUSE: Duration = Duration::from_secs(2);
/// Fewest tokens that a session is expected to go on which may end at any time.
const LEAST_EXPECTED: u64 = 64;

/// A segment on its way.
#[derive(Debug)]
pub(crate) struct Follow {
    number: u64,
    home: RemoteHome,
    /// Number of its first page.
    first_page: u64,
    /// Pages that are here.
    arrived: usize,
}

/// Segments on their way, one for a session at most.
#[derive(Debug, Default)]
pub(crate) struct Follows {
    open: BTreeMap<TaskId, Follow>,
    /// Sessions that wait after a failure.
    paused: BTreeMap<TaskId, Instant>,
    next: u64,
}

impl Follows {
    /// Whether nothing is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

/// Tokens that a session is expected to go on for: all that it may where nothing else ends it, else about as many as it has
/// drawn so far. Prompt tokens that are not computed yet ask like any other.
fn further_tokens(sequence: &Sequence, computed: u64) -> u64 {
    let drawn = sequence.completion();
    let left = u64::from(sequence.stop.max_tokens).saturating_sub(drawn);
    let has_other_ends =
        !sequence.stop.ignore_eos || !sequence.stop.stop_token_ids.is_empty() || !sequence.stop.stop.is_empty();
    let expected = if has_other_ends { left.min(drawn.max(LEAST_EXPECTED)) } else { left };
    sequence.length().saturating_sub(computed) + expected
}

impl EngineCore {
    /// Begins to bring what is worth it, and forgets what nobody wants any more.
    pub(super) fn follow_pages(&mut self, now: Instant) -> Result<(), Fatal> {
        let Some(config) = self.config.moves.clone() else { return Ok(()) };
        let scheduler = &self.scheduler;
        self.follows.open.retain(|id, _| scheduler.following(*id).is_some());
        self.follows.paused.retain(|_, until| *until > now);
        if self.follows.open.len() >= AT_ONCE {
            return Ok(());
        }
        let ids: Vec<TaskId> = self.sessions.keys().copied().collect();
        for id in ids {
            if self.follows.open.len() >= AT_ONCE {
                break;
            }
            if let Some((segment, home)) = self.worth_bringing(id, &config) {
                self.bring(id, &segment, home, &config);
            }
        }
        Ok(())
    }

    /// A segment of a session that should be here, if there is one.
    fn worth_bringing(&self, id: TaskId, config: &MoveConfig) -> Option<(LatentSegment, RemoteHome)> {
        if self.follows.open.contains_key(&id) || self.follows.paused.contains_key(&id) {
            return None;
        }
        let (held, view) = (self.sessions.get(&id)?, self.scheduler.session(id)?);
        let runs = matches!(view.status, Status::Prefill | Status::Decode) && view.latents.is_remote();
        if !runs || self.is_leaving(held) {
            return None;
        }
        let geometry = self.executor.geometry()?;
        let expected = further_tokens(&held.sequence, view.computed);
        let is_worth = |home: &RemoteHome| {
            let held = view.latents.remote_ranges().filter(|(other, _)| remote_home(other).as_ref() == Some(home));
            let positions = held.map(|(_, range)| range.end - range.start).sum();
            // Queries travel in the type of the latents.
            let dtype = geometry.latent_dtype;
            let is_cheaper = expected > break_even_tokens(&config.shape, dtype, dtype, positions);
            (config.follow == FollowPolicy::ByCost && is_cheaper) || self.is_called_back(home)
        };
        let segments = view.latents.segments().iter();
        let mut remote = segments.filter_map(|segment| Some((segment, remote_home(&segment.home)?)));
        remote.find(|(_, home)| is_worth(home)).map(|(segment, home)| (segment.clone(), home))
    }

    /// Whether a session is on its way to another replica: its pages would not follow far.
    fn is_leaving(&self, held: &Session) -> bool {
        self.seats.get(&held.sequence.session).is_some_and(|seat| seat.outgoing.is_some() || seat.order.is_some())
    }

    fn bring(&mut self, id: TaskId, segment: &LatentSegment, home: RemoteHome, config: &MoveConfig) {
        let (Some(held), Some(geometry)) = (self.sessions.get(&id), self.executor.geometry()) else { return };
        let count = segment.page_count();
        if self.scheduler.follow(id, usize::try_from(count).unwrap_or(usize::MAX)).is_none() {
            return;
        }
        let number = self.follows.next;
        self.follows.next += 1;
        let first = segment.first_page * PAGE_POSITIONS;
        let fetching = Fetching {
            task: id,
            number,
            session: held.sequence.session.clone(),
            epoch: held.sequence.epoch,
            positions: first..first + count * PAGE_POSITIONS,
            geometry,
            commands: self.commands.clone(),
            due: (0, first),
            failure: None,
        };
        tracing::debug!(session = fetching.session(), home = home.replica, first, pages = count, "pages follow");
        let follow = Follow { number, home: home.clone(), first_page: segment.first_page, arrived: 0 };
        self.follows.open.insert(id, follow);
        config.connector.fetch(&home, fetching);
    }

    /// Pages came: they are written on every rank, and when they were the last ones the segment is local.
    pub(crate) fn pages_came(
        &mut self,
        id: TaskId,
        number: u64,
        pages: Vec<PageSlice>,
        reply: FetchReply,
    ) -> Result<(), Fatal> {
        let taken = self.take_pages(id, number, pages)?;
        self.answer(reply, taken);
        Ok(())
    }

    fn take_pages(&mut self, id: TaskId, number: u64, slices: Vec<PageSlice>) -> Result<Result<(), FetchError>, Fatal> {
        let follow = self.follows.open.get_mut(&id).filter(|follow| follow.number == number);
        let (Some(follow), Some(pages)) = (follow, self.scheduler.following(id)) else {
            return Ok(Err(FetchError::Unwanted));
        };
        let mut expected = BTreeMap::new();
        let mut spans: Vec<PageSpan> = Vec::new();
        let mut writes = Vec::with_capacity(slices.len());
        for slice in slices {
            let index = (slice.first / PAGE_POSITIONS).checked_sub(follow.first_page);
            let page = index.and_then(|index| pages.get(usize::try_from(index).ok()?)).copied();
            let Some(page) = page else { return Ok(Err(FetchError::Unwanted)) };
            let span = PageSpan { page, first: slice.first, positions: PAGE_POSITIONS as u32 };
            if spans.last() != Some(&span) {
                spans.push(span);
            }
            *expected.entry(slice.layer).or_insert(Digest::default()) += slice.digest;
            writes.push((page, slice));
        }
        let (arrived, due) = (follow.arrived + spans.len(), pages.len());
        follow.arrived = arrived;
        let written = self.executor.import_pages(&writes).and_then(|()| self.executor.digest_pages(&spans));
        match written {
            Ok(found) if found.iter().eq(expected.values()) => {}
            Ok(_) => return Ok(Err(FetchError::Ranks("their digests differ from the home's".into()))),
            Err(error) => return Ok(Err(FetchError::Ranks(non_fatal(error)?))),
        }
        if arrived == due {
            self.turn_local(id)?;
        }
        Ok(Ok(()))
    }

    fn turn_local(&mut self, id: TaskId) -> Result<(), Fatal> {
        let Some(follow) = self.follows.open.remove(&id) else { return Ok(()) };
        let shadow = self.scheduler.localise(id, follow.first_page)?;
        if let Some(slot) = shadow {
            self.poison(&[slot], &[])?;
        }
        let Some(held) = self.sessions.get(&id) else { return Ok(()) };
        let (session, epoch) = (held.sequence.session.0.clone(), held.sequence.epoch);
        let page = self
            .executor
            .geometry()
            .map_or(0, |geometry| geometry.position_bytes() * PAGE_POSITIONS * u64::from(geometry.mla_layers));
        self.config.observer.followed(follow.arrived as u64 * page);
        tracing::debug!(session, home = follow.home.replica, pages = follow.arrived, "a segment is local now");
        let still_there = self.scheduler.session(id).is_some_and(|view| {
            view.latents.remote_ranges().any(|(home, _)| remote_home(home).as_ref() == Some(&follow.home))
        });
        if !still_there {
            self.give_up_home(follow.home, session, epoch);
        }
        Ok(())
    }

    /// A fetch ended before its time.
    pub(crate) fn fetch_failed(&mut self, id: TaskId, number: u64, why: &str) -> Result<(), Fatal> {
        if self.follows.open.get(&id).is_none_or(|follow| follow.number != number) {
            return Ok(());
        }
        let Some(follow) = self.follows.open.remove(&id) else { return Ok(()) };
        self.scheduler.drop_following(id)?;
        self.follows.paused.insert(id, self.config.clock.now() + PAUSE);
        let session = self.sessions.get(&id).map(|held| held.sequence.session.0.as_str());
        tracing::debug!(session, home = follow.home.replica, why, "pages do not follow for now");
        Ok(())
    }
}

/// A home as a place to ask; none for this replica.
pub(super) fn remote_home(home: &Home) -> Option<RemoteHome> {
    match home {
        Home::Local { .. } => None,
        Home::Remote { replica, incarnation, endpoint, .. } => {
            Some(RemoteHome { replica: replica.clone(), incarnation: incarnation.clone(), endpoint: endpoint.clone() })
        }
    }
}
