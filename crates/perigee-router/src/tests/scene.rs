//! Three replicas that act by themselves, a router before them, and clients that check every response they read.

use std::collections::HashMap;
use std::time::Duration;

use perigee_proto::v1::{self, FinishReason};
use tokio::task::JoinHandle;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::actor::{Actor, GRACE, Hub, TICK, token_of};
use super::fake::Sandbox;
use crate::RouterConfig;

/// Tokens that a stream has: at one a tick, longer than any fault takes to mend.
pub(super) const TOKENS: u32 = 90;

/// A cluster.
pub(super) struct Scene {
    pub(super) sandbox: Sandbox,
    pub(super) hub: Hub,
    pub(super) actors: HashMap<String, Actor>,
}

/// What a client read.
#[derive(Debug, Default)]
pub(super) struct Read {
    /// By choice: replica and epoch of every token.
    pub(super) tokens: HashMap<u32, Vec<(String, u64)>>,
    pub(super) text: String,
    pub(super) ends: HashMap<u32, FinishReason>,
    pub(super) status: Option<Status>,
}

impl Read {
    /// Replicas of a choice in order, each once in a row, with their epochs.
    pub(super) fn owners(&self, choice: u32) -> Vec<(&str, u64)> {
        let mut owners: Vec<(&str, u64)> =
            self.tokens[&choice].iter().map(|(replica, epoch)| (replica.as_str(), *epoch)).collect();
        owners.dedup();
        owners
    }

    /// Asserts that every choice is complete.
    pub(super) fn is_complete(&self, choices: u32) {
        assert!(self.status.is_none(), "{:?}", self.status);
        for choice in 0..choices {
            assert_eq!(self.tokens[&choice].len(), TOKENS as usize, "choice {choice}");
            assert_eq!(self.ends.get(&choice), Some(&FinishReason::Length), "choice {choice}");
        }
        if choices == 1 {
            let expected: String = (0..TOKENS).map(|index| format!("t{index} ")).collect();
            assert_eq!(self.text, expected);
        }
    }
}

/// A client in the middle of its answer.
pub(super) struct Client {
    pub(super) sessions: Vec<String>,
    reader: JoinHandle<Read>,
    seen: tokio::sync::watch::Receiver<usize>,
}

impl Client {
    /// Waits until it has so many tokens.
    pub(super) async fn reaches(&mut self, count: usize) {
        self.seen.wait_for(|seen| *seen >= count).await.expect("the stream goes on");
    }

    pub(super) fn session(&self) -> &str {
        &self.sessions[0]
    }

    pub(super) async fn read(self) -> Read {
        self.reader.await.expect("no panic")
    }

    /// Goes away.
    pub(super) fn leave(self) {
        self.reader.abort();
    }
}

impl Scene {
    /// Replicas a, b and c.
    pub(super) async fn start(config: RouterConfig) -> Self {
        let sandbox = Sandbox::start(config).await;
        let mut scene = Self { sandbox, hub: Hub::default(), actors: HashMap::new() };
        for name in ["a", "b", "c"] {
            scene.add(name).await;
        }
        scene
    }

    pub(super) async fn add(&mut self, name: &str) {
        let actor = Actor::start(&self.sandbox, &self.hub, name).await;
        self.actors.insert(name.to_owned(), actor);
    }

    pub(super) fn actor(&self, name: &str) -> &Actor {
        &self.actors[name]
    }

    pub(super) fn kill(&mut self, name: &str) {
        self.actors.get_mut(name).expect("an actor").kill();
    }

    /// A client's request; it has its first response.
    pub(super) async fn client(&self, choices: u32) -> Client {
        let sampling = Some(v1::SamplingParams { n: Some(choices), seed: Some(1), ..Default::default() });
        let request =
            v1::GenerateRequest { token_ids: vec![1, 2, 3], max_tokens: Some(TOKENS), sampling, ..Default::default() };
        let mut stream = self.sandbox.inference.clone().generate(request).await.expect("accepted").into_inner();
        let (count, seen) = tokio::sync::watch::channel(0);
        let (named, mut names) = tokio::sync::watch::channel(HashMap::new());
        let reader = tokio::spawn(async move {
            let mut read = Read::default();
            loop {
                let response = match stream.message().await {
                    Ok(Some(response)) => response,
                    Ok(None) => return read,
                    Err(status) => {
                        read.status = Some(status);
                        return read;
                    }
                };
                named.send_if_modified(|names| names.insert(response.choice, response.session_id.clone()).is_none());
                assert!(!read.ends.contains_key(&response.choice), "nothing comes after the end");
                let tokens = read.tokens.entry(response.choice).or_default();
                assert_eq!(response.index, tokens.len() as u64, "no gap and no repeat");
                if let Some(token) = response.token_id {
                    assert_eq!(token, token_of(response.choice, response.index));
                    if let Some((_, epoch)) = tokens.last() {
                        assert!(response.epoch >= *epoch, "epochs only rise");
                    }
                    tokens.push((response.replica.clone(), response.epoch));
                }
                read.text.push_str(&response.text);
                if response.finish_reason() != FinishReason::Unspecified {
                    read.ends.insert(response.choice, response.finish_reason());
                }
                count.send_replace(read.tokens.values().map(Vec::len).sum());
            }
        });
        let names = names.wait_for(|names| names.len() == choices as usize).await.expect("responses");
        let sessions = (0..choices).map(|choice| names[&choice].clone()).collect();
        Client { sessions, reader, seen }
    }

    /// Has a session moved, in the background.
    pub(super) fn migrate(
        &self,
        session: &str,
        to: &str,
        mode: v1::MigrateMode,
    ) -> JoinHandle<Result<v1::MigrateResponse, Status>> {
        let request = v1::MigrateRequest { session_id: session.to_owned(), to: to.to_owned(), mode: mode.into() };
        let mut cluster = self.sandbox.cluster.clone();
        tokio::spawn(async move { cluster.migrate(request).await.map(|answer| answer.into_inner()) })
    }

    /// The replica that steps a session.
    pub(super) fn owner(&self, session: &str) -> Option<String> {
        let steps = |actor: &&Actor| !actor.has_ended() && actor.steps().iter().any(|stepped| stepped == session);
        self.actors.values().find(steps).map(|actor| actor.name.clone())
    }

    /// A replica other than those.
    pub(super) fn other(&self, than: &[&str]) -> String {
        let mut names: Vec<&String> = self.actors.keys().filter(|name| !than.contains(&name.as_str())).collect();
        names.sort();
        names[0].clone()
    }

    /// Asserts that nothing of any session is left: at once, or after the grace time where messages got lost.
    pub(super) async fn all_is_free(&self, at_once: bool) {
        self.sandbox.assert_idle().await;
        // What was sent last arrives.
        tokio::time::sleep(TICK * 2).await;
        if !at_once {
            tokio::time::sleep(GRACE * 2 + Duration::from_secs(5)).await;
        }
        for actor in self.actors.values().filter(|actor| !actor.has_ended()) {
            assert_eq!(actor.holds(), Vec::<String>::new(), "{} holds something", actor.name);
        }
    }

    /// How many migrations of a mode ended so.
    pub(super) fn count(&self, mode: &str, result: &str) -> u64 {
        self.sandbox.router.inference.metrics.migrations.with_label_values(&[mode, result]).get()
    }
}

/// What a refusal tells programs: reason, and the facts.
pub(super) fn told(status: &Status) -> (Code, String, HashMap<String, String>) {
    let details = status.get_error_details();
    let info = details.error_info();
    let reason = info.map(|info| info.reason.clone()).unwrap_or_default();
    (status.code(), reason, info.map(|info| info.metadata.clone()).unwrap_or_default())
}
