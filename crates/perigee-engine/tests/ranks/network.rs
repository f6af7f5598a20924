//! Homes that answer within the process: the shipped directory and reader behind a client that can be told to lose, break
//! or hold back answers. It has no threads of its own: a question is answered on the asking rank's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use perigee_backend::LatentReader;
use perigee_engine::cache::HomePages;
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_engine::remote::{AttentionClient, RemoteHome, RemotePlan, RemoteRanges, RemoteRow};

use crate::group::Group;

/// How a home behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conduct {
    /// Answers.
    Answers,
    /// Is known to be gone: no answer, and nobody waits.
    Gone,
    /// Takes questions and says nothing, after so many answers.
    SilentAfter(u64),
    /// Has not answered an earlier question.
    Overdue,
    /// Its answers have a bit flipped.
    Damages,
}

/// A replica as others see it.
struct Home {
    directory: HomeDirectory,
    reader: Arc<dyn LatentReader>,
    model: AnswerModel,
    conduct: Conduct,
}

/// What went over the network.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traffic {
    /// (asking rank, home) of every question, in order.
    pub(crate) questions: Vec<(usize, String)>,
    /// How long ranks were ready to wait.
    pub(crate) patience: Vec<(usize, Duration)>,
}

/// All homes.
#[derive(Clone, Default)]
pub(crate) struct Network {
    homes: Arc<Mutex<HashMap<String, Home>>>,
    traffic: Arc<Mutex<Traffic>>,
}

/// Called with the asking rank before a question is answered.
type Meeting = Arc<dyn Fn(usize) + Send + Sync>;

/// One rank's end.
struct Client {
    rank: usize,
    network: Network,
    meeting: Option<Meeting>,
    answers: Vec<Option<Vec<u8>>>,
    /// Whether an answer is missing of which nothing is known.
    waits: bool,
}

impl Network {
    pub(crate) fn client(&self, rank: usize) -> Option<Box<dyn AttentionClient>> {
        self.meeting_client(rank, None)
    }

    pub(crate) fn meeting_client(&self, rank: usize, meeting: Option<Meeting>) -> Option<Box<dyn AttentionClient>> {
        Some(Box::new(Client { rank, network: self.clone(), meeting, answers: Vec::new(), waits: false }))
    }

    /// Adds a replica under a name; its directory.
    pub(crate) fn join(&self, name: &str, group: &Group) -> HomeDirectory {
        let directory = HomeDirectory::new();
        let (reader, model) = (group.ranks.latent_reader().unwrap(), group.ranks.answer_model());
        let home = Home { directory: directory.clone(), reader, model, conduct: Conduct::Answers };
        self.homes.lock().insert(name.to_owned(), home);
        directory
    }

    pub(crate) fn set(&self, name: &str, conduct: Conduct) {
        self.homes.lock().get_mut(name).unwrap().conduct = conduct;
    }

    /// What went over it since the last call.
    pub(crate) fn traffic(&self) -> Traffic {
        std::mem::take(&mut *self.traffic.lock())
    }
}

impl AttentionClient for Client {
    fn ask(&mut self, home: &RemoteHome, message: Vec<u8>) {
        if let Some(meeting) = &self.meeting {
            meeting(self.rank);
        }
        let asked = {
            let mut traffic = self.network.traffic.lock();
            traffic.questions.push((self.rank, home.replica.clone()));
            traffic.questions.iter().filter(|(_, name)| *name == home.replica).count() as u64
        };
        let (directory, reader, model, conduct) = {
            let homes = self.network.homes.lock();
            let Home { directory, reader, model, conduct } = &homes[&home.replica];
            (directory.clone(), Arc::clone(reader), *model, *conduct)
        };
        let answer = || directory.answer(&*reader, &model, &message).unwrap();
        let is_silent = matches!(conduct, Conduct::SilentAfter(count) if asked > count);
        self.waits |= is_silent;
        self.answers.push(match conduct {
            Conduct::Gone => None,
            Conduct::SilentAfter(_) if is_silent => None,
            Conduct::Damages => {
                let mut answer = answer();
                let middle = answer.len() / 2;
                answer[middle] ^= 4;
                Some(answer)
            }
            _ => Some(answer()),
        });
    }

    fn collect(&mut self, until: Instant) -> Vec<Option<Vec<u8>>> {
        let patience = until.saturating_duration_since(Instant::now());
        self.network.traffic.lock().patience.push((self.rank, patience));
        if std::mem::take(&mut self.waits) {
            std::thread::sleep(patience);
            while Instant::now() < until {
                std::thread::yield_now();
            }
        }
        std::mem::take(&mut self.answers)
    }

    fn is_overdue(&self, home: &RemoteHome) -> bool {
        self.network.homes.lock()[&home.replica].conduct == Conduct::Overdue
    }
}

/// Some pages of a session: number of the first, and which they are.
pub(crate) fn kept(runs: &[(u64, &[u32])]) -> HomePages {
    HomePages { pages: runs.iter().map(|(first, pages)| (*first, pages.to_vec())).collect() }
}

/// Homes by name, each in its first run.
pub(crate) fn remote_plan(homes: &[&str], rows: Vec<RemoteRow>) -> RemotePlan {
    let home = |name: &&str| {
        let replica = (*name).to_owned();
        RemoteHome { endpoint: format!("{replica}:1"), replica, incarnation: "1".into() }
    };
    RemotePlan { homes: homes.iter().map(home).collect(), rows, patience_ms: 10_000 }
}

/// A remote row in epoch 2 with (home, first page, pages).
pub(crate) fn remote_row(row: u32, session: &str, parts: &[(u32, u64, u64)]) -> RemoteRow {
    let mut ranges: Vec<RemoteRanges> = Vec::new();
    for &(home, first, pages) in parts {
        let range = first * 64..(first + pages) * 64;
        match ranges.iter_mut().find(|part| part.home == home) {
            Some(part) => part.ranges.push(range),
            None => ranges.push(RemoteRanges { home, ranges: vec![range] }),
        }
    }
    RemoteRow { row, session: session.into(), epoch: 2, parts: ranges }
}
